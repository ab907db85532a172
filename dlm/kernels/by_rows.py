"""Attention in which each row has its own number of queries and keys, so that its bits do not depend on its batch.

Shapes: B rows, Q queries and T keys of the widest row, H heads, D head size.

Measured on a CPU in float32 (tests/kernels/test_by_rows.py): oneDNN's products and all that works on single tokens give
a token the same bits in every batch, and so does attention, but for two things: another number of keys, hidden or not,
adds the same numbers in another order, and fewer than four queries (or than four behind the last 32) take another path.
So each row attends to as many keys as it would alone, and a few queries are filled up to four. A piece is a run of rows
with as many keys. Under block-causal visibility a piece is a block with all that is before it, which needs
no mask, and gives a prompt's blocks the same keys whatever follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Piece", "attend", "pieces_of"]

SPLIT, FEW = 32, 4  # queries that attention works on together, and those below which it takes another path
Span = tuple[int, int, int]  # first query, the one behind the last, number of keys


@dataclass(frozen=True)
class Piece:
    """Rows and queries that attend to the first `keys` keys. mask: as in attention, None where all are seen."""

    rows: slice
    queries: slice
    keys: int
    mask: Tensor | None


def pieces_of(
    queries: int,
    keys: Sequence[int],
    mask: Tensor | None,
    slots: list[list[int]] | None = None,
    block_length: int | None = None,
    offsets: Sequence[int] | None = None,
) -> list[Piece]:
    """The pieces of a pass of this many queries in each row, of which row i has `keys[i]` keys.

    mask (B or 1, 1, Q, T) bool or None. block_length: under block-causal visibility, whose blocks begin offsets[i]
    slots before slot 0; slots: of each row's queries. The mask is then not read.
    """
    spans = []
    for i, limit in enumerate(keys):
        if block_length is None:
            spans.append(((0, queries, limit),))
        else:
            spans.append(_block_spans(slots[i], limit, block_length, offsets[i] if offsets else 0))
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
    """(B, Q, H * D) for q (B, Q, H, D) and k, v (B, T, H_kv, D)."""
    few = 0 < q.shape[1] % SPLIT < FEW
    if len(pieces) == 1 and pieces[0].mask is None and pieces[0].keys == k.shape[1] and not few:
        return attention(q, k, v, None)
    out = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
    groups = q.shape[2] // k.shape[2]
    for piece in pieces:
        rows, limit, count = piece.rows, piece.keys, piece.queries.stop - piece.queries.start
        asking, mask = q[rows, piece.queries], piece.mask
        if 0 < count % SPLIT < FEW:
            filled = torch.arange(count + FEW - count % SPLIT).clamp_max(count - 1)
            asking, mask = asking[:, filled], None if mask is None else mask[:, :, filled]
        mask = mask if mask is None or groups == 1 else mask.repeat(1, 1, groups, 1)
        out[rows, piece.queries] = attention(asking, k[rows, :limit], v[rows, :limit], mask)[:, :count]
    return out
