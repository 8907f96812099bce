"""The server over HTTP, asked with OpenAI's own client: answers, switches, streams, refusals, limits."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
import uvicorn
from factories import assert_same, patched
from openai import OpenAI
from servers import CHAT, GREEDY, NAME, Served, held, serving, until
from transformers import PreTrainedTokenizerBase

import calm
from calm.serving import server
from calm.serving.app import build
from calm.serving.limits import Limits


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    """OpenAI's client of the shared server."""
    return served.client()


def metric(served: Served, name: str, key: str = "none") -> float:
    """The value of a metric without labels."""
    text = httpx2.get(f"{served.url}/metrics", headers={"authorization": f"Bearer {key}"}).text
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def generated(model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: list[int], tokens: int) -> str:
    """What the library generates."""
    output = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_chat_is_what_the_library_generates_from_the_chat_template(
    client: OpenAI, model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    answer = client.chat.completions.create(messages=CHAT, max_completion_tokens=20, **GREEDY)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    choice = answer.choices[0]
    assert choice.message.content == generated(model, tokenizer, ids, 20)
    assert (choice.message.role, choice.finish_reason, answer.model) == ("assistant", "length", NAME)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        len(ids),
        20,
        len(ids) + 20,
    )
    parts = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    again = client.chat.completions.create(messages=parts, max_tokens=20, **GREEDY)
    assert again.choices[0].message.content == choice.message.content
    # what was answered can be sent back, as OpenAI's client writes it, or with all the fields that it knows
    for answered in (choice.message, choice.message.model_dump()):
        more = [*CHAT, answered, {"role": "user", "content": "more"}]
        assert client.chat.completions.create(messages=more, max_tokens=1, **GREEDY).usage.prompt_tokens > len(ids)


def test_completions_are_what_the_library_generates(
    client: OpenAI, model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    prompts = ["1+2=", "a longer prompt"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = [generated(model, tokenizer, one, 16) for one in ids]
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, ids)), 32)
    for prompt, text in ((prompts[0], expected[0]), (ids[1], expected[1])):
        assert client.completions.create(prompt=prompt, **GREEDY).choices[0].text == text


@pytest.mark.parametrize(
    ("model_name", "augmenting", "off"),
    [
        (NAME, None, ()),
        (NAME, "all", ()),
        (NAME, ["two", "one"], ()),
        (NAME, "none", ("one", "two")),
        (NAME, [], ("one", "two")),
        (f"{NAME}:anchor", None, ("one", "two")),
        (NAME, ["one"], ("two",)),
        (f"{NAME}:one", None, ("two",)),
        (f"{NAME}:two", None, ("one",)),
    ],
)
def test_each_request_says_which_augmenting_models_are_on(
    client: OpenAI,
    model: calm.CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    augmenting: Any,
    off: tuple[str, ...],
):
    """With none of them it is the anchor's own `generate`, log-probabilities and all."""
    body = {} if augmenting is None else {"augmenting": augmenting}
    answer = client.completions.create(
        model=model_name, prompt="switch", temperature=0, max_tokens=12, logprobs=0, extra_body=body
    )
    ids = tokenizer("switch")["input_ids"]
    arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if len(off) == 2:
        output = model.anchor.generate(torch.tensor([ids]), **arguments)
    else:
        with model.augmenting_disabled(*off):
            output = model.generate(torch.tensor([ids]), **arguments)
    tokens = output.sequences[0, len(ids) :]
    assert answer.choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
    expected = torch.cat(output.logits).log_softmax(-1)[torch.arange(12), tokens]
    assert_same(torch.tensor(answer.choices[0].logprobs.token_logprobs), expected)


def test_the_switches_change_the_answer(client: OpenAI):
    """Or the test before would prove nothing."""
    names = [NAME, f"{NAME}:anchor", f"{NAME}:one", f"{NAME}:two"]
    answers = [client.completions.create(model=name, prompt="switch", temperature=0).choices[0].text for name in names]
    assert len(set(answers)) == 4


