"""The mask predictor for inference: the same weights and mathematics, laid out for the processor.

Shapes: B batch, Q queried tokens, T slots of the canvas, M places asked about, D head size, H heads, V embedding_size.

What differs from `transformer` is where the time went: linear layers are those of `linear` (on a CPU, oneDNN on
weights that were blocked once), query, key and value (and gate and up) are one product, rotary positions are one
complex product, residuals are added inside the product before, and the last layer computes only the places asked
about; on a GPU with Triton, and on a CPU where `compiled` asks for it, rotary positions and the cache's scatter are one
kernel, and silu and the product after it another; `compiled` norms and linear layers (`Panels`) are too. The
checkpoint's weights are not touched: these are copies (`packing` says when they are made).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.kernels.available import triton_kernels
from dlm.kernels.by_rows import EndToEnd, RowSizes, Stored, Uniform, lay_out, pieces_of
from dlm.kernels.int8 import QuantizedLinear
from dlm.kernels.layers import Layer, let_go, pack_layer, release_weights
from dlm.kernels.linear import Blocked, kind_for
from dlm.kernels.native import Native, Panels, Runs, native
from dlm.kernels.whole import Whole
from dlm.models.attention import Visible, attention_mask, visible_of
from dlm.models.kv_cache import Drafted, KVCache
from dlm.models.rotary import rotary_angles

if TYPE_CHECKING:  # generation from a file does without it, and its import takes seconds
    from dlm.models.transformer import LLaDAModelLM

__all__ = ["Packed", "attention"]

TURNS = 2**17  # slots whose rotary angles are there from the start, where the model reads so many
WIDEST = 2**24  # scores that attention in bf16 holds at once; beyond it the fused kernel, which holds none


@dataclass(frozen=True)
class _Where:
    """slots (B, Q) of what is computed, None for 0..Q-1, and their rotary turns (B or 1, Q, 1, D / 2)."""

    slots: Tensor | None
    turns: Tensor | None

    def at(self, asked: Tensor) -> _Where:
        """Of the places `asked` (B, M) among these."""
        slots = asked if self.slots is None else self.slots.gather(1, asked)
        if self.turns is None:
            return _Where(slots, None)
        turns = self.turns.expand(len(asked), -1, -1, -1)
        return _Where(slots, turns.take_along_dim(asked[..., None, None], dim=1))


class Packed:
    """A mask predictor with the signature of `LLaDAModelLM.predict`, without gradients.

    A `KVCache` that it fills holds keys in its own order of head dimensions: do not share one with the model.
    release: layer by layer the model's own weights are let go once they are copied, and it can no longer be called.
    """

    @torch.no_grad()
    def __init__(self, model: LLaDAModelLM, release: bool = False):
        self.config = config = model.config
        self.device = model.device
        self.small = _small_operations(model, triton_kernels(model.device))
        # Attributes of a transformers configuration take microseconds each to read: what a layer needs is kept here.
        self.size, self.width, self.eps = config.head_dim, config.n_heads * config.head_dim, config.rms_norm_eps
        self.heads, self.kv_heads, self.norm_each = config.n_heads, config.n_kv_heads, config.qk_norm == "head"
        self.visible = visible_of(config)
        self.scale_in = config.d_model**0.5 if config.input_emb_norm else None
        self.scale_out = config.d_model**-0.5 if config.scale_logits else None
        transformer = model.model.transformer
        blocks = transformer.blocks
        self.embedding = transformer.wte.weight.detach()
        kind = kind_for(self.embedding.device, self.embedding.dtype)
        compiled = isinstance(self.small, Native)
        of = partial(Panels.of, self.small) if compiled else kind.of
        gate_up = partial(Panels.gate_up, self.small) if compiled else kind.of
        self.layers = []
        every = config.rope_layers or (True,) * len(blocks)
        for block, rope in zip(blocks, every, strict=False):  # the list of a config.json may be longer
            self.layers.append(pack_layer(block, block is blocks[-1], rope, of, gate_up))
            if release:
                release_weights(block)
        self.plain_rotary = self.layers[0].q_norm is None and config.rope_layers is None
        self.last_norm = transformer.ln_f.weight.detach()
        tied = config.weight_tying
        head = transformer.wte if tied else transformer.ff_out
        self.head = of([head.weight], [None if tied else head.bias])
        if release and not tied:
            let_go(transformer.ff_out)
        device = self.embedding.device
        # exp(i angle), (T', D / 2), of many slots from the start: a recorded pass (`Graphs`) reads this memory, so that
        # a table that became too short is kept beside the longer one.
        self.limit, self.shorter = config.max_sequence_length, []
        self.turns = self._table(min(self.limit, TURNS))
        self.fixed_shapes = device.type == "cuda"  # a GPU's libraries make a plan for each number of places asked about
        self.additive = device.type == "cuda"
        # Whether a row gets the same bits in every batch; the products of a mixture of experts do not give them.
        self.exact_rows = kind is Blocked and not any(
            layer.moe is not None or isinstance(layer.out, QuantizedLinear) for layer in self.layers
        )

        self.whole = Whole(self) if Whole.can_be(self) else None

    @property
    def kernels(self):
        """The GPU's kernels for small operations, or None for torch; they can be exchanged."""
        return None if isinstance(self.small, Native) else self.small

    @kernels.setter
    def kernels(self, kernels) -> None:
        self.small = kernels

    @property
    def at_once(self) -> bool:
        """Whether one kernel makes queries, keys and values of what the product gives."""
        return self.small is not None and self.plain_rotary

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        visible: Visible | None = None,
        cache=None,
        valid: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        sizes: RowSizes | None = None,
    ) -> Tensor:
        """Logits, as `LLaDAModelLM.predict` gives them. sizes: what each row would compute alone, so that with
        `exact_rows` it gets the same bits."""
        if torch.is_autocast_enabled(kind := self.device.type):  # the products are made for the weights' own type
            asked = {"visible": visible, "cache": cache, "valid": valid, "logits_to_keep": logits_to_keep}
            with torch.autocast(kind, enabled=False):
                return self(tokens, positions, **asked, sizes=sizes)
        batch, queries = tokens.shape
        visible = visible or self.visible
        if cache is not None and positions is None:
            raise ValueError("a cache needs positions (B, Q): the slots whose keys and values are computed now")
        keys = queries if cache is None else cache.length
        if keys > self.limit:
            raise ValueError(
                f"{keys} slots are above the model's max_sequence_length {self.limit}: give it fewer tokens"
            )
        if self.limit > len(self.turns):
            self._lengthen(keys if cache is not None or positions is None else int(positions.max()) + 1)
        sizes = sizes if self.exact_rows else None
        if self.whole is not None and Whole.serves(cache, logits_to_keep):
            return self.whole(tokens, positions, visible, cache, valid, logits_to_keep, sizes)
        if sizes is not None:
            return self._by_rows(tokens, positions, visible, cache, valid, logits_to_keep, sizes)
        x = F.embedding(tokens, self.embedding)
        if self.scale_in is not None:
            x = x * self.scale_in
        slots = None if cache is None else positions
        by_rows = self.exact_rows and valid is None
        blocks = getattr(visible, "block_length", None) if by_rows else None
        mask = None
        if blocks is None:
            mask = attention_mask("sdpa", visible, valid, slots, (batch, queries, keys), tokens.device)
        asked = logits_to_keep if logits_to_keep is not None and logits_to_keep.ndim == 2 else None
        asked = None if asked is None or asked.dtype == torch.bool else asked
        where = self._where(positions, queries, cache)
        if by_rows:
            counts, own = (queries,) * batch, (keys,) * batch
            offsets = getattr(visible, "offsets", None)
            places = None
            if blocks is not None:
                places = [list(range(queries))] * batch if positions is None else positions.tolist()
            bias = Uniform(pieces_of(counts, own, mask, places, blocks, offsets))
        else:
            bias = self._bias(mask, x)
        bias = self._listed(bias, mask, batch, queries, keys)
        for number, layer in enumerate(self.layers[:-1]):
            x = self._layer(layer, number, x, x, where, where, bias, cache)
        few, few_where = x, where
        if asked is not None:
            few = x.take_along_dim(asked[..., None], dim=1)  # (B, M, d_model)
            few_where = where.at(asked)
            if by_rows:
                if mask is not None:
                    mask = mask.expand(batch, -1, -1, -1).take_along_dim(asked[:, None, :, None], dim=2)
                if blocks is not None:
                    places = [[row[i] for i in here] for row, here in zip(places, asked.tolist(), strict=True)]
                bias = Uniform(pieces_of((asked.shape[1],) * batch, own, mask, places, blocks, offsets))
            elif mask is not None:
                mask = mask.expand(batch, -1, -1, -1).take_along_dim(asked[:, None, :, None], dim=2)
                bias = self._bias(mask, x)
            bias = self._listed(bias, mask, batch, asked.shape[1], keys)
        x = self._layer(self.layers[-1], len(self.layers) - 1, few, x, few_where, where, bias, cache)
        if logits_to_keep is not None and asked is None:
            x = x[logits_to_keep] if logits_to_keep.dtype == torch.bool else x.flatten(0, 1)[logits_to_keep]  # (N, D)
        return self._logits(x)

    def _by_rows(self, tokens, positions, visible: Visible, cache, valid, asked: Tensor, sizes: RowSizes) -> Tensor:
        """`__call__` for rows of several sizes, which lie end to end, so that what pads them is not computed; the
        logits of places that no row asks about are 0."""
        laid = lay_out(positions, tokens.shape, visible, cache, valid, asked, sizes)
        at_once = self.at_once and not isinstance(laid.cache, Drafted)
        turns = None if at_once else self.turns[laid.slots][None, :, None]
        where = _Where(laid.slots[None], turns)
        x = F.embedding(tokens.flatten()[laid.queries], self.embedding)[None]
        if self.scale_in is not None:
            x = x * self.scale_in
        bias, last_bias = laid.attention, laid.last_attention
        if isinstance(self.small, Native):
            bias, last_bias = Runs(self.small, bias.runs()), Runs(self.small, last_bias.runs())
        for number, layer in enumerate(self.layers[:-1]):
            x = self._layer(layer, number, x, x, where, where, bias, laid.cache)
        last, few, few_where = len(self.layers) - 1, x[:, laid.asked_of], where.at(laid.asked_of[None])
        x = self._layer(self.layers[-1], last, few, x, few_where, where, last_bias, laid.cache)
        logits = self._logits(x)
        out = logits.new_zeros(asked.numel(), logits.shape[-1])
        out[laid.asked] = logits[0]
        return out.unflatten(0, asked.shape)

    def _logits(self, x: Tensor) -> Tensor:
        """Of what the last layer gave, (..., d_model)."""
        logits = self.head(self._norm(x, self.last_norm))
        return logits if self.scale_out is None else logits * self.scale_out

    def _layer(self, layer: Layer, number: int, x: Tensor, every: Tensor, x_where: _Where, where: _Where, bias, cache):
        """x (B, M, d_model) after the layer, attending to the keys of `every` (B, Q, d_model) and what is stored. Both
        stand where `x_where` and `where` say; on a GPU the sums may lie in the memory of x."""
        normed = self._norm(every, layer.attn_norm)
        asking = normed if x is every else self._norm(x, layer.attn_norm)
        queried = self._queried if where.turns is not None else self._queried_at_once
        q, k, v = queried(layer, number, asking, normed, x_where, where, cache)
        listed = isinstance(bias, EndToEnd | Uniform | Runs)
        mixed = bias.attend(attention, q, k, v) if listed else attention(q, k, v, bias)
        x = layer.out.plus(mixed, x)
        if layer.moe is not None:
            return layer.moe(self._norm(x, layer.ff_norm)).add_(x)
        both = layer.gate_up(self._norm(x, layer.ff_norm))
        if type(layer.gate_up) is Panels:
            return layer.down.plus(both, x)
        if self.small is not None:
            return layer.down.plus(self.small.gated(both), x)
        gate, up = both.chunk(2, dim=-1)
        return layer.down.plus(F.silu(gate).mul_(up), x)

    def _queried(self, layer: Layer, number: int, asking: Tensor, normed: Tensor, x_where, where, cache):
        """Queries (B, M, H, D) of what asks, and keys and values (B, T, H_kv, D)."""
        kv_width = self.kv_heads * self.size
        if layer.qkv is not None:
            qk, v = layer.qkv(normed).split((self.width + kv_width, kv_width), dim=-1)
            if layer.q_norm is None:
                q, k = self._rotated(layer, qk, where.turns).split((self.heads, self.kv_heads), dim=2)
            else:
                q, k = qk.split((self.width, kv_width), dim=-1)
                q = self._rotated(layer, self._head_norm(q, layer.q_norm), where.turns)
                k = self._rotated(layer, self._head_norm(k, layer.k_norm), where.turns)
        else:
            q = layer.q(asking)
            k, v = layer.kv(normed).chunk(2, dim=-1)
            if layer.q_norm is not None:
                q, k = self._head_norm(q, layer.q_norm), self._head_norm(k, layer.k_norm)
            q, k = self._rotated(layer, q, x_where.turns), self._rotated(layer, k, where.turns)
        v = v.unflatten(-1, (-1, self.size))
        if cache is not None:
            k, v = cache.update(number, where.slots, k, v)
        return q, k, v

    def _queried_at_once(self, layer: Layer, number: int, asking: Tensor, normed: Tensor, x_where, where, cache):
        """`_queried` by one kernel that turns what it reads and writes keys and values where they are kept."""
        laid = {}
        if cache is not None:
            base = cache.cache if isinstance(cache, Stored) else cache
            stored = base.stored(number, normed.new_empty(0, self.kv_heads, self.size))
            if isinstance(cache, Stored):
                laid = {"rows": cache.rows}
        else:
            if where.slots is not None:  # rows end to end, whose keys are those of the pass
                laid = {"places": torch.arange(normed.shape[1])}
            shape = (len(normed), self.kv_heads, normed.shape[1], self.size)
            stored = normed.new_empty(shape), normed.new_empty(shape)
        if layer.qkv is not None:
            q = self.small.place(layer.qkv(normed), self.turns, where.slots, self.heads, stored, **laid)
        else:
            q = self.small.place(layer.q(asking), self.turns, x_where.slots, self.heads, None)
            self.small.place(layer.kv(normed), self.turns, where.slots, 0, stored, **laid)
        return q, *(x.transpose(1, 2) for x in stored)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.small is not None and x.stride(-1) == 1:
            return self.small.normed(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _head_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Queries or keys (B, Q, H * D), normed in each head or over all of them."""
        if not self.norm_each:
            return self._norm(x, weight)
        return self._norm(x.unflatten(-1, (-1, self.size)), weight).flatten(-2)

    def _where(self, positions: Tensor | None, queries: int, cache) -> _Where:
        """Where queries stand; without turns where one kernel looks them up, which it can in whole canvases."""
        whole = positions is None if cache is None else type(cache) is KVCache
        if self.at_once and whole:
            return _Where(positions, None)
        turns = self.turns[None, :queries] if positions is None else self.turns[positions]
        return _Where(positions, turns[:, :, None])

    def _table(self, slots: int) -> Tensor:
        """exp(i angle) of the first slots, (T', D / 2)."""
        rotary = self.config.rotary
        cos, sin = rotary_angles(torch.arange(slots, device=self.device), rotary, torch.float32)
        return F.pad(torch.complex(cos, sin)[:, 0], (0, (self.size - rotary.size) // 2), value=1)

    def _lengthen(self, slots: int) -> None:
        """Makes the table long enough for so many slots."""
        if slots > len(self.turns):
            self.shorter.append(self.turns)
            self.turns = self._table(min(self.limit, 2 * slots))

    def _listed(self, bias, mask: Tensor | None, rows: int, queries: int, keys: int):
        """`bias` as compiled attention has it, where attention is compiled: (rows, queries) that see `keys` slots."""
        if not isinstance(self.small, Native):
            return bias
        if not isinstance(bias, Uniform):
            bias = Uniform(pieces_of((queries,) * rows, (keys,) * rows, mask))
        return Runs(self.small, bias.runs(queries))

    def _bias(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The mask (B, 1, Q, T) for `attention`: for every head of a group, and on a GPU as what is added to scores,
        which torch would otherwise make of it in every layer, in rows of a multiple of 16 numbers."""
        if mask is None:
            return None
        mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)
        if not self.additive:
            return mask
        width = mask.shape[-1]
        bias = x.new_full((*mask.shape[:-1], -(-width // 16) * 16), -torch.inf)[..., :width]
        return bias.masked_fill_(mask, 0)

    def _rotated(self, layer: Layer, x: Tensor, turns: Tensor) -> Tensor:
        """x (B, Q, H * D) with its pairs turned where the layer has positions, (B, Q, H, D); in fp32, where it can, in
        place."""
        if not layer.rope:
            return x.unflatten(-1, (-1, self.size))
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, self.size // 2, 2)))
        return torch.view_as_real(pairs.mul_(turns)).flatten(-2).to(x.dtype)


def _small_operations(model, kernels):
    """What makes a layer's norms, rotary positions and silu: Triton on a GPU, what `native` compiles on a CPU where the
    model asks for it, None for torch."""
    if not getattr(model, "compiled", False):
        return kernels
    dtype = model.model.transformer.wte.weight.dtype
    if model.device.type != "cpu" or dtype != torch.float32:
        raise ValueError(
            f"compile is for float32 on a CPU, and the model is {str(dtype).removeprefix('torch.')} on {model.device}: "
            "leave it out"
        )
    return native()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, Q, H, D) and k, v (B, T, H_kv, D), heads joined: (B, Q, H * D).

    mask (B or 1, 1, Q H / H_kv, T): True where a key may be seen, or what is added to scores.

    The queries of a group of heads are rows of one product with the keys they share, so that none is repeated. On a
    CPU in bf16 two products take half the time of the fused kernel, which computes its scores in fp32 there.
    """
    batch, queries, heads, size = q.shape
    groups = heads // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        q = q.reshape(batch, k.shape[1], groups * queries, size)
    fused = q.device.type != "cpu" or q.dtype == torch.float32
    if fused or q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] > WIDEST:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        scores = q * size**-0.5 @ k.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1) @ v
    return out.reshape(batch, heads, queries, size).transpose(1, 2).flatten(2)
