"""vLLM's server of a composition: streaming, log-probabilities, switches, structured output, many clients at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine
import httpx
import openai
import pytest
import torch
from bases import byte_tokenizer, save_base
from factories import open_gates

import calm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving_load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "3 + 4 ="


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> calm.CalmForCausalLM:
    """A composition with a tokenizer beside its anchor, not in its own folder."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_tokenizer(chat=True)
    anchor = save_base(folder / "anchor", tokenizer, seed=0, width=64, max_position_embeddings=256)
    augmenting = {
        name: str(save_base(folder / name, tokenizer, seed=seed, width=width, layers=3, max_position_embeddings=256))
        for seed, (name, width) in enumerate({"one": 32, "two": 48}.items(), 1)
    }
    model = calm.compose(str(anchor), augmenting, connections=2)
    generator = torch.Generator().manual_seed(7)
    for connection in model.connections:
        weight = connection.w_o.weight
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    open_gates(model, 1).save_pretrained(folder / "composed")
    model.name_or_path = str(folder / "composed")
    return model


@pytest.fixture(scope="module")
def url(model: calm.CalmForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_load.server(
        model.name_or_path, "--max-num-batched-tokens", "64", log=tmp_path_factory.mktemp("log") / "server.log"
    ) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=serving_load.KEY)


def test_streams_what_transformers_generates(client: openai.OpenAI, model: calm.CalmForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT).input_ids
    (expected,) = engine.expect(model, [ids], 20)
    arguments = {"model": "composed", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(**arguments, logprobs=5, extra_body=extra)
    pieces = list(client.completions.create(**arguments, stream=True, extra_body={"ignore_eos": True}))
    assert whole.choices[0].token_ids == expected.generated
    assert len(pieces) > 10 and "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    found = torch.tensor(whole.choices[0].logprobs.token_logprobs)
    wanted = expected.log_probs[-20:].max(-1).values
    assert (found - wanted).abs().max() < 1e-3


CHOICES: dict[str, tuple[list[str], str, object]] = {  # what is on; the model's name and the field that say so
    "whole": (["one", "two"], "composed", None),
    "anchor": ([], "composed:anchor", None),
    "one": (["one"], "composed:one", None),
    "two": (["two"], "composed:two", None),
    "field all": (["one", "two"], "composed", "all"),
    "field none": ([], "composed", "none"),
    "field one": (["one"], "composed", ["one"]),
    "field both": (["one", "two"], "composed", ["two", "one"]),
    "field empty": ([], "composed", []),
}


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_requests_say_which_augmenting_models_are_on(
    chat: bool, client: openai.OpenAI, model: calm.CalmForCausalLM
) -> None:
    """All at once, so that they share batches; each has the log-probabilities that transformers has for it alone."""
    tokenizer = byte_tokenizer(chat=True)
    message = [{"role": "user", "content": PROMPT}]
    ids = tokenizer(PROMPT).input_ids
    if chat:
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    def ask(choice: str) -> list[float]:
        _, name, field = CHOICES[choice]
        extra = {"ignore_eos": True} | ({} if field is None else {"augmenting": field})
        shared = {"model": name, "max_tokens": 20, "temperature": 0, "extra_body": extra}
        if chat:
            answer = client.chat.completions.create(messages=message, logprobs=True, **shared)
            return [token.logprob for token in answer.choices[0].logprobs.content]
        return client.completions.create(prompt=PROMPT, logprobs=1, **shared).choices[0].logprobs.token_logprobs

    with ThreadPoolExecutor(len(CHOICES)) as pool:
        found = dict(zip(CHOICES, pool.map(ask, CHOICES), strict=True))
    expected = {}
    for choice, (on, _, _) in CHOICES.items():
        (one,) = engine.expect_each(model, [ids], [on], 20)
        expected[choice] = one.log_probs[-20:].max(-1).values
        assert (torch.tensor(found[choice]) - expected[choice]).abs().max() < 1e-3, choice
    apart = [(expected["whole"] - expected[choice]).abs().max() for choice in ("anchor", "one", "two")]
    assert min(apart) > 0.03, "the settings are too near to one another for the comparison to mean anything"


def test_the_names_are_listed(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["composed", "composed:anchor", "composed:one", "composed:two"]


REFUSED: dict[str, tuple[str, dict[str, object], int, str]] = {
    "unknown": ("completions", {"augmenting": ["one", "third"]}, 400, "augmenting: ['third'] are not here: expected"),
    "unknown in chat": ("chat/completions", {"augmenting": ["third"]}, 400, "augmenting: ['third'] are not here"),
    "no list": ("completions", {"augmenting": 3}, 400, 'augmenting: 3: expected "all", "none" or some of'),
    "a word": ("completions", {"augmenting": "one"}, 400, "augmenting: 'one': expected"),
    "both": ("completions", {"model": "composed:one", "augmenting": "none"}, 400, "both choose augmenting models"),
    "both ways": ("completions", {"augmenting": "none", "vllm_xargs": {"augmenting": ["one"]}}, 400, "both choose"),
    "no such model": ("completions", {"model": "composed:third", "augmenting": "none"}, 404, "composed:third"),
    "no such model, by name": ("completions", {"model": "composed:third"}, 404, "composed:third"),
    "beam search": ("completions", {"augmenting": "none", "use_beam_search": True}, 400, "use_beam_search"),
    "beam search, by vLLM's own argument": (
        "completions",
        {"vllm_xargs": {"augmenting": ["one"]}, "use_beam_search": True},
        400,
        "use_beam_search",
    ),
    "vLLM's own argument": ("completions", {"vllm_xargs": {"augmenting": ["third"]}}, 400, "['third'] are not here"),
    "another path": ("messages", {"model": "composed:anchor", "max_tokens": 3}, 400, "are chosen in /v1/completions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_refused(case: str, url: str) -> None:
    path, body, status, message = REFUSED[case]
    prompt = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    whole = {"model": "composed"} | prompt | body
    response = httpx.post(f"{url}/v1/{path}", json=whole, headers=serving_load.HEADERS)
    error = response.json()["error"]
    assert response.status_code == status and message in error["message"]
    assert {"message", "type", "param", "code"} <= set(error)


@pytest.mark.parametrize("path", ["v1/completions", "invocations", "generative_scoring", "tokenize", "detokenize"])
def test_nothing_is_told_without_the_key(path: str, url: str) -> None:
    """Under no path: vLLM's own middleware lets everyone ask those that do not begin with /v1."""
    asked = {"model": "composed", "prompt": "x", "augmenting": ["third"]}
    response = httpx.post(f"{url}/{path}", json=asked)
    assert response.status_code == 401 and "third" not in response.text
    assert httpx.post(f"{url}/{path}", json=asked, headers=serving_load.HEADERS).status_code != 401


def test_structured_output_and_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="composed",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=8,
        extra_body={"structured_outputs": {"choice": ["seven", "eight"]}},
    )
    assert answer.choices[0].message.content in ("seven", "eight")
    assert answer.usage.completion_tokens > 0


def test_many_clients_at_once(url: str) -> None:
    requests = serving_load.make_requests(120, 200, range(6, 262), seed=0)
    counts = asyncio.run(serving_load.under_load(url, requests, clients=64, leaving=8, longest=200))
    assert counts["errors"] == [] and counts["answers_that_differ"] == 0
    assert counts["leaving_failed"] == [] and counts["still_right_afterwards"]
    assert counts["malformed_wrongly_answered"] == []
    assert counts["wrong_key"] == 401
