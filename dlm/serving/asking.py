"""The body of a request -> what is asked of the engine; a result -> OpenAI's objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlm.serving.protocol import INVALID, ApiError, ChatBody, CompletionBody
from dlm.serving.requests import Place, Request, Result

if TYPE_CHECKING:
    from dlm.serving.engine import Engine

__all__ = ["Ask", "ask_chat", "ask_completion", "chat_choice", "completion_choice", "usage_of"]

FILL_LENGTH = 16  # slots of an answer with text behind it, where the body does not say


@dataclass(frozen=True)
class Ask:
    """requests: one for each choice, in order; given: tokens of the prompts, each counted once; echoed: the text that
    stands before each choice's own."""

    requests: list[Request]
    given: int
    echoed: list[str]


def ask_completion(engine: Engine, body: CompletionBody) -> Ask:
    """What /v1/completions asks. Raises ApiError."""
    from dlm.tokenizer import encode_prompt

    opened, requests, given, echoed = engine.pretrained, [], 0, []
    if body.echo and body.likely is not None:
        raise ApiError(400, "echo with logprobs asks for probabilities of the prompt: leave one out", INVALID, "echo")
    with as_api_errors("prompt"):
        engine.check_count(len(body.prompts) * (body.n or 1))  # before each of them takes memory
    defaults = opened.defaults if body.suffix is None else opened.blank_defaults
    for prompt in body.prompts:
        trim = body.suffix is not None and isinstance(prompt, str) and prompt.endswith(" ") and prompt[-2:] != "  "
        with engine.text_lock, as_api_errors("prompt"):
            if isinstance(prompt, str):  # the space before a blank is left to the model, which writes it with the word
                ids = encode_prompt(opened.tokenizer, prompt[:-1] if trim else prompt, opened.mask_id)
                text = prompt
            else:
                ids, text = check_ids(prompt, opened.mask_id), opened.text(prompt) if body.echo else ""
            behind = []
            if body.suffix:
                behind = encode_prompt(opened.tokenizer, body.suffix, opened.mask_id, beginning=False)
        fixed: dict[str, Any] = {}
        if opened.has_end and body.suffix is None:
            fixed = {"stop_at_eos": True}
        elif opened.has_end and body.grow != "confidence":  # which looks for an end of text
            fixed = {"suppress_eos": True}
        requests += texts(engine, body, ids, behind, defaults, fixed, trim=trim)
        given += len(ids) + len(behind)
        echoed += [text if body.echo else ""] * (body.n or 1)
    return Ask(requests, given, echoed)


def ask_chat(engine: Engine, body: ChatBody) -> Ask:
    """What /v1/chat/completions asks. Raises ApiError."""
    from dlm.chat_template import chat_ids, last_turns

    opened = engine.pretrained
    if opened.chat_template is None or opened.defaults.get("chat") is False:
        raise ApiError(
            400,
            f"{opened.name} continues texts and was not trained to answer: use /v1/completions",
            INVALID,
            "messages",
        )
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    messages = last_turns(messages, opened.chat_turns)
    with engine.text_lock, as_api_errors("messages"):
        ids = chat_ids(opened.tokenizer, messages, opened.mask_id)
    fixed: dict[str, Any] = {"stop_at_eos": True} if opened.has_end else {}
    requests = texts(engine, body, ids, [], opened.chat_defaults, fixed | body.constraint)
    return Ask(requests, len(ids), [""] * len(requests))


