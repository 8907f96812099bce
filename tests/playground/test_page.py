"""The page in a real browser: type, generate, read, switch, point, walk, narrow, export; nothing leaves the machine."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from factories import Mix
from pages import EVERYTHING, HOSTILE, company, words

from calm.inspection import Inspection
from calm.inspection.page import visible
from calm.playground.answers import Answer, Company, Question, Sampling

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PROMPT = words(5, 10, 34, 17, 5)
SAMPLING = Sampling(12)


class Visit:
    """One visitor's tab: what it asked the network for, and how one reads and uses the page."""

    def __init__(self, browser: Any, url: str, viewport: dict[str, int], scheme: str = "light"):
        self.url = url
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.tab = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(url)
        self.tab.locator("#prompt textarea").wait_for()

    def sampling(self, sampling: Sampling) -> None:
        """Open the controls, and set them."""
        controls = self.tab.locator("#sampling")
        if not controls.get_by_label("Seed").is_visible():
            controls.get_by_role("button", name="Sampling").click()
        wanted = {
            "Most new tokens": sampling.max_new_tokens,
            "Temperature": sampling.temperature,
            "Top-p": sampling.top_p,
            "Seed": sampling.seed,
        }
        fields = {
            label: controls.locator(".block", has_text=label).locator("input[type=number]").first for label in wanted
        }
        for _ in range(10):  # on a busy machine a control that has just appeared may forget what is typed at once
            for label, value in wanted.items():
                fields[label].fill(str(value))
                fields[label].blur()
            self.tab.wait_for_timeout(50)
            if all(float(fields[label].input_value()) == value for label, value in wanted.items()):
                return
        raise AssertionError(f"the controls do not keep {wanted}")

    def ask(self, prompt: str = PROMPT) -> None:
        self.tab.locator("#prompt textarea").fill(prompt)
        self.tab.locator("#generate").click()
        self.wait()

    def wait(self) -> None:
        self.tab.wait_for_function("document.querySelector('.calm-status').textContent === 'Writing …'")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        self.tab.wait_for_function("document.querySelector('.calm-status').textContent === 'Ready.'")

    @property
    def answers(self) -> list[str]:
        return self.tab.locator("[data-answer]").all_text_contents()

    def cell(self, row: int, column: int) -> Any:
        return self.tab.locator(".calm-looked tbody tr").nth(row).locator("td").nth(column)

    @property
    def reading(self) -> str:
        return self.tab.locator(".calm-reading").text_content()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """Opens pages. In the end none may have asked another host for anything, or run what a model wrote."""
    visits: list[Visit] = []

    def open_page(url: str, viewport: dict[str, int] = LAPTOP, scheme: str = "light") -> Visit:
        visits.append(Visit(chromium, url, viewport, scheme))
        return visits[-1]

    yield open_page
    for one in visits:
        hosts = {urlsplit(request).netloc for request in one.requests if not request.startswith(("blob:", "data:"))}
        caught = one.tab.evaluate("window.caught")
        one.context.close()
        assert hosts == {urlsplit(one.url).netloc}
        assert one.errors == [] and caught is None


@pytest.fixture(scope="module")
def one(serve: Callable[..., str]) -> tuple[Company, str]:
    parts = company(Mix("llama", ("qwen2",)))
    return parts, serve(parts)


@pytest.fixture(scope="module")
def two(serve: Callable[..., str]) -> tuple[Company, str]:
    parts = company(Mix("llama", ("gpt2", "qwen2")))
    return parts, serve(parts)


def expected(parts: Company, question: Question) -> tuple[list[Answer], Inspection | None]:
    """What the models answer in Python, and what the connections did."""
    *_, answers = parts.answers(question)
    everything_off = question.off == set(parts.augmenting)
    return answers, None if everything_off else parts.inspect(question, answers[-1])