def test_models_say_which_augmenting_models_are_on(client: OpenAI):
    listed = {model.id: model.augmenting for model in client.models.list()}
    assert listed == {NAME: ["one", "two"], f"{NAME}:anchor": [], f"{NAME}:one": ["one"], f"{NAME}:two": ["two"]}
    assert client.models.retrieve(f"{NAME}:one").augmenting == ["one"]
    with pytest.raises(openai.NotFoundError, match="does not exist: expected one of"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, sampling: dict[str, Any]):
    asked = {"model": NAME, "max_tokens": 30, "n": 2, **sampling}
    whole = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **asked)
    chunks = list(
        client.chat.completions.create(
            messages=CHAT,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            **asked,
        )
    )
    *parts, last = chunks
    assert (last.usage, last.choices) == (whole.usage, [])
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [c for chunk in parts for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        told = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
        assert [entry.token for entry in told] == [entry.token for entry in choice.logprobs.content]
        found, expected = (torch.tensor([entry.logprob for entry in e]) for e in (told, choice.logprobs.content))
        assert_same(found, expected)
    assert len(parts) > 20, "a stream in one piece is none"


def test_a_stream_of_completions_too(client: OpenAI):
    asked = {"prompt": ["ab", "cd"], "max_tokens": 20, "logprobs": 1, **GREEDY}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(stream=True, **asked))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert [o for c in mine for o in c.logprobs.text_offset] == choice.logprobs.text_offset
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize(("path", "body"), [("completions", {"prompt": "x"}), ("chat/completions", {"messages": CHAT})])
@pytest.mark.parametrize("counted", [False, True])
def test_every_chunk_of_a_stream_that_counts_has_the_field(
    served: Served, path: str, body: dict[str, Any], counted: bool
):
    """As OpenAI says: null in all but the last one."""
    asked = GREEDY | body | {"max_tokens": 3, "stream": True, "stream_options": {"include_usage": counted}}
    lines = httpx2.post(f"{served.url}/v1/{path}", json=asked).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    if not counted:
        assert not any("usage" in chunk for chunk in chunks)
        return
    *others, last = [chunk["usage"] for chunk in chunks]
    assert set(others) == {None} and last["completion_tokens"] == 3


def test_what_arrives_together_runs_together_and_answers_as_alone(composed: Path):
    """Twelve clients at a time, all different, half of them streaming; the same twelve one by one."""
    asked = [
        {
            "model": [NAME, f"{NAME}:anchor", NAME][i % 3],
            "prompt": "prompt " * (i % 4) + str(i),
            "max_tokens": 8 + i,
            "logprobs": 1,
            "temperature": i % 2 * 0.8,
            "seed": i,
        }
        for i in range(12)
    ]
    with serving(composed) as served:
        client = served.client()

        def ask(number: int) -> tuple[list[str], torch.Tensor, str]:
            answer = client.completions.create(stream=bool(number % 2), **asked[number])
            chunks = list(answer) if number % 2 else [answer]
            choices = [choice for chunk in chunks for choice in chunk.choices]
            return (
                [token for choice in choices for token in choice.logprobs.tokens],
                torch.tensor([value for choice in choices for value in choice.logprobs.token_logprobs]),
                "".join(choice.text for choice in choices),
            )

        alone = [ask(number) for number in range(12)]
        assert metric(served, "calm_batch_rows_count") == 12
        with held(served.engine) as gate, ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, number) for number in range(12)]
            until(lambda: len(served.engine._waiting) + len(served.engine._running) == 12)
            gate.open()
            together = [answer.result() for answer in answers]
        assert metric(served, "calm_batch_rows_count") <= 12 + 4
    for found, expected in zip(together, alone, strict=True):
        assert found[0] == expected[0] and found[2] == expected[2]
        assert_same(found[1], expected[1])
    assert len({text for *_, text in alone}) == 12


def test_several_answers_differ_and_a_seed_brings_them_again(client: OpenAI):
    asked = {"model": NAME, "prompt": "x", "n": 3, "seed": 11, "max_tokens": 12}
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert first.usage.prompt_tokens == 2, "a prompt counts once"


