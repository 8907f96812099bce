"""What requests to vLLM's server say of a composition, here to a small application that answers what it got.

`tests/vllm_plugin/test_server.py` sees vLLM itself answer them.
"""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from factories import config
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

import calm
from calm.serving.vllm.middleware import Augmenting

BEAMS = "use_beam_search: vLLM's beam search switches no augmenting models"
KNOWN, MORE = 100, 200


def behind(anchor: int = KNOWN, augmenting: int = KNOWN) -> TestClient:
    """A client of an application behind the middleware, for a composition of models with so many tokens."""
    configs = [config("llama"), config("gpt2")]
    for one, size in zip(configs, (anchor, augmenting), strict=True):
        one.vocab_size = size
    pair = {"augmenting": "one", "augmenting_layer": 1, "anchor_layer": 1}
    composed = calm.CalmConfig(anchor_config=configs[0], augmenting_configs={"one": configs[1]}, connections=[pair])
    app = FastAPI()
    app.state.args = Namespace(served_model_name=["composed"], model="path")
    app.state.vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=composed))
    app.add_middleware(Augmenting)

    @app.post("/{path:path}")
    async def answer(path: str, request: Request) -> Any:
        return await request.json()

    return TestClient(app)


def refused(client: TestClient, asked: dict[str, Any], path: str = "v1/completions") -> tuple[str, str]:
    """With which words, and which parameter."""
    response = client.post(f"/{path}", json=asked)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["message"], error["param"]


def passed(client: TestClient, asked: dict[str, Any], path: str = "v1/completions") -> Any:
    """What the application behind gets."""
    response = client.post(f"/{path}", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


PROMPTS = {
    "tokens": ("v1/completions", "prompt", [5, KNOWN]),
    "several": ("v1/completions", "prompt", [[5], [6, KNOWN]]),
    "invocations": ("invocations", "prompt", [KNOWN]),
    "generate": ("inference/v1/generate", "token_ids", [KNOWN, 5]),
    "scoring, its query": ("generative_scoring", "query", [KNOWN]),
    "scoring, its items": ("generative_scoring", "items", [[KNOWN], [5]]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_tokens_that_one_model_lacks_are_refused(case: str):
    """In the words of transformers' server. Where all models have the same, what is beyond is vLLM's to refuse."""
    path, param, prompt = PROMPTS[case]
    smaller = behind(anchor=MORE)
    assert refused(smaller, {param: prompt}, path) == (f"{param}: token {KNOWN}: expected tokens below {KNOWN}", param)
    assert refused(behind(augmenting=MORE), {param: prompt}, path)[1] == param
    passed(behind(), {param: prompt}, path)


@pytest.mark.parametrize("prompt", ["100 200", ["100", "200"], [5, KNOWN - 1], [[5], [KNOWN - 1]], [], [[]], None, 3])
def test_other_prompts_pass(prompt: Any):
    asked = {"model": "composed", "prompt": prompt}
    assert passed(behind(anchor=MORE), asked) == asked


@pytest.mark.parametrize("choice", [{"augmenting": "none"}, {"vllm_xargs": {"augmenting": ["one"]}}])
@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions"])
def test_beam_search_does_not_choose(path: str, choice: dict[str, Any]):
    """In neither of the two ways in which a request can: vLLM's beam search would leave all augmenting models on."""
    client, asked = behind(), {"model": "composed"} | choice
    assert refused(client, asked | {"use_beam_search": True}, path) == (BEAMS, "augmenting")
    passed(client, asked | {"use_beam_search": False}, path)
    passed(client, {"model": "composed", "use_beam_search": True, "vllm_xargs": {"other": 1}}, path)
