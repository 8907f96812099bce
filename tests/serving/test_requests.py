"""What requests are refused for, and that a refusal costs little, however large the request."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

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
