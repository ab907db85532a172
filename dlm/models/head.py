"""The output projection, and the loss at it without the logits of all places at once.

Shapes: N places asked about, C places in a chunk, D d_model, V embedding_size.

A vocabulary of 126,464 makes logits the largest thing a training step holds: (N, V) in the weights' type, again in
fp32, and the gradient of both. Here they live for a chunk of places only. The gradients of the hidden states and of
the projection are computed along with the loss, as a weighted sum allows (what comes back in the backward pass is one
number for all places, which they are multiplied by), so that nothing is computed twice. Liger's fused loss computes
the projection a second time where tokens have weights of their own, so it is not used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Head", "Targets", "loss_chunk", "weighted_cross_entropy", "weighted_sum"]

WHOLE = 2**27  # logits; a chunk of so many, 512 MiB in fp32, keeps a GPU busy


def loss_chunk(places: int, vocabulary: int) -> int | None:
    """Places whose logits are computed at a time: None is all, where these are few enough."""
    return None if places * vocabulary <= WHOLE else max(1, WHOLE // vocabulary)


class Targets:
    """What a loss wants at the places asked about: their `tokens` (N,), the `weight` (N,) of each in the sum, and of
    how many places logits may be held at a time, `chunk`.

    No dataclass on purpose: FSDP2 would look into one and round the weights to bf16.
    """

    def __init__(self, tokens: Tensor, weight: Tensor, chunk: int):
        assert tokens.shape == weight.shape and tokens.ndim == 1 and chunk > 0
        self.tokens, self.weight, self.chunk = tokens, weight, chunk


class Head(nn.Linear):
    """x W^T + b; with targets their loss, computed here because sharded weights are whole while this module runs."""

    def forward(self, x: Tensor, targets: Targets | None = None, scale: float = 1.0):
        if targets is None:
            return super().forward(x)
        return weighted_cross_entropy(x, self.weight, self.bias, targets, scale)


def weighted_sum(logits: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(total () with a gradient, cross entropies (N,) without one) of logits (N, V), in fp32 and nats."""
    ce = F.cross_entropy(logits.float(), tokens, reduction="none")
    return (ce * weight).sum(), ce.detach()


def weighted_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`weighted_sum` of the logits scale * (x W^T + b), chunk by chunk; x (..., D) with N places in row order.

    The projection runs in autocast's type where that is on, the softmax in fp32, and the gradient of W is summed over
    chunks in fp32. Errors: fp16, whose small gradients need the loss scale that is not known yet.
    """
    x = x.flatten(0, -2)
    assert len(x) == len(targets.tokens)
    kind = x.device.type
    lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if lowered else x.dtype
    with torch.autocast(kind, enabled=False):
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias)):
            ce, *_ = _by_chunks(x, weight, bias, targets, scale, dtype, (False, False, False))
            return (ce * targets.weight).sum(), ce
        if dtype == torch.float16:
            raise ValueError("loss_chunk computes gradients before the loss is scaled, too small for fp16: use bf16")
        return _WeightedCrossEntropy.apply(x, weight, bias, targets, scale, dtype)


class _WeightedCrossEntropy(torch.autograd.Function):
    """The loss, and with it its gradients, which the backward pass only multiplies."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, scale, dtype):
        ce, *ctx.gradients = _by_chunks(x, weight, bias, targets, scale, dtype, ctx.needs_input_grad[:3])
        ctx.mark_non_differentiable(ce)
        return (ce * targets.weight).sum(), ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, total, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were given away in its first backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(total) for gradient in gradients), None, None, None


def _by_chunks(x, weight, bias, targets, scale, dtype, wanted) -> tuple[Tensor, Tensor | None, Tensor | None, ...]:
    """Cross entropies (N,) fp32, and the gradients of their weighted sum for x, W and b, each where it is wanted."""
    low_weight, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    ce = torch.empty(len(x), device=x.device)
    x_gradient = torch.empty_like(x) if wanted[0] else None
    w_gradient = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    b_gradient = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
    for start in range(0, len(x), targets.chunk):
        here = slice(start, start + targets.chunk)
        part, truth = x[here].to(dtype), targets.tokens[here, None]
        logits = F.linear(part, low_weight, low_bias).mul_(scale)  # (C, V)
        log_p = logits.log_softmax(dim=-1, dtype=torch.float32)
        ce[here] = -log_p.gather(1, truth)[:, 0]
        if not any(wanted):
            continue
        error = log_p.exp_().scatter_add_(1, truth, log_p.new_full(truth.shape, -1.0))  # softmax - one at the truth
        gradient = torch.mul(error, targets.weight[here, None] * scale, out=logits)  # in the logits' place and type
        if wanted[0]:
            x_gradient[here] = gradient @ low_weight
        if wanted[1]:
            if dtype == wide:
                w_gradient.addmm_(gradient.T, part)
            else:
                w_gradient += gradient.T @ part
        if wanted[2]:
            b_gradient += gradient.sum(dim=0, dtype=wide)
    return (
        ce,
        x_gradient,
        None if w_gradient is None else w_gradient.to(weight.dtype),
        None if b_gradient is None else b_gradient.to(bias.dtype),
    )
