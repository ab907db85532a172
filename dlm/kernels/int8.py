"""Linear layers with numbers of eight bits, and what those in integers do on a processor.

Shapes: N rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Int8", "QuantizedLinear", "joined", "quantise", "refusal"]


def joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Rows of several layers in one tensor; one layer's own is not copied."""
    if pieces[0] is None:
        return None
    return torch.cat([piece.detach() for piece in pieces]) if len(pieces) > 1 else pieces[0].detach()


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, I) as int8 (N, I) and fp32 scales (N, 1), x = int8 * scale: the largest of a row becomes 127."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny).div_(127)
    return (x / scale).round_().to(torch.int8), scale


class QuantizedLinear(nn.Module):
    """A linear layer with W = scale q: q (O, I) of eight bits, one scale for each output (O,), b (O,) or None."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> QuantizedLinear:
        """Several layers that read the same input, one below the other."""
        return cls(joined(weights), joined(scales), joined(biases))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self(x).add_(residual)


class Int8(QuantizedLinear):
    """A linear layer with weights of eight bits: W = scale q, one scale for each output (O,), q int8 (O, I).

    The input is rounded to eight bits too, with one scale for each token, its largest number over 127, and the
    product is summed in 32-bit integers (as LLM.int8's vector-wise part, arXiv:2208.07339, section 3.1; symmetric,
    without its outliers). A token's result does not depend on the others. For processors with VNNI.
    """

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> Int8:
        """Rounded to nearest; a row of zeros stays one."""
        weight, scale = quantise(linear.weight.detach())
        return cls(weight, scale[:, 0], None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantise(x.reshape(-1, x.shape[-1]))
        product = _scratch(len(rows), len(self.weight))
        torch._int_mm(rows, self.weight.t(), out=product)
        y = product.float().mul_(self.scale).mul_(scale).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


_KEPT = threading.local()


def _scratch(rows: int, columns: int) -> Tensor:
    """int32 (rows, columns) to be used at once: the same memory at every call of a thread.

    Asked for anew, these megabytes go back to the system after every layer, and each page of them costs a fault.
    """
    size = rows * columns
    if not hasattr(_KEPT, "numbers") or len(_KEPT.numbers) < size:
        with torch.inference_mode(False):
            _KEPT.numbers = torch.empty(size, dtype=torch.int32)
    return _KEPT.numbers[:size].view(rows, columns)


def refusal(device: torch.device) -> str | None:
    """Why models on this device have no use for int8, None where they do."""
    if device.type != "cpu":
        return f"int8 weights are for processors, and the model is on {device}: use fp8 or bfloat16"
    if not torch.cpu._is_vnni_supported():
        return "int8 weights need a processor with AVX512-VNNI, which this one lacks: use bfloat16 or float32"
    return None
