"""OpenAI's requests on vLLM's server say which augmenting models are on, as they do on transformers (docs/serving.md).

    vllm serve path/to/composed --middleware calm.serving.vllm.middleware.Augmenting

`calm serve` adds it by itself.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calm.serving import bodies
from calm.serving.errors import APIError
from calm.serving.names import Names

FIELD = "augmenting"

PATHS = ("/v1/completions", "/v1/chat/completions")
"""Where the choice is handed on."""


class Augmenting:
    """Hands the field `augmenting`, or the model's name, on as `vllm_xargs`, in which vLLM takes what it does not know.

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
        APIError: If what is chosen is not there, or cannot be chosen here.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return body  # vLLM says so
    if not isinstance(asked, dict):
        return body
    served = state.args.served_model_name or [state.args.model]
    names = Names(served[0], list(state.vllm_config.model_config.hf_config.augmenting_configs))
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
    if asked.get("use_beam_search"):
        raise APIError(400, "use_beam_search: vLLM's beam search switches no augmenting models", param=FIELD)
    arguments = asked.get("vllm_xargs") or {}
    if not isinstance(arguments, dict):
        return body
    if FIELD in arguments:
        raise APIError(400, "vllm_xargs and the request both choose augmenting models: leave one out", param=FIELD)
    return json.dumps(asked | {"model": served[0], "vllm_xargs": arguments | {FIELD: on}}).encode()
