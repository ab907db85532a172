"""The weights of one transformer layer, laid out for the processor: few, large products.

Shapes: D head size, R the dimensions of a head that rotary positions turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dlm.kernels.int8 import QuantizedLinear
from dlm.kernels.linear import QUANTIZED, Blocked, Plain
from dlm.kernels.native import Panels
from dlm.models.moe import MoE

if TYPE_CHECKING:  # generation from a file does without it, and its import takes seconds
    from dlm.models.transformer import LLaDABlock

__all__ = ["FEW_BITS", "Layer", "let_go", "pack_layer", "release_weights"]

Linear = Plain | Blocked | Panels | QuantizedLinear
Of = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Linear]
FEW_BITS = tuple(kind.layer for kind in QUANTIZED.values())


@dataclass(frozen=True)
class Layer:
    """One layer. qk and v in one product, but in the last layer, where fewer queries than keys are wanted. A mixture of
    experts is used as it is, `moe`. rope: whether queries and keys are turned by their positions."""

    q: Linear | None
    qkv: Linear | None
    kv: Linear | None
    out: Linear
    gate_up: Linear | None
    down: Linear | None
    moe: MoE | None
    attn_norm: Tensor
    ff_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    rope: bool


def _interleave(rows: Tensor, size: int, turned: int) -> Tensor:
    """The rows of every head in the order 0, R/2, 1, R/2 + 1 ...: a rotary pair side by side, as complex numbers are.

    turned: R, the first dimensions of a head, which rotary positions turn; the others keep their places. Queries and
    keys are permuted alike, so that their products stay what they were.
    """
    heads = rows.unflatten(0, (-1, size))
    pairs = heads[:, :turned].unflatten(1, (2, turned // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((pairs, heads[:, turned:]), dim=1).flatten(0, 1)


def pack_layer(block: LLaDABlock, last: bool, rope: bool, of: Of, gate_up: Of) -> Layer:
    """Copies the weights of `block`. last: whether it is the last layer; rope: as in `Layer`; of: makes a linear layer
    of whole weights, gate_up: that of gate and up."""
    size, part = block.head_dim, block.config.rotary.size
    turned = {block.q_proj, block.k_proj}

    def joined(*linears: nn.Module, of: Of = of) -> Linear:
        def rows(name: str) -> list[Tensor | None]:
            pieces = [getattr(linear, name) for linear in linears]
            return [
                _interleave(piece.detach(), size, part) if piece is not None and linear in turned else piece
                for linear, piece in zip(linears, pieces, strict=True)
            ]

        if (few := type(linears[0])) in FEW_BITS:
            return few.of(rows("weight"), rows("scale"), rows("bias"))
        return of(rows("weight"), rows("bias"))

    normed = block.qk_norm is not None
    return Layer(
        q=joined(block.q_proj) if last else None,
        qkv=None if last else joined(block.q_proj, block.k_proj, block.v_proj),
        kv=joined(block.k_proj, block.v_proj) if last else None,
        out=joined(block.attn_out),
        gate_up=None if block.mixture else joined(block.ff_proj, block.up_proj, of=gate_up),
        down=None if block.mixture else joined(block.ff_out),
        moe=block.moe if block.mixture else None,
        attn_norm=block.attn_norm.weight.detach(),
        ff_norm=block.ff_norm.weight.detach(),
        q_norm=_interleave(block.q_norm.weight.detach(), size, part) if normed else None,
        k_norm=_interleave(block.k_norm.weight.detach(), size, part) if normed else None,
        rope=rope,
    )


def release_weights(block: LLaDABlock) -> None:
    """Lets the weights of the block's linear layers go; a mixture of experts is used as it is, and stays."""
    for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
        if (linear := getattr(block, name, None)) is not None:
            let_go(linear)


def let_go(linear) -> None:
    """Lets the weights of one linear layer go, of a module or of what a file gave."""
    if isinstance(linear, nn.Module):
        linear.to("meta")
    else:
        linear.weight = linear.bias = None
