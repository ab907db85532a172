"""Documents -> Examples -> packed Batches.

Shapes: B rows in a batch, T row length, E examples in a batch.

A row holds several examples; `segments` says which token belongs to which, and a token sees its own example only, so
that which examples share a row does not change the loss. Order is a function of (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dlm.data.documents import Documents
from dlm.utils.random import CROP, PROMPT, example_generator

PAD_SEGMENT = -1


@dataclass(frozen=True)
class Example:
    """One thing to learn: tokens (L,) int64, target (L,) bool (which of them carry loss), its index in the data."""

    tokens: np.ndarray
    target: np.ndarray
    index: int

    def __post_init__(self):
        if self.tokens.shape != self.target.shape or self.tokens.ndim != 1:
            raise ValueError(
                f"example {self.index} has tokens of shape {self.tokens.shape} and target of shape "
                f"{self.target.shape}: both must be one row of the same length"
            )


@dataclass(frozen=True)
class Batch:
    """Packed examples.

    tokens (B, T) int64; segments (B, T) int64: the number e of the token's example in this batch, -1 for padding;
    target (B, T) bool; positions (B, T) int64: place within the example; index (E,) and epoch (E,) int64: which
    example of the data, in which pass over it (together they name its noise). advantages (E,) fp32, where an objective
    weighs examples by a reward; None elsewhere.
    """

    tokens: Tensor
    segments: Tensor
    target: Tensor
    positions: Tensor
    index: Tensor
    epoch: Tensor
    advantages: Tensor | None = None

    def __post_init__(self):
        assert self.tokens.shape == self.segments.shape == self.target.shape == self.positions.shape
        assert self.index.shape == self.epoch.shape
        assert self.advantages is None or self.advantages.shape == self.index.shape

    def to(self, device) -> Batch:
        tensors = (self.tokens, self.segments, self.target, self.positions, self.index, self.epoch, self.advantages)
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))


def pack(rows: Sequence[Sequence[tuple[int, Example]]], length: int, pad_id: int) -> Batch:
    """Lay rows of (epoch, example) out as a Batch of `length` columns. Errors: a row that does not fit."""
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    segments = np.full(shape, PAD_SEGMENT, dtype=np.int64)
    target = np.zeros(shape, dtype=bool)
    positions = np.zeros(shape, dtype=np.int64)
    index, epochs = [], []
    for r, row in enumerate(rows):
        start = 0
        for epoch, example in row:
            end = start + len(example.tokens)
            if end > length:
                raise ValueError(
                    f"example {example.index} ends at token {end} of a row of {length}: shorten it or use longer rows"
                )
            tokens[r, start:end] = example.tokens
            segments[r, start:end] = len(index)
            target[r, start:end] = example.target
            positions[r, start:end] = np.arange(end - start)
            index.append(example.index)
            epochs.append(epoch)
            start = end
    arrays = (tokens, segments, target, positions, np.array(index, np.int64), np.array(epochs, np.int64))
    return Batch(*(torch.from_numpy(array) for array in arrays))


# ------------------------------------------------------------------------------------------- examples, rows, batches


class Examples:
    """Documents cut into examples of at most `length` tokens: a long one gives consecutive examples.

    An example's number is its index over all sources in order; it names its noise. weights: each source's share of the
    examples of an epoch; None: every example once.
    """

    def __init__(self, documents: Sequence[Documents], length: int, weights: Sequence[float] | None = None):
        if length < 2:
            raise ValueError(f"sequence_length is {length}: an example needs at least 2 tokens")
        assert weights is None or len(weights) == len(documents)
        self.documents, self.length, self.weights = list(documents), length, weights
        files, starts, lengths, owners, first = [], [], [], [], 0
        for number, part in enumerate(self.documents):
            sizes = np.diff(part.starts)
            pieces = -(-sizes // length)
            owner = np.repeat(np.arange(len(part)), pieces)
            within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
            start = part.starts[owner] + within * length
            files.append(np.full(len(owner), number))
            starts.append(start)
            lengths.append(np.minimum(part.starts[owner + 1] - start, length))
            owners.append(owner + first)
            first += len(part)
        self.files, self.starts = np.concatenate(files), np.concatenate(starts)
        self.lengths, self.owners = np.concatenate(lengths), np.concatenate(owners)  # owner: document over all files

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        part, start = self.documents[self.files[index]], self.starts[index]
        end = start + self.lengths[index]
        tokens = np.asarray(part.tokens[start:end]).astype(np.int64)
        target = tokens != part.bos_id if part.target is None else np.asarray(part.target[start:end])
        return Example(tokens, target, int(index))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def signature(self) -> str:
        """What must be the same for an exact resume."""
        return f"{len(self)} examples of at most {self.length} tokens"

    def describe(self) -> str:
        return f"{self.tokens:,} tokens in {len(self):,} examples"

    def rows_in_epoch(self, seed: int, packing: bool = True) -> int:
        """Rows of the first pass over the data."""
        return len(epoch_rows(self, seed, 0, packing))

    def stream(self, seed: int, packing: bool = True, position: tuple[int, int] | None = None) -> Stream:
        return Stream(self, seed, position or (0, 0), packing)


def pack_rows(lengths: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    """Put examples into rows of `length`, each into the fullest open row that still holds it (online best fit).

    Open rows are kept by the room they have left; a bit set of the rooms in use finds the smallest that fits, so that
    the cost does not grow with the number of rows. Rows come in the order in which they were begun.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    in_use = 0
    for example in order:
        size = int(lengths[example])
        fitting = in_use >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                in_use &= ~(1 << room)
            rows[row].append(int(example))
        else:
            room, row = length, len(rows)
            rows.append([int(example)])
        left = room - size
        if left:
            by_room[left].append(row)
            in_use |= 1 << left
    return rows


