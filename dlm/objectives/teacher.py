"""Objectives with a teacher of the student's shape, so that fewer passes stay good.

Shapes: B rows, T their length, E examples of a batch, N masked places, K passes of the teacher, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm.data.examples import Batch
from dlm.models.attention import document
from dlm.models.predictor import as_predictor, guess_places
from dlm.objectives.losses import Loss, Objective
from dlm.objectives.noise import Noise, corrupt, draw_noise
from dlm.objectives.reference import digest
from dlm.utils.random import TEACHER, example_generator

__all__ = ["Consistency", "Drawn", "StepDistillation", "Taught", "predictions"]


@dataclass(frozen=True)
class Drawn:
    """Noise, and what a teacher's passes draw: uniform numbers (K, 2, B, T), the first which places are revealed, the
    second which token."""

    noise: Noise
    uniform: Tensor

    @property
    def block_length(self) -> int | None:
        return self.noise.block_length

    def to(self, device) -> Drawn:
        return Drawn(self.noise.to(device), self.uniform.to(device))


def predictions(model, xt: Tensor, batch: Batch, places: Tensor) -> Tensor:
    """(N, V) log probabilities in fp32 at some places (B, T) bool, in row order."""
    asked = {"visible": document(batch.segments), "logits_to_keep": guess_places(model, places, batch.positions)}
    return as_predictor(model)(xt, batch.positions, **asked).float().log_softmax(dim=-1)


class Taught(Objective):
    """A loss against a frozen teacher, which may follow the student: a moving average with this `decay` (0: it stays),
    or a copy of the student every `round_steps` optimizer steps (0: never)."""

    def __init__(self, teacher: nn.Module, *, passes: int, decay: float = 0.0, round_steps: int = 0):
        if passes < 1 or not 0 <= decay < 1 or round_steps < 0 or (decay and round_steps):
            raise ValueError(
                f"the teacher has {passes} passes, decay {decay} and rounds of {round_steps} steps: give 1 pass or "
                f"more, a decay below 1, and one of decay and rounds"
            )
        self.teacher, self.passes, self.decay, self.round_steps, self.round = teacher, passes, decay, round_steps, 0
        self.identity = f"teacher {digest(teacher)}"

    def to(self, device) -> Taught:
        self.teacher.to(device)
        return self

    def noise(self, batch, settings, seed, strata=None) -> Drawn:
        """The noise of a batch and the teacher's draws, each example's from its own generator."""
        uniform = torch.zeros(self.passes, 2, *batch.tokens.shape)
        for number, key in enumerate(zip(batch.epoch.tolist(), batch.index.tolist(), strict=True)):
            own = batch.segments == number
            drawn = example_generator(seed, *key, TEACHER).random((self.passes, 2, int(own.sum())), dtype="float32")
            uniform[:, :, own] = torch.from_numpy(drawn)
        return Drawn(draw_noise(batch, settings, seed, strata=strata), uniform)

    @torch.no_grad()
    def after_step(self, model, step: int) -> None:
        ends = self.round_steps and step % self.round_steps == 0
        if not (self.decay or ends):
            return
        share = 1.0 if ends else 1 - self.decay
        for mine, its in zip(self.teacher.parameters(), model.parameters(), strict=True):
            whole = its.full_tensor() if hasattr(its, "full_tensor") else its
            mine.lerp_(whole.to(mine), share)
        self.round += bool(ends)

    def state(self) -> dict[str, Tensor]:
        if not (self.decay or self.round_steps):
            return {}
        weights = {name: weight.detach() for name, weight in self.teacher.named_parameters()}
        return weights | {"round": torch.tensor(self.round)}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.round = int(tensors["round"])
        for name, weight in self.teacher.named_parameters():
            weight.copy_(tensors[name])

    @abstractmethod
    def divergence(self, model, batch: Batch, drawn: Drawn, xt: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
        """(N,) what each masked place of x_t adds to the loss, in row order, and (N,) the cross entropy there."""

    def loss(self, model, batch: Batch, noise: Drawn, mask_id: int, chunk: int | None = None) -> Loss:
        """The sum over masked places. `chunk` is not used: all logits are held."""
        masked = noise.noise.masked
        xt = corrupt(batch.tokens, masked, mask_id)
        values, ce = self.divergence(model, batch, noise, xt, mask_id)
        owner, size = batch.segments[masked], len(batch.index)
        examples = torch.zeros(size, device=values.device).index_add(0, owner, values)
        lengths = torch.bincount(batch.segments[batch.target], minlength=size)
        return Loss(
            total=examples.sum(), count=int(batch.target.sum()), examples=examples.detach(), lengths=lengths,
            ce=ce.detach(), rate=noise.noise.rate[owner],
        )  # fmt: skip

    def rates(self, batch: Batch, noise: Noise) -> Tensor:
        """(B, T) the mask rate of each token's example, its time under the linear schedule."""
        return noise.rate[batch.segments.clamp_min(0)]


