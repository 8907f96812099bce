"""inspection/: attention gives back what a connection added, what is off is off, the page runs its own script alone."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import locale
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import byte_tokenizer
from factories import Mix, assert_identical, assert_same, word_tokenizer
from torch import Tensor

import calm
from calm.errors import CalmError
from calm.inspection import Inspection, inspect_prompt, page, pictures
from calm.inspection.measure import MAX_TOKENS, _texts

PROMPT = "w5 w9 w33 w2 w17 w9 w60"
LENGTH, NEW = 7, 5
TOKENIZER = word_tokenizer()

MIXES = {
    "gated": Mix(),
    "normalized": Mix(attention="normalized"),
    "paper": Mix(attention="paper"),
    "prompt only": Mix(attend="prompt"),
    "several": Mix("gemma2", ("gpt2", "mamba"), connections=(((1, 1), (3, 2)), ((0, 1),))),
}
mixes = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


def inspected(model: calm.CalmForCausalLM) -> Inspection:
    return inspect_prompt(model, TOKENIZER, PROMPT, max_new_tokens=NEW)


def reread(model: calm.CalmForCausalLM, inspection: Inspection) -> Tensor:
    """The logits of the inspected tokens, float64 `[positions, vocabulary]`."""
    with torch.no_grad():
        read = inspection.token_ids[None, :-1]
        return model(read, use_cache=False, prompt_length=inspection.prompt_length).logits[0].double()


def calls(model: calm.CalmForCausalLM, inspection: Inspection) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each connection got and gave for the inspected tokens: hidden states, context, and what it added."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [
        connection.register_forward_hook(
            lambda module, args, output, index=index: found.update({index: (args[0], args[1], output)})
        )
        for index, connection in enumerate(model.connections)
    ]
    reread(model, inspection)
    for hook in hooks:
        hook.remove()
    return [found[index] for index in range(len(found))]


def added(connection: torch.nn.Module, hidden: Tensor, context: Tensor, weights: Tensor) -> Tensor:
    """What a connection adds when it looks where `weights`, `[heads, positions, positions]`, say."""
    values = connection.project(hidden, context)[2][0]
    found = connection.w_o((weights @ values).transpose(0, 1).flatten(1))
    if connection.gate is not None:
        size = hidden[0].square().mean(-1, keepdim=True).sqrt()
        openness = connection.gate.bias * hidden.shape[-1] / 8 + hidden[0] / size @ connection.gate.weight.T
        found = found * openness * size
    return found


@mixes
def test_attention_gives_back_what_is_added(mix: Mix) -> None:
    """To 1e-5 of the largest value: float32 rounding of two ways to sum the same products."""
    model = mix.shared()
    inspection = inspected(model)
    length = LENGTH + NEW - 1
    for use, connection, (hidden, context, output) in zip(
        inspection.connections, model.connections, calls(model, inspection), strict=True
    ):
        assert use.attention.shape == (connection.num_heads, length, length)
        with torch.no_grad():
            assert_same(added(connection, hidden, context, use.attention), output[0], 1e-5)
            elsewhere = use.attention.roll(1, dims=-1)
            with pytest.raises(AssertionError, match="differs"):
                assert_same(added(connection, hidden, context, elsewhere), output[0], 1e-5)
        ratio = np.linalg.norm(output[0].detach().numpy(), axis=-1) / np.linalg.norm(hidden[0].numpy(), axis=-1)
        np.testing.assert_allclose(use.injection.numpy(), ratio, rtol=1e-5)


@mixes
def test_rows_sum_to_one_over_what_is_seen(mix: Mix) -> None:
    inspection = inspected(mix.shared())
    rows, columns = np.indices((LENGTH + NEW - 1,) * 2)
    seen = columns <= rows
    if mix.attend == "prompt":
        seen &= columns < LENGTH
    for use in inspection.connections:
        weights = use.attention.double().numpy()
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert not weights[:, ~seen].any(), "neither the future nor, with attend='prompt', what was produced"
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
        np.testing.assert_allclose(use.entropy.numpy(), entropy, atol=1e-5)


@pytest.mark.parametrize("attention", ["gated", "normalized", "paper"])
def test_long_rows_in_blocks(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mix(attention=attention).shared()
    whole = inspected(model)
    monkeypatch.setattr(calm.alignment, "BLOCK", 4)
    for found, expected in zip(inspected(model).connections, whole.connections, strict=True):
        assert_same(found.attention, expected.attention, 1e-6)


@mixes
def test_off_is_a_connection_that_adds_zero(mix: Mix) -> None:
    """Against a copy whose `W_O` is zero, and the anchor alone; distances by numpy in float64."""
    model = mix.shared()
    inspection = inspected(model)
    composed = reread(model, inspection).log_softmax(-1).numpy()

    def distances(other: Tensor) -> tuple[np.ndarray, np.ndarray]:
        q = other.double().log_softmax(-1).numpy()
        return (np.exp(composed) * (composed - q)).sum(-1), np.abs(np.exp(composed) - np.exp(q)).sum(-1) / 2

    expected = []
    for index in range(len(model.connections)):
        zeroed = copy.deepcopy(model)
        zeroed.connections[index].w_o.weight.data.zero_()
        expected.append(reread(zeroed, inspection))
    with torch.no_grad():
        expected.append(model.anchor(inspection.token_ids[None, :-1]).logits[0])
    withouts = [*(use.without for use in inspection.connections), inspection.anchor]
    for without, logits in zip(withouts, expected, strict=True):
        kl, moved = distances(logits)
        np.testing.assert_allclose(without.kl.numpy(), kl, atol=1e-5)
        np.testing.assert_allclose(without.total_variation.numpy(), moved, atol=1e-5)
        assert moved.max() > 1e-3
        assert_same(without.next_tokens.top_probabilities, logits.softmax(-1).topk(5).values.float())
        assert without.next_tokens.top_tokens[3][0] == f"w{logits[3].argmax()}"
    # another connection off is something else
    assert np.abs(withouts[0].kl.numpy() - distances(expected[1])[0]).max() > 1e-4


def test_it_follows_what_generate_produces() -> None:
    model = Mix().shared()
    inspection = inspected(model)
    inputs = TOKENIZER(PROMPT, return_tensors="pt")
    produced = model.generate(inputs["input_ids"], max_new_tokens=NEW, do_sample=False)[0]
    assert torch.equal(inspection.token_ids, produced)
    assert inspection.tokens == TOKENIZER.convert_ids_to_tokens(produced.tolist())
    assert inspection.prompt_length == LENGTH
    assert inspection.completion.split() == inspection.tokens[LENGTH:]
    assert inspection.produced == slice(LENGTH - 1, LENGTH + NEW - 1)
    expects = inspection.next_tokens
    assert expects.top_ids[inspection.produced, 0].tolist() == produced[LENGTH:].tolist()
    assert_identical(expects.followed[inspection.produced], expects.top_probabilities[inspection.produced, 0])


def test_an_untrained_composition_changes_nothing() -> None:
    inspection = inspected(Mix().fresh())
    for use in inspection.connections:
        assert not use.injection.any() and not use.without.kl.any() and not use.without.total_variation.any()
    assert not inspection.anchor.kl.any()


def test_it_leaves_the_model_as_it_was() -> None:
    model = Mix().build()
    inspection = inspected(model)
    before = reread(model, inspection)
    inspected(model)
    assert_identical(reread(model, inspection), before)
    assert not any(connection._forward_hooks for connection in model.connections)


def test_what_cannot_be_inspected() -> None:
    model = Mix().shared()
    with pytest.raises(CalmError, match="no tokens"):
        inspect_prompt(model, TOKENIZER, "")
    with pytest.raises(CalmError, match=f"prompt of 7 tokens: expected at least 1, and at most {MAX_TOKENS}"):
        inspect_prompt(model, TOKENIZER, PROMPT, MAX_TOKENS)
    with pytest.raises(CalmError, match="max_new_tokens=0"):
        inspect_prompt(model, TOKENIZER, PROMPT, 0)
    with pytest.raises(CalmError, match="context"):
        inspect_prompt(model, TOKENIZER, PROMPT, 100)


def test_parts_of_characters_have_names() -> None:
    tokenizer = byte_tokenizer(bos=False)
    assert _texts(tokenizer, [len(tokenizer) + 5]) == [f"<{len(tokenizer) + 5}>"], "embeddings may be padded"
    texts = _texts(tokenizer, tokenizer("a é")["input_ids"])
    assert texts[:2] == ["a", " "] and len(texts) == 4 and "\ufffd" not in "".join(texts)


def test_what_cannot_be_seen_is_shown() -> None:
    assert page.visible("a b\n\x00\ud800é") == "a␣b⏎\\x00\\ud800é"


# -- the page and the pictures -------------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp;$\\frac{$"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the texts of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.scripts: list[str] = []
        self.in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspected(Mix().shared())


@pytest.fixture(scope="module")
def evil(inspection: Inspection) -> Inspection:
    """Every text is an attack."""
    texts = [[EVIL] * len(row) for row in inspection.next_tokens.top_tokens]
    expected = replace(inspection.next_tokens, top_tokens=texts)
    without = replace(inspection.anchor, next_tokens=expected)
    uses = [replace(u, pair=replace(u.pair, augmenting=EVIL), without=without) for u in inspection.connections]
    return replace(
        inspection,
        prompt=EVIL,
        completion=EVIL,
        tokens=[EVIL] * len(inspection.tokens),
        next_tokens=expected,
        connections=uses,
        anchor=without,
    )


def test_tokens_never_become_elements(inspection: Inspection, evil: Inspection) -> None:
    plain, attacked = Elements(page.to_html(inspection)), Elements(page.to_html(evil))
    assert [tag for tag, _ in attacked.found if tag in ("script", "img")] == ["script", "script"]
    assert not any(name.startswith("on") for _, attributes in attacked.found for name in attributes)
    assert attacked.scripts[1] == plain.scripts[1]
    data = json.loads(attacked.scripts[0])
    assert set(data["read"]) == set(data["seen"]) == {page.visible(EVIL)}
    with pytest.raises(AssertionError):  # the check sees what unescaped text would do
        broken = Elements(page.to_html(inspection).replace("<main>", f"<main>{EVIL}"))
        assert [tag for tag, _ in broken.found if tag in ("script", "img")] == ["script", "script"]


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(inspection: Inspection) -> None:
    html = page.to_html(inspection)
    elements = Elements(html)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    assert not re.search(r"url\(|@import|fetch\(|import\(|XMLHttp", html)
    policy = next(a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@pytest.mark.skipif(bool(sys.flags.utf8_mode), reason="Python reads every file as UTF-8")
def test_the_page_does_not_depend_on_the_locale(inspection: Inspection) -> None:
    html = page.to_html(inspection)
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        with pytest.raises(UnicodeDecodeError):  # the page's files are not ASCII, and this locale is
            (page.FOLDER / "page.js").read_text()
        assert page.to_html(inspection) == html
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_the_maps_hold_the_weights(inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a weight, so to half of 1/255; of a long text the last positions over all tokens."""
    length = LENGTH + NEW - 1
    for window in (128, 4):
        monkeypatch.setattr(page, "WINDOW", window)
        shown = min(window, length)
        data = json.loads(Elements(page.to_html(inspection)).scripts[0])
        assert len(data["read"]) == len(data["next"]) == shown and len(data["seen"]) == length
        assert data["offset"] == length - shown
        assert data["next"][-1] == inspection.tokens[-1] and data["read"] == inspection.tokens[-1 - shown : -1]
        assert (None in data["next"]) == (window > NEW)
        for packed, use in zip(data["weights"], inspection.connections, strict=True):
            found = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(-1, shown, length) / 255
            np.testing.assert_allclose(found[1:], use.attention[:, -shown:], atol=0.51 / 255)
            np.testing.assert_allclose(found[0], use.attention.mean(0)[-shown:], atol=0.51 / 255)


