"""OpenAI's protocol: the bodies of requests, what they ask of the engine, and the errors in its shape."""

from __future__ import annotations

import dataclasses
import json
import secrets
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model, model_validator

from dlm.sampling.config import CHOICES, SamplingConfig
from dlm.sampling.options import SAMPLING
from dlm.utils.names import nearest

__all__ = ["ApiError", "ChatBody", "CompletionBody", "error_body", "message_of"]

MAX_CHOICES, MAX_STOPS, MAX_LIKELY = 16, 4, 20


class ApiError(Exception):
    """An answer that says what was wrong: HTTP status, message, and OpenAI's type, param and code."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The object that OpenAI's clients read an error from."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---------------------------------------------------------------- fields


def _sampling_fields() -> dict[str, tuple]:
    """The fields of SamplingConfig as optional fields of a body; lists stand for tuples, and a schema may be an
    object. The page of the routes lists the names of a choice; SamplingConfig checks them, and names the nearest."""
    hints, fields = typing.get_type_hints(SamplingConfig), {}
    whole = Annotated[int, Field(ge=0, lt=2**63)]
    special = {
        "seed": whole | None,
        "eos_token_id": whole | list[whole] | None,
        "choices": list[str] | None,
        "json_schema": str | dict[str, Any] | None,
    }
    for field, (_, text) in SAMPLING.items():
        hint = special.get(field, hints[field] | None)
        if field in CHOICES:
            hint = Annotated[str, WithJsonSchema({"type": "string", "enum": list(CHOICES[field])})] | None
        fields[field] = (hint, Field(default=None, description=text))
    return fields


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Refuses a field that nothing reads, by name."""
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                if name in REFUSED:
                    raise ValueError(f"{name} is not supported: leave it out")
                raise ValueError(f"{str(name)[:60]!r} is no field: did you mean {nearest(name, cls.model_fields)!r}?")
        return values


REFUSED = ("tools", "tool_choice", "functions", "function_call", "best_of", "modalities", "audio", "prediction",
           "parallel_tool_calls", "reasoning_effort", "web_search_options", "verbosity")  # fmt: skip
Sampling = create_model("Sampling", __base__=_Body, **_sampling_fields())
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=0)]


class StreamOptions(BaseModel):
    """What a stream adds to the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class _Common(Sampling):
    """What both kinds of request share."""

    model: str | None = Field(None, description="the name that /v1/models lists")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="texts for each prompt; seeds count up")
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_canvas: bool | None = Field(None, description="with stream: each pass with the whole canvas")
    max_tokens: int | None = Field(None, ge=1, description="slots of the answer; gen_length here")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="only empty")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def length(self) -> int | None:
        """Slots of the answer, None for the checkpoint's own. Raises ApiError for two that differ."""
        names = [name for name in LENGTHS if getattr(self, name, None) is not None]
        values = {getattr(self, name) for name in names}
        if len(values) > 1:
            raise ApiError(400, f"{' and '.join(names)} differ: give one of them", INVALID, names[0])
        return values.pop() if values else None

    def config(self, defaults: dict[str, Any], length: int, **fixed: Any) -> SamplingConfig:
        """The settings of a text: the checkpoint's, then `fixed`, then what the body says. Raises ApiError."""
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        own = {name: value for name, value in defaults.items() if name != "chat"}
        if self.length is not None:
            own.pop("steps", None)  # it was meant for the checkpoint's own length
        if isinstance(given.get("json_schema"), dict):
            given["json_schema"] = json.dumps(given["json_schema"])
        if given.get("top_p") == 1:
            del given["top_p"]
        given.setdefault("seed", secrets.randbelow(2**31))
        try:
            return SamplingConfig(**(own | fixed | given | {"gen_length": length}))
        except ValueError as error:
            raise ApiError(400, str(error), INVALID, _first_field(str(error))) from None


INVALID = "invalid_request_error"
LENGTHS = ("max_tokens", "max_completion_tokens", "gen_length")


class CompletionBody(_Common):
    """The body of POST /v1/completions; every field of `dlm.SamplingConfig` may stand in it."""

    prompt: str | Ids | list[str] | list[Ids] = ""
    suffix: str | None = Field(None, description="the text behind the answer: infilling")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LIKELY)

    @property
    def likely(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class SchemaFormat(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text, json_object (a flat object of short values), or json_schema."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class ChatBody(_Common):
    """The body of POST /v1/chat/completions; every field of `dlm.SamplingConfig` may stand in it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LIKELY)

    @property
    def likely(self) -> int | None:
        if not self.logprobs:
            return None
        return self.top_logprobs or 0

    @property
    def constraint(self) -> dict[str, str]:
        """The field of SamplingConfig that holds the text to `response_format`. Raises ApiError."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return {}
        if wanted.type == "json_object":
            return {"regex": JSON_OBJECT}
        if wanted.json_schema is None:
            raise ApiError(400, "json_schema needs a schema: give json_schema.schema", INVALID, "response_format")
        return {"json_schema": json.dumps(wanted.json_schema.schema_)}


def _json_object() -> str:
    """A pattern for a JSON object whose values are strings, numbers, literals, or flat lists and objects of those."""
    string = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
    number = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
    gap = "[ \n]?"
    simple = f"(?:{string}|{number}|true|false|null)"

    def listed(item: str, left: str, right: str) -> str:
        return f"{left}{gap}(?:{item}(?:,{gap}{item})*)?{gap}{right}"

    values = listed(simple, r"\[", r"\]")
    fields = listed(f"{string}:{gap}{simple}", r"\{", r"\}")
    return "[ ]?" + listed(f"{string}:{gap}(?:{simple}|{values}|{fields})", r"\{", r"\}")


JSON_OBJECT = _json_object()


def _first_field(message: str) -> str | None:
    """The field that a message begins with (`threshold is 2: ...`)."""
    name = message.split(" ", 1)[0]
    return name if name in {field.name for field in dataclasses.fields(SamplingConfig)} else None


def message_of(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The message and the parameter of what pydantic says of a body."""
    first = errors[0]
    place = [str(part) for part in first.get("loc", ()) if part != "body"]
    param = next((part for part in place if not part.isdigit()), None)
    text = first.get("msg", "").removeprefix("Value error, ")
    if not place and isinstance(first.get("input"), bytes):  # it was not read, for want of the header
        return "the body was not read as JSON: send the header content-type: application/json", None
    if first.get("type") == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', text)}", None
    if not place:
        return text[:1].lower() + text[1:] if first.get("type") != "value_error" else text, None
    same = [e.get("msg", "") for e in errors if [str(p) for p in e.get("loc", ()) if p != "body"][:1] == place[:1]]
    text = "; or ".join(dict.fromkeys(text[:1].lower() + text[1:] for text in same[:4]))
    return f"{param or '.'.join(place)}: {text}", param
