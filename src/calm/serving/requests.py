"""The requests that are understood, in OpenAI's words; a parameter that is not here is refused, never ignored.

What is not supported is accepted with the values that change nothing, since many clients write them into every request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _whole(value: Any) -> Any:
    """3.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _only(expected: str) -> WrapValidator:
    """What is not supported takes the values that change nothing, and says of others that it is not supported."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            message = "this server does not support this parameter: expected {expected}, or leave it out"
            raise PydanticCustomError("not_supported", message, {"expected": expected}) from error

    return WrapValidator(check)


Int = Annotated[int, BeforeValidator(_whole)]
# a bare str may hold half a character, which no tokenizer takes
AnyText = Annotated[str, StringConstraints(min_length=0)]
Text = Annotated[str, StringConstraints(min_length=1)]
TokenId = Annotated[Int, Field(ge=0)]
# the first bad element ends the check: a list of hundreds of thousands would have as many complaints
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, _only("0")]
No = Annotated[Literal[False] | None, _only("false")]
EmptyList = Annotated[Annotated[list[Any], Field(max_length=0)] | None, _only("[]")]
EmptyObject = Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, _only("{}")]
NotSupported = "Only what changes nothing is accepted: 0."
NothingOnly = "Only what changes nothing is accepted."

MAX_CHOICES = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Of unknown parameters the first, which is enough to refuse the request."""
        if not isinstance(data, dict):
            return data
        unknown = next((name for name in data if name not in cls.model_fields), None)
        return {name: value for name, value in data.items() if name in cls.model_fields or name == unknown}


class StreamOptions(_Strict):
    """What a stream tells besides its text."""

    include_usage: bool = Field(False, description="Count the tokens in a last chunk.")
    include_obfuscation: No = Field(False, description=NothingOnly)


class _Request(_Strict):
    """What both kinds of requests have in common."""

    model: str = Field(description="A name that /v1/models lists.")
    augmenting: Literal["all", "none"] | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None,
        description=(
            'Which augmenting models are on: "all", "none" (the bare anchor answers) or a list of their names. '
            "By default those that the model's name says."
        ),
    )
    n: Int | None = Field(1, ge=1, le=MAX_CHOICES, description="Answers to each prompt.")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0, or below 0.001: the likeliest token each time.")
    top_p: float | None = Field(1.0, ge=0, le=1, description="Sample from the likeliest tokens of this probability.")
    seed: Int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="Of sampling; the same whatever runs beside it."
    )
    stop: Text | Annotated[list[Text], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="Strings that end the answer and are not part of it."
    )
    stream: bool | None = Field(False, description="Send the answer as it comes, as server-sent events.")
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero = Field(0, description=NotSupported)
    presence_penalty: Zero = Field(0, description=NotSupported)
    logit_bias: EmptyObject = Field(None, description=NothingOnly)
    user: str | None = Field(None, description="Accepted, of no effect and not kept.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Request):
    """A request for text that continues prompts."""

    prompt: Text | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)] = Field(
        description="A text or its tokens, or a list of either."
    )
    max_tokens: Int | None = Field(None, ge=1, description="Tokens to generate at most; by default 16, as OpenAI's.")
    logprobs: Int | None = Field(None, ge=0, le=5, description="Alternatives beside each token's log-probability.")
    echo: No = Field(False, description="Not supported: false.")
    best_of: Annotated[Literal[1] | None, _only("1")] = Field(None, description="Not supported: 1.")
    suffix: Annotated[None, _only("null")] = Field(None, description=NothingOnly)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report beside each one."""
        return self.logprobs


class TextPart(_Strict):
    """A part of a message; there are none but text."""

    type: Literal["text"]
    text: AnyText


class Message(_Strict):
    """A message of the conversation, as the chat template takes it."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer: the same as system.")
    content: AnyText | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: AnyText | None = Field(None, description="Whose message it is, for chat templates that say so.")
    # what OpenAI's client writes, all null, of an answer that is sent back with all the fields that it knows
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The parts as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def for_template(self) -> dict[str, str]:
        """As chat templates know messages: they have no developer."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text} | ({} if self.name is None else {"name": self.name})


class TextFormat(_Strict):
    """The only kind of answers."""

    type: Literal["text"]


class ChatRequest(_Request):
    """A request for the next message of a conversation."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: Int | None = Field(
        None, ge=1, description="Tokens to generate at most; by default what the server allows and the context holds."
    )
    max_tokens: Int | None = Field(None, ge=1, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(False, description="Report the log-probability of each token.")
    top_logprobs: Int | None = Field(None, ge=0, le=20, description="Alternatives beside it; needs logprobs.")
    response_format: Annotated[TextFormat | None, _only('{"type": "text"}')] = Field(None, description=NothingOnly)
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None, _only('["text"]')
    ] = Field(None, description=NothingOnly)
    tools: EmptyList = Field(None, description=NothingOnly)
    tool_choice: Annotated[Literal["none"] | None, _only('"none"')] = Field(None, description=NothingOnly)
    parallel_tool_calls: bool | None = Field(None, description="Of no effect: there are no tools.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="Of no effect: there is one.")
    store: No = Field(None, description=NothingOnly)
    metadata: EmptyObject = Field(None, description=NothingOnly)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report beside each one."""
        return (self.top_logprobs or 0) if self.logprobs else None
