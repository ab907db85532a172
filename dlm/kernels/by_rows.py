"""Attention in which each row has its own number of queries and keys, so that its bits do not depend on its batch.

Shapes: B rows, Q queries and T keys of the widest row, N queries of all rows, H heads, D head size.

Measured on a CPU in float32 (tests/kernels/test_by_rows.py): oneDNN's products and all that works on single tokens give
a token the same bits in every batch, and attention does for every number of rows. But another number of keys, hidden or
not, adds the same numbers in another order, and so may another number of queries. So each row has as many as it would
have alone, and fewer than four (or than four behind the last 32), for which threads share one product, are filled up. A
piece is a run of rows with as many queries and keys. Under block-causal visibility a piece is a block with all that is
before it, which needs no mask, and gives a prompt's blocks the same keys whatever follows them.

Rows of several sizes lie end to end (`EndToEnd`), so that nothing is computed of what would pad them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dlm.models.attention import Visible, attention_mask
from dlm.models.kv_cache import Drafted, KVCache

__all__ = ["EndToEnd", "Piece", "RowSizes", "Run", "Stored", "Uniform", "lay_out", "pieces_of"]

SPLIT, FEW = 32, 4  # queries that attention works on together, and below which threads share one
Span = tuple[int, int, int]  # first query, the one behind the last, number of keys
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class RowSizes:
    """What each row of a padded pass would compute alone: its queries, its keys, the places it asks about."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    asked: tuple[int, ...]

    def repeated(self, times: int) -> RowSizes:
        """For a batch that holds the rows so often."""
        return RowSizes(self.queries * times, self.keys * times, self.asked * times)


@dataclass(frozen=True)
class Piece:
    """Rows and queries that attend to the first `keys` keys. mask: as in attention, None where all are seen."""

    rows: slice
    queries: slice
    keys: int
    mask: Tensor | None


def pieces_of(
    queries: Sequence[int],
    keys: Sequence[int],
    mask: Tensor | None,
    slots: list[list[int]] | None = None,
    block_length: int | None = None,
    offsets: Sequence[int] | None = None,
) -> list[Piece]:
    """The pieces of a pass in which row i has `queries[i]` queries and `keys[i]` keys.

    mask (B or 1, 1, Q, T) bool or None. block_length: under block-causal visibility, whose blocks begin offsets[i]
    slots before slot 0; slots: of each row's queries, ascending. The mask is then not read.
    """
    spans = []
    for i, (count, limit) in enumerate(zip(queries, keys, strict=True)):
        count = max(count, 1)  # a row that asks about no place has padding alone
        if block_length is None:
            spans.append(((0, count, limit),))
        else:
            spans.append(_block_spans(slots[i][:count], limit, block_length, offsets[i] if offsets else 0))
    pieces, first = [], 0
    for i in range(1, len(spans) + 1):
        if i < len(spans) and spans[i] == spans[first]:
            continue
        rows = slice(first, i)
        for begin, end, limit in spans[first]:
            part = None
            if mask is not None and block_length is None:
                part = mask[rows if len(mask) > 1 else slice(None), :, begin:end, :limit]
                part = None if bool(part.all()) else part
            pieces.append(Piece(rows, slice(begin, end), limit, part))
        first = i
    return pieces


def _block_spans(slots: list[int], limit: int, block_length: int, offset: int) -> tuple[Span, ...]:
    spans, begin = [], 0
    for i in range(1, len(slots) + 1):
        block = (slots[begin] + offset) // block_length
        if i == len(slots) or (slots[i] + offset) // block_length != block:
            spans.append((begin, i, min((block + 1) * block_length - offset, limit)))
            begin = i
    return tuple(spans)