def test_other_tokens_are_marked_by_what_they_are(inspection: Inspection) -> None:
    """Also where all of them are written alike."""
    expected = 0
    for without in [*(use.without for use in inspection.connections), inspection.anchor]:
        likeliest = without.next_tokens.top_ids[inspection.produced, 0]
        expected += int((likeliest != inspection.token_ids[LENGTH:]).sum())
    assert expected > 0
    assert page.to_html(inspection).count('<td class="other">') == expected
    alike = [["x"] * 5] * len(inspection.next_tokens.top_tokens)
    anchor = replace(inspection.anchor, next_tokens=replace(inspection.anchor.next_tokens, top_tokens=alike))
    written_alike = replace(inspection, tokens=["x"] * len(inspection.tokens), anchor=anchor)
    assert page.to_html(written_alike).count('<td class="other">') == expected


def test_the_summary_averages_over_what_was_produced(inspection: Inspection) -> None:
    rows = page.summary(inspection)
    assert len(rows) == len(inspection.connections) + 1
    for row, use in zip(rows, inspection.connections, strict=False):
        assert row["injection"] == pytest.approx(use.injection[LENGTH - 1 :].mean().item())
        assert row["kl"] == pytest.approx(use.without.kl[LENGTH - 1 :].mean().item())
        assert row["moved"] != pytest.approx(use.without.total_variation.mean().item())
    assert rows[-1]["injection"] is None
    assert rows[-1]["moved"] == pytest.approx(inspection.anchor.total_variation[LENGTH - 1 :].mean().item())
    json.dumps(rows)


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # a model's name so long leaves no room
def test_pictures(evil: Inspection, tmp_path: Path) -> None:
    """Of any text, formulas that would not parse included; the same bytes each time."""
    paths = pictures.save_pictures(evil, tmp_path, "x")
    assert [path.name for path in paths] == ["x-used.png", "x-off.png", "x-attention-0.png", "x-attention-1.png"]
    before = [path.read_bytes() for path in paths]
    assert all(content.startswith(b"\x89PNG") for content in before)
    assert [path.read_bytes() for path in pictures.save_pictures(evil, tmp_path, "x")] == before


