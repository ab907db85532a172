"""Which of the proposed tokens a pass commits.

Shapes: R rows of one forward pass, M masked slots asked about."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["COMMITS", "Step", "by_blocks", "choose", "coarse_block"]


# ---------------------------------------------------------------- commit: confidence -> which places


@dataclass(frozen=True)
class Step:
    """What a commit rule may know of the pass: the rows' quotas (B,), for `quota` also None, one place in each row; the
    rule's own parameter, drawn (B, M): the places that an ancestral step draws, and stable (B, M): those whose
    prediction has settled. spacing: fewest slots between two places, or none from spacing_threshold on; slots (B, M):
    where the places are."""

    quota: Tensor | None
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    drawn: Tensor | None = None
    stable: Tensor | None = None
    spacing: int = 0
    spacing_threshold: float = 0.95
    slots: Tensor | None = None


def _ranked(confidence: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence, -inf where a place is not eligible, and a key of the same order.

    Places that differ by rounding alone are ties. A row of masks without a prompt has equal confidences everywhere, and
    the rounding of a product depends on the batch: without this the same row committed in another order elsewhere.
    They are compared on a grid of eight units in the last place, which above 1 grows with them (entropies do).
    """
    floor = torch.finfo(confidence.dtype).min
    ranked = confidence.clamp_min(floor).masked_fill(~eligible, -torch.inf)
    unit = 4 * torch.finfo(ranked.dtype).eps if ranked.dtype != torch.float64 else 2.0**-40
    if confidence.device.type == "cpu" and all(-1 <= float(end) <= 1 for end in confidence.aminmax()):
        return ranked, (ranked / unit).round()  # the same order in a third of the operations
    grid = torch.ldexp(torch.full_like(ranked, unit), ranked.clamp(-(2**20), 2**20).frexp().exponent.clamp_min(0))
    return ranked, torch.where(ranked.abs() < 2**20, (ranked / grid).round() * grid, ranked)


