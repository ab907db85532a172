"""Data that is read while it is trained on: it need not fit in memory, nor be tokenized first.

A source is read from its beginning to its end, again and again. Its examples go through a window, in which they are
shuffled and packed; a function of (seed, window) and the source alone, so that every process, each of which reads all
of the data, knows the whole of every step, as it does of data on disk. A checkpoint keeps where the window began.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from dlm.data.documents import words_of
from dlm.data.examples import Example, pack_rows
from dlm.data.sources import read_documents
from dlm.utils.random import WINDOW

Row = tuple[int, np.ndarray, np.ndarray]  # its number in the source, tokens (L,), target (L,) bool
CHUNK = 64  # texts tokenized at once


@dataclass(frozen=True)
class StreamedSource:
    """read(skip): the rows of one pass that make an example, in order, without the first `skip` of the source.

    counts: what happened to the rows that were read, by name; `read` keeps them.
    """

    name: str
    read: Callable[[int], Iterator[Row]]
    weight: float = 1.0
    counts: dict[str, int] = field(default_factory=dict)


def text_source(paths: Sequence[str], tokenizer, column: str, split: str, weight: float = 1.0) -> StreamedSource:
    """The documents of files one after another, tokenized as `load_documents` does it; errors: `read_documents`'s."""

    def read(skip: int) -> Iterator[Row]:
        texts = chain.from_iterable(read_documents(path, column, split, streaming=True) for path in paths)
        texts = islice(texts, skip, None)
        number, words = skip, words_of(tokenizer)
        while chunk := list(islice(texts, CHUNK)):
            for tokens in words.encode(chunk):
                yield number, tokens, tokens != tokenizer.bos_token_id
                number += 1

    return StreamedSource(", ".join(map(str, paths)), read, weight)


class StreamedExamples:
    """What is streamed, cut into examples of at most `length` tokens; takes the place of `Examples` in training.

    Only the examples of the rows that were taken last are held. With several sources each gives its share of the
    examples, by weight, at every moment. An example's index is its place in its source, times the number of sources,
    plus the source's own number: with the visit (how often the source was read before) it names the noise.
    """

    def __init__(self, sources: Sequence[StreamedSource], length: int, window: int):
        if length < 2:
            raise ValueError(f"sequence_length is {length}: an example needs at least 2 tokens")
        if window < 1:
            raise ValueError(f"shuffle_window is {window}: it holds at least one example")
        self.sources, self.length, self.window = list(sources), length, window
        self.held: dict[int, Example] = {}
        self.tokens = None  # not known before the end

    def __getitem__(self, index: int) -> Example:
        return self.held[index]

    @property
    def lengths(self) -> dict[int, int]:
        return {index: len(example.tokens) for index, example in self.held.items()}

    @property
    def signature(self) -> str:
        """What must be the same for an exact resume."""
        names = "; ".join(f"{source.name} (weight {source.weight})" for source in self.sources)
        return f"{names}; cut at {self.length} tokens, windows of {self.window}"

    def describe(self) -> str:
        return f"streamed in windows of {self.window:,} examples"

    def stream(self, seed: int, packing: bool = True, position=None) -> StreamedRows:
        return StreamedRows(self, seed, packing, position)


class _Reader:
    """One source read endlessly; `state` says where: (visit, row, piece of the row, examples before in this visit)."""

    def __init__(self, source: StreamedSource, length: int, state: Sequence[int]):
        self.source, self.length = source, length
        self.visit, self.row, self.piece, self.number = state
        self._examples = self._read()

    @property
    def state(self) -> list[int]:
        return [self.visit, self.row, self.piece, self.number]

    def next(self) -> tuple[int, int, np.ndarray, np.ndarray]:
        """(visit, number in it, tokens, target) of the next example."""
        return next(self._examples)

    def _read(self):
        while True:
            for row, tokens, target in self.source.read(self.row):
                if row != self.row:
                    self.row, self.piece = row, 0
                while (start := self.piece * self.length) < len(tokens):
                    own = slice(start, start + self.length)
                    made = self.visit, self.number, tokens[own].astype(np.int64), target[own]
                    self.piece, self.number = self.piece + 1, self.number + 1
                    yield made
            if self.number == 0:
                raise ValueError(f"{self.source.name}: no example in all of it; give other data or a greater length")
            self.visit, self.row, self.piece, self.number = self.visit + 1, 0, 0, 0


class StreamedRows:
    """An endless sequence of packed rows, as `data.Stream` is one.

    Its position is the window's number, the row in it, and where each source stood (and how many examples it had given)
    when the window began.
    """

    def __init__(self, data: StreamedExamples, seed: int, packing: bool = True, position=None):
        self.data, self.seed, self.packing = data, seed, packing
        self.window, self.row, self._began = position or (0, 0, [[0, 0, 0, 0, 0]] * len(data.sources))
        if len(self._began) != len(data.sources):
            raise ValueError(f"position {list(position)} is none of these data: it has {len(self._began)} sources")
        self._readers = [
            _Reader(source, data.length, state[:4]) for source, state in zip(data.sources, self._began, strict=True)
        ]
        self._given = [state[4] for state in self._began]
        self.window_digest = ""  # SHA-256 of the tokens and targets of the window
        self._rows: list[list[tuple[int, Example]]] | None = None

    @property
    def position(self) -> tuple[int, int, list[list[int]]]:
        return self.window, self.row, self._began

    def take(self, count: int) -> list[list[tuple[int, int]]]:
        """The next `count` rows, each a list of (visit, example index); their examples are held until the next call."""
        taken: list[list[tuple[int, int]]] = []
        self.data.held.clear()
        while len(taken) < count:
            self.fill()
            if self.row == len(self._rows):
                self.window, self.row, self._rows = self.window + 1, 0, None
                continue
            row = self._rows[self.row]
            self.data.held.update((example.index, example) for _, example in row)
            taken.append([(visit, example.index) for visit, example in row])
            self.row += 1
        return taken

    def fill(self) -> None:
        """Have the rows of the window ready."""
        if self._rows is None:
            self._rows = self._fill()
            digest = hashlib.sha256()
            for visit, example in (entry for row in self._rows for entry in row):
                digest.update(repr((visit, example.index, len(example.tokens))).encode())
                digest.update(example.tokens.tobytes() + example.target.tobytes())
            self.window_digest = digest.hexdigest()

    def _fill(self) -> list[list[tuple[int, Example]]]:
        """The rows of the next window: its examples in an order drawn from (seed, window)."""
        self._began = [[*r.state, given] for r, given in zip(self._readers, self._given, strict=True)]
        drawn = [self._next() for _ in range(self.data.window)]
        key, counter = [self.seed, WINDOW], [0, 0, 0, self.window]
        order = np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(len(drawn))
        if not self.packing:
            return [[drawn[place]] for place in order]
        lengths = [len(example.tokens) for _, example in drawn]
        return [[drawn[place] for place in row] for row in pack_rows(lengths, order, self.data.length)]

    def _next(self) -> tuple[int, Example]:
        """The next example, from the source that is furthest behind its share."""
        weights = np.array([source.weight for source in self.data.sources])
        behind = weights / weights.sum() * (sum(self._given) + 1) - self._given
        source = int(np.argmax(behind))
        self._given[source] += 1
        visit, number, tokens, target = self._readers[source].next()
        return visit, Example(tokens, target, number * len(self._readers) + source)
