"""Rows of a conversation, or of a prompt and its response -> Documents that carry loss on the answers alone.

An answer is tokenized apart from what stands before it, so that at generation the same prompt has the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from dlm.chat_template import ChatTemplate
from dlm.data.choices import ON_BAD_ROW, OVERLONG
from dlm.data.columns import COLUMNS, Columns, Message, messages_of
from dlm.data.documents import Documents, cached, join, token_type
from dlm.data.sources import identity, read_rows
from dlm.data.streaming import StreamedSource
from dlm.tokenizer import encode_prompt
from dlm.utils.names import check_name

COUNTS = ("rows", "truncated", "skipped", "without_answer")


@dataclass(frozen=True)
class ChatFormat:
    """How rows become tokens.

    chat: through the tokenizer's chat template; otherwise prompt and separator, as `dlm generate` encodes a prompt,
    then response and end-of-text. messages, prompt, response: columns, "" for those that are known by name. preface: a
    text before the first request of every conversation, with a blank line between them. length: most tokens of an
    example; overlong: `truncate` a longer one or `skip` it. on_bad_row: `stop` at a row that cannot be used, or `skip`
    and count it.
    """

    chat: bool
    length: int
    messages: str = ""
    prompt: str = ""
    response: str = ""
    separator: str = "\n"
    preface: str = ""
    overlong: str = "truncate"
    on_bad_row: str = "stop"

    def __post_init__(self):
        check_name("overlong", self.overlong, OVERLONG)
        check_name("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        if self.messages and (self.prompt or self.response):
            raise ValueError(
                f"columns {self.messages!r} and {self.prompt or self.response!r} are both named: give a column of "
                f"messages, or a prompt and a response"
            )

    @property
    def columns(self) -> Columns:
        return Columns(self.messages, self.prompt, self.response)

    def bad_row(self, counts: dict[str, int], error: ValueError) -> None:
        """Counts a row that cannot be used among `counts`. Raises the error where rows stop at one."""
        if self.on_bad_row == "stop":
            raise ValueError(f"{error} (or leave such rows out: --on-bad-row skip)") from error
        counts["bad_rows"] = counts.get("bad_rows", 0) + 1


class Encoder:
    """Rows -> tokens and targets, with `counts` of what happened to them."""

    def __init__(self, tokenizer, form: ChatFormat, counts: dict[str, int] | None = None):
        self.tokenizer, self.form = tokenizer, form
        self.counts = Counter() if counts is None else counts
        self.counts.update(dict.fromkeys(COUNTS, 0))
        self.template = ChatTemplate.of(tokenizer, pinned=True) if form.chat else None
        self.first_bad: str | None = None

    def bad(self, error: ValueError) -> None:
        """Count a row that cannot be used. Raises the error where the format says so."""
        self.form.bad_row(self.counts, error)
        self.first_bad = self.first_bad or str(error)

    def encode(self, row: dict, where: str) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Tokens (L,), target (L,) and the bytes of the answers; None where the row is left out."""
        self._count("rows")
        try:
            messages, unused = messages_of(row, self.form.columns, where)
            for column in unused:
                self._count(f"{COLUMNS}{column}")
            if not any(message["role"] == "assistant" and message["loss"] for message in messages):
                self._count("without_answer")
                return None
            if self.form.preface:
                messages = _prefaced(messages, self.form.preface)
            ids, target = encode_conversation(self.tokenizer, messages, self.form, where, self.template, self.counts)
        except ValueError as error:
            self.bad(error)
            return None
        if len(ids) > self.form.length:
            self._count("skipped" if self.form.overlong == "skip" else "truncated")
            if self.form.overlong == "skip":
                return None
            ids, target = ids[: self.form.length], target[: self.form.length]
        if not target.any():
            self._count("without_answer")
            return None
        answers = (message["content"] for message in messages if message["role"] == "assistant" and message["loss"])
        return ids, target, sum(len(answer.encode()) for answer in answers)

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


def load_chats(path, tokenizer, form: ChatFormat, *, split: str = "train", cache=None) -> Documents:
    """Tokenize the conversations of a source once, and memory-map the result from then on.

    `counts` of the result has how many rows were read, truncated, skipped as too long, left out because no answer
    was left or because they cannot be used, and which columns were not used. Raises ValueError: those of `read_rows`
    and `ChatTemplate.of`; missing columns, a special token in the text, a source without an answer.
    """
    named = ("chat", identity(path, split), form, tokenizer.chat_template if form.chat else None)
    return cached(path, named, tokenizer, lambda: _tokenize(path, tokenizer, form, split), cache)


