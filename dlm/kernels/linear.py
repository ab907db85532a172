"""Linear layers for inference: one interface, one class per GEMM backend.

Shapes: N rows (tokens), I inputs, O outputs.

`of` makes one of several layers of a checkpoint that read the same input, `__call__` is y = x W^T + b, and `plus` adds
a residual. `kind_for` says which class suits a device and a type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.kernels import fp8, int8
from dlm.kernels.fp8 import Float8
from dlm.kernels.int8 import Int8, QuantizedLinear, joined
from dlm.utils.names import check_name

__all__ = ["QUANTIZED", "Blocked", "Plain", "has_kernels", "kind_for", "quantize_", "rows_made"]


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN, and it is fast for this type."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 and torch.cpu._is_avx2_supported()


@dataclass(frozen=True)
class Plain:
    """The GEMM of torch, which is the fast one on a GPU."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Plain:
        return cls(joined(weights), joined(biases))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum, on a GPU in the residual's memory, to which the product adds as it writes."""
        if self.bias is not None or not residual.is_cuda:
            return F.linear(x, self.weight, self.bias).add_(residual)
        return residual.flatten(0, -2).addmm_(x.flatten(0, -2), self.weight.t()).view(residual.shape)


EXACT, STEPS = 32, 16  # rows up to which a product is made for each number of them, and numbers an octave beyond


def rows_made(rows: int) -> int:
    """The number of rows that a product of `rows` is made for: the same, or beyond EXACT up to a sixteenth more.

    oneDNN makes a program for each number of rows, and keeps a thousand (ideep beside it another thousand). Measured on
    a CPU with AVX2 beside other load: 4 to 13 ms each where a call takes 0.4, and 0.3 to 0.6 MB. A server meets every
    number of rows: 800 requests to a tiny model made it grow by 350 MB.
    """
    if rows <= EXACT:
        return rows
    step = 2 ** (rows - 1).bit_length() // (2 * STEPS)
    return -(-rows // step) * step


@dataclass(frozen=True)
class Blocked:
    """oneDNN's product on a weight that was blocked once for a processor's registers. Rows of zeros fill it up to
    `rows_made`; a row has the same bits in every number of them."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Blocked:
        weight = joined(weights).contiguous()
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, 32), joined(biases))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if (made := rows_made(rows)) == rows:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        y = torch.ops.mkldnn._linear_pointwise(_filled(x, made), self.weight, self.bias, "none", [], "")
        return y[:rows].view(*x.shape[:-1], y.shape[-1])

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if (made := rows_made(rows)) == rows:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        both = _filled(x, made), _filled(residual, made)
        return torch.ops.mkldnn._linear_pointwise.binary(*both, self.weight, self.bias, "add")[:rows].view_as(residual)


def _filled(x: Tensor, rows: int) -> Tensor:
    """x (..., I) as (rows, I), zeros behind its own."""
    x = x.flatten(0, -2)
    return torch.cat([x, x.new_zeros(rows - len(x), x.shape[-1])])


def kind_for(device: torch.device, dtype: torch.dtype) -> type[Plain] | type[Blocked] | None:
    """The class for whole weights of this type on this device; None where the layers as they are do as well."""
    if device.type == "cuda":
        return Plain
    return Blocked if device.type == "cpu" and has_kernels(dtype) else None


# ---------------------------------------------------------------- eight bits


@dataclass(frozen=True)
class Kind:
    """layer: the class of the linear layers; numbers: of their weights; base: of all else; refusal: why a device cannot
    do it."""

    layer: type[QuantizedLinear]
    numbers: torch.dtype
    base: str
    refusal: Callable[[torch.device], str | None]


QUANTIZED = {
    "int8": Kind(Int8, torch.int8, "auto", int8.refusal),
    "fp8": Kind(Float8, torch.float8_e4m3fn, "bfloat16", fp8.refusal),
}


@torch.no_grad()
def quantize_(model: nn.Module, name: str) -> nn.Module:
    """Replaces the linear layers of the model's blocks, in place, by those with few bits; embeddings and the head,
    whose errors no later layer evens out, stay as they are. So do mixtures of experts, which a warning says.

    Raises ValueError for an unknown name, or one that the model's device cannot do.
    """
    check_name("dtype", name, QUANTIZED)
    kind = QUANTIZED[name]
    if reason := kind.refusal(model.device):
        raise ValueError(reason)
    for block in model.model.transformer.blocks:
        for child, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, child, kind.layer.from_linear(linear).train(linear.training))
    if said := left_whole(model, name):
        warnings.warn(said, stacklevel=2)
    return model


def left_whole(model: nn.Module, name: str) -> str | None:
    """What `quantize_` left of the model's mixtures of experts, in one line; None where it has none."""
    layers = [layer for layer, block in enumerate(model.model.transformer.blocks) if block.mixture]
    if not layers:
        return None
    blocks = model.model.transformer.blocks
    weights = [weight for layer in layers for weight in blocks[layer].moe.parameters()]
    held, whole = (sum(weight.nbytes for weight in each) for each in (weights, _stored(model)))
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers ({layers[0]} to {layers[-1]})"
    kind = str(weights[0].dtype).removeprefix("torch.")
    return (
        f"{name} leaves the experts of {where} in {kind}: {held / 1e9:.3g} GB of the model's {whole / 1e9:.3g} GB stay "
        "as they are"
    )


def _stored(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
