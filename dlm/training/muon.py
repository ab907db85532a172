"""Muon with all matrices of one shape in one product, and in a number type that the processor is fast at.

Shapes: K matrices of one shape, R rows, C columns, R <= C.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7


def product_type(device: torch.device) -> torch.dtype:
    """The type of the Newton-Schulz products: bf16 on a GPU and on a CPU with bf16 instructions, else fp32.

    A 704 x 256 x 704 product: 7.9 GFLOP/s in bf16 without such instructions, 56.5 in fp32 (one core).
    """
    if device.type != "cpu":
        return torch.bfloat16
    try:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    except AttributeError:  # a build for another kind of processor
        fast = False
    return torch.bfloat16 if fast else torch.float32


def orthogonalise(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = EPS) -> Tensor:
    """Newton-Schulz: (K, R, C) -> matrices with the same singular vectors and singular values near 1, in stack's type.

    The quintic iteration x <- a x + (b g + c g g) x with g = x x^T, from x over its Frobenius norm (Muon, K. Jordan
    2024; the same as `torch.optim.Muon`, for several matrices at once).
    """
    a, b, c = coefficients
    x = stack / torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, state and update the same: fewer and larger products, in `product_type`."""

    @torch.no_grad()
    def step(self, closure=None):
        """One optimizer step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            if parameters:
                self._update(group, parameters, gradients, momenta)
        return loss

    def _update(self, group, parameters, gradients, momenta) -> None:
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        moves = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, int], list[int]] = {}
        for number, parameter in enumerate(parameters):
            alike.setdefault(tuple(parameter.shape), []).append(number)
        for shape, numbers in alike.items():
            stack = torch.stack([moves[number] for number in numbers]).to(product_type(parameters[0].device))
            tall = shape[0] > shape[1]
            made = orthogonalise(stack.mT if tall else stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
            made = (made.mT if tall else made).to(parameters[0].dtype)
            rate = group["lr"] * _ratio(group["adjust_lr_fn"], shape)
            torch._foreach_add_([parameters[number] for number in numbers], list(made.unbind()), alpha=-rate)


def _ratio(rule: str | None, shape: tuple[int, int]) -> float:
    """What the learning rate is multiplied by for a matrix of this shape (arXiv:2502.16982 for match_rms_adamw)."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