class Stream:
    """An endless sequence of packed rows; its position (epoch, row) is all that a checkpoint needs to keep.

    An epoch is every example once, or as many by the sources' weights, in an order drawn from (seed, epoch). Rows flow
    over the end of an epoch, so that every optimizer step has the same number of them. packing: several examples may
    share a row.
    """

    def __init__(self, examples: Examples, seed: int, position: tuple[int, int] = (0, 0), packing: bool = True):
        self.examples, self.seed, self.packing = examples, seed, packing
        if len(position) != 2 or min(position) < 0:
            raise ValueError(f"position {list(position)} is none of these data: two numbers that are not negative")
        self.epoch, self.row = position
        self.window_digest = ""  # what was read is named by the data's own digest
        self._rows: list[list[tuple[int, int]]] | None = None

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.row

    def fill(self) -> None:
        """Have the rows of the epoch ready. Errors: a position behind its last row."""
        if self._rows is None:
            self._rows = epoch_rows(self.examples, self.seed, self.epoch, self.packing)
            if self.row > len(self._rows):
                raise ValueError(f"position {list(self.position)} is none of these data, of {len(self._rows)} rows")

    def take(self, count: int) -> list[list[tuple[int, int]]]:
        """The next `count` rows, each a list of (epoch, example index)."""
        taken = []
        while len(taken) < count:
            self.fill()
            if self.row == len(self._rows):
                self.epoch, self.row, self._rows = self.epoch + 1, 0, None
                continue
            taken.append(self._rows[self.row])
            self.row += 1
        return taken


