"""All layers of a pass in one call of what `native` compiles: nothing of Python or torch between them, and threads that
stay together from the first layer to the logits.

Shapes: B batch, Q queried tokens, N tokens of a pass, M places asked about, V ids.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.kernels.by_rows import RowSizes, Stored, Uniform, lay_out, pieces_of
from dlm.kernels.native import POINTER, SIZE, Linear, Native, Panels, Runs, Team
from dlm.models.attention import Visible, attention_mask
from dlm.models.kv_cache import KVCache

if TYPE_CHECKING:
    from dlm.kernels.packed import Packed

__all__ = ["Whole"]


class _Layer(ctypes.Structure):
    """`struct layer`."""

    _fields_ = [("attn_norm", POINTER), ("ff_norm", POINTER)]
    _fields_ += [(name, Linear) for name in ("queries", "kv", "out", "gate_up", "down")]


class _Pass(ctypes.Structure):
    """`struct pass`."""

    _fields_ = [("team", Team), ("layers", POINTER), ("last_norm", POINTER), ("turns", POINTER), ("head", Linear)]
    _fields_ += [
        (name, SIZE) for name in ("count", "heads", "kv_heads", "size", "width", "tokens", "asking", "queries")
    ]
    _fields_ += [(name, SIZE) for name in ("length", "pieces_count", "last_count", "room_size")]
    _fields_ += [("eps", ctypes.c_float)]
    _fields_ += [(name, POINTER) for name in ("x", "normed", "wide", "q", "mixed", "few", "room", "logits")]
    _fields_ += [(name, POINTER) for name in ("slots", "rows", "places", "asked", "asked_slots", "keys", "values")]
    _fields_ += [("pieces", POINTER), ("last_pieces", POINTER)]


class Whole:
    """The passes of a `Packed` whose linear layers are `Panels`, with those numbers that its own layers would give."""

    def __init__(self, packed: Packed):
        self.packed, layers = packed, packed.layers
        self.layers = (_Layer * len(layers))()
        for struct, layer in zip(self.layers, layers, strict=True):
            struct.attn_norm, struct.ff_norm = layer.attn_norm.data_ptr(), layer.ff_norm.data_ptr()
            struct.queries = (layer.q if layer.qkv is None else layer.qkv).struct
            if layer.kv is not None:
                struct.kv = layer.kv.struct
            struct.out, struct.gate_up, struct.down = layer.out.struct, layer.gate_up.struct, layer.down.struct
        held = packed.kv_heads * packed.size
        self.widest = max(packed.width + 2 * held, layers[0].gate_up.outputs)
        self._kept = WeakKeyDictionary()  # of a cache's keys and values, layer by layer

    @staticmethod
    def can_be(packed: Packed) -> bool:
        """Whether queries, keys and values of this copy need nothing but rotary positions, and no layer has experts."""
        return (
            isinstance(packed.small, Native)
            and packed.at_once
            and all(type(layer.gate_up) is Panels and type(layer.out) is Panels for layer in packed.layers)
        )

    @staticmethod
    def serves(cache, logits_to_keep: Tensor | None) -> bool:
        """Whether the pass stores keys and values in their own places, and asks about as many in each row."""
        few = logits_to_keep is None or (logits_to_keep.ndim == 2 and logits_to_keep.dtype != torch.bool)
        return few and (cache is None or type(getattr(cache, "base", None)) is KVCache)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        visible: Visible,
        cache,
        valid: Tensor | None,
        asked: Tensor | None,
        sizes: RowSizes | None,
    ) -> Tensor:
        """Logits (B, Q or M, V), as `Packed` gives them."""
        batch, queries = tokens.shape
        keys = queries if cache is None else cache.length
        seen_keys = (keys,) * batch
        if sizes is not None and set(sizes.queries) == {queries} and set(sizes.asked) == {asked.shape[1]}:
            seen_keys, sizes = sizes.keys, None  # nothing is padded
            if valid is not None and all(count == keys for count in seen_keys) and bool(valid.all()):
                valid = None
        if sizes is not None:
            laid = lay_out(positions, tokens.shape, visible, cache, valid, asked, sizes)
            own = None if cache is not None else torch.arange(len(laid.queries))
            runs = laid.attention.runs(), laid.last_attention.runs()
            rows = laid.cache.rows if isinstance(laid.cache, Stored) else None
            of = laid.asked_of, laid.slots[laid.asked_of]
            few = self._passed(tokens.flatten()[laid.queries], laid.slots, rows, own, runs, *of, cache, 1)
            logits = few.new_zeros(asked.numel(), few.shape[1])
            logits[laid.asked] = few
            return logits.unflatten(0, asked.shape)
        every = torch.arange(queries).expand(batch, -1) if positions is None else positions
        blocks = getattr(visible, "block_length", None) if valid is None else None
        offsets, mask = getattr(visible, "offsets", None), None
        if blocks is None:
            seen = None if cache is None else positions
            mask = attention_mask("sdpa", visible, valid, seen, (batch, queries, keys), tokens.device)
        where = None if cache is None else cache.places

        def runs_of(slots: Tensor, mask: Tensor | None) -> list:
            listed = slots.tolist() if blocks is not None else None
            count = slots.shape[1]
            pieces = pieces_of((count,) * batch, seen_keys, mask, listed, blocks, offsets)
            return Uniform(pieces).runs(count, where)

        runs = runs_of(every, mask)
        if asked is None:
            asked, asked_slots, few_runs = torch.arange(queries).expand(batch, -1), every, runs
        else:
            asked_slots = every.gather(1, asked)
            if mask is not None:
                mask = mask.expand(batch, -1, -1, -1).take_along_dim(asked[:, None, :, None], dim=2)
            few_runs = runs_of(asked_slots, mask)
        among = asked if batch == 1 else queries * torch.arange(batch)[:, None] + asked
        rows = None
        if where is not None and where != list(range(batch)):
            rows = torch.tensor(where).repeat_interleave(queries)
        own = torch.arange(queries).repeat(batch) if cache is None and positions is not None else None
        of = among.flatten(), asked_slots.flatten()
        few = self._passed(tokens.flatten(), every.flatten(), rows, own, (runs, few_runs), *of, cache, batch)
        return few.unflatten(0, asked.shape)

    def _passed(self, tokens, slots, rows, own, runs, asked_of, asked_slots, cache, batch: int) -> Tensor:
        """Logits (M, V) at the tokens asked_of (M,), which stand at asked_slots (M,). Of each token (N,): tokens, its
        id; slots, its slot; rows, its row of the cache, None where every row of the pass has its own; own, without a
        cache, where among the keys of its row of the pass its own lie, None for its slot. runs: what the tokens see,
        and those asked about."""
        packed = self.packed
        slots, asked_of, asked_slots = (x.contiguous() for x in (slots, asked_of, asked_slots))
        count, asking, width = len(tokens), len(asked_of), packed.embedding.shape[1]
        heads, size, length = packed.heads, packed.size, count // batch if cache is None else cache.base.length
        x = F.embedding(tokens, packed.embedding)
        if packed.scale_in is not None:
            x = x * packed.scale_in
        if cache is None:
            shape = (batch, packed.kv_heads, length, size)
            pair = x.new_empty(shape), x.new_empty(shape)
            keys, values = _addresses([pair] * len(packed.layers))
        else:
            keys, values = self._stored(cache.base)
        first, last = (Runs(packed.small, some) for some in runs)
        team = Team.of(14 * len(packed.layers) + 4)
        each = packed.small.attention_room(max(first.most, last.most), size)
        parts = [count * width, count * self.widest, count * heads * size, count * heads * size, 2 * asking * width]
        room = x.new_empty(sum(parts) + team.wanted * each)
        at = [room.data_ptr()]
        for part in parts:
            at.append(at[-1] + 4 * part)
        logits = x.new_empty(asking, packed.head.outputs)
        indices = [None if index is None else index.data_ptr() for index in (slots, rows, own, asked_of, asked_slots)]
        assert packed.turns.is_contiguous()
        asks = _Pass(
            team, ctypes.addressof(self.layers), packed.last_norm.data_ptr(), packed.turns.data_ptr(),
            packed.head.struct, len(packed.layers), heads, packed.kv_heads, size, width, count, asking,
            max(count // batch, 1), length, len(first.pieces), len(last.pieces), each, packed.eps,
            x.data_ptr(), *at, logits.data_ptr(), *indices, ctypes.addressof(keys), ctypes.addressof(values),
            ctypes.addressof(first.pieces), ctypes.addressof(last.pieces),
        )  # fmt: skip
        packed.small.passed(asks)
        return logits if packed.scale_out is None else logits.mul_(packed.scale_out)

    def _stored(self, cache: KVCache) -> tuple[ctypes.Array, ctypes.Array]:
        """Where the keys and the values of each layer lie in a cache, whose memory stays where it is."""
        if (found := self._kept.get(cache)) is None:
            packed = self.packed
            like = packed.embedding.new_empty(0, packed.kv_heads, packed.size)
            found = _addresses([cache.stored(number, like) for number in range(len(packed.layers))])
            self._kept[cache] = found
        return found


def _addresses(stored: list[tuple[Tensor, Tensor]]) -> tuple[ctypes.Array, ctypes.Array]:
    """Of the keys, and of the values, of each layer."""
    assert all(part.is_contiguous() for pair in stored for part in pair)
    return tuple((POINTER * len(stored))(*(pair[i].data_ptr() for pair in stored)) for i in (0, 1))