class Run(NamedTuple):
    """`count` queries of a pass from `first` on, which see slots offset .. offset + keys - 1 of one row of keys.
    mask (count, keys) bool: where they see, None for everywhere."""

    first: int
    count: int
    row: int
    offset: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class Uniform:
    """Attention of rows of one size, piece by piece."""

    pieces: list[Piece]

    def runs(self, queries: int, places: Sequence[int] | None = None) -> list[Run]:
        """For rows of so many queries. places: the row of the keys of each."""
        every = [(row, piece) for piece in self.pieces for row in range(piece.rows.start, piece.rows.stop)]
        return [_run(piece, row, row * queries, (places[row] if places else row, 0)) for row, piece in every]

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, Q, H * D) for q (B, Q, H, D) and k, v (B, T, H_kv, D)."""
        whole = [Piece(slice(0, len(q)), slice(0, q.shape[1]), k.shape[1], None)]
        if self.pieces == whole and not 0 < q.shape[1] % SPLIT < FEW:
            return attention(q, k, v, None)
        out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
        for piece in self.pieces:
            rows, here, limit = piece.rows, piece.queries, piece.keys
            out[rows, here] = _attended(attention, q[rows, here], k[rows, :limit], v[rows, :limit], piece)
        return out


def _run(piece: Piece, row: int, first: int, keys: tuple[int, int]) -> Run:
    """The part of a piece of one of its rows. first: query of the row; keys: row and first slot of its keys."""
    mask = piece.mask
    if mask is not None:
        mask = mask[row - piece.rows.start if len(mask) > 1 else 0, 0]
    here = piece.queries
    return Run(first + here.start, here.stop - here.start, *keys, piece.keys, mask)


def _attended(attention: Attention, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
    """(rows, queries, H * D) of one piece."""
    count, mask, groups = q.shape[1], piece.mask, q.shape[2] // k.shape[2]
    if 0 < count % SPLIT < FEW:
        filled = torch.arange(count + FEW - count % SPLIT).clamp_max(count - 1)
        q, mask = q[:, filled], None if mask is None else mask[:, :, filled]
    mask = mask if mask is None or groups == 1 else mask.repeat(1, 1, groups, 1)
    return attention(q, k, v, mask)[:, :count]


# ---------------------------------------------------------------- rows end to end


@dataclass(frozen=True)
class Stored:
    """A cache for N queries of several rows that lie end to end: rows (N,) of the cache and slots (N,) of each."""

    cache: KVCache
    rows: Tensor
    slots: Tensor

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scatters k, v (1, N, H, D) and returns all that is stored, (rows of the cache, T, H, D)."""
        keys, values = self.cache.stored(layer, k)
        keys[self.rows, :, self.slots] = k[0]
        values[self.rows, :, self.slots] = v[0]
        return keys.transpose(1, 2), values.transpose(1, 2)


