"""What clients may ask for. What is not known, or not done, is refused by name; nothing is taken and then ignored.

`user` alone has no effect: OpenAI defines it as a label. null means left out, as in OpenAI's own library.
"""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hivegrpo.peer.learn.messages import MAX_MESSAGES, Message, Prompt
from hivegrpo.peer.serving.refusals import Refusal, invalid

MAX_CHOICES = 16
"""Answers to one request: n times its prompts."""
COMPLETION_TOKENS = 16
"""Of /v1/completions, where max_tokens is left out: OpenAI's default."""
MAX_PARTS = 256
"""Of one message's content."""
SHOWN = 100
"""Characters of what the client wrote that a refusal repeats."""

_TYPE = re.compile(r"(constrained-)?str$|(constrained|list|function)[-\[]")
"""What pydantic calls the types of our fields."""

NEUTRAL = {
    "best_of": ("1",),
    "echo": ("false",),
    "frequency_penalty": ("0", "0.0"),
    "function_call": (),
    "functions": ("[]",),
    "logit_bias": ("{}",),
    "logprobs": ("false",),
    "metadata": ("{}",),
    "modalities": ('["text"]',),
    "parallel_tool_calls": (),
    "presence_penalty": ("0", "0.0"),
    "reasoning_effort": (),
    "response_format": ('{"type": "text"}',),
    "service_tier": ('"auto"', '"default"'),
    "store": ("false",),
    "suffix": ('""',),
    "tool_choice": ('"none"',),
    "tools": ("[]",),
    "top_logprobs": (),
    "verbosity": (),
}
"""Parameters of OpenAI's that are not supported, and the values, as JSON, that ask for nothing."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _sparse(cls, values: Any) -> Any:
        """Without what is null. Of unknown names only the first is told: pydantic would collect an error for each."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        unknown = next((name for name in given if name not in cls.model_fields), None)
        if unknown is not None:
            raise PydanticCustomError("unknown_name", "there is no {name}", {"name": unknown[:SHOWN]})
        return given


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]

    def plain(self) -> Message:
        """As chat templates take it; parts of a content become its lines."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(_Body):
    include_usage: bool = False


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[int, Field(ge=1)]


class _Request(_Body):
    model: str = Field(max_length=256)
    max_tokens: Tokens | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1024)


class _ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Tokens | None = None


class _CompletionRequest(_Request):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


_AnyRequest = TypeVar("_AnyRequest", bound=_Request)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that can be done."""

    model: str
    chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    """Answers to each prompt."""
    max_tokens: int | None
    """Of each answer; None is what fits."""
    temperature: float | None
    top_p: float | None
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    """In a stream, which has none otherwise."""


def read_chat(body: bytes) -> Wanted:
    """A request to /v1/chat/completions; Refusal if it will not do."""
    request = _read(_ChatRequest, body)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid("max_tokens and max_completion_tokens differ.", "Give one of them.", param="max_tokens")
    prompt = [message.plain() for message in request.messages]
    return _wanted(request, True, (prompt,), limits.pop() if limits else None)


def read_completion(body: bytes) -> Wanted:
    """A request to /v1/completions; Refusal if it will not do."""
    request = _read(_CompletionRequest, body)
    prompts = (request.prompt,) if isinstance(request.prompt, str) else tuple(request.prompt)
    if len(prompts) * request.n > MAX_CHOICES:
        raise invalid(f"{len(prompts)} prompts with {request.n} answers each are over {MAX_CHOICES}.", param="n")
    return _wanted(request, False, prompts, request.max_tokens or COMPLETION_TOKENS)


def _wanted(request: _Request, chat: bool, prompts: tuple[Prompt, ...], max_tokens: int | None) -> Wanted:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only for stream = true.", param="stream_options")
    return Wanted(
        model=request.model,
        chat=chat,
        prompts=prompts,
        n=request.n,
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stops=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
        stream=request.stream,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
    )


def _read(kind: type[_AnyRequest], body: bytes) -> _AnyRequest:
    try:
        values = json.loads(body.decode())
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, and no text
    except (ValueError, RecursionError) as error:
        raise invalid(f"The request is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise invalid("The request is not a JSON object.")
    given = {name: value for name, value in values.items() if value is not None}
    for name in sorted(given.keys() & NEUTRAL.keys()):
        if json.dumps(given[name]) not in NEUTRAL[name]:
            raise invalid(f"{name} is not supported.", "Leave it out.", param=name, code="unsupported_parameter")
        del given[name]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refusal:
    # Of a choice between types, pydantic tells what each misses, and adds the type to the place: the longest place is
    # that of the type which was meant.
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    names = [str(part) for part in first["loc"] if not _TYPE.match(str(part))]
    if first["type"] == "unknown_name":
        names.append(first["ctx"]["name"])
    place = ".".join(names)[:SHOWN]
    if first["type"] == "unknown_name":
        return invalid(f"There is no parameter {place}.", "Leave it out.", param=place, code="unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"{place} is missing.", param=place, code="missing_required_parameter")
    return invalid(f"{place}: {first['msg'][:SHOWN]}.", param=place)
