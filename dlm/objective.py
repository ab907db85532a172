"""Objectives: Batch (and its noise) -> Loss. Pure functions; all randomness comes in as an argument.

Shapes: B batch, T row length, E examples in the batch, N tokens that carry loss, V vocabulary.

A Loss is a sum, never a mean: the trainer divides by the number of target tokens of the whole optimizer step, over
all micro-batches and processes, which is what makes the gradient independent of how the step was cut up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.data import Batch
from dlm.diffusion import Noise, corrupt
from dlm.models import attention
from dlm.models.attention import both, causal, document


@dataclass(frozen=True)
class Loss:
    """A weighted sum of cross entropies, in nats.

    total: () fp32, differentiable. count: number of target tokens of the batch (the share of the normaliser).
    examples (E,): each example's part of `total`, detached; lengths (E,): each example's target tokens.
    ce (N,), rate (N,): cross entropy of each predicted token and the mask rate of its draw, detached.
    """

    total: Tensor
    count: int
    examples: Tensor
    lengths: Tensor
    ce: Tensor
    rate: Tensor


def masked_diffusion(model, batch: Batch, noise: Noise, mask_id: int) -> Loss:
    """The masked diffusion bound: weighted CE of the masked tokens given the others.

    Logits are computed at masked places only, and the softmax in fp32 on them alone (LLaDA eq. 3).
    """
    xt = corrupt(batch.tokens, noise.masked, mask_id)
    logits = model(
        xt, batch.positions, visible=document(batch.segments), logits_to_keep=noise.masked
    )  # (N, V), row-major over (B, T)
    return _masked_loss(logits, batch, noise)


def block_diffusion(model, batch: Batch, noise: Noise, mask_id: int) -> Loss:
    """The bound of block diffusion: each block's masked tokens given the rest of it and the clean blocks before.

    All blocks in one forward of [x_t ; x_0] with repeated positions (BD3-LM, arXiv:2503.09573).
    The noise must have been drawn block by block: it says how long a block is.
    """
    assert noise.block_length is not None, "noise of whole examples: draw it with NoiseSettings(block_length=...)"
    xt = corrupt(batch.tokens, noise.masked, mask_id)
    logits = model(
        torch.cat([xt, batch.tokens], dim=1),  # (B, 2T)
        torch.cat([batch.positions, batch.positions], dim=1),
        visible=attention.block_diffusion(batch.segments, batch.positions, noise.block_length),
        logits_to_keep=torch.cat([noise.masked, torch.zeros_like(noise.masked)], dim=1),
    )  # (N, V)
    return _masked_loss(logits, batch, noise)


def next_token_targets(batch: Batch) -> Tensor:
    """Target tokens (B, T) bool that have a token of their own example before them: the first cannot be predicted."""
    follows = batch.segments[:, 1:] == batch.segments[:, :-1]
    predicted = torch.zeros_like(batch.target)
    predicted[:, 1:] = batch.target[:, 1:] & follows
    return predicted


def autoregressive(model, batch: Batch, noise: Noise | None = None, mask_id: int | None = None) -> Loss:
    """The causal twin: CE of each target token given those before it in its example (noise is not used)."""
    predicted = next_token_targets(batch)
    predicting = torch.zeros_like(predicted)
    predicting[:, :-1] = predicted[:, 1:]  # the place before
    visible = both(causal, document(batch.segments))
    logits = model(batch.tokens, batch.positions, visible=visible, logits_to_keep=predicting)
    example = batch.segments[predicted]
    ones = torch.ones(example.shape, device=example.device)
    return _loss(logits, batch.tokens[predicted], ones, example, ones, predicted, batch)


@dataclass(frozen=True)
class Objective:
    """loss(model, batch, noise, mask_id) -> Loss; targets(batch) -> (B, T) bool: the tokens that count."""

    loss: Callable[..., Loss]
    targets: Callable[[Batch], Tensor]


OBJECTIVES = {
    "diffusion": Objective(masked_diffusion, lambda batch: batch.target),
    "block_diffusion": Objective(block_diffusion, lambda batch: batch.target),
    "autoregressive": Objective(autoregressive, next_token_targets),
}


def _masked_loss(logits: Tensor, batch: Batch, noise: Noise) -> Loss:
    masked = noise.masked
    units = batch.segments if noise.units is None else noise.units
    example, rate = batch.segments[masked], noise.rate[units[masked]]
    return _loss(logits, batch.tokens[masked], noise.weight[masked], example, rate, batch.target, batch)


def _loss(logits, tokens, weight, example, rate, target, batch) -> Loss:
    ce = F.cross_entropy(logits.float(), tokens, reduction="none")  # (N,)
    weighted = ce * weight
    size = len(batch.index)
    examples = torch.zeros(size, device=ce.device).index_add_(0, example, weighted.detach())
    owners = batch.segments[target]
    return Loss(
        total=weighted.sum(),
        count=int(target.sum()),
        examples=examples,
        lengths=torch.bincount(owners, minlength=size),
        ce=ce.detach(),
        rate=rate,
    )