def produced(model: Any, parts: Company, sampling: Sampling, prompt: str = PROMPT) -> str:
    """What a model generates on its own."""
    inputs = parts.tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(sampling.seed)
    output = model.generate(**inputs, **sampling.arguments(), max_new_tokens=sampling.max_new_tokens, pad_token_id=0)
    return parts.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_three_answers_and_what_the_connections_did(one, visit):
    parts, url = one
    page = visit(url)
    page.sampling(SAMPLING)
    page.ask()
    models = [*parts.augmenting.values(), parts.composed.anchor, parts.composed]
    assert page.answers == [produced(model, parts, SAMPLING) for model in models]
    assert page.answers[-1] != page.answers[-2]
    assert any(text in "".join(page.answers) for text in HOSTILE)  # the models do write markup

    _, inspection = expected(parts, Question(PROMPT, SAMPLING))
    tokens = [visible(token) for token in inspection.tokens]
    for connection in (0, 1):
        page.tab.locator("#connection input").nth(connection).check()
        use = inspection.connections[connection]
        name = f"m0 {use.pair.augmenting_layer} → {use.pair.anchor_layer}"
        page.tab.locator(f".calm-looked[data-name='{name}']").wait_for()
        for row, column in ((0, 2), (3, 6), (11, 15)):
            weight = use.attention.mean(0)[inspection.prompt_length - 1 + row, column]
            page.cell(row, column).hover()
            produced_token, after = tokens[inspection.prompt_length + row], tokens[inspection.prompt_length + row - 1]
            assert page.reading == (
                f"To produce “{produced_token}” after “{after}”, it looked at “{tokens[column]}” "
                f"with weight {weight:.2f}."
            )
            bubble = page.cell(row, column).locator("span")
            assert bubble.text_content() == f"{weight:.2f}" and bubble.bounding_box()["width"] > 15
        assert page.cell(0, 0).locator("span").bounding_box()["width"] <= 1  # control: hidden when not pointed at

    shares = page.tab.locator(".calm-added tbody tr")
    for index, use in enumerate(inspection.connections):
        values = use.injection[inspection.produced]
        found = [text.strip() for text in shares.nth(index).locator("td").all_text_contents()]
        assert found == [f"{values.mean():.2f}", *(f"{value:.2f}" for value in values)]


def test_sampling_controls(one, visit):
    parts, url = one
    page = visit(url)
    sampling = Sampling(9, temperature=1.5, top_p=0.8, seed=11)
    page.sampling(sampling)
    page.ask()
    models = [*parts.augmenting.values(), parts.composed.anchor, parts.composed]
    assert page.answers == [produced(model, parts, sampling) for model in models]
    assert page.answers != [produced(model, parts, Sampling(9)) for model in models]


def test_switched_off_the_composed_model_is_the_anchor(one, visit):
    _, url = one
    page = visit(url)
    page.sampling(SAMPLING)
    page.ask()
    assert page.answers[-1] != page.answers[-2]
    before = page.answers
    page.tab.get_by_label("Augmenting model is on").uncheck()
    page.ask()
    assert page.answers == [before[0], before[1], before[1]]
    assert page.tab.get_by_text("all switched off: this is the anchor").is_visible()
    assert "is switched off: it looks nowhere" in page.tab.locator("#looked").text_content()
    assert page.tab.locator("#export-html").is_disabled() and page.tab.locator("#export-json").is_enabled()
    page.tab.get_by_label("Augmenting model is on").check()
    page.ask()
    assert page.answers == before


def test_two_augmenting_models_have_a_column_and_a_switch_each(two, visit):
    parts, url = two
    page = visit(url)
    page.sampling(SAMPLING)
    page.tab.get_by_label("Augmenting model “m0” is on").uncheck()
    page.ask()
    answers, inspection = expected(parts, Question(PROMPT, SAMPLING, frozenset({"m0"})))
    assert page.answers == [answer.text for answer in answers] and len(answers) == 4
    titles = page.tab.locator(".calm-answer h2").all_text_contents()
    assert titles == ["Augmenting model “m0”", "Augmenting model “m1”", "Anchor", "Composed"]
    assert page.tab.locator(".calm-added tbody tr").count() == len(inspection.connections) == 2
    assert "m0 1 → 1 is switched off" in page.tab.locator("#looked").text_content()
    page.tab.locator("#connection input").nth(2).check()
    page.tab.locator(".calm-looked").wait_for()


