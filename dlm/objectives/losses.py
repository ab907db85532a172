"""Objectives: Batch (and its noise) -> Loss. Pure functions; all randomness comes in as an argument.

Shapes: B batch, T row length, E examples in the batch, N tokens that carry loss, V vocabulary.

A Loss is a sum, never a mean: the trainer divides by the number of target tokens of the whole optimizer step, over
all micro-batches and processes, which is what makes the gradient independent of how the step was cut up.
chunk: places whose logits are held at a time; None: all of them, until the backward pass.
earlier: of a model whose layers are applied R times (`config.layer_repeats`), the share of the loss that falls on what
the first R - 1 rounds put out, the same on each; it has no meaning for R = 1, and changes nothing there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dlm.data.examples import Batch
from dlm.models import attention
from dlm.models.attention import both, causal, document
from dlm.models.head import Targets, weighted_sum
from dlm.models.predictor import as_predictor, guess_places
from dlm.objectives.noise import Noise, NoiseSettings, Strata, corrupt, draw_noise

Extra = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), true tokens (N,) -> ()


@dataclass(frozen=True)
class Loss:
    """A weighted sum of cross entropies, in nats.

    total: () fp32, differentiable. count: number of target tokens of the batch (the share of the normaliser).
    examples (E,): each example's part of `total`, detached; lengths (E,): each example's target tokens.
    ce (N,), rate (N,): cross entropy of each predicted token and the mask rate of its draw, detached.
    notes: sums over what `count` counts, for the log, by name.
    """

    total: Tensor
    count: int
    examples: Tensor
    lengths: Tensor
    ce: Tensor
    rate: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)


def masked_diffusion(
    model, batch: Batch, noise: Noise, mask_id: int, chunk: int | None = None, *, extra: Extra | None = None,
    earlier: float = 0.0,
) -> Loss:  # fmt: skip
    """The masked diffusion bound: weighted CE of the masked tokens given the others.

    Logits are computed at masked places only, and the softmax in fp32 on them alone (LLaDA eq. 3). extra: a term of the
    logits and true tokens that is added to the sum.
    """
    xt = corrupt(batch.tokens, noise.masked, mask_id)
    places = guess_places(model, noise.scored, batch.positions)
    asked = {"visible": document(batch.segments), "logits_to_keep": places}
    return _masked_loss(model, (xt, batch.positions), asked, batch, noise, chunk, extra, earlier)


def block_diffusion(
    model, batch: Batch, noise: Noise, mask_id: int, chunk: int | None = None, *, extra: Extra | None = None,
    earlier: float = 0.0,
) -> Loss:  # fmt: skip
    """The bound of block diffusion: each block's masked tokens given the rest of it and the clean blocks before.

    All blocks in one forward of [x_t ; x_0] with repeated positions (BD3-LM, arXiv:2503.09573).
    The noise must have been drawn block by block: it says how long a block is.
    """
    assert noise.block_length is not None, "noise of whole examples: draw it with NoiseSettings(block_length=...)"
    xt = corrupt(batch.tokens, noise.masked, mask_id)
    both_copies = (
        torch.cat([xt, batch.tokens], dim=1),
        torch.cat([batch.positions, batch.positions], dim=1),
    )  # (B, 2T)
    asked = {
        "visible": attention.block_diffusion(batch.segments, batch.positions, noise.block_length),
        "logits_to_keep": guess_places(model, noise.scored, batch.positions, noise.block_length),
    }
    return _masked_loss(model, both_copies, asked, batch, noise, chunk, extra, earlier)


def next_token_targets(batch: Batch) -> Tensor:
    """Target tokens (B, T) bool that have a token of their own example before them: the first cannot be predicted."""
    follows = batch.segments[:, 1:] == batch.segments[:, :-1]
    predicted = torch.zeros_like(batch.target)
    predicted[:, 1:] = batch.target[:, 1:] & follows
    return predicted


def autoregressive(
    model, batch: Batch, noise: Noise | None = None, mask_id: int | None = None, chunk: int | None = None, *,
    earlier: float = 0.0,
) -> Loss:  # fmt: skip
    """The causal twin: CE of each target token given those before it in its example (noise is not used)."""
    predicted = next_token_targets(batch)
    predicting = torch.zeros_like(predicted)
    predicting[:, :-1] = predicted[:, 1:]  # the place before
    asked = {"visible": both(causal, document(batch.segments)), "logits_to_keep": predicting}
    example = batch.segments[predicted]
    ones = torch.ones(example.shape, device=example.device)
    inputs, truth = (batch.tokens, batch.positions), batch.tokens[predicted]
    total, ce = _cross_entropies(model, inputs, asked, truth, ones, chunk, earlier=earlier)
    return _loss(total, ce, ones, example, ones, predicted, batch)


class Objective(ABC):
    """What a run minimises: which tokens count, the noise they get, the loss on them. `unit` names what is counted.

    An objective is an object, so that it may hold a reference model, a teacher or settings of its own; the three below
    hold nothing. A batch may carry `advantages`, which an objective of policy gradients reads.
    """

    unit = "tokens"  # what `count` counts, for the log
    identity = ""  # names what the object holds (a digest of a reference's weights), for an exact resume

    def targets(self, batch: Batch) -> Tensor:
        """(B, T) bool: the tokens that count."""
        return batch.target

    def count(self, batch: Batch) -> int:
        """The batch's share of the number that a step's loss is divided by: its tokens that count."""
        return int(self.targets(batch).sum())

    def noise(self, batch: Batch, settings: NoiseSettings, seed: int, strata: Strata | None = None) -> Noise:
        """The noise of a batch, on the CPU; strata: of the whole optimizer step (`deal_strata`)."""
        return draw_noise(batch, settings, seed, strata=strata)

    @abstractmethod
    def loss(self, model, batch: Batch, noise: Noise, mask_id: int, chunk: int | None = None) -> Loss:
        """The loss of a batch, a sum that is divided by the step's `count`."""

    def after_step(self, model, step: int) -> None:
        """Called with the plain model after optimizer step `step` (from 1): a teacher may follow the student here."""
        return

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the object: tensors by name."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Errors: tensors of another model."""
        assert not tensors, "this objective keeps nothing"

    def to(self, device) -> Objective:
        """Called once before the first step: models that the objective holds go to the device."""
        return self