@dataclass(frozen=True)
class EndToEnd:
    """Attention of rows that lie end to end: pieces, each of rows that stand beside each other in the cache too;
    counts: queries of each row; own: keys of each row where they are those of the pass; stored: else each row's place
    in the cache."""

    pieces: list[Piece]
    counts: Sequence[int]
    own: Sequence[int] | None
    stored: Sequence[int] | None

    @classmethod
    def of(cls, pieces: Sequence[Piece], counts: Sequence[int], own: Sequence[int] | None, stored=None) -> EndToEnd:
        """Splits pieces whose rows have no keys that lie evenly, and drops those of rows that ask about no place."""

        def even(i: int) -> bool:
            if counts[i] != counts[i + 1]:  # a row that asks about no place, beside one that asks about a single one
                return False
            return own[i] == own[i + 1] if stored is None else stored[i] + 1 == stored[i + 1]

        parts = []
        for piece in pieces:
            first = begin = piece.rows.start
            for i in range(begin, piece.rows.stop):
                if i + 1 < piece.rows.stop and even(i):
                    continue
                if counts[i]:
                    mask = piece.mask
                    mask = mask if mask is None or len(mask) == 1 else mask[first - begin : i + 1 - begin]
                    parts.append(Piece(slice(first, i + 1), piece.queries, piece.keys, mask))
                first = i + 1
        return cls(parts, counts, own, stored)

    def runs(self) -> list[Run]:
        starts = [0, *accumulate(self.counts)]
        firsts = None if self.own is None else [0, *accumulate(self.own)]
        return [
            _run(piece, row, starts[row], (self.stored[row], 0) if firsts is None else (0, firsts[row]))
            for piece in self.pieces
            for row in range(piece.rows.start, piece.rows.stop)
        ]

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1, N, H * D) for q (1, N, H, D), and k, v (1, N', H_kv, D) of the pass or all that is stored."""
        out = q.new_empty(1, q.shape[1], q.shape[2] * q.shape[3])
        starts = [0, *accumulate(self.counts)]
        firsts = None if self.own is None else [0, *accumulate(self.own)]
        for piece in self.pieces:
            first, rows = piece.rows.start, piece.rows.stop - piece.rows.start
            here, shape = slice(starts[first], starts[piece.rows.stop]), (rows, self.counts[first])
            if firsts is None:
                from_here = slice(self.stored[first], self.stored[first] + rows)
                keys, values = k[from_here, : piece.keys], v[from_here, : piece.keys]
            else:
                part = slice(firsts[first], firsts[piece.rows.stop])
                keys, values = (x[0, part].unflatten(0, (rows, self.own[first]))[:, : piece.keys] for x in (k, v))
            asking = q[0, here].unflatten(0, shape)[:, piece.queries]
            out[0, here].unflatten(0, shape)[:, piece.queries] = _attended(attention, asking, keys, values, piece)
        return out


@dataclass(frozen=True)
class LaidOut:
    """A padded pass end to end. queries, slots (N,): each of its queries among the padded ones, and the slot where it
    stands; asked, asked_of (M',): each place asked about among the padded ones, and among the queries."""

    queries: Tensor
    slots: Tensor
    asked: Tensor
    asked_of: Tensor
    attention: EndToEnd
    last_attention: EndToEnd
    cache: Stored | Drafted | None


def lay_out(
    positions: Tensor | None,
    shape: tuple[int, int],
    visible: Visible,
    cache,
    valid: Tensor | None,
    asked: Tensor,
    sizes: RowSizes,
) -> LaidOut:
    """How the rows of a padded pass of `shape` (B, Q) lie end to end; the rest as a mask predictor is asked."""
    batch, width = shape
    keys, seen = (width, None) if cache is None else (cache.length, positions)
    blocks, offsets = getattr(visible, "block_length", None), getattr(visible, "offsets", None)
    every = torch.arange(width).expand(batch, -1) if positions is None else positions
    queries, few = _leading(sizes.queries, width), _leading(sizes.asked, asked.shape[1])
    slots, own, stored = every.flatten()[queries], sizes.queries, None
    if cache is not None:
        own, stored = None, cache.places
        rows = torch.tensor(stored).repeat_interleave(torch.tensor(sizes.queries))
        cache = cache.end_to_end(rows, slots) if isinstance(cache, Drafted) else Stored(cache.base, rows, slots)
    mask = few_mask = places = few_places = None
    if blocks is not None:
        places, few_places = every.tolist(), every.gather(1, asked).tolist()
    elif (mask := attention_mask("sdpa", visible, valid, seen, (batch, width, keys), asked.device)) is not None:
        few_mask = mask.expand(batch, -1, -1, -1).take_along_dim(asked[:, None, :, None], dim=2)
    pieces = pieces_of(sizes.queries, sizes.keys, mask, places, blocks, offsets)
    few_pieces = pieces_of(sizes.asked, sizes.keys, few_mask, few_places, blocks, offsets)
    starts = torch.tensor([0, *accumulate(sizes.queries[:-1])])[:, None]
    return LaidOut(
        queries, slots, few, (starts + asked).flatten()[few],
        EndToEnd.of(pieces, sizes.queries, own, stored), EndToEnd.of(few_pieces, sizes.asked, own, stored), cache,
    )  # fmt: skip


def _leading(counts: Sequence[int], width: int) -> Tensor:
    """(N,) where the first counts[i] of the `width` places of each row i stand in all of them."""
    return torch.cat([torch.arange(i * width, i * width + count) for i, count in enumerate(counts)])
