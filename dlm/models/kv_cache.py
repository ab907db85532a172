"""Keys and values of the slots of a canvas, kept between passes.

Shapes: B batch, T slots of the canvas, Q queried slots, H key heads, D head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Beside", "Drafted", "Further", "KVCache", "Part"]


class KVCache:
    """Preallocated keys (after RoPE) and values, made at the first update of a layer.

    They lie head by head, (B, H, T, D), as attention reads them: in bf16 on a CPU that halves its time.
    """

    def __init__(self, rows: int, length: int):
        self.rows, self.length = rows, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._every = torch.arange(rows)[:, None]

    @property
    def base(self) -> KVCache:
        """The cache that holds the keys and values."""
        return self

    @property
    def places(self) -> list[int]:
        """Where each row of a batch lies in `base`."""
        return list(range(self.rows))

    def at(self, rows: Tensor | None) -> KVCache | _Rows:
        """The cache seen by a batch of these rows (R,); None is all of them, in order."""
        return self if rows is None else _Rows(self, rows)

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scatters k, v (B, Q, H, D) to slots `positions` (B, Q) and returns all keys and values (B, T, H, D)."""
        keys, values = self.stored(layer, k)
        keys[self._every, :, positions] = k
        values[self._every, :, positions] = v
        return keys.transpose(1, 2), values.transpose(1, 2)

    def stored(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values (B, H, T, D), made at the first call for keys `like` (..., H, D)."""
        if layer not in self._layers:
            shape = (self.rows, like.shape[-2], self.length, like.shape[-1])
            self._every = self._every.to(like.device)
            # Zeros, not garbage: a slot that no pass has computed is hidden, but 0 x NaN would still be NaN.
            with torch.inference_mode(False):  # it outlives the caller's mode, and is written outside of it too
                self._layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[layer]

    def clear(self, rows: list[int]) -> None:
        """Fills these rows with zeros."""
        for stored in self._layers.values():
            for x in stored:
                x[rows] = 0

    def part(self, row: int, slots: slice) -> list[tuple[Tensor, Tensor]]:
        """A copy of a row's keys and values (H, slots, D) at these slots, layer by layer."""
        return [tuple(x[row, :, slots].clone() for x in self._layers[layer]) for layer in sorted(self._layers)]

    def put(self, row: int, slots: slice, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Writes what `part` gave."""
        for layer, part in enumerate(parts):
            for x, kept in zip(self.stored(layer, part[0].transpose(0, 1)), part, strict=True):
                x[row, :, slots] = kept

    def copy_rows(self, other: KVCache, rows: slice, to: int) -> None:
        """Copies these rows of a cache that is not longer to the rows from `to` on."""
        for layer, stored in other._layers.items():
            for mine, theirs in zip(self.stored(layer, stored[0].transpose(1, 2)), stored, strict=True):
                mine[to : to + rows.stop - rows.start, :, : other.length] = theirs[rows]


@dataclass(frozen=True)
class _Rows:
    """Some rows of a cache, for a batch that holds only those."""

    cache: KVCache
    rows: Tensor

    @property
    def base(self) -> KVCache:
        return self.cache

    @property
    def places(self) -> list[int]:
        return self.rows.tolist()

    @property
    def length(self) -> int:
        return self.cache.length

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.stored(layer, k)
        keys[self.rows[:, None], :, positions] = k
        values[self.rows[:, None], :, positions] = v
        first, count = int(self.rows[0]) if self.rows.device.type == "cpu" else 0, len(self.rows)
        if self.rows.device.type == "cpu" and self.rows.tolist() == list(range(first, first + count)):  # no copy
            return keys[first : first + count].transpose(1, 2), values[first : first + count].transpose(1, 2)
        return keys[self.rows].transpose(1, 2), values[self.rows].transpose(1, 2)


@dataclass(frozen=True)
class Beside:
    """The stored keys and values of some rows, and behind them those of `count` queries, which are not stored. rows
    (R,): of the cache, None for all."""

    cache: KVCache
    rows: Tensor | None
    count: int

    @property
    def length(self) -> int:
        return self.cache.length + self.count

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        stored = [x if self.rows is None else x[self.rows] for x in self.cache.stored(layer, k)]
        return tuple(torch.cat([x.transpose(1, 2), new], dim=1) for x, new in zip(stored, (k, v), strict=True))


@dataclass(frozen=True)
class Further:
    """A cache as it is seen by layers that are applied again: their keys and values come `ahead` layers further on."""

    cache: KVCache | _Rows | Beside
    ahead: int

    @property
    def length(self) -> int:
        return self.cache.length

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(layer + self.ahead, positions, k, v)


@dataclass(frozen=True)
class Part:
    """Keys and values (Q, H, D) of each layer at the slots `positions` (Q,) of one row of a cache."""

    positions: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def store(self, cache: KVCache, row: int) -> None:
        """Writes them into a row of the cache."""
        for layer, part in enumerate(self.layers):
            for stored, new in zip(cache.stored(layer, part[0]), part, strict=True):
                stored[row, :, self.positions] = new.transpose(0, 1)


class Drafted:
    """The stored keys and values of rows of a cache, each with those of the state that it is asked about put over them.

    index (U,): the cache's row of each row of the pass. true: which rows of the pass belong to the canvas itself, and
    are stored. before[u]: the rows of this pass whose keys are put over the stored slots of row u, in order. keep: the
    rows whose keys and values `part` gives afterwards. length: slots that any row sees.
    """

    def __init__(
        self, cache: KVCache, index: Tensor, true: list[int], before: list[list[int]], keep: list[int], length: int
    ):
        self.cache, self.index, self.length, self.rows = cache, index, length, len(index)
        self.true, self.before = torch.tensor(true, device=index.device), before
        self.places = list(range(self.rows))  # where each row lies in what `update` gives
        self._kept: dict[int, Part] = {row: Part(index.new_empty(0), []) for row in keep}
        self._laid: tuple[Tensor, Tensor] | None = None

    def at(self, rows: Tensor | None) -> Drafted:
        assert rows is None, "the rows of a pass over drafts are chosen already"
        return self

    def end_to_end(self, rows: Tensor, slots: Tensor) -> Drafted:
        """For N queries that lie end to end: rows (N,) of the pass, and slots (N,) of each."""
        self._laid = rows, slots
        return self

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scatters k, v (U, Q, H, D), at slots `positions` (U, Q), or those of queries end to end (1, N, H, D), and
        returns what each row sees, (U, T, H, D)."""
        rows, slots = self._laid or (self._every(k.shape[1]), positions.flatten())
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        mine = {row: rows == row for row in {*self._kept, *(part for parts in self.before for part in parts)}}
        for row, part in self._kept.items():
            part.layers.append((k[mine[row]], v[mine[row]]))
            self._kept[row] = Part(slots[mine[row]], part.layers)
        seen, true = [], torch.isin(rows, self.true)
        for stored, new in zip(self.cache.stored(layer, k), (k, v), strict=True):
            stored[self.index[rows[true]], :, slots[true]] = new[true]
            here = stored[self.index, :, : self.length]
            for row, parts in enumerate(self.before):
                for part in parts:
                    here[row, :, slots[mine[part]]] = new[mine[part]].transpose(0, 1)
            here[rows, :, slots] = new
            seen.append(here.transpose(1, 2))
        return tuple(seen)

    def _every(self, queries: int) -> Tensor:
        return torch.arange(self.rows, device=self.index.device).repeat_interleave(queries)

    def part(self, row: int) -> Part:
        """The keys and values of a row in `keep`, after the pass."""
        return self._kept[row]
