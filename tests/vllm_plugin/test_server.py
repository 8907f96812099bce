"""`vllm serve` of a composition: streaming, log-probabilities, structured output, chat, and many clients at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import engine
import openai
import pytest
import torch
from bases import byte_tokenizer, save_base

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
    augmenting = save_base(folder / "augmenting", tokenizer, seed=1, width=32, layers=3, max_position_embeddings=256)
    model = calm.compose(str(anchor), str(augmenting), connections=2)
    generator = torch.Generator().manual_seed(7)
    for connection in model.connections:
        weight = connection.w_o.weight
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder / "composed")
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
