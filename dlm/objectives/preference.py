"""Preferences between two answers: DPO on bounds of their likelihoods, with less variance (VRPO, arXiv:2505.19223).

Shapes: B rows, T their length, E examples of a batch (chosen and rejected in turn), P pairs, K draws, V vocabulary.

With b(y) >= -log p(y | prompt), the weighted cross entropy of masked tokens averaged over K draws, the loss of a pair
is -log sigmoid(beta * delta), delta = (b_ref - b)(chosen) - (b_ref - b)(rejected): DPO's (arXiv:2305.18290, eq. 7) with
bounds in place of log-likelihoods. VRPO: the whole budget goes to times, one mask each, and policy and reference share
times and masks, so that what both do not know cancels. Under full attention a draw masks the whole answer; where the
noise was drawn in blocks, b is the bound of block diffusion: [x_t ; x_0], each block given the clean ones before it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.data.examples import Batch
from dlm.models.attention import block_diffusion, document
from dlm.models.head import Targets
from dlm.models.predictor import as_predictor, guess_places
from dlm.objectives.losses import Loss, Objective
from dlm.objectives.noise import Noise, NoiseSettings, corrupt, draw_noise
from dlm.objectives.reference import as_reference, digest

__all__ = ["Draws", "Preference", "dpo", "repeat"]


@dataclass(frozen=True)
class Draws:
    """K draws of noise for the same batch."""

    noises: tuple[Noise, ...]

    @property
    def block_length(self) -> int | None:
        return self.noises[0].block_length

    def to(self, device) -> Draws:
        return Draws(tuple(noise.to(device) for noise in self.noises))


def draw(batch: Batch, settings: NoiseSettings, seed: int, draws: int) -> Draws:
    """K independent draws for each example: draw k in pass e over the data is the noise of pass e * K + k."""
    passes = (replace(batch, epoch=batch.epoch * draws + number) for number in range(draws))
    return Draws(tuple(draw_noise(one, settings, seed) for one in passes))


def repeat(batch: Batch, draws: Draws, mask_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The batch once for each draw, one below the other.

    Returns xt, positions, segments (K * B, T) (each draw's examples are counted on from those of the draw before), the
    truth (K * B, T) and the weights (K * B, T).
    """
    count = len(draws.noises)
    xt = torch.cat([corrupt(batch.tokens, noise.masked, mask_id) for noise in draws.noises])
    shift = torch.arange(count, device=batch.segments.device).repeat_interleave(len(batch.tokens))[:, None]
    segments = batch.segments.repeat(count, 1)
    segments = torch.where(segments >= 0, segments + shift * len(batch.index), segments)
    weight = torch.cat([noise.weight for noise in draws.noises])
    return xt, batch.positions.repeat(count, 1), segments, batch.tokens.repeat(count, 1), weight


def bounds(
    model, inputs, examples: int, chunk: int | None, factor: Tensor | None = None, block_length: int | None = None
) -> Tensor:
    """Each example's weighted cross entropy (K * E,) in nats, of what `repeat` made.

    block_length: of noise in blocks, and then the clean copy stands behind x_t. With `factor` (K * E,): their sum times
    factor (), whose gradient is taken `chunk` places at a time.
    """
    xt, positions, segments, truth, weight = inputs
    scored = weight > 0
    predict = as_predictor(model)
    owner, places = segments[scored], guess_places(model, scored, positions, block_length)
    visible = document(segments)
    if block_length is not None:
        visible = block_diffusion(segments, positions, block_length)
        xt, positions = torch.cat([xt, truth], dim=1), torch.cat([positions, positions], dim=1)  # (K * B, 2T)
    asked = {"visible": visible, "logits_to_keep": places}
    if factor is not None:
        targets = Targets(truth[scored], weight[scored] * factor[owner], chunk)
        total, _ = predict(xt, positions, **asked, targets=targets)
        return total
    if chunk is not None:
        _, ce = predict(xt, positions, **asked, targets=Targets(truth[scored], weight[scored], chunk))
    else:
        ce = F.cross_entropy(predict(xt, positions, **asked).float(), truth[scored], reduction="none")
    return torch.zeros(examples, device=ce.device).index_add(0, owner, ce * weight[scored])