class StepDistillation(Taught):
    """KL(teacher || student) at the masked places of x_t, where the teacher took K passes for the student's one (SDTT,
    arXiv:2410.21035).

    The student takes `steps` passes for a text, so one goes from t to t - 1 / steps. The teacher takes K ancestral
    passes over the same time; the target of a place is its prediction in the last pass before it was revealed, or in
    the last of all. In each round the student becomes the teacher and `steps` is halved.
    """

    def __init__(self, teacher: nn.Module, *, steps: int, passes: int = 2, round_steps: int = 0):
        super().__init__(teacher, passes=passes, round_steps=round_steps)
        if steps < 1:
            raise ValueError(f"the student takes {steps} passes: give 1 or more")
        self.steps = steps
        self.identity += f", {steps} steps, {passes} passes, rounds of {round_steps}"

    def divergence(self, model, batch, drawn, xt, mask_id):
        masked = drawn.noise.masked
        target = self.targets_of(batch, drawn, xt, mask_id)
        log_p = predictions(model, xt, batch, masked)
        ce = F.nll_loss(log_p, batch.tokens[masked], reduction="none")
        return F.kl_div(log_p, target, reduction="none", log_target=True).sum(dim=-1), ce

    @torch.no_grad()
    def targets_of(self, batch: Batch, drawn: Drawn, xt: Tensor, mask_id: int) -> Tensor:
        """(N, V) the teacher's log probabilities at the masked places."""
        masked, time = drawn.noise.masked, self.rates(batch, drawn.noise)
        left, xt, target = masked.clone(), xt.clone(), None
        each = 1 / (max(1, self.steps // 2**self.round) * self.passes)
        for number in range(self.passes):
            log_p = predictions(self.teacher, xt, batch, left)
            target = log_p if target is None else target.index_put((left[masked],), log_p)
            if number == self.passes - 1:
                break
            chance = each / (time - number * each).clamp_min(each)
            revealed = left & (drawn.uniform[number, 0] < chance)
            if bool(revealed.any()):
                p = log_p[revealed[left]].exp()
                p[:, mask_id] = 0
                level = drawn.uniform[number, 1][revealed, None] * p.sum(dim=-1, keepdim=True)
                xt[revealed] = torch.searchsorted(p.cumsum(dim=-1), level).clamp_max(p.shape[-1] - 1)[:, 0]
                left = left & ~revealed
            if not bool(left.any()):
                break
        return target


class Consistency(Taught):
    """The bound, and `weight` times KL(teacher at x_s || student at x_t) at the places masked in both.

    x_s is a later state on the way from x_t to the text: a share of the masked tokens, drawn evenly for each example,
    is revealed. With a moving average of the student as the teacher it is consistency training (arXiv:2303.01469) on
    masked text.
    """

    def __init__(self, teacher: nn.Module, *, weight: float, decay: float = 0.0):
        super().__init__(teacher, passes=1, decay=decay)
        if not weight >= 0:
            raise ValueError(f"consistency is {weight}: it weighs a divergence, 0 or more")
        self.weight = weight
        self.identity += f", consistency {weight}, decay {decay}"

    def divergence(self, model, batch, drawn, xt, mask_id):
        masked = drawn.noise.masked
        first = torch.zeros(len(batch.index), device=xt.device)
        for number in range(len(first)):  # an example's first draw says how much of it is revealed
            own = batch.segments == number
            first[number] = drawn.uniform[0, 1][own][0]
        kept = masked & (drawn.uniform[0, 0] < first[batch.segments.clamp_min(0)])
        log_p = predictions(model, xt, batch, masked)
        ce = F.nll_loss(log_p, batch.tokens[masked], reduction="none")
        values = ce * drawn.noise.weight[masked]
        if bool(kept.any()):
            with torch.no_grad():
                later = torch.where(masked & ~kept, batch.tokens, xt)
                target = predictions(self.teacher, later, batch, kept)
            apart = F.kl_div(log_p[kept[masked]], target, reduction="none", log_target=True).sum(dim=-1)
            values = values.index_add(0, kept[masked].nonzero()[:, 0], self.weight * apart)
        return values, ce
