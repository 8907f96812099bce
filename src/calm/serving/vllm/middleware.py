"""What requests to vLLM's server say of a composition, as on transformers: which models are on, and which tokens.

    vllm serve path/to/composed --middleware calm.serving.vllm.middleware.Augmenting

`calm serve` adds it by itself.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm import backbones
from calm.serving import bodies
from calm.serving.errors import APIError
from calm.serving.names import Names

FIELD = "augmenting"

PATHS = ("/v1/completions", "/v1/chat/completions")
"""Where the choice is handed on."""

TOKENS = ("prompt", "token_ids", "query", "items")
"""What requests of vLLM's interfaces call prompts that may be given as tokens."""


class Augmenting:
    """Hands the field `augmenting`, or the model's name, on as `vllm_xargs`, in which vLLM takes what it does not know.

    Tokens that one of the models lacks, of which vLLM knows the anchor's only, are refused.

    Args:
        app: vLLM's server.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return

        async def translated() -> Message:
            message = await bodies.whole(receive)
            if message["type"] == "http.request":
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                message["body"] = _translate(message["body"], path, scope["app"].state)
            return message

        await bodies.answer(self._app, scope, receive, send, translated)


def _translate(body: bytes, path: str, state: Any) -> bytes:
    """A request's body as vLLM is to see it; unchanged where nothing in it chooses.

    Raises:
        APIError: If what is chosen is not there, or cannot be chosen here, or if a model lacks a token.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return body  # vLLM says so
    if not isinstance(asked, dict):
        return body
    config = state.vllm_config.model_config.hf_config
    _check_tokens(asked, backbones.known_tokens(config.anchor_config, config.augmenting_configs))
    arguments = asked.get("vllm_xargs") or {}
    in_arguments = isinstance(arguments, dict) and FIELD in arguments
    if in_arguments:
        _check_no_beams(asked)
    served = state.args.served_model_name or [state.args.model]
    names = Names(served[0], list(config.augmenting_configs))
    model, field = asked.get("model"), asked.pop(FIELD, None)
    if not isinstance(model, str | None):
        return body
    if model not in names.on and (model is None or model in served):
        model = served[0]
    if model not in names.on and field is None:
        return body  # vLLM says that there is no such model
    on = names.chosen(model, field)
    if field is None and on == names.augmenting:
        return body
    if path not in PATHS:
        raise APIError(400, f"augmenting models are chosen in {' and '.join(PATHS)} only", param=FIELD)
    _check_no_beams(asked)
    if not isinstance(arguments, dict):
        return body
    if in_arguments:
        raise APIError(400, "vllm_xargs and the request both choose augmenting models: leave one out", param=FIELD)
    return json.dumps(asked | {"model": served[0], "vllm_xargs": arguments | {FIELD: on}}).encode()


def _check_no_beams(asked: dict[str, Any]) -> None:
    if asked.get("use_beam_search"):
        raise APIError(400, "use_beam_search: vLLM's beam search switches no augmenting models", param=FIELD)


def _check_tokens(asked: dict[str, Any], known: int | None) -> None:
    """Refuse tokens from the smallest vocabulary on; with `None` all are alike, and vLLM checks the anchor's."""
    if known is None:
        return
    for param in TOKENS:
        prompt = asked.get(param)
        parts = prompt if isinstance(prompt, list) else []
        tokens = (token for part in parts for token in (part if isinstance(part, list) else [part]))
        largest: float = max((token for token in tokens if isinstance(token, int | float)), default=-1)
        if largest >= known:
            raise APIError(400, f"{param}: token {largest}: expected tokens below {known}", param=param)