def dpo(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(loss, delta) of each pair (P,) from bounds (E,) in nats, chosen and rejected in turn."""
    gained = reference - policy  # how much more probable than under the reference
    delta = gained[0::2] - gained[1::2]
    return -F.logsigmoid(beta * delta), delta


class Preference(Objective):
    """DPO on bounds. A batch holds pairs: example 2i is chosen, 2i + 1 rejected, one after the other in one row.

    reference: a frozen model; None: the policy with its adapters off. beta: how strongly the policy may leave the
    reference. draws: noise draws of each answer. sft: weight of the chosen answer's bound a token, added to the loss.
    shared: whether policy and reference have the same noise; without it the reference has draws of its own.
    """

    unit = "pairs"

    def __init__(self, reference: nn.Module | None, *, beta: float = 0.1, draws: int = 8, sft: float = 0.0,
                 shared: bool = True):  # fmt: skip
        if not beta > 0 or draws < 1 or not sft >= 0:
            raise ValueError(f"beta is {beta}, draws {draws}, sft {sft}: give beta > 0, draws >= 1 and sft >= 0")
        self.reference, self.beta, self.draws, self.sft, self.shared = reference, beta, draws, sft, shared

    @property
    def identity(self) -> str:
        """SHA-256 of the reference's weights; "" where it is the policy without its adapters."""
        return digest(self.reference)

    def to(self, device) -> Preference:
        if self.reference is not None:
            self.reference.to(device)
        return self

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.index) // 2

    def noise(self, batch, settings, seed, strata=None) -> Draws:
        """Draws for the policy, and behind them, where nothing is shared, as many for the reference."""
        return draw(batch, settings, seed, self.draws * (1 if self.shared else 2))

    def loss(self, model, batch: Batch, noise: Draws, mask_id: int, chunk: int | None = None) -> Loss:
        """The sum of the pairs' losses; its notes are sums over pairs."""
        assert torch.equal(batch.index[1::2], batch.index[0::2] + 1), "chosen and rejected must follow one another"
        examples = len(batch.index)
        mine, its = Draws(noise.noises[: self.draws]), Draws(noise.noises[-self.draws :])
        inputs, blocks = repeat(batch, mine, mask_id), {"block_length": noise.block_length}
        with torch.no_grad(), as_reference(self.reference, model) as reference:
            theirs = bounds(reference, repeat(batch, its, mask_id), self.draws * examples, chunk, **blocks)
        with torch.no_grad() if chunk is not None else nullcontext():
            ours = bounds(model, inputs, self.draws * examples, chunk, **blocks)
        ours, theirs = ours.view(self.draws, examples), theirs.view(self.draws, examples)
        lengths = torch.bincount(batch.segments[batch.target], minlength=examples)
        mean = ours.mean(0)
        losses, delta = dpo(mean, theirs.mean(0), self.beta)
        losses = losses + self.sft * mean[0::2] / lengths[0::2].clamp(min=1)
        total = losses.sum()
        if chunk is not None:  # the same gradient, without the logits of all places
            slope = self.beta * torch.sigmoid(-self.beta * delta)
            factor = torch.stack([slope + self.sft / lengths[0::2].clamp(min=1), -slope], dim=1).view(-1) / self.draws
            through = bounds(model, inputs, self.draws * examples, chunk, factor.repeat(self.draws), **blocks)
            total = through + (total - through).detach()
        return Loss(
            total=total, count=self.count(batch), examples=losses.detach().repeat_interleave(2) / 2, lengths=lengths,
            ce=mean.detach(), rate=torch.zeros_like(mean), notes=self._notes(ours.detach(), theirs, delta.detach()),
        )  # fmt: skip

    def _notes(self, ours: Tensor, theirs: Tensor, delta: Tensor) -> dict[str, Tensor]:
        gained = ours - theirs
        notes = {
            "accuracy": (delta > 0).float().sum(),
            "margin": self.beta * delta.sum(),
            "chosen_gain": -gained.mean(0)[0::2].sum(),
            "rejected_gain": -gained.mean(0)[1::2].sum(),
        }
        if self.draws > 1:  # the variance of delta: as it is, and if policy and reference had noise of their own
            pairs = gained[:, 0::2] - gained[:, 1::2]
            apart = ours.var(0) + theirs.var(0)
            notes["variance_shared"] = pairs.var(0).sum() / self.draws
            notes["variance_apart"] = (apart[0::2] + apart[1::2]).sum() / self.draws
        return notes