STYLES = {name: Path(calm.__file__).with_name(name) / "page.css" for name in ("inspection", "playground")}
TEXT = [
    *(("ink", behind) for behind in ("paper", "panel", "cell")),
    *(("soft", behind) for behind in ("paper", "panel")),
    *(("mark", behind) for behind in ("paper", "panel", "mark-soft")),
]


def variables(css: str, dark: bool) -> dict[str, str]:
    """The colours of a scheme; the dark one changes some of the light one's."""
    found = re.findall(r"(?:^|\n)\s*(?::root|:root, \.light|\.dark) \{([^}]*)\}", css)
    assert len(found) == 2
    return {name: value for block in found[: 1 + dark] for name, value in re.findall(r"--([\w-]+): ([^;]+);", block)}


def rgb(colour: str) -> Tensor:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return torch.tensor([int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)], dtype=torch.float64)


def contrast(one: Tensor, other: Tensor) -> float:
    """WCAG 2.2: of two colours, from 1 to 21."""

    def luminance(colour: Tensor) -> float:
        linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("style", "cells"), [("inspection", (".strip td", "v")), ("playground", (".calm-added td", "w"))]
)
def test_text_can_be_read_on_every_shade(style: str, cells: tuple[str, str], dark: bool):
    """A contrast of 4.5 at least: on each of the shades behind numbers, and wherever else there is text."""
    css = STYLES[style].read_text(encoding="utf-8")
    colours = variables(css, dark)
    (rule,) = re.findall(rf"\n{re.escape(cells[0])} \{{([^}}]*)\}}", css)
    assert f"color-mix(in srgb, var(--accent) calc(var(--{cells[1]}) * var(--most)), var(--cell))" in rule
    assert not re.search(r"[{;\s]color:", rule), "the text is in ink"
    assert f"{cells[0]}." not in css.replace("td.mean", ""), "on all of them"
    most = float(colours["most"].removesuffix("%")) / 100

    def on_shade(share: float) -> float:
        shade = share * rgb(colours["accent"]) + (1 - share) * rgb(colours["cell"])
        return contrast(rgb(colours["ink"]), shade)

    least = min(on_shade(most * step / 255) for step in range(256))
    assert least >= 4.5
    assert on_shade(1.0) < 4.5, "control: on the full colour the text could not be read"
    pairs = [*TEXT, *([("on-accent", "accent")] if style == "inspection" else [])]
    assert min((contrast(rgb(colours[one]), rgb(colours[other])), one, other) for one, other in pairs)[0] >= 4.5


def test_contrast_is_that_of_the_standard():
    assert contrast(rgb("#000"), rgb("#ffffff")) == pytest.approx(21)
    assert contrast(rgb("#777777"), rgb("#fff")) == pytest.approx(4.48, abs=0.005)