def _tokenize(path, tokenizer, form: ChatFormat, split: str) -> Documents:
    encoder = Encoder(tokenizer, form)
    pieces, targets, size = [], [], 0
    for where, row in read_rows(path, split, on_bad=encoder.bad):
        made = encoder.encode(row, where)
        if made is None:
            continue
        ids, target, answers = made
        size += answers
        pieces.append(ids.astype(token_type(tokenizer)))
        targets.append(target)
    counts = dict(encoder.counts)
    if not pieces:
        bad = f", {counts['bad_rows']} that cannot be used, first {encoder.first_bad}" if encoder.first_bad else ""
        raise ValueError(
            f"{path}: no example with an answer in {counts['rows']} rows ({counts['skipped']} too long for "
            f"{form.length} tokens, {counts['without_answer']} without an answer{bad}): give other data or a greater "
            f"length"
        )
    return join(pieces, targets, tokenizer.bos_token_id, size, counts)


def chat_source(paths: Sequence[str], tokenizer, form: ChatFormat, split: str, weight: float = 1.0) -> StreamedSource:
    """The conversations of files one after another, read while they are trained on; errors: `load_chats`'s."""
    encoder = Encoder(tokenizer, form, {})

    def read(skip: int):
        rows = chain.from_iterable(read_rows(path, split, streaming=True, on_bad=encoder.bad) for path in paths)
        for number, (where, row) in islice(enumerate(rows), skip, None):
            made = encoder.encode(row, where)
            if made is not None:
                yield number, *made[:2]

    return StreamedSource(", ".join(map(str, paths)), read, weight, encoder.counts)


def encode_conversation(
    tokenizer, messages: Sequence[Message], form: ChatFormat, where: str,
    template: ChatTemplate | None = None, counts: dict[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Tokens (L,) int64 and target (L,) bool of a conversation: every answer carries loss, and the end of the text.

    Raises ValueError for a special token spelled in a message and for a conversation that does not fit the format.
    """
    specials = sorted(set(tokenizer.all_special_tokens))
    for message in messages:
        for special in specials:
            if special in message["content"]:
                raise ValueError(f"{where}: the text holds the special token {special}: remove it from the data")
    if form.chat:
        parts = _chat_parts(template or ChatTemplate.of(tokenizer, pinned=True), messages, where, counts)
    else:
        parts = _plain_parts(tokenizer, messages, form, where)
    ids, target = [], []
    for text, answer in parts:
        new = text if isinstance(text, list) else tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        target += [answer] * len(new)
    end = tokenizer.eos_token_id
    if end is not None and ids and not (form.chat and end in template_end(template)):
        ids.append(end)
        target.append(target[-1])
    return np.array(ids, dtype=np.int64), np.array(target, dtype=bool)


def _prefaced(messages: Sequence[Message], preface: str) -> list[Message]:
    """The messages with `preface` before the first one of a user."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    return [
        {**message, "content": f"{preface}\n\n{message['content']}"} if number == first else message
        for number, message in enumerate(messages)
    ]


def template_end(template: ChatTemplate | None) -> tuple[int, ...]:
    """The ids that the template closes an answer with; they may hold the end of the text already."""
    return () if template is None else template.end


def _chat_parts(template: ChatTemplate, messages: Sequence[Message], where: str, counts):
    """(text, whether it carries loss), in order, up to the last answer."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        if answers[0] == 0:
            raise ValueError("the conversation begins with an answer: begin it with a user's or a system's message")
        parts = _turns(template, plain, messages, answers)
        if parts is None:  # a template that writes earlier turns anew (without their reasoning, say): the last alone
            parts = _turns(template, plain, messages, answers[-1:])
            if counts is not None and parts is not None:
                counts["last_answer_only"] = counts.get("last_answer_only", 0) + 1
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if parts is None:
        raise ValueError(
            f"{where}: the tokenizer's chat template writes another text before an answer than with it, so the answer "
            f"cannot be told from its prompt: use a checkpoint with another template, or --format plain"
        )
    return parts


def _turns(template: ChatTemplate, plain, messages: Sequence[Message], answers: Sequence[int]):
    """The parts of a conversation cut before and behind these answers; None where earlier text changes."""
    done, parts = "", []
    for number in answers:
        before, after = template.prompt(plain[:number]), template.text(plain[: number + 1])
        if not before.startswith(done) or not after.startswith(before):
            return None
        parts += [(before[len(done) :], False), (after[len(before) :], messages[number]["loss"])]
        done = after
    return parts


def _plain_parts(tokenizer, messages: Sequence[Message], form: ChatFormat, where: str):
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError(
            f"{where}: {len(messages)} messages ({', '.join(message['role'] for message in messages)}), but the plain "
            f"format takes one prompt and one response: use --format chat"
        )
    prompt, response = (message["content"] for message in messages)
    return [(encode_prompt(tokenizer, prompt + form.separator), False), (response, True)]