def epoch_rows(examples: Examples, seed: int, epoch: int, packing: bool = True) -> list[list[tuple[int, int]]]:
    """The rows of one epoch, each a list of (visit, index), shuffled by (seed, epoch).

    The visit says how often the example was met before: with it, the example has new noise each time.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    if examples.weights is None:
        index = generator.permutation(len(examples))
        visit = np.full(len(index), epoch)
    else:
        visit, index = _mixture(examples, seed, epoch)
        shuffled = generator.permutation(len(index))
        visit, index = visit[shuffled], index[shuffled]
    rows = (
        pack_rows(examples.lengths[index], range(len(index)), examples.length)
        if packing
        else [[i] for i in range(len(index))]
    )
    return [[(int(visit[i]), int(index[i])) for i in row] for row in rows]


def _mixture(examples: Examples, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(visit, index) of the examples of one epoch, each source giving its share of len(examples).

    A source is an endless sequence of shuffled passes over its own examples, of which an epoch takes the next piece: a
    small source with a great weight is repeated, and none of a source is met again before all of it was.
    """
    shares = np.array(examples.weights) / np.sum(examples.weights) * len(examples)
    counts = np.floor(shares).astype(int)
    for source in np.argsort(counts - shares, kind="stable")[: len(examples) - counts.sum()]:
        counts[source] += 1  # largest remainder
    visits, indices = [], []
    for source, count in enumerate(counts):
        own = np.flatnonzero(examples.files == source)
        visit, place = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(own))
        for turn in np.unique(visit):
            key, counter = [seed, int(turn)], [0, 0, 0, source + 1]
            order = np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(own)
            indices.append(order[place[visit == turn]])
            visits.append(np.full(len(indices[-1]), turn))
    return np.concatenate(visits), np.concatenate(indices)


def fetch(
    examples: Examples, rows: Sequence[Sequence[tuple[int, int]]], pad_id: int, *, random_length: float = 0.0,
    seed: int = 0, width: int | None = None, end_id: int | None = None,
) -> Batch:  # fmt: skip
    """The Batch of rows of (epoch, index), as `Stream.take` gives them.

    random_length, seed: as `crop` takes them. width: columns of the batch (None: the length that examples were cut to).
    end_id: fill each example that was not cut up to `width` with this token, which carries loss (`fill_with_end`).
    """
    width = examples.length if width is None else width
    made: list[list[tuple[int, Example]]] = []
    for row in rows:
        made.append([])
        for epoch, index in row:
            whole = examples[index]
            example = crop(whole, epoch, random_length, seed)
            if end_id is not None and len(example.tokens) == len(whole.tokens):  # a text that was cut does not end
                example = fill_with_end(example, width, end_id)
            made[-1].append((epoch, example))
    return pack(made, width, pad_id)


def fill_with_end(example: Example, length: int, end_id: int) -> Example:
    """`example` with end-of-text tokens up to `length`, part of the answer: LLaDA's rule (arXiv:2502.09992)."""
    missing = length - len(example.tokens)
    tokens = np.concatenate([example.tokens, np.full(missing, end_id)])
    return Example(tokens, np.concatenate([example.target, np.ones(missing, bool)]), example.index)


def drop_prompts(batch: Batch, probability: float, seed: int, mask_id: int) -> Batch:
    """With this probability all of an example that carries no loss becomes masks, for guidance without a prompt.

    The draw belongs to the example: it is a function of (seed, epoch, index) (classifier-free guidance,
    arXiv:2207.12598).
    """
    if probability == 0:
        return batch
    keys = zip(batch.epoch.tolist(), batch.index.tolist(), strict=True)
    dropped = [bool(example_generator(seed, *key, PROMPT).random() < probability) for key in keys]
    given = ~batch.target & (batch.segments != PAD_SEGMENT)
    given &= torch.tensor([*dropped, False])[batch.segments]  # -1, padding, is the last
    return replace(batch, tokens=torch.where(given, mask_id, batch.tokens))


def crop(example: Example, epoch: int, probability: float, seed: int) -> Example:
    """With this probability the first n tokens, n from 1..L: LLaDA's 1% of short texts (arXiv:2502.09992, 2.2).

    A text that does not end lets the model meet lengths below that of its rows. Like noise, the draw belongs to the
    example: it is a function of (seed, epoch, index).
    """
    if probability == 0:
        return example
    generator = example_generator(seed, epoch, example.index, CROP)
    if generator.random() >= probability:
        return example
    length = int(generator.integers(1, len(example.tokens) + 1))
    return Example(example.tokens[:length], example.target[:length], example.index)
