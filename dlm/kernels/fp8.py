"""Linear layers in eight-bit floating point: half the bytes of bf16, and twice its rate where a GPU multiplies them.

Shapes: N tokens, K inputs, O outputs. A number is a float8_e4m3fn (a sign, four bits of exponent, three of mantissa,
at most 448; Micikevicius et al., arXiv:2209.05433) times an fp32 scale: one for each output of the weights, found once,
and one for each token of the activations, found when it is multiplied, so that no token depends on another.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from dlm.kernels.available import triton_kernels
from dlm.kernels.int8 import QuantizedLinear

__all__ = ["Float8", "has_kernel", "quantise", "refusal"]

LARGEST = torch.finfo(torch.float8_e4m3fn).max
MULTIPLE = 16  # of K and O, for the tensor cores


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) as float8 (..., K) and fp32 scales (..., 1), x = float8 * scale: the largest of a row becomes 448.

    A row of zeros stays one. NaN and infinities become NaN, and so do the products, which `denoise_step` refuses.
    """
    if (kernels := triton_kernels(x.device)) is not None:
        return kernels.quantise(x)
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).to(torch.float8_e4m3fn), scale


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether torch multiplies float8 with a scale a row on this device: NVIDIA's, from compute capability 9.0 on.

    Of capability 8.9, torch before 2.12 launches that product outside of the current stream (pytorch issue 177651).
    """
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        x, scale = quantise(torch.zeros(MULTIPLE, MULTIPLE, device=device))
        _product(x, scale, x, scale[:, 0], None)
    except RuntimeError:  # cuBLAS has no such product for some of the newer ones
        return False
    return True


REFUSED: set[tuple[torch.device, int, int, int]] = set()  # (device, N, K, O) that have no product with a scale a row


def _product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(N, O) in bf16 on tensor cores. They add up in less than fp32, and far faster (pytorch issue 147971).

    cuBLASLt has the product with a scale a row for some sizes, GPUs and versions only (pytorch issues 192707, ao 4582)
    and refuses the others; those have a product without scales, which are multiplied in afterwards.
    """
    size = (x.device, *x.shape, len(weight))
    if size not in REFUSED:
        try:
            return torch._scaled_mm(
                x,
                weight.t(),
                scale_a=x_scale,
                scale_b=scale[None],
                bias=bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            REFUSED.add(size)
    one = _one(x.device)
    y = torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)
    y = y.mul_(scale).mul_(x_scale)
    return (y if bias is None else y + bias).bfloat16()


@cache  # a copy from the host waits for the GPU, and a recorded pass reads its memory
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)


class Float8(QuantizedLinear):
    """A linear layer y = x W^T + b, W (O, K) in float8 with scale (O,), and what it reads in float8 with one a token.

    Where `has_kernel` says no, the same numbers are multiplied in fp32: slower than bf16, for tests of quality alone.
    """

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> Float8:
        """Raises ValueError where a size is no multiple of 16."""
        outputs, inputs = linear.weight.shape
        if outputs % MULTIPLE or inputs % MULTIPLE:
            raise ValueError(
                f"a linear layer is {inputs} to {outputs} wide: float8 products take multiples of {MULTIPLE}; "
                "use bfloat16 for this model"
            )
        weight, scale = quantise(linear.weight)
        return cls(weight, scale[:, 0], None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows, x_scale = quantise(x.reshape(-1, x.shape[-1]))
        if has_kernel(x.device):
            y = _product(rows, x_scale, self.weight, self.scale, self.bias)
        else:
            y = rows.float() @ self.weight.float().t() * x_scale * self.scale
            y = (y if self.bias is None else y + self.bias).bfloat16()
        return y.to(x.dtype).view(*x.shape[:-1], len(self.weight))


def refusal(device: torch.device) -> str | None:
    """Why models on this device have no use for float8, None where they do."""
    if has_kernel(device):
        return None
    return f"fp8 weights need an NVIDIA GPU of compute capability 9.0 (H100) or later, not {device}: use bfloat16"
