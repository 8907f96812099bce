"""What requests may hold, what they are refused for, and that a refusal costs little, however large the request."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError
from servers import CHAT, GREEDY, NAME, Served

from calm.serving.requests import ChatRequest, CompletionRequest

MANY = 20_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * MANY}),
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [""] * MANY}),
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": [[-1] * 2] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [""] * MANY}),
        (CompletionRequest, {"prompt": "x", "augmenting": [0] * MANY}),
        (CompletionRequest, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MANY)), 0)}),
        (CompletionRequest, {"prompt": "x"} | dict.fromkeys(map(str, range(MANY)))),
        (CompletionRequest, {"prompt": "x", "stream_options": dict.fromkeys(map(str, range(MANY)))}),
        (ChatRequest, {"messages": [0] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"} | dict.fromkeys(map(str, range(MANY)))]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "tools": [0] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "modalities": [0] * MANY}),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:40],
)
def test_a_large_refusal_has_few_complaints(kind: type, body: dict[str, Any]):
    """Each costs time and memory in the thread that serves everyone."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m"} | body)
    assert caught.value.error_count() <= 6


def test_the_first_unknown_parameter_is_named():
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": "x", "b": 1, "a": 1})
    (problem,) = caught.value.errors()
    assert (problem["loc"], problem["type"]) == (("b",), "extra_forbidden")


NEUTRAL: dict[str, list[dict[str, Any]]] = {
    "completions": [{"suffix": None}, {"logit_bias": {}}, {"logit_bias": None}],
    "chat/completions": [
        *({"logit_bias": value} for value in (None, {})),
        *({"response_format": value} for value in (None, {"type": "text"})),
        *({"modalities": value} for value in (None, ["text"])),
        *({"tools": value} for value in (None, [])),
        *({"tool_choice": value} for value in (None, "none")),
        *({"parallel_tool_calls": value} for value in (None, True, False)),
        *({"service_tier": value} for value in (None, "auto", "default")),
        *({"store": value} for value in (None, False)),
        *({"metadata": value} for value in (None, {})),
        {"messages": [CHAT[0] | {"role": "developer"}, CHAT[1]]},
        {"messages": [CHAT[0], CHAT[1] | {"name": "ada"}]},
    ],
}


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in NEUTRAL.items() for body in bodies], ids=str
)
def test_what_changes_nothing_is_accepted(served: Served, path: str, body: dict[str, Any]):
    """Many clients write such values into each of their requests."""
    asked = GREEDY | {"max_tokens": 5} | ({"messages": CHAT} if path.startswith("chat") else {"prompt": "x"})
    plain, response = [httpx2.post(f"{served.url}/v1/{path}", json=one) for one in (asked, asked | body)]
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"tools": []}, "tools: this server does not know or support"),
        (
            "completions",
            {"suffix": "x"},
            "suffix: this server does not support this parameter: expected null, or leave it out",
        ),
        (
            "completions",
            {"logit_bias": {"5": 1}},
            "logit_bias: this server does not support this parameter: expected {}",
        ),
        (
            "chat/completions",
            {"tools": [{"type": "function"}]},
            "tools: this server does not support this parameter: expected []",
        ),
        (
            "chat/completions",
            {"tool_choice": "required"},
            'tool_choice: this server does not support this parameter: expected "none"',
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_object"}},
            'expected {"type": "text"}, or leave it out',
        ),
        ("chat/completions", {"store": True}, "store: this server does not support this parameter: expected false"),
        (
            "chat/completions",
            {"metadata": {"a": "b"}},
            "metadata: this server does not support this parameter: expected {}",
        ),
        ("chat/completions", {"service_tier": "flex"}, "service_tier: Input should be 'auto' or 'default'"),
        (
            "chat/completions",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation: this server does not support this parameter",
        ),
        ("completions", {"echo": True}, "echo: this server does not support"),
        ("completions", {"best_of": 3}, "best_of: this server does not support this parameter: expected 1"),
        (
            "completions",
            {"presence_penalty": 0.5},
            "presence_penalty: this server does not support this parameter: expected 0",
        ),
        ("completions", {"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ("completions", {"temperature": "hot"}, "temperature: Input should be a valid number"),
        ("completions", {"n": 99}, "n: Input should be less than or equal to 16"),
        ("completions", {"prompt": ["a"] * 40, "n": 2}, "40 prompts with 2 answers each are more than the 64"),
        ("completions", {"max_tokens": 101}, "max_tokens=101: this server generates 100 at most"),
        ("completions", {"prompt": "p" * 120}, "the context of the model is 128 tokens: 121 of the prompt and 16"),
        ("chat/completions", {"messages": [{"role": "user", "content": "p" * 128}]}, "the context of the model is 128"),
        ("completions", {"prompt": [262]}, "token 262: expected tokens below 262"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"augmenting": ["three"]}, 'augmenting: [\'three\'] are not here: expected "all", "none" or'),
        ("completions", {"augmenting": "one"}, "augmenting"),
        ("completions", {"augmenting": "all", "model": f"{NAME}:one"}, "both choose augmenting models: leave one out"),
        ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs=2: needs logprobs=true"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options: needs stream=true"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be"),
        ("chat/completions", {"messages": []}, "messages: List should have at least 1 item"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(served: Served, path: str, body: dict[str, Any], message: str):
    """In OpenAI's error format, and before anything is generated; what was sent is not repeated."""
    whole = {"model": NAME} | ({"messages": CHAT} if path.startswith("chat") else {"prompt": "x"}) | body
    response = httpx2.post(f"{served.url}/v1/{path}", json=whole)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("message", [{"content": "\ud83d"}, {"content": "x", "name": "\ud83d"}])
def test_half_a_character_is_refused(served: Served, message: dict[str, str]):
    """What programs send that cut texts within an emoji; no tokenizer takes it."""
    body = json.dumps({"model": NAME, "messages": [{"role": "user"} | message]})
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{served.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert "unable to parse raw data as a unicode string" in response.json()["error"]["message"]