def test_the_keyboard_is_enough(one, visit):
    _, url = one
    page = visit(url)
    keyboard = page.tab.keyboard
    reached = []

    def tab_to(selector: str) -> None:
        for _ in range(25):
            keyboard.press("Tab")
            focused = page.tab.evaluate(
                """() => { const e = document.activeElement, s = getComputedStyle(e);
                           return [e.closest('[id]')?.id, s.outlineStyle, parseFloat(s.outlineWidth)]; }"""
            )
            reached.append(focused)
            if page.tab.evaluate("s => document.activeElement.matches(s)", selector):
                assert focused[1] == "solid" and focused[2] >= 2, f"{selector} shows no focus: {focused}"
                return
        raise AssertionError(f"Tab does not reach {selector}: {reached}")

    page.tab.evaluate("document.activeElement.blur()")
    tab_to("#prompt textarea")
    keyboard.insert_text(PROMPT)
    keyboard.press("Control+Enter")
    page.wait()
    first = page.answers
    assert all(first)
    tab_to("#generate")
    tab_to("#stop")
    tab_to("#switch-0 input")
    keyboard.press("Space")
    keyboard.press("Shift+Tab")
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")  # on Generate
    page.wait()
    assert page.answers == [first[0], first[1], first[1]]
    keyboard.press("Shift+Tab")
    keyboard.press("Shift+Enter")  # in the prompt
    page.wait()
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.press("Space")
    keyboard.press("Shift+Tab")
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    page.wait()
    assert page.answers == first
    tab_to("#connection input[value='1']")
    keyboard.press("Space")
    page.tab.locator(".calm-looked[data-name='m0 3 → 3']").wait_for()
    tab_to("#looked .calm-scroll")
    keyboard.press("ArrowDown")  # enters at the end of the first row
    at = page.reading
    keyboard.press("ArrowLeft")
    assert page.tab.evaluate("document.activeElement.cellIndex") == 4 and page.reading != at
    keyboard.press("ArrowDown")
    assert page.tab.evaluate("document.activeElement.parentElement.sectionRowIndex") == 1
    assert page.reading.endswith(f"with weight {page.cell(1, 3).text_content()}.")
    tab_to("#export-json")
    with page.tab.expect_download() as download:
        keyboard.press("Enter")
    assert download.value.suggested_filename == "calm-playground.json"


def test_narrow_windows_stack_the_columns(one, visit):
    _, url = one
    page = visit(url)
    page.sampling(SAMPLING)
    page.ask()

    def boxes() -> list[dict[str, float]]:
        return [card.bounding_box() for card in page.tab.locator(".calm-answer").all()]

    def scrolls_sideways() -> bool:
        return page.tab.evaluate("document.documentElement.scrollWidth > window.innerWidth")

    wide = boxes()
    assert len({box["y"] for box in wide}) == 1 and wide[0]["x"] < wide[1]["x"] < wide[2]["x"]
    assert not scrolls_sideways()
    page.tab.set_viewport_size(PHONE)
    narrow = boxes()
    assert len({box["x"] for box in narrow}) == 1 and narrow[0]["y"] < narrow[1]["y"] < narrow[2]["y"]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] for box in narrow)
    assert not scrolls_sideways()
    assert page.tab.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('#looked .calm-scroll'))")
    page.tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=width:900px>wide</p>')")
    assert scrolls_sideways()  # control


def test_export(one, visit, tmp_path):
    parts, url = one
    page = visit(url)
    page.sampling(SAMPLING)
    page.ask()
    answers, inspection = expected(parts, Question(PROMPT, SAMPLING))
    files = {}
    for kind in ("html", "json"):
        with page.tab.expect_download() as download:
            page.tab.locator(f"#export-{kind}").click()
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    content = json.loads(files["json"].read_text())
    assert [answer["text"] for answer in content["answers"]] == page.answers
    for found, use in zip(content["connections"], inspection.connections, strict=True):
        assert found["injection"] == use.injection[inspection.produced].tolist()
    exported = page.context.new_page()
    requests: list[str] = []
    exported.on("request", lambda request: requests.append(request.url))
    exported.goto(files["html"].as_uri())
    assert exported.locator(".answer").all_text_contents() == [answer.text for answer in answers]
    assert exported.locator(".map canvas").count() >= len(inspection.connections)
    assert requests == [files["html"].as_uri()] and exported.evaluate("window.caught") is None


