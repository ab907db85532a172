"""A tokenizer's chat template: what it writes around messages, and the ids of a conversation.

A template is a program of the checkpoint's authors (Jinja, run in transformers' sandbox). Most write the header of an
answer only where `add_generation_prompt` asks for it. Some write it always (LLaDA-8B-Instruct's, as released), some
never. `ChatTemplate.of` finds out by rendering short conversations, so that callers need not know.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dlm.utils.errors import one_line

__all__ = ["ChatTemplate", "Message", "chat_ids", "last_turns"]

Message = dict[str, Any]  # {"role": "user" | "assistant" | "system" | "tool", "content": text}

SECONDS = 5.0  # a template that renders one conversation for longer does not end
QUESTION, ANSWER, NEXT = "qz81", "wx27", "jv65"  # words that no template writes by itself
DATE = "01 Jan 2025"  # in place of today in training: tokens must not depend on the day
PINNED = f"{{%- macro strftime_now(format) -%}}{DATE}{{%- endmacro -%}}"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what was found out about it.

    writes_header: `asked` (only with add_generation_prompt), `always` or `never`. header: the text that opens an
    answer; end: the ids that close one (end-of-turn). dated: it writes today's date. source: the template itself.
    """

    tokenizer: Any = field(repr=False, compare=False)
    source: str = field(repr=False)
    writes_header: str
    header: str
    end: tuple[int, ...]
    dated: bool

    @classmethod
    def of(cls, tokenizer, *, pinned: bool = False) -> ChatTemplate:
        """The template of a tokenizer. pinned: writes `DATE` where it would write today's.

        Raises ValueError where there is none, it cannot be rendered, or it leaves out messages.
        """
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use a checkpoint that has one, or plain prompts")
        source = str(tokenizer.chat_template)
        return _examine(tokenizer, PINNED + source if pinned and "strftime_now" in source else source)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the next answer begins, its header included."""
        asked = render(self.tokenizer, self.source, messages, header=True)
        return asked + self.header if self.writes_header == "never" else asked

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation, without the header of an answer that is not there."""
        plain = render(self.tokenizer, self.source, messages, header=False)
        return plain.removesuffix(self.header) if self.writes_header == "always" else plain

    def notes(self) -> list[str]:
        """What a user should know, a line each."""
        lines = []
        if self.writes_header == "always":
            lines.append("the chat template always ends in the header of an answer: it is taken off after an answer")
        if self.writes_header == "never":
            lines.append(f"the chat template never writes the header of an answer: {self.header!r} is added to prompts")
        if self.dated:
            lines.append(f"the chat template writes today's date: training writes {DATE} in every row")
        return lines


def render(tokenizer, template: str, messages: Sequence[Message], header: bool) -> str:
    """The text that the template writes. Raises ValueError, in one line, whatever goes wrong in it."""
    try:
        with _Deadline(SECONDS):
            return tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=header
            )
    except _TooSlow:
        reason = f"it does not end within {SECONDS:.0f} s"
    except RecursionError:
        reason = "it nests without end"
    except MemoryError:
        reason = "it needs too much memory"
    except Exception as error:  # Jinja's own errors, and whatever the template raises or computes with
        reason = one_line(error)
    roles = ", ".join(str(message.get("role")) for message in messages)
    raise ValueError(
        f"the chat template cannot write these messages (roles: {roles}): {reason}. Use other messages, or a "
        f"checkpoint with another template"
    )


