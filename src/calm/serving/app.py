"""The application: OpenAI's paths on FastAPI, over one engine."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.sse import format_sse_event
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from calm import hosts
from calm.model import CalmForCausalLM
from calm.serving import errors
from calm.serving.access import ApiKey, refused
from calm.serving.bodies import LimitBodies
from calm.serving.engine import Engine
from calm.serving.errors import APIError, ErrorBody
from calm.serving.generating import Generating
from calm.serving.limits import Limits
from calm.serving.metrics import Metrics
from calm.serving.names import Names
from calm.serving.observing import Observe
from calm.serving.requests import ChatRequest, CompletionRequest

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}  # FastAPI's words for one


class ListedModel(Model):
    """A model as OpenAI lists it, and which augmenting models are on in it."""

    augmenting: list[str]


class ModelList(BaseModel):
    """The models that can be asked."""

    object: str = "list"
    data: list[ListedModel]


class Health(BaseModel):
    """Whether the server answers."""

    status: str


def build(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    limits: Limits | None = None,
    log_prompts: bool = False,
) -> FastAPI:
    """The application that serves a composition.

    Args:
        model: The composition; the application's alone from here on.
        tokenizer: Its tokenizer, padding on the left.
        name: What clients call it.
        host: The address that it is served on.
        api_key: Asked of every request but /health; without one only this address and names of this machine are
            answered, so that no web page can reach the server through a name of its own (DNS rebinding).
        limits: What it takes on at most.
        log_prompts: Log prompts and answers too.

    Raises:
        CalmError: If the tokenizer cannot be used, or names collide.
    """
    limits = limits or Limits()
    metrics = Metrics()
    names = Names(name, list(model.config.augmenting_configs))
    engine = Engine(model, tokenizer, limits, metrics)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close()

    app = FastAPI(
        title=f"{name} (calm)",
        lifespan=lifespan,
        middleware=[
            Middleware(Observe, metrics=metrics),
            Middleware(AuthenticationMiddleware, backend=ApiKey([api_key]), on_error=refused)
            if api_key is not None
            else Middleware(TrustedHostMiddleware, allowed_hosts=hosts.names_of(host)),
            Middleware(LimitBodies, limits=limits),
        ],
        responses={"default": {"model": ErrorBody}},
    )
    app.state.engine = engine
    errors.install(app)
    # for the schema; the key has been compared by then
    guarded = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if api_key is not None else [])

    async def answer(request: Request, asked: ChatRequest | CompletionRequest) -> Any:
        generating = Generating(engine, names, metrics, request, asked, log_prompts)
        await generating.submit()
        if asked.stream:
            return _Events(generating)
        return await generating.whole()

    answers: dict[str, Any] = {
        "response_model_exclude_unset": True,
        "responses": {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}},
    }

    @guarded.post("/v1/chat/completions", response_model=ChatCompletion, **answers)
    async def chat_completions(request: Request, asked: ChatRequest) -> Any:
        """The next message of a conversation."""
        return await answer(request, asked)

    @guarded.post("/v1/completions", response_model=Completion, **answers)
    async def completions(request: Request, asked: CompletionRequest) -> Any:
        """Text that continues prompts."""
        return await answer(request, asked)

    def listed(model: str) -> ListedModel:
        return ListedModel(id=model, object="model", created=created, owned_by="calm-lm", augmenting=names.on[model])

    @guarded.get("/v1/models", response_model_exclude_unset=True)
    async def models() -> ModelList:
        """The composition, its anchor, and the composition with one of several augmenting models."""
        return ModelList(object="list", data=[listed(model) for model in names.on])

    @guarded.get("/v1/models/{model:path}", response_model_exclude_unset=True)
    async def one_model(model: str) -> ListedModel:
        """One of them."""
        names.off(model, None)
        return listed(model)

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> Health:
        """Whether requests are answered."""
        if not engine.alive:
            raise APIError(503, "the engine has stopped")
        return Health(status="ok")

    @guarded.get("/metrics", response_class=Response)
    async def render_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.render(), media_type=metrics.content_type)

    app.include_router(guarded)
    return app


class _Events(StreamingResponse):
    """An answer as server-sent events; when the client goes, what it asked for is no longer generated."""

    def __init__(self, generating: Generating) -> None:
        self._generating = generating
        super().__init__(self._lines(), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generating.end()

    async def _lines(self) -> AsyncIterator[bytes]:
        async for chunk in self._generating.chunks():
            yield format_sse_event(data_str=json.dumps(chunk))
        yield format_sse_event(data_str="[DONE]")