def test_errors_can_be_read(one, visit):
    _, url = one
    page = visit(url)
    message = page.tab.get_by_role("alert").filter(has_text=re.compile("prompt", re.I))
    page.tab.locator("#generate").click()
    message.wait_for()
    assert message.text_content() == "The prompt is empty. Write something for the models to continue."
    page.tab.locator("#prompt textarea").fill("<b> " * 65)
    page.tab.locator("#generate").click()
    page.tab.get_by_text("it has 65 tokens, and these models read 64 at most").wait_for()
    page.ask()
    assert all(page.answers) and not page.tab.get_by_role("alert").is_visible()


def test_what_is_typed_stays_text(one, visit):
    _, url = one
    page = visit(url)
    page.ask(EVERYTHING)
    page.tab.wait_for_timeout(300)  # for an image to fail to load
    assert page.tab.locator("#answers script, #answers img, #looked img, #looked b").count() == 0
    shown = page.tab.locator(".calm-looked thead").text_content()
    assert all(text in shown for text in HOSTILE)
    page.tab.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.control=1'>`)")
    page.tab.wait_for_function("window.control === 1")  # control: markup would have run


def slow(parts: Company, seconds: float) -> Company:
    """The same models, in less of a hurry: time to press a button while they write."""
    parts.composed.anchor.register_forward_hook(lambda *_: time.sleep(seconds))
    return parts


def test_answers_stream_can_be_stopped_and_others_wait(visit, serve):
    parts = slow(company(Mix("llama", ("qwen2",))), 0.05)
    url = serve(parts)
    first, second = visit(url), visit(url)
    long = Sampling(56)
    first.sampling(long)
    second.sampling(Sampling(4))
    first.tab.locator("#prompt textarea").fill(PROMPT)
    first.tab.locator("#generate").click()
    first.tab.wait_for_function("document.querySelectorAll('[data-answer]').length === 3")
    seen = [first.answers]
    second.tab.locator("#prompt textarea").fill(PROMPT)
    second.tab.locator("#generate").click()
    second.tab.get_by_text("Waiting for the models …").wait_for()
    seen.append(first.answers)
    assert second.tab.locator(".empty").count() == 3  # nothing has been written for the second visitor
    first.tab.locator("#stop").click()
    first.wait_until_ready()
    seen.append(first.answers)
    second.wait_until_ready()
    full = [answer.text for answer in expected(parts, Question(PROMPT, long))[0]]
    for now, later in zip(seen, [*seen[1:], full], strict=True):
        assert all(b.startswith(a) for a, b in zip(now, later, strict=True))
    assert all(len(text) < len(whole) for text, whole in zip(seen[-1], full, strict=True))
    assert first.tab.locator(".calm-answer .end").first.text_content().endswith("· stopped")
    assert first.tab.locator(".calm-looked tbody tr").count() > 0  # what there is has been measured
    assert second.answers == [answer.text for answer in expected(parts, Question(PROMPT, Sampling(4)))[0]]


def test_a_visitor_who_leaves_lets_the_next_one_in(visit, serve):
    parts = slow(company(Mix("llama", ("qwen2",))), 0.1)
    calls: list[None] = []
    parts.composed.anchor.register_forward_hook(lambda *_: calls.append(None))
    url = serve(parts)
    leaving, staying = visit(url), visit(url)
    leaving.sampling(Sampling(56))
    staying.sampling(Sampling(2))
    leaving.tab.locator("#prompt textarea").fill(PROMPT)
    leaving.tab.locator("#generate").click()
    leaving.tab.wait_for_function("document.querySelectorAll('[data-answer]').length === 3")
    leaving.tab.goto("about:blank")
    staying.ask()
    assert len(calls) < 56, "it waited for an answer that no one reads: the anchor's and the composed model's 56 tokens"
    assert staying.answers == [answer.text for answer in expected(parts, Question(PROMPT, Sampling(2)))[0]]


