"""Policy gradients: answers that the model wrote, and how much better each was than its group (GRPO for diffusion).

Shapes: B rows (an answer each), T their length, N scored places, G answers of a group, V vocabulary.

A part of a step is one forward pass over answers of which some places are masked. Two ways to say how probable an
answer is (`METHODS` names them):
- one pass, everything of the answer masked and some of the prompt too (diffu-GRPO, d1, arXiv:2504.12216, sections 3.1
  and 3.2; wd1, arXiv:2507.08838, takes the same). Exact for an answer of one token, else a mean-field estimate;
- one pass for each pass of the sampler, with what it had committed before in place (TraceRL, arXiv:2509.06949,
  section 4.1). Exact where a pass commits one token and its place does not depend on the weights.

The policy is the model's prediction at the temperature that it was sampled with, without the ids that are never
proposed. Top-k, top-p and guidance are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlm.data.examples import PAD_SEGMENT, Batch
from dlm.models.attention import Visible
from dlm.models.predictor import as_predictor, guess_places
from dlm.objectives.config import POLICY_NAMES
from dlm.objectives.losses import Loss, Objective
from dlm.objectives.reference import as_reference, digest
from dlm.utils.names import check_name

__all__ = ["METHODS", "Answers", "Method", "Policy", "advantages_of", "one_pass", "trace_passes"]


@dataclass(frozen=True)
class Answers:
    """What a pass is about, in place of noise. hidden (B, T) bool: places that hold the mask; scored (B, T) bool: whose
    tokens are scored; weight (B, T) fp32: of each scored token in its answer's loss; old (B, T) fp32: their log
    probabilities under the weights that sampled them, None where those are the model's own."""

    hidden: Tensor
    scored: Tensor
    weight: Tensor
    old: Tensor | None = None
    block_length: int | None = None

    def to(self, device) -> Answers:
        old = None if self.old is None else self.old.to(device)
        hidden, scored, weight = (x.to(device) for x in (self.hidden, self.scored, self.weight))
        return Answers(hidden, scored, weight, old, self.block_length)


def one_pass(target: Tensor, region: Tensor, hidden: Tensor) -> list[Answers]:
    """All of the answer masked, every token of it scored with weight 1/|o| (d1, section 3.1 and eq. 4).

    target (B, T) bool: the answer to its end; region (B, T): all that the sampler may write; hidden (B, T): the places
    of the prompt that are masked too.
    """
    weight = target / target.sum(dim=1, keepdim=True).clamp(min=1)
    return [Answers(region | hidden, target, weight)]


