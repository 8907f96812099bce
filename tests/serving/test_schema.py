"""The served OpenAPI schema says what the server does: schemathesis asks what it allows, and what it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from servers import NAME, serving

from calm.serving.limits import Limits

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# the context, the vocabulary, the names of models and what a chat template accepts are no matters of the schema
OTHER_REASONS = [positive_data_acceptance]


@pytest.fixture(scope="module")
def api(composed: Path) -> Iterator[Any]:
    """The schema of a running server with a key and short answers."""
    with serving(composed, api_key=KEY, limits=Limits(max_tokens=8)) as running:
        yield schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=HEADERS)


def answerable(body: dict[str, Any]) -> dict[str, Any]:
    """What of a request has to be other than any schema says, so that not all of them are refused."""
    changes: dict[str, Any] = {"model": NAME, "augmenting": None}
    changes |= {name: 4 for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None}
    changes |= {"logprobs": True} if body.get("top_logprobs") else {}
    changes |= {"stream": True} if body.get("stream_options") is not None else {}
    if isinstance(prompt := body.get("prompt"), list) and isinstance(prompt[0], int):
        changes["prompt"] = [token % 262 for token in prompt]
    return changes


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        ("/v1/completions", "POST", GenerationMode.POSITIVE),
        ("/v1/completions", "POST", GenerationMode.NEGATIVE),
        ("/v1/chat/completions", "POST", GenerationMode.POSITIVE),
        ("/v1/chat/completions", "POST", GenerationMode.NEGATIVE),
        ("/v1/models", "GET", GenerationMode.POSITIVE),
        ("/v1/models/{model}", "GET", GenerationMode.POSITIVE),
        ("/health", "GET", GenerationMode.POSITIVE),
        ("/metrics", "GET", GenerationMode.POSITIVE),
    ],
)
def test_the_server_does_what_its_schema_says(api: Any, path: str, method: str, mode: GenerationMode):
    """No 500, only what is documented, and nothing that the schema forbids is accepted."""
    statuses: Counter[int] = Counter()

    @settings(max_examples=25)
    @given(api[path][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body |= answerable(case.body)
        statuses[case.call_and_validate(headers=HEADERS, excluded_checks=OTHER_REASONS).status_code] += 1

    ask()
    if mode == GenerationMode.NEGATIVE:
        assert statuses[400] > 0 and statuses[200] == 0
    elif path != "/v1/models/{model}":
        assert statuses[200] > 0, "refusals alone would prove little"
