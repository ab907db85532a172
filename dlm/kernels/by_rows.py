"""Attention in which each row has its own number of queries and keys, so that its bits do not depend on its batch.

Shapes: B rows, Q queries and T keys of the widest row, H heads, D head size.

Measured on a CPU in float32 (tests/kernels/test_by_rows.py): oneDNN's products and all that works on single tokens give
a token the same bits in every batch, and attention does for every number of rows. But another number of keys, hidden or
not, adds the same numbers in another order, and so may another number of queries. So each row has as many as it would
have alone, and fewer than four (or than four behind the last 32), for which threads share one product, are filled up. A
piece is a run of rows with as many queries and keys. Under block-causal visibility a piece is a block with all that is
before it, which needs no mask, and gives a prompt's blocks the same keys whatever follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Piece", "RowSizes", "attend", "pieces_of"]

SPLIT, FEW = 32, 4  # queries that attention works on together, and below which threads share one
Span = tuple[int, int, int]  # first query, the one behind the last, number of keys


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
    found, first = [], 0
    for i in range(1, len(spans) + 1):
        if i < len(spans) and spans[i] == spans[first]:
            continue
        rows = slice(first, i)
        for begin, end, limit in spans[first]:
            part = None
            if mask is not None and block_length is None:
                part = mask[rows if len(mask) > 1 else slice(None), :, begin:end, :limit]
                part = None if bool(part.all()) else part
            found.append(Piece(rows, slice(begin, end), limit, part))
        first = i
    return found


def _block_spans(slots: list[int], limit: int, block_length: int, offset: int) -> tuple[Span, ...]:
    found, begin = [], 0
    for i in range(1, len(slots) + 1):
        block = (slots[begin] + offset) // block_length
        if i == len(slots) or (slots[i] + offset) // block_length != block:
            found.append((begin, i, min((block + 1) * block_length - offset, limit)))
            begin = i
    return tuple(found)


def attend(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
) -> Tensor:
    """(B, Q, H * D) for q (B, Q, H, D) and k, v (B, T, H_kv, D). Queries that pad a row get what its last one gets,
    since they stand in its slot."""
    if len(pieces) == 1 and pieces[0].mask is None and (q.shape[1] % SPLIT >= FEW or q.shape[1] % SPLIT == 0):
        first = pieces[0]
        if (first.rows, first.queries, first.keys) == (slice(0, len(q)), slice(0, q.shape[1]), k.shape[1]):
            return attention(q, k, v, None)
    out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
    groups = q.shape[2] // k.shape[2]
    for number, piece in enumerate(pieces):
        rows, limit, count = piece.rows, piece.keys, piece.queries.stop - piece.queries.start
        asking, mask = q[rows, piece.queries], piece.mask
        if 0 < count % SPLIT < FEW:
            filled = torch.arange(count + FEW - count % SPLIT).clamp_max(count - 1)
            asking, mask = asking[:, filled], None if mask is None else mask[:, :, filled]
        mask = mask if mask is None or groups == 1 else mask.repeat(1, 1, groups, 1)
        out[rows, piece.queries] = attention(asking, k[rows, :limit], v[rows, :limit], mask)[:, :count]
        end, last = piece.queries.stop, number + 1 == len(pieces) or pieces[number + 1].rows != rows
        if last and end < q.shape[1]:
            out[rows, end:] = out[rows, end - 1 : end]
    return out