def test_nothing_is_served_but_the_page(one, tmp_path):
    _, url = one
    for path in ("/etc/passwd", str(Path("pyproject.toml").resolve()), "pyproject.toml", "../pyproject.toml"):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
    upload = httpx.post(f"{url}gradio_api/upload", files={"files": ("x.html", b"<script>1</script>")})
    assert upload.status_code == 413
    assert json.loads(httpx.get(f"{url}gradio_api/info").text)["named_endpoints"] == {}
    answer = httpx.get(url, headers={"Origin": "https://example.invalid"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_password_is_asked_for(serve, connections_out):
    url = serve(company(Mix("llama", ("qwen2",))), auth=("ada", "correct horse"))
    assert httpx.get(f"{url}config").status_code == 401
    assert httpx.post(f"{url}login", data={"username": "ada", "password": "wrong"}).status_code == 400
    with httpx.Client() as client:
        assert client.post(f"{url}login", data={"username": "ada", "password": "correct horse"}).status_code == 200
        assert client.get(f"{url}config").status_code == 200
    assert connections_out and {host for host, *_ in connections_out} <= {"127.0.0.1", "::1"}


CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const over = (colour, below) => {
    context.fillStyle = `rgb(${below})`; context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const behind = (e) => e === null ? [255, 255, 255] :
    over(getComputedStyle(e).backgroundColor, behind(e.parentElement));
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.querySelector('.gradio-container'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, box = e.getBoundingClientRect();
    const text = walker.currentNode.textContent.trim();
    if (!text || box.width < 2 || !e.checkVisibility() || e.closest('[disabled]')) continue;
    const back = behind(e), [a, b] = [light(over(getComputedStyle(e).color, back)), light(back)];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.trim().slice(0, 30), e.className]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(one, visit, scheme):
    _, url = one
    page = visit(url, scheme=scheme)
    page.sampling(SAMPLING)
    page.ask()
    contrasts = page.tab.evaluate(CONTRAST)
    assert len(contrasts) > 50 and contrasts[0][0] >= 4.5, contrasts[:5]
    background = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(251, 250, 247)", "dark": "rgb(21, 23, 27)"}[scheme]
    nameless = page.tab.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, table, [tabindex="0"]')].filter((e) =>
             e.checkVisibility() && !e.labels?.length && !e.getAttribute('aria-label') && !e.caption && !e.title
             && !(e.tagName === 'BUTTON' && e.textContent.trim())).map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


@pytest.mark.parametrize(
    ("name", "viewport", "scheme"),
    [("laptop", LAPTOP, "light"), ("dark", LAPTOP, "dark"), ("phone", PHONE, "light")],
)
def test_screenshots(name, viewport, scheme, visit, serve, tmp_path):
    """The pictures of docs/playground.md: CALM_SCREENSHOTS=runs/demo/composed makes them anew, of that composition."""
    model = os.environ.get("CALM_SCREENSHOTS")
    folder, prompt, parts = tmp_path, PROMPT, None
    if model:
        from calm.cli.playground import load_company

        folder, prompt = Path("docs/images"), "me-pre + wu-ta - fa-kri ="
        folder.mkdir(exist_ok=True)
        parts = load_company(model, None, None, "auto", "cpu")
    page = visit(serve(parts or company(Mix("llama", ("qwen2",)))), viewport, scheme)
    page.ask(prompt)
    weights = page.tab.locator(".calm-looked tbody tr").nth(2).locator("td").all_text_contents()
    page.cell(2, max(range(len(weights)), key=lambda column: float(weights[column]))).hover()
    file = folder / f"playground-{name}.png"
    page.tab.screenshot(path=file, full_page=True)
    assert 20_000 < file.stat().st_size < 400_000
    assert page.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