def trace_passes(target: Tensor, region: Tensor, order: Tensor, shrink: int = 1) -> list[Answers]:
    """One pass for each `shrink` passes of the sampler: what was committed before is seen, and what was committed in
    them is scored, each token with weight 1 / (their number) (TraceRL, section 4.1, eq. 3, with its shrinkage
    parameter; advantages are divided by their deviation there, and not here).

    order (B, T) int64: the pass that committed a place, from 1; 0: none did (a place behind an early end).
    """
    turn = torch.where(order > 0, (order - 1) // shrink, torch.iinfo(torch.int64).max)
    passes = []
    for number in torch.unique(turn[target]).tolist():
        scored = target & (turn == number)
        weight = scored / scored.sum(dim=1, keepdim=True).clamp(min=1)
        passes.append(Answers(region & (turn >= number), scored, weight))
    return passes


def group_means(rewards: Tensor, group: int) -> Tensor:
    """(B,) rewards minus the mean of their group of G, without a division by its deviation (d1, eq. 2)."""
    grouped = rewards.view(-1, group)
    return (grouped - grouped.mean(dim=1, keepdim=True)).view(-1)


def exponential_weights(rewards: Tensor, group: int) -> Tensor:
    """(B,) G (w+ - w-), w+ = softmax(A) and w- = softmax(-A) over the group of advantages A (wd1, eq. 9 with psi = 1).

    Its loss (eq. 8) has 1 / G in front of the sum over a group: with the factor G the weights are of the size of
    advantages, and the mean over answers is theirs times G.
    """
    grouped = group_means(rewards, group).view(-1, group)
    return (group * (grouped.softmax(dim=1) - (-grouped).softmax(dim=1))).view(-1)


@dataclass(frozen=True)
class Method:
    """traced: whether the passes follow the sampler's. ratio: whether a clipped ratio to the old policy stands in the
    loss, or the log probability itself. advantages: (rewards (B,), G) -> what weighs each answer (B,)."""

    traced: bool
    ratio: bool
    advantages: Callable[[Tensor, int], Tensor]


METHODS: dict[str, Method] = {
    "diffu_grpo": Method(traced=False, ratio=True, advantages=group_means),
    "trace": Method(traced=True, ratio=True, advantages=group_means),
    "wd1": Method(traced=False, ratio=False, advantages=exponential_weights),
}


def advantages_of(method: str, rewards: Tensor, group: int) -> Tensor:
    """(B,) what weighs each answer; rewards (B,), the answers of a group one after another. All zero where the rewards
    of a group are equal."""
    return METHODS[method].advantages(rewards, group)


class Policy(Objective):
    """The loss of a part: -sum over an answer's tokens of weight * min(ratio A, clip(ratio, 1 - e, 1 + e) A) + kl * KL.

    KL to the reference is exp(d) - d - 1 of d = log p_ref - log p, which is not negative (GRPO, arXiv:2402.03300,
    eq. 4). It is divided by the number of answers. reference: a frozen model; None: the policy with its adapters off.
    temperature: of the sampler. forbidden: ids that it never proposes. columns: names what the rewards read. visible: a
    rule of `attention`, what the sampler saw; None: the model's own.
    """

    unit = "answers"

    def __init__(
        self, method: str = "diffu_grpo", *, reference: nn.Module | None = None, ratio_clip: float = 0.2,
        kl: float = 0.0, temperature: float = 1.0, forbidden: tuple[int, ...] = (), columns: str = "",
        visible: Visible | None = None,
    ):  # fmt: skip
        check_name("policy", method, POLICY_NAMES)
        if not ratio_clip > 0 or not kl >= 0 or not temperature > 0:
            raise ValueError(
                f"ratio_clip is {ratio_clip}, kl {kl}, temperature {temperature}: give a clip and a temperature above "
                f"0, and a kl that is not negative"
            )
        self.method, self.reference, self.ratio_clip, self.kl = METHODS[method], reference, ratio_clip, kl
        self.temperature, self.forbidden, self.columns = temperature, tuple(forbidden), columns
        self.visible = visible

    @property
    def identity(self) -> str:
        """A digest of the reference's weights and of the columns that the rewards read."""
        return f"{digest(self.reference)} {self.columns}".strip()

    def to(self, device) -> Policy:
        if self.reference is not None:
            self.reference.to(device)
        return self

    def count(self, batch: Batch) -> int:
        """Answers."""
        return len(batch.index)

    def noise(self, batch, settings, seed, strata=None):
        raise AssertionError("the parts of a policy gradient come from rollouts")

    def log_probs(self, model, batch: Batch, answers: Answers, mask_id: int) -> tuple[Tensor, Tensor]:
        """Log probabilities of the scored tokens in row order (N,), in fp32 or more, and entropies (N,) in nats."""
        xt = batch.tokens.masked_fill(answers.hidden, mask_id)
        valid = batch.segments != PAD_SEGMENT
        places = guess_places(model, answers.scored, batch.positions)
        asked = {"visible": self.visible, "valid": None if bool(valid.all()) else valid, "logits_to_keep": places}
        logits = as_predictor(model)(xt, batch.positions, **asked)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / self.temperature
        ids = [token for token in {mask_id, *self.forbidden} if token < logits.shape[-1]]
        logits = logits.index_fill(1, torch.tensor(ids, device=logits.device), -torch.inf)
        log_p = logits.log_softmax(dim=-1)
        entropy = torch.special.entr(log_p.detach().exp()).sum(dim=-1)
        return log_p.gather(1, batch.tokens[answers.scored][:, None])[:, 0], entropy

    def loss(self, model, batch: Batch, noise: Answers, mask_id: int, chunk: int | None = None) -> Loss:
        """The sum of the answers' losses; its notes are sums over answers, none where no token has a weight. `chunk` is
        not used: all logits are held."""
        assert batch.advantages is not None, "a policy gradient needs advantages"
        owner = batch.segments[noise.scored]
        log_p, entropy = self.log_probs(model, batch, noise, mask_id)
        advantage, weight = batch.advantages[owner], noise.weight[noise.scored]
        clipped = torch.zeros_like(weight)
        if self.method.ratio:
            ratio = (log_p - (log_p.detach() if noise.old is None else noise.old[noise.scored])).exp()
            bounded = ratio.clamp(1 - self.ratio_clip, 1 + self.ratio_clip)
            gained = torch.minimum(ratio * advantage, bounded * advantage)
            clipped = (bounded * advantage < ratio * advantage).float()
        else:
            gained = log_p * advantage
        loss, notes = -gained, {"clip_share": clipped, "entropy": entropy}
        if self.kl:
            with torch.no_grad(), as_reference(self.reference, model) as reference:
                theirs, _ = self.log_probs(reference, batch, noise, mask_id)
            apart = theirs - log_p
            notes["kl"] = apart.exp() - apart - 1
            loss = loss + self.kl * notes["kl"]
        size = len(batch.index)
        examples = torch.zeros(size, dtype=loss.dtype, device=loss.device).index_add(0, owner, loss * weight)
        return Loss(
            total=examples.sum(), count=self.count(batch), examples=examples.detach(),
            lengths=torch.bincount(owner, minlength=size), ce=-log_p.detach(), rate=torch.ones_like(weight),
            notes={name: (value.detach() * weight).sum() for name, value in notes.items() if bool(weight.any())},
        )  # fmt: skip