def test_stop_strings(client: OpenAI):
    whole = client.completions.create(prompt="stop", max_tokens=30, **GREEDY).choices[0].text
    stop = whole[5:7]
    for given in (stop, ["\0\0never", stop]):
        answer = client.completions.create(prompt="stop", max_tokens=30, stop=given, **GREEDY)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 30


@pytest.mark.parametrize("value", [None, False])
def test_a_stream_that_is_not_obfuscated_is_one(client: OpenAI, value: bool | None):
    options = {"include_usage": True, "include_obfuscation": value}
    *_, last = client.completions.create(prompt="x", max_tokens=5, stream=True, stream_options=options, **GREEDY)
    assert last.usage.completion_tokens == 5


def test_a_chat_template_may_say_whose_message_it_is(composed: Path):
    with serving(composed) as named:
        named.engine.tokenizer.chat_template = "{% for m in messages %}{{ m.name or m.role }}{% endfor %}"
        for name, prompt in (("ada", "ada"), (None, "user")):
            messages = [{"role": "user", "content": "hi", "name": name}]
            answer = named.client().chat.completions.create(messages=messages, max_tokens=1, **GREEDY)
            assert answer.usage.prompt_tokens == len(prompt)  # a token is a byte


def test_a_prompt_that_ends_in_no_character_is_not_repeated(client: OpenAI):
    messages = [{"role": "user", "content": "pasted caf\ufffd"}]
    answer = client.chat.completions.create(messages=messages, max_tokens=4, stop=["pasted"], **GREEDY)
    assert "pasted" not in answer.choices[0].message.content and answer.usage.completion_tokens == 4


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model": "\xed\xa0\x80"}', b"[" * 100_000])
def test_what_is_no_json_object_is_refused(served: Served, content: bytes):
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{served.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_form_of_a_web_page_is_refused(served: Served):
    """Browsers send such a body to any machine without asking it first."""
    content = json.dumps({"model": NAME, "prompt": "x"})
    response = httpx2.post(f"{served.url}/v1/completions", content=content, headers={"content-type": "text/plain"})
    assert response.status_code == 400
    named = httpx2.post(f"{served.url}/v1/completions", content=content, headers={"host": "evil.example"})
    assert named.status_code == 400
    assert "access-control-allow-origin" not in httpx2.options(f"{served.url}/v1/completions").headers


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_every_loopback_address_can_be_served_on_without_a_key(composed: Path, host: str):
    """By its own name too, and by no other."""
    with serving(composed, host=host) as other:
        assert httpx2.get(f"{other.url}/v1/models").status_code == 200
        for name, status in (("localhost", 200), ("127.0.0.3", 400), ("evil.example", 400)):
            assert httpx2.get(f"{other.url}/v1/models", headers={"host": name}).status_code == status


def test_unknown_models_and_paths(client: OpenAI, served: Served):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    assert httpx2.get(f"{served.url}/nowhere").json()["error"]["message"] == "Not Found"
    assert httpx2.get(f"{served.url}/v1/completions").status_code == 405


@pytest.fixture(scope="module")
def guarded(composed: Path) -> Iterator[Served]:
    """A server with a key and tight limits."""
    limits = Limits(batch_size=1, queue=1, max_tokens=50, body_size=1000)
    with serving(composed, api_key="the-right-key", limits=limits) as running:
        yield running


def test_only_the_right_key_opens(guarded: Served):
    assert guarded.client("the-right-key").models.list().data
    for key in ("the-wrong-key", "the-right-ke", "the-right-key2"):
        with pytest.raises(openai.AuthenticationError, match="a wrong API key, or none"):
            guarded.client(key).models.list()
    for headers in ({}, {"authorization": "the-right-key"}, {"authorization": "Basic the-right-key"}):
        for path in ("v1/models", "metrics", "openapi.json", "docs", "nowhere", "v1/completions"):
            response = httpx2.get(f"{guarded.url}/{path}", headers=headers)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert httpx2.get(f"{guarded.url}/health").json() == {"status": "ok"}


def test_a_body_that_is_too_large_is_refused_unread(guarded: Served):
    client = guarded.client("the-right-key")
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=NAME, prompt="x" * 1000)
    assert caught.value.status_code == 413
    client.completions.create(model=NAME, prompt="x" * 20, max_tokens=1)

    def endless() -> Iterator[bytes]:  # in pieces, without saying how many
        for _ in range(100):
            yield b" " * 100

    headers = {"authorization": "Bearer the-right-key", "content-type": "application/json"}
    assert httpx2.post(f"{guarded.url}/v1/completions", content=endless(), headers=headers).status_code == 413


def test_a_full_queue_says_when_to_come_again(guarded: Served):
    client = guarded.client("the-right-key")
    asked = {"prompt": "x", "max_tokens": 2, **GREEDY}
    with held(guarded.engine) as gate, ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.completions.create, **asked)
        until(lambda: guarded.engine._running)
        waiting = pool.submit(client.completions.create, **asked)
        until(lambda: guarded.engine._waiting)
        with pytest.raises(openai.RateLimitError, match="may wait here") as caught:
            client.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) > 0
        gate.open()
        assert running.result().choices[0].text == waiting.result().choices[0].text
    assert client.completions.create(**asked).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_and_the_next_is_answered(guarded: Served, stream: bool):
    client = guarded.client("the-right-key", max_retries=2)  # which the answer tells not to try again
    asked = {"prompt": "x", "max_tokens": 50, **GREEDY}
    before = metric(guarded, "calm_generated_tokens_total", "the-right-key")
    short = replace(guarded.engine.limits, seconds=0.5)
    with held(guarded.engine) as gate, patched(guarded.engine, limits=short):
        gate.permit(2)
        with pytest.raises(openai.APIError, match=r"no answer within 0\.5 s") as caught:
            list(client.completions.create(stream=stream, **asked))
        assert caught.value.code == "timeout"
    until(lambda: not guarded.engine._running)
    generated = metric(guarded, "calm_generated_tokens_total", "the-right-key") - before
    assert generated <= 4, "what nobody waits for is not generated"
    assert client.completions.create(**asked).usage.completion_tokens == 50


