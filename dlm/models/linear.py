"""Linear layers for inference: one interface, and a class for each way a processor is quick at the product.

Shapes: N rows (tokens), I inputs, O outputs.

`of` makes one of several layers of a checkpoint that read the same input, `__call__` is y = x W^T + b, and `plus` adds
a residual. `kind_for` says which class suits a device and a type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..names import check_name
from . import fp8
from .fp8 import Float8

__all__ = ["QUANTIZED", "Blocked", "Int8", "Plain", "has_kernels", "kind_for", "quantize_"]


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this processor has oneDNN, and it is quick at this type."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.float32 and torch.cpu._is_avx2_supported()


def _joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Rows of several layers in one tensor; one layer's own is not copied."""
    if pieces[0] is None:
        return None
    return torch.cat([piece.detach() for piece in pieces]) if len(pieces) > 1 else pieces[0].detach()


@dataclass(frozen=True)
class Plain:
    """torch's own product: what a GPU's library is quick at."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Plain:
        return cls(_joined(weights), _joined(biases))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).add_(residual)


@dataclass(frozen=True)
class Blocked:
    """oneDNN's product on a weight that was blocked once for a processor's registers."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Blocked:
        weight = _joined(weights).contiguous()
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, 32), _joined(biases))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


def kind_for(device: torch.device, dtype: torch.dtype) -> type[Plain] | type[Blocked] | None:
    """The class for whole weights of this type on this device; None where the layers as they are do as well."""
    if device.type == "cuda":
        return Plain
    return Blocked if device.type == "cpu" and has_kernels(dtype) else None


# ---------------------------------------------------------------- eight bits


class Int8(nn.Module):
    """A linear layer with weights of eight bits: W = scale q, one scale for each output (O,), q int8 (O, I).

    The input is rounded to eight bits too, with one scale for each token, its largest number over 127, and the
    product is summed in 32-bit integers (as LLM.int8's vector-wise part, arXiv:2208.07339, section 3.1; symmetric,
    without its outliers). A token's result does not depend on the others. For processors with VNNI.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Int8:
        return cls(_joined(weights), _joined(scales), _joined(biases))

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> Int8:
        """Rounded to nearest; a row of zeros stays one."""
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        bias = None if linear.bias is None else linear.bias.detach()
        return cls((wide / scale[:, None]).round().to(torch.int8), scale, bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny).div_(127)
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight.t())  # (N, O) int32
        y = product.float().mul_(self.scale).mul_(scale).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


def _int8_refusal(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"int8 weights are for processors, and the model is on {device}: use fp8 or bfloat16"
    if not torch.cpu._is_vnni_supported():
        return "int8 weights need a processor with AVX512-VNNI, which this one lacks: use bfloat16 or float32"
    return None


@dataclass(frozen=True)
class Quantized:
    """layer: the class of the linear layers; base: the type of all else; refusal: why a device cannot do it."""

    layer: type[Int8] | type[Float8]
    base: str
    refusal: Callable[[torch.device], str | None]


QUANTIZED = {"int8": Quantized(Int8, "auto", _int8_refusal), "fp8": Quantized(Float8, "bfloat16", fp8.refusal)}


@torch.no_grad()
def quantize_(model: nn.Module, name: str) -> nn.Module:
    """Replaces the linear layers of the model's blocks, in place, by those with few bits; embeddings and the head,
    whose errors no later layer evens out, stay as they are.

    Raises ValueError for an unknown name, or one that the model's device cannot do.
    """
    check_name("dtype", name, QUANTIZED)
    kind = QUANTIZED[name]
    if reason := kind.refusal(model.device):
        raise ValueError(reason)
    for block in model.model.transformer.blocks:
        for child, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, child, kind.layer.from_linear(linear))
    return model