def _sorted(confidence: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence from high to low and the places it belongs to; eligible places first, ties by place."""
    ranked, key = _ranked(confidence, eligible)
    order = key.sort(dim=-1, descending=True, stable=True).indices
    return ranked.gather(-1, order), order


def _best(confidence: Tensor, eligible: Tensor) -> Tensor:
    """bool (B, M): the most confident eligible place of each row."""
    best = _ranked(confidence, eligible)[1].argmax(dim=-1, keepdim=True)  # the first of several
    return torch.zeros_like(eligible).scatter(-1, best, True) & eligible


def _first(count: Tensor, order: Tensor, eligible: Tensor) -> Tensor:
    """bool (B, M): the first `count` (B,) places of `order`, at least one, as far as they are eligible."""
    ahead = torch.arange(order.shape[-1], device=order.device)[None] < count.clamp_min(1)[:, None]
    return torch.zeros_like(eligible).scatter(-1, order, ahead) & eligible


def by_quota(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """The `quota` most confident places (LLaDA, arXiv:2502.09992, alg. 5)."""
    if step.quota is None:
        return _best(confidence, eligible)
    _, order = _sorted(confidence, eligible)
    return _first(step.quota, order, eligible)


def by_threshold(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """Every place with confidence >= tau, else the best one (Fast-dLLM, arXiv:2505.22618, alg. 1)."""
    return _sure_or_best(confidence, eligible, eligible & (confidence >= step.threshold))


def _sure_or_best(confidence: Tensor, eligible: Tensor, sure: Tensor) -> Tensor:
    return torch.where(sure.any(dim=-1, keepdim=True), sure, _best(confidence, eligible))


def by_factor(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """The n best places, for the largest n with (n + 1)(1 - c_(n)) < f (Fast-dLLM, arXiv:2505.22618, thm. 1)."""
    ranked, order = _sorted(confidence, eligible)
    n = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
    holds = (n + 1) * (1 - ranked) < step.factor
    return _first((holds * n).amax(dim=-1), order, eligible)


def by_entropy_bound(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """The largest prefix in order of entropy with sum H - max H <= gamma (EB-Sampler, arXiv:2505.24857).

    `confidence` is minus the entropy, so the prefix's largest H is its last one.
    """
    ranked, order = _sorted(confidence, eligible)
    total = (-ranked).cumsum(dim=-1)
    holds = total + ranked <= step.entropy_bound
    return _first((holds & torch.isfinite(ranked)).cumprod(dim=-1).sum(dim=-1), order, eligible)


def by_chance(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """The places that a step of the reverse process draws, in random order (MDLM, arXiv:2406.07524; `remask`)."""
    return eligible & step.drawn


def by_order(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """The first `quota` places, from left to right (SDAR's sequential, arXiv:2510.06303)."""
    return eligible & (eligible.cumsum(dim=-1) <= step.quota.clamp_min(1)[:, None])


def by_dynamic(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """Every place with confidence > tau where those are at least `quota`, else the `quota` best (LLaDA2,
    arXiv:2512.15745; SDAR, arXiv:2510.06303; with a quota of 1 Fast-dLLM v2, arXiv:2509.26328)."""
    ranked, order = _sorted(confidence, eligible)
    return _first(torch.maximum((ranked > step.threshold).sum(dim=-1), step.quota), order, eligible)


def by_cap(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """Of the `quota` best places those with confidence >= tau, and always the best (Fast-dLLM for Dream without a
    cache); the quota holds what earlier passes left of theirs."""
    ranked, order = _sorted(confidence, eligible)
    return _first(torch.minimum((ranked >= step.threshold).sum(dim=-1), step.quota), order, eligible)


def by_uniform(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """Each place with probability `quota`, whatever its score; `confidence` is uniform in [0, 1). A pass may commit
    nothing (Dream's origin, arXiv:2508.15487; D3PM, arXiv:2107.03006)."""
    return eligible & (confidence < step.quota[:, None])


def by_stability(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """Every place with confidence >= tau whose prediction has settled, else the best one (KLASS, arXiv:2511.05664,
    alg. 1; `stability`)."""
    return _sure_or_best(confidence, eligible, sure_places(confidence, eligible, step))


def sure_places(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """bool (B, M): the places that a rule with a threshold commits by themselves, without the best where none is."""
    sure = eligible & (confidence >= step.threshold)
    return sure if step.stable is None else sure & step.stable


def by_blocks(confidence: Tensor, eligible: Tensor, step: Step, block: Tensor, forced: Tensor, rule: str) -> Tensor:
    """bool (B, M): the rule in each of several open blocks, the best place only where `forced` (B, M) holds.

    block (B, M): the block of every place. A block commits what passes the threshold, and at least one token a pass
    once its predecessor is mostly done (D2F, arXiv:2508.09192; d3LLM, arXiv:2601.07568).
    """
    chosen = sure_places(confidence, eligible, step)
    for number in block[eligible].unique().tolist():
        here = eligible & (block == number)
        chosen = chosen | (COMMITS[rule](confidence, here, step) & forced)
    return chosen


COMMITS: dict[str, Callable[[Tensor, Tensor, Step], Tensor]] = {
    "quota": by_quota,
    "threshold": by_threshold,
    "factor": by_factor,
    "entropy_bound": by_entropy_bound,
    "ancestral": by_chance,
    "sequential": by_order,
    "dynamic": by_dynamic,
    "capped": by_cap,
    "origin": by_uniform,
    "stable": by_stability,
}


def choose(rule: str, confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """bool (B, M): what the rule of this name commits, with `step.spacing` between the places where it is above 0."""
    chosen = COMMITS[rule](confidence, eligible, step)
    return spread(confidence, chosen, eligible, step, fill=rule == "quota") if step.spacing else chosen


def spread(confidence: Tensor, chosen: Tensor, eligible: Tensor, step: Step, *, fill: bool) -> Tensor:
    """bool (B, M): of the chosen places, from the most confident on, those that have `step.spacing` slots or more
    between them, or are both at least as confident as `step.spacing_threshold`.

    Tokens that one pass draws do not see each other, and near ones depend on each other most: neighbours often hold the
    same word twice (Luxembourg et al., Plan for Speed, arXiv:2506.19037, space the places by a fixed plan). fill: as
    many places as were chosen, any eligible ones, and near ones only where no others are left.
    """
    _, order = _sorted(confidence, eligible)
    rank, count = order.argsort(dim=-1), chosen.sum(dim=-1, keepdim=True)
    sure = confidence >= step.spacing_threshold
    left, kept = (eligible if fill else chosen).clone(), torch.zeros_like(chosen)
    for _ in range(int(count.max())):
        best = rank.masked_fill(~left, rank.shape[-1]).argmin(dim=-1, keepdim=True)
        taken = left.gather(-1, best) & (kept.sum(dim=-1, keepdim=True) < count)
        kept |= torch.zeros_like(kept).scatter(-1, best, taken)
        near = (step.slots - step.slots.gather(-1, best)).abs() <= step.spacing
        left &= ~near | (sure & sure.gather(-1, best))
        left.scatter_(-1, best, False)
    if fill:
        rest = (eligible & ~kept).gather(-1, order)
        rest &= rest.cumsum(dim=-1) <= count - kept.sum(dim=-1, keepdim=True)
        kept |= torch.zeros_like(kept).scatter(-1, order, rest)
    return kept


def coarse_block(confidence: Tensor, eligible: Tensor, ending: Tensor, size: Tensor) -> Tensor:
    """bool (B, M): the `size` (B,) most confident eligible places, coarse-to-fine's logical block.

    Where at least `size` places predict something other than end-of-text (`ending` (B, M) is False), only those
    compete.
    """
    speaking = eligible & ~ending
    enough = speaking.sum(dim=-1) >= size
    competing = torch.where(enough[:, None], speaking, eligible)
    _, order = _sorted(confidence, competing)
    return _first(size, order, competing)
