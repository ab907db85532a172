"""Rows of a prompt, a chosen and a rejected answer -> pairs of examples that share a row.

TRL's formats: `prompt`, `chosen`, `rejected` as text or as lists of messages; without `prompt`, two conversations that
differ in their last answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from dlm.chat_template import ChatTemplate
from dlm.data.conversations import ChatFormat, encode_conversation
from dlm.data.documents import Documents, cached, join, token_type
from dlm.data.examples import Examples, Stream
from dlm.data.sources import checked, columns_of, identity, read_rows

__all__ = ["Pairs", "load_pairs", "messages_of_pair"]


class Pairs(Examples):
    """Examples of which 2i is chosen and 2i + 1 rejected; a row holds one pair."""

    def __init__(self, documents: Sequence[Documents]):
        longest = [np.diff(part.starts).reshape(-1, 2).sum(1).max() for part in documents]
        super().__init__(documents, int(max(longest)))

    def rows_in_epoch(self, seed: int, packing: bool = True) -> int:
        return len(self) // 2

    def stream(self, seed: int, packing: bool = True, position=None) -> PairStream:
        return PairStream(self, seed, position or (0, 0), packing)

    def describe(self) -> str:
        return f"{self.tokens:,} tokens in {len(self) // 2:,} pairs"


class PairStream(Stream):
    """An endless sequence of pairs, each pass over the data in an order drawn from (seed, epoch)."""

    def fill(self) -> None:
        if self._rows is None:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
            order = generator.permutation(len(self.examples) // 2)
            self._rows = [[(self.epoch, 2 * int(i)), (self.epoch, 2 * int(i) + 1)] for i in order]


def load_pairs(path, tokenizer, form: ChatFormat, *, split: str = "train", cache=None) -> Documents:
    """Tokenize the pairs of a source once: chosen and rejected in turn, with loss on the last answer.

    `counts` has the rows that were read, and those left out: too long, or bad (where the format says so).
    Raises ValueError: those of `read_rows`; missing columns, equal answers, no pair that fits.
    """
    named = ("pairs", identity(path, split), form, tokenizer.chat_template if form.chat else None)
    return cached(path, named, tokenizer, lambda: _tokenize(path, tokenizer, form, split), cache)


def _tokenize(path, tokenizer, form: ChatFormat, split: str) -> Documents:
    template = ChatTemplate.of(tokenizer, pinned=True) if form.chat else None
    counts = {"rows": 0, "too_long": 0, "bad_rows": 0}
    pieces, targets, size = [], [], 0
    bad = partial(form.bad_row, counts)
    for where, row in read_rows(path, split, on_bad=bad):
        counts["rows"] += 1
        try:
            pair = [
                encode_conversation(tokenizer, messages, form, where, template, counts)
                for messages in messages_of_pair(row, where)
            ]
            if np.array_equal(pair[0][0], pair[1][0]):
                raise ValueError(
                    f"{where}: chosen and rejected have the same tokens, from which nothing can be learned"
                )
        except ValueError as error:
            bad(error)
            continue
        if max(len(ids) for ids, _ in pair) > form.length:  # a cut answer is not the one that was preferred
            counts["too_long"] += 1
            continue
        for ids, target in pair:
            pieces.append(ids.astype(token_type(tokenizer)))
            targets.append(target)
            size += int(target.sum())
    if not pieces:
        raise ValueError(
            f"{path}: no pair in {counts['rows']} rows ({counts['too_long']} longer than {form.length} tokens, "
            f"{counts['bad_rows']} bad): give other data or a greater --sequence-length"
        )
    return join(pieces, targets, tokenizer.bos_token_id, size, counts)


def messages_of_pair(row: dict, where: str) -> tuple[list[dict], list[dict]]:
    """The chosen and the rejected conversation of a row; only the last answer carries loss.

    Raises ValueError: missing columns, other types, answers that are equal.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise ValueError(f"{where}: a pair needs chosen and rejected, and the columns are {columns_of(row)}")
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text, from which nothing can be learned")
    prompt = _messages(row.get("prompt", []), "user", "prompt", where)
    made = [prompt + _messages(answer, "assistant", name, where) for answer, name in
            ((chosen, "chosen"), (rejected, "rejected"))]  # fmt: skip
    for messages, name in zip(made, ("chosen", "rejected"), strict=True):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: {name} is no answer to a prompt: give a column prompt, or messages")
        messages[-1]["loss"] = True
    return made[0], made[1]


def _messages(value, role: str, name: str, where: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": checked(value, where), "loss": False}]
    if isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in value
    ):
        return [{"role": one["role"], "content": checked(one["content"], where), "loss": False} for one in value]
    raise ValueError(f"{where}: column {name!r} is a {type(value).__name__}: give text, or a list of messages")
