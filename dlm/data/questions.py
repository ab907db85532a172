"""Rows of a prompt and other columns -> the prompts that a model answers, and what reward functions read beside them.

A prompt is a text or a list of messages in the column `prompt` (TRL's formats) or under another name that is known; a
text goes through the chat template where the format says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dlm.chat_template import chat_ids
from dlm.data.columns import PROMPTS
from dlm.data.conversations import ChatFormat
from dlm.data.documents import join, token_type
from dlm.data.examples import Examples, Stream
from dlm.data.sources import columns_of, read_rows
from dlm.tokenizer import encode_prompt

__all__ = ["Questions", "load_questions"]


class Questions(Examples):
    """Prompts to answer. prompts: each as its row has it; columns: the other columns by name, with a value for every
    row (None where it has none); places: where each row stands. A row of a batch is one answer, and each prompt has
    `answers` of them in a pass over the data.

    length is that of the longest prompt and the region behind it.
    """

    def __init__(
        self, documents, prompts: list, columns: dict[str, list], places: list[str], region: int, answers: int
    ):
        super().__init__([documents], int(np.diff(documents.starts).max()) + region)
        self.prompts, self.columns, self.places, self.answers = prompts, columns, places, answers

    def ids(self, index: int) -> list[int]:
        """The tokens of a prompt."""
        return self[index].tokens.tolist()

    def rows_in_epoch(self, seed: int, packing: bool = True) -> int:
        return len(self) * self.answers

    def stream(self, seed: int, packing: bool = True, position=None) -> Stream:
        return Stream(self, seed, position or (0, 0), packing=False)

    def describe(self) -> str:
        return f"{len(self):,} prompts, the longest of {self.length} tokens with its answer"

    @property
    def columns_digest(self) -> str:
        """SHA-256 of the columns that reward functions read."""
        return hashlib.sha256(
            json.dumps([self.prompts, self.columns], sort_keys=True, default=str).encode()
        ).hexdigest()


def load_questions(
    paths: Sequence[str], tokenizer, form: ChatFormat, *, mask: int, region: int, answers: int, split: str = "train"
) -> Questions:
    """The questions of some sources. region: places behind each prompt. mask: the mask id, which no prompt may hold.

    `counts` of the documents has the rows that were read, too long, or bad (where the format leaves those out).
    Raises ValueError: those of `read_rows`; a row without a prompt; no prompt that fits.
    """
    counts = {"rows": 0, "too_long": 0, "bad_rows": 0}
    pieces, prompts, rows, places = [], [], [], []
    bad = partial(form.bad_row, counts)
    for path in paths:
        for where, row in read_rows(path, split, on_bad=bad):
            counts["rows"] += 1
            try:
                name, ids = _encode(row, tokenizer, form, mask, where)
            except ValueError as error:
                bad(error)
                continue
            if len(ids) + region > form.length:
                counts["too_long"] += 1
                continue
            pieces.append(np.array(ids, dtype=token_type(tokenizer)))
            prompts.append(row[name])
            rows.append({key: value for key, value in row.items() if key not in (name, "prompt", "completions")})
            places.append(where)
    if not pieces:
        raise ValueError(
            f"{', '.join(paths)}: no prompt in {counts['rows']} rows ({counts['too_long']} leave no room for {region} "
            f"tokens in {form.length}, {counts['bad_rows']} bad): give other data, or a smaller gen_length"
        )
    targets = [np.ones(len(piece), dtype=bool) for piece in pieces]
    documents = join(pieces, targets, tokenizer.bos_token_id, 0, counts)
    names = {key: None for row in rows for key in row}
    columns = {key: [row.get(key) for row in rows] for key in names}
    return Questions(documents, prompts, columns, places, region, answers)


def _encode(row: dict[str, Any], tokenizer, form: ChatFormat, mask: int, where: str) -> tuple[str, list[int]]:
    """The column of the prompt and its tokens."""
    name = form.prompt or next((name for name in ("prompt", *PROMPTS) if name in row), "")
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        messages = [{"role": "user", "content": value}]
    elif (
        isinstance(value, list)
        and value
        and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
            for one in value
        )
    ):
        messages = value
    else:
        raise ValueError(
            f"{where}: no text or messages for the prompt{f' in column {name!r}' if name else ''}; the columns are "
            f"{columns_of(row)}. Name it with --prompt-column"
        )
    try:
        if form.chat:
            return name, chat_ids(tokenizer, messages, mask)
        if len(messages) != 1:
            raise ValueError(f"{len(messages)} messages, but the plain format takes one text: use --format chat")
        return name, encode_prompt(tokenizer, messages[0]["content"] + form.separator, mask)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