def test_the_time_of_a_request_begins_when_it_arrives(composed: Path):
    """And not when all of its body is there, which may come late or never."""
    body = json.dumps(GREEDY | {"prompt": "x", "max_tokens": 50}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"content-length: %d\r\n\r\n" % len(body)
    with serving(composed, limits=Limits(seconds=2)) as short, held(short.engine):
        address = ("127.0.0.1", int(short.url.rpartition(":")[2]))
        for late in (b"", body[10:]):
            started = time.monotonic()
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(head + body[:10])
                time.sleep(1.5)
                client.sendall(late)
                answer = HTTPResponse(client)
                answer.begin()
                assert (answer.status, json.load(answer)["error"]["code"]) == (504, "timeout")
            assert 2 <= time.monotonic() - started < 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_stops_its_generation(served: Served, stream: bool):
    body = {"prompt": "gone", "max_tokens": 100, "stream": stream, **GREEDY}
    before = metric(served, "calm_generated_tokens_total")
    with held(served.engine) as gate:
        gate.permit(3)
        with httpx2.Client() as browser:
            if stream:
                with browser.stream("POST", f"{served.url}/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    browser.post(f"{served.url}/v1/completions", json=body, timeout=0.5)
        until(lambda: all(row.cancelled for row in served.engine._running))
        gate.permit(100)
        until(lambda: not served.engine._running)
    assert metric(served, "calm_generated_tokens_total") - before <= 4


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such option")
def test_a_client_that_takes_nothing_loses_its_connection(monkeypatch: pytest.MonkeyPatch):
    """The server cannot close it before all is sent, and would wait for that at its end, too."""
    monkeypatch.setattr(server, "SECONDS_TO_READ", 0.5)

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await asyncio.wait({asyncio.ensure_future(receive())}, timeout=0.01)) and not gone.is_set():
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})

    gone = threading.Event()
    bound = server.bind("127.0.0.1", 0, 0.5)
    running = uvicorn.Server(uvicorn.Config(endless, log_config=None, lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until(lambda: running.started)
    with socket.create_connection(bound.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        until(lambda: running.server_state.connections)
        until(lambda: not running.server_state.connections)  # and nothing was read
    gone.set()
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def test_without_a_chat_template_chat_says_what_to_do(composed: Path, client: OpenAI):
    with serving(composed) as other:
        other.engine.tokenizer.chat_template = None
        with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
            other.client().chat.completions.create(messages=CHAT, **GREEDY)
        other.engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(openai.BadRequestError, match="chat template refuses: roles must alternate"):
            other.client().chat.completions.create(messages=CHAT, **GREEDY)
        for broken in ("{{ messages[0]['content'] + 1 }}", "{{ 1 / 0 }}"):
            other.engine.tokenizer.chat_template = broken
            with pytest.raises(openai.BadRequestError, match="chat template cannot take these messages"):
                other.client().chat.completions.create(messages=CHAT, **GREEDY)


def test_tokens_that_the_model_does_not_have_are_refused(composed: Path):
    """On a GPU the first of them would end all that the server can do; and a prompt without any is no prompt."""
    with serving(composed) as other:
        other.engine.tokenizer.add_tokens(["<added>"])
        for content in ("x<added>", [262]):
            with pytest.raises(openai.BadRequestError, match="prompt: token 262: expected tokens below 262"):
                other.client().completions.create(prompt=content, **GREEDY)
        asked = {"messages": [{"role": "user", "content": "<added>"}], **GREEDY}
        with pytest.raises(openai.BadRequestError, match="messages: token 262: expected tokens below 262"):
            other.client().chat.completions.create(**asked)
        other.engine.tokenizer.chat_template = "{{ '' }}"
        with pytest.raises(openai.BadRequestError, match="messages: a text without a single token"):
            other.client().chat.completions.create(**asked)


def test_what_fails_is_a_500_and_the_server_goes_on(served: Served, client: OpenAI, caplog: pytest.LogCaptureFixture):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    hook = served.engine.model.anchor.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError, match="generating failed; the server's log says why"):
            client.completions.create(prompt="x", **GREEDY)
    finally:
        hook.remove()
    assert "out of memory, say" in caplog.text
    assert client.completions.create(prompt="x", **GREEDY).choices


def test_health_and_metrics(served: Served, client: OpenAI):
    names = ("calm_prompt_tokens_total", "calm_generated_tokens_total", "calm_batch_rows_sum")
    before = [metric(served, name) for name in names]
    client.completions.create(prompt="abc", max_tokens=7, n=2, **GREEDY)  # a sample may end before its 7th token
    assert [metric(served, name) - value for name, value in zip(names, before, strict=True)] == [8, 14, 2]
    text = httpx2.get(f"{served.url}/metrics").text
    assert re.search(r'calm_requests_total\{path="/v1/completions",status="200"\} ', text)
    httpx2.get(f"{served.url}/made/up/path")
    assert "made" not in httpx2.get(f"{served.url}/metrics").text
    assert httpx2.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_and_answers_are_logged_only_when_asked_for(
    composed: Path, caplog: pytest.LogCaptureFixture, log_prompts: bool
):
    """The negative control is the flag."""
    caplog.set_level(logging.DEBUG)
    with serving(composed, log_prompts=log_prompts) as served:
        client = served.client()
        messages = [{"role": "user", "content": "my-secret"}]
        answer = client.chat.completions.create(messages=messages, max_tokens=5, **GREEDY)
        list(client.completions.create(prompt="my-secret", max_tokens=2, stream=True, **GREEDY))
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt="my-secret", max_tokens=5, stop=["my-secret"] * 5, **GREEDY)
    assert answer.choices[0].message.content
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("calm", "uvicorn")))
    assert ("my-secret" in logged) == log_prompts
    assert (repr(answer.choices[0].message.content) in logged) == log_prompts
    assert "prompt_tokens=" in logged and "/v1/chat/completions" in logged


def test_an_augmenting_model_called_anchor_is_refused_where_names_would_collide(
    model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    from calm.serving.names import Names

    Names("x", ["anchor"])
    with pytest.raises(calm.errors.CalmError, match="called 'anchor'"):
        Names("x", ["anchor", "other"])
    assert build(model, tokenizer, "x").title == "x (calm)"