class MaskedDiffusion(Objective):
    """`masked_diffusion`: the bound of an example that is masked anywhere; earlier: as the module says."""

    def __init__(self, earlier: float = 0.0):
        self.earlier = earlier

    def loss(self, model, batch, noise, mask_id, chunk=None):
        return masked_diffusion(model, batch, noise, mask_id, chunk, earlier=self.earlier)


class BlockDiffusion(Objective):
    """`block_diffusion`: the bound of blocks that see what is clean before them.

    Rows whose noise was drawn without blocks are trained under full attention (`TrainingConfig.full_share`).
    earlier: as the module says.
    """

    def __init__(self, earlier: float = 0.0):
        self.earlier = earlier

    def loss(self, model, batch, noise, mask_id, chunk=None):
        bound = masked_diffusion if noise.block_length is None else block_diffusion
        return bound(model, batch, noise, mask_id, chunk, earlier=self.earlier)


class Autoregressive(Objective):
    """`autoregressive`: the causal twin; the noise is drawn and not used. earlier: as the module says."""

    def __init__(self, earlier: float = 0.0):
        self.earlier = earlier

    def targets(self, batch):
        return next_token_targets(batch)

    def loss(self, model, batch, noise, mask_id, chunk=None):
        return autoregressive(model, batch, noise, mask_id, chunk, earlier=self.earlier)


_KINDS = {"diffusion": MaskedDiffusion, "block_diffusion": BlockDiffusion, "autoregressive": Autoregressive}
OBJECTIVES: dict[str, Objective] = {name: kind() for name, kind in _KINDS.items()}


def objective(name: str, earlier: float = 0.0) -> Objective:
    """The objective of a name, with a share of its loss on the earlier rounds of the layers."""
    return _KINDS[name](earlier)


def _masked_loss(
    model, inputs, asked, batch: Batch, noise: Noise, chunk: int | None, extra: Extra | None, earlier: float
) -> Loss:
    scored = noise.scored
    units = batch.segments if noise.units is None else noise.units
    example, weight, rate = batch.segments[scored], noise.weight[scored], noise.rate[units[scored]]
    total, ce = _cross_entropies(model, inputs, asked, batch.tokens[scored], weight, chunk, extra, earlier)
    return _loss(total, ce, weight, example, rate, batch.target, batch)


def _cross_entropies(
    model, inputs, asked, truth: Tensor, weight: Tensor, chunk, extra=None, earlier=0.0
) -> tuple[Tensor, Tensor]:
    """(weighted sum (), cross entropies (N,)) at the places asked about, N in row-major order over (B, T).

    The cross entropies are those of the last round of the layers, the sum has `earlier` of its weight on the others.
    """
    repeats = _repeats(model) if earlier else 1
    if repeats > 1:
        assert extra is None, "an extra term has one output to look at"
        shares = weight.new_tensor([earlier / (repeats - 1)] * (repeats - 1) + [1.0 - earlier])  # (R,)
        asked = {**asked, "every_repeat": True}
        spread = (shares[:, None] * weight).flatten()  # (R * N,)
        total, ce = _cross_entropies(model, inputs, asked, truth.repeat(repeats), spread, chunk)
        return total, ce[-len(truth) :] if len(truth) else ce
    if extra is not None:
        logits = as_predictor(model)(*inputs, **asked)
        total, ce = weighted_sum(logits, truth, weight)
        return total + extra(logits, truth), ce
    if chunk is None:
        return weighted_sum(as_predictor(model)(*inputs, **asked), truth, weight)
    return as_predictor(model)(*inputs, **asked, targets=Targets(truth, weight, chunk))


def _repeats(model) -> int:
    """How often a model, or what it wraps, applies its layers."""
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    config = next((module.config for module in modules if hasattr(module, "config")), None)
    return getattr(config, "layer_repeats", 1)


def _loss(total, ce, weight, example, rate, target, batch) -> Loss:
    size = len(batch.index)
    examples = torch.zeros(size, device=ce.device).index_add_(0, example, ce * weight)
    owners = batch.segments[target]
    return Loss(
        total=total,
        count=int(target.sum()),
        examples=examples,
        lengths=torch.bincount(owners, minlength=size),
        ce=ce,
        rate=rate,
    )