@lru_cache(maxsize=32)
def _examine(tokenizer, template: str) -> ChatTemplate:
    _refuse_products(template)
    ask, answer, again = (
        {"role": role, "content": text} for role, text in (("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))
    )
    plain, asked = render(tokenizer, template, [ask], header=False), render(tokenizer, template, [ask], header=True)
    whole = render(tokenizer, template, [ask, answer], header=False)
    if QUESTION not in plain or QUESTION not in whole or ANSWER not in whole:
        raise ValueError("the chat template leaves out what a message says: use a checkpoint with another template")
    dated = "strftime_now" in template
    before, after = whole[: whole.index(ANSWER)], whole[whole.index(ANSWER) + len(ANSWER) :]
    if asked != plain:
        header = asked[len(plain) :] if asked.startswith(plain) else before[before.index(QUESTION) + len(QUESTION) :]
        return ChatTemplate(tokenizer, template, "asked", header, _end(tokenizer, after, header), dated)
    if not plain.startswith(before):  # the header stands only in front of an answer
        header = before[len(plain) :] if before.startswith(plain) else ""
        return ChatTemplate(tokenizer, template, "never", header, _end(tokenizer, after, header), dated)
    longer = _try(tokenizer, template, [ask, answer, again])
    header = _header(tokenizer, before, after, longer)
    kind = "always" if header else "never"
    return ChatTemplate(tokenizer, template, kind, header, _end(tokenizer, after, header), dated)


def _header(tokenizer, before: str, after: str, longer: str | None) -> str:
    """The header that stands both in front of the answer and behind it, apart from the end of a turn.

    Between an answer and the next question stand the end of a turn and the question's header, and that header also
    opens the conversation: what both endings share, compared in tokens, is the header of a question.
    """
    if not after or longer is None or not before.endswith(after):
        return ""
    opening = _ids(tokenizer, before[: before.index(QUESTION)])
    between = _ids(tokenizer, longer[longer.index(ANSWER) + len(ANSWER) : longer.index(NEXT)])
    shared = 0
    while shared < min(len(opening), len(between)) and opening[-1 - shared] == between[-1 - shared]:
        shared += 1
    end = between[: len(between) - shared]
    behind = _ids(tokenizer, after)
    if behind[: len(end)] != end or len(behind) == len(end):
        return ""
    return after[len(tokenizer.decode(end)) :]


def _end(tokenizer, after: str, header: str) -> tuple[int, ...]:
    """The ids that close an answer, of what stands behind it."""
    return tuple(_ids(tokenizer, after.removesuffix(header) if header else after))


def _ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _try(tokenizer, template: str, messages) -> str | None:
    try:
        return render(tokenizer, template, messages, header=False)
    except ValueError:
        return None


def _refuse_products(template: str) -> None:
    """Raises ValueError for a template that multiplies or takes powers: a few characters could ask for all memory."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return  # transformers knows more statements than plain Jinja; what is broken fails when it is rendered
    for node in tree.find_all((nodes.Mul, nodes.Pow)):
        raise ValueError(
            f"line {node.lineno} of the chat template multiplies, which could take all memory: "
            f"use a checkpoint with another template"
        )


def chat_ids(tokenizer, messages: Sequence[Message], mask: int) -> list[int]:
    """Ids of a conversation, ready for the answer.

    A special token spelled in a message is plain text there, never a turn of its own. Raises ValueError where the
    template fails or the mask token remains in the text.
    """
    template = ChatTemplate.of(tokenizer)
    specials = [token for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} if token]
    spelled = [any(token in str(message.get("content")) for token in specials) for message in messages]
    if not any(spelled):
        ids = _ids(tokenizer, template.prompt(messages))
    else:
        names = [f"{QUESTION}x{number}y" for number in range(len(messages))]
        marked = [
            {**message, "content": name if odd else message["content"]}
            for message, name, odd in zip(messages, names, spelled, strict=True)
        ]
        rest, ids = template.prompt(marked), []
        for message, name, odd in zip(messages, names, spelled, strict=True):
            if odd and name in rest:
                before, rest = rest.split(name, 1)
                ids += _ids(tokenizer, before) + _plain_ids(tokenizer, message["content"])
        ids += _ids(tokenizer, rest)
    if mask in ids:
        raise ValueError("the chat template writes the mask token: use a checkpoint with another template")
    return ids


def last_turns(messages: Sequence[Message], turns: int | None) -> list[Message]:
    """A conversation from its `turns`-th last request on, behind its system messages; all of it for None."""
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = 0 if turns is None or len(asked) <= turns else asked[-turns]
    return [m for i, m in enumerate(messages) if i >= first or m["role"] in ("system", "developer")]


def _plain_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens are plain text."""
    from dlm.tokenizer import encode_documents

    return encode_documents(tokenizer, [text])[0]


class _TooSlow(Exception):
    pass


class _Deadline:
    """Raises `_TooSlow` in the code of the `with` block once it has run for `seconds`, in whichever thread it runs."""

    def __init__(self, seconds: float):
        self.timer = threading.Timer(seconds, self._expire)
        self.timer.daemon = True
        self.lock = threading.Lock()

    def __enter__(self) -> _Deadline:
        self.thread, self.done = threading.get_ident(), False
        self.timer.start()
        return self

    def _expire(self) -> None:
        with self.lock:
            if not self.done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(_TooSlow))

    def __exit__(self, *_) -> None:
        with self.lock:
            self.done = True
        self.timer.cancel()
