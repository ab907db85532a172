"""Keys and values of prompts' blocks that were computed before, for requests that begin with the same blocks.

Shapes: K block length, H key heads, D head size.

Only where that is exact: under block-causal visibility a block's keys depend on it and on what is before it, and with a
predictor of `exact_rows` they have the same bits whatever follows. A request's result does not change; its first pass
computes fewer slots.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor

from dlm.sampling.row import Row
from dlm.sampling.rows import Batch

__all__ = ["Prefixes"]


class Prefixes:
    """Blocks by what they and all blocks before them hold; the longest unused go first once `limit` bytes are full."""

    def __init__(self, limit: int):
        self.limit, self.bytes, self.reused = limit, 0, 0
        self._blocks: OrderedDict[bytes, list[tuple[Tensor, Tensor]]] = OrderedDict()

    def fits(self, batch: Batch, row: Row) -> bool:
        """Whether blocks of this row may be kept and reused."""
        exact = getattr(batch.predictor, "exact_rows", False) and row.method.block_causal
        return exact and row.branches == 1 and row.offset == 0 and self.limit > 0

    def lend(self, batch: Batch, row: Row) -> None:
        """Writes what is known of the row's prompt into the batch's cache, and tells the row."""
        if not self.fits(batch, row):
            return
        known = 0
        for number, name in enumerate(self._names(batch, row)):
            if name not in self._blocks:
                break
            self._blocks.move_to_end(name)
            known = number + 1
            slots = slice(number * row.block_length, known * row.block_length)
            batch.cache.put(row.index, slots, self._blocks[name])
        row.known = known * row.block_length
        self.reused += row.known

    def keep(self, batch: Batch, row: Row) -> None:
        """Takes the blocks of a prompt after the row's first pass."""
        if not self.fits(batch, row):
            return
        for number, name in enumerate(self._names(batch, row)):
            if name not in self._blocks:
                slots = slice(number * row.block_length, (number + 1) * row.block_length)
                self._blocks[name] = batch.cache.part(row.index, slots)
                self.bytes += _size(self._blocks[name])
        while self.bytes > self.limit:
            self.bytes -= _size(self._blocks.popitem(last=False)[1])

    def _names(self, batch: Batch, row: Row) -> Iterator[bytes]:
        """A digest for each whole block before the first one that is written."""
        given = (batch.canvas.given & batch.canvas.valid)[row.index].tolist()
        first = given.index(False) if False in given else len(given)
        tokens: Sequence[int] = batch.canvas.tokens[row.index].tolist()
        digest = hashlib.blake2b(digest_size=16)
        for begin in range(0, first - row.block_length + 1, row.block_length):
            block = tokens[begin : begin + row.block_length]
            digest.update(b"".join(token.to_bytes(4, "little") for token in block))
            yield digest.digest()


def _size(parts: list[tuple[Tensor, Tensor]]) -> int:
    return sum(x.nbytes for part in parts for x in part)