def texts(
    engine: Engine,
    body: CompletionBody | ChatBody,
    ids: list[int],
    behind: list[int],
    defaults: dict[str, Any],
    fixed: dict[str, Any],
    trim: bool = False,
) -> list[Request]:
    """The requests for the texts between `ids` and `behind`, one for each seed."""
    import dataclasses

    opened = engine.pretrained
    limit = engine.settings.max_slots or opened.max_length
    room = 2**62 if limit is None else limit - len(ids) - len(behind)
    length = body.length
    if length is None:
        length = FILL_LENGTH if behind else defaults.get("gen_length", 128)
        length = min(length, max(room, 1))
    if length > room:
        raise ApiError(
            400,
            f"the prompt has {len(ids) + len(behind)} tokens and max_tokens is {length}, and the model reads {limit} "
            "together: shorten one of them",
            INVALID,
            "max_tokens",
            "context_length_exceeded",
        )
    config = body.config(defaults, length, **fixed)
    if body.likely is not None and (config.ordering != "probability" or config.revise != "none"):
        raise ApiError(400, "logprobs need confidence 'probability' and revise 'none'", INVALID, "logprobs")
    seed = config.seed if isinstance(config.seed, int) else config.seed[0]
    canvas = bool(body.stream and body.stream_canvas)
    return [
        Request(
            [*ids, *[opened.mask_id] * config.start_length, *behind],
            dataclasses.replace(config, seed=(seed + i) % 2**63),
            stop=body.stops,
            stream=bool(body.stream),
            canvas=canvas,
            likely=body.likely,
            trim=trim,
        )
        for i in range(body.n or 1)
    ]


def check_ids(ids: Sequence[int], mask_id: int) -> list[int]:
    """Ids of a prompt. Raises ValueError where the mask is among them."""
    if mask_id in ids:
        raise ValueError(f"the prompt holds the mask token (id {mask_id}): leave it out, or give a suffix")
    return list(ids)


class as_api_errors:
    """Within it a ValueError is an ApiError about this parameter."""

    def __init__(self, param: str):
        self.param = param

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ValueError):
            raise ApiError(400, str(error), INVALID, self.param) from None


# ---------------------------------------------------------------- results


def usage_of(given: int, results: Sequence[Result]) -> dict[str, Any]:
    """Tokens as OpenAI counts them, and the forward passes of all choices."""
    written, nfe = sum(result.written for result in results), sum(result.nfe for result in results)
    completed = sum(len(result.ids) for result in results)
    return {
        "prompt_tokens": given,
        "completion_tokens": completed,
        "total_tokens": given + completed,
        "nfe": nfe,
        "tokens_per_forward": round(written / max(nfe, 1), 4),
    }


def log_of(probability: float) -> float:
    """The natural logarithm, of 0 the one of the smallest number, since JSON has no infinity."""
    return math.log(max(probability, 1e-45))


def completion_choice(index: int, result: Result, echoed: str, logprobs: int | None) -> dict[str, Any]:
    """A choice of /v1/completions."""
    likely = None if logprobs is None else completion_logprobs(result.places)
    return {"index": index, "text": echoed + result.text, "logprobs": likely, "finish_reason": result.finish_reason}


def completion_logprobs(places: Sequence[Place]) -> dict[str, Any]:
    offsets, at = [], 0
    for place in places:
        offsets.append(at)
        at += len(place.text)
    return {
        "tokens": [place.text for place in places],
        "token_logprobs": [log_of(place.probability) for place in places],
        "top_logprobs": [{text: log_of(p) for text, p in place.likely} for place in places],
        "text_offset": offsets,
    }


def chat_choice(index: int, result: Result, logprobs: int | None) -> dict[str, Any]:
    """A choice of /v1/chat/completions."""
    message = {"role": "assistant", "content": result.text, "refusal": None}
    likely = None if logprobs is None else chat_logprobs(result.places)
    return {"index": index, "message": message, "logprobs": likely, "finish_reason": result.finish_reason}


def chat_logprobs(places: Sequence[Place]) -> dict[str, Any]:
    def entry(text: str, probability: float) -> dict[str, Any]:
        return {"token": text, "logprob": log_of(probability), "bytes": list(text.encode("utf-8", "replace"))}

    content = [
        entry(place.text, place.probability) | {"top_logprobs": [entry(*pair) for pair in place.likely]}
        for place in places
    ]
    return {"content": content, "refusal": None}
