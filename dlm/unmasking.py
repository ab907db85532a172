"""Unmasking rules: what to write on a masked place (propose) and which places to commit now (commit).

Shapes: B rows, M places asked about, V vocabulary. All arithmetic is in fp32 (fp64 for an fp64 model) through
logsumexp, over the M places alone. Ties go to the lowest place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["COMMITS", "CONFIDENCES", "SPLITS", "Step", "apportion", "coarse_block", "propose", "schedule"]


# ---------------------------------------------------------------- propose: logits -> token, confidence


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (..., V) with everything outside the top k, or outside the nucleus of mass p, at -inf.

    The nucleus is the smallest set of most probable tokens whose mass reaches p (Holtzman et al., arXiv:1904.09751).
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        above, level = logits > least, logits == least
        room = top_k - above.sum(dim=-1, keepdim=True)  # of those level with the k-th, the lowest ids
        logits = logits.masked_fill(~(above | (level & (level.cumsum(dim=-1) <= room))), -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the mass before it already reaches p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def probability(logits: Tensor, open_logits: Tensor, token: Tensor) -> Tensor:
    """The softmax probability of the token chosen (LLaDA's low-confidence remasking, arXiv:2502.09992, alg. 5)."""
    return logits.log_softmax(dim=-1).gather(-1, token[..., None])[..., 0].exp()


def margin(logits: Tensor, open_logits: Tensor, token: Tensor) -> Tensor:
    """p1 - p2, the gap between the two most probable tokens (Kim et al., arXiv:2502.06768)."""
    two = open_logits.topk(min(2, logits.shape[-1]), dim=-1).values
    two = (two - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return two[..., 0] - two[..., 1:].sum(dim=-1)


def entropy(logits: Tensor, open_logits: Tensor, token: Tensor) -> Tensor:
    """Minus the entropy of the prediction, in nats (Dream, arXiv:2508.15487)."""
    return -torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


# (the prediction's logits, the same with what may not be chosen at -inf, the token) -> confidence
CONFIDENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | None] = {
    "probability": probability,
    "margin": margin,
    "entropy": entropy,
    "random": None,  # needs the row's generator, not the logits
}


def _uniform(counts: Sequence[int], generators: Sequence[torch.Generator], logits: Tensor) -> Tensor:
    """Numbers in [0, 1) for the places of logits (B, M, V): (B, M). Row i draws for its first counts[i] places, from
    its own generator, and no more."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    noise = torch.zeros(logits.shape[:-1], dtype=dtype, device=logits.device)
    for row, count, generator in zip(noise, counts, generators, strict=True):
        row[:count].uniform_(generator=generator)
    return noise


BLOCK = 64  # how many numbers of a row a search looks at together


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Tokens of probability softmax(scores), scores (..., V) of which the largest is 0: where the cumulative
    distribution passes `uniform` (...).

    The law of argmax(scores + Gumbel noise) for one random number instead of V, and without its error in fp32, which
    cuts the tails (Zheng et al., arXiv:2409.02908): cumulative sums are in fp64. The search goes by blocks, then
    inside of one.
    """
    weights = F.pad(scores.exp(), (0, -scores.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = weights.sum(dim=-1).to(uniform.dtype).cumsum(dim=-1)  # (..., V / BLOCK)
    place = _below(uniform[..., None] * sums[..., -1:], sums)
    block = torch.searchsorted(sums, place, right=True)  # (..., 1); never one without weight
    place = place - F.pad(sums, (1, 0)).gather(-1, block)
    inside = weights.take_along_dim(block[..., None], dim=-2)[..., 0, :].to(sums.dtype).cumsum(dim=-1)
    return (block * BLOCK + torch.searchsorted(inside, _below(place, inside), right=True))[..., 0]


def _below(place: Tensor, sums: Tensor) -> Tensor:
    """`place` (..., 1), less than the last of the cumulative sums, whatever was rounded."""
    last = sums[..., -1:]
    return torch.minimum(place, last.nextafter(torch.zeros_like(last)))


def largest(x: Tensor) -> Tensor:
    """argmax of x (..., V), the lowest index where several are largest; x has no NaN.

    On a CPU argmax visits one number after another, and amax many at once: the largest number of every block of 64
    finds the block, and the search goes on there.
    """
    size = x.shape[-1]
    if x.device.type != "cpu" or size < BLOCK * BLOCK:
        return x.argmax(dim=-1)
    whole = size - size % BLOCK
    start = x[..., :whole].unflatten(-1, (-1, BLOCK)).amax(dim=-1).argmax(dim=-1, keepdim=True) * BLOCK
    token = start + x.gather(-1, start + torch.arange(BLOCK)).argmax(dim=-1, keepdim=True)
    if whole < size:
        top, index = x[..., whole:].max(dim=-1, keepdim=True)
        token = torch.where(top > x.gather(-1, token), whole + index, token)
    return token[..., 0]


def propose(
    logits: Tensor,
    generators: Sequence[torch.Generator] = (),
    *,
    counts: Sequence[int] = (),
    forbidden: Tensor | None = None,
    confidence: str = "probability",
    temperature: float = 0.0,
    tempered: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Token and confidence at every place: logits (B, M, V) -> int64 (B, M), float (B, M).

    The token is drawn from softmax(l / T), argmax(l) at T = 0, among the ids that are not `forbidden` (N,) and that
    top_k and top_p leave. Confidence is of the model's whole prediction, untempered and unfiltered (LLaDA), or with
    `tempered` of the distribution that was sampled from (Dream). counts (B): the places of each row that are real; a
    row draws numbers for those alone, from its own generator, so that what it draws does not depend on the batch.
    """
    allowed = logits if forbidden is None else logits.index_fill(-1, forbidden, -torch.inf)
    if tempered or temperature > 0:
        sampled = filter_logits(allowed, top_k, top_p)
        if temperature > 0:  # the largest is moved to 0, so that no temperature overflows
            sampled = (sampled - sampled.amax(dim=-1, keepdim=True)) / temperature
    token = draw(sampled, _uniform(counts, generators, sampled)) if temperature > 0 else largest(allowed)
    rule = CONFIDENCES[confidence]
    if rule is None:
        return token, _uniform(counts, generators, logits).to(logits.dtype)
    return token, rule(sampled, sampled, token) if tempered else rule(logits, allowed, token)


# ---------------------------------------------------------------- how many passes, and how many tokens in each


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` passes shared over blocks of these sizes by largest remainder, at least one each, earlier first.

    Raises ValueError where there are fewer passes than blocks.
    """
    if total < len(sizes):
        raise ValueError(
            f"steps is {total} but there are {len(sizes)} blocks, and each needs a pass: "
            f"give steps >= {len(sizes)}, or a larger block_length"
        )
    ideal = [total * size / sum(sizes) for size in sizes]
    shares = [max(1, int(share)) for share in ideal]
    while sum(shares) < total:
        shares[max(range(len(sizes)), key=lambda i: (ideal[i] - shares[i], -i))] += 1
    while sum(shares) > total:
        large = [i for i in range(len(sizes)) if shares[i] > 1]
        shares[min(large, key=lambda i: (ideal[i] - shares[i], -i))] -= 1
    return shares


def remainder_first(masked: int, passes: int) -> list[int]:
    """masked // passes tokens each and one more in the first passes, as LLaDA splits: 8 over 3 is 3, 3, 2."""
    base, extra = divmod(masked, passes)
    return [base + (i < extra) for i in range(passes)]


def rounded(masked: int, passes: int) -> list[int]:
    """What is left over the passes left, rounded half to even, as dllm splits: 8 over 3 is 3, 2, 3."""
    shares = []
    for left in range(passes, 0, -1):
        shares.append(round(masked / left))
        masked -= shares[-1]
    return shares


SPLITS: dict[str, Callable[[int, int], list[int]]] = {"remainder_first": remainder_first, "rounded": rounded}


def schedule(steps: int | None, sizes: Sequence[int], split: str = "remainder_first") -> list[list[int]]:
    """The quotas of every block: `steps` passes in all over blocks of these sizes; None is one token a pass.

    A quota of zero costs no pass, so it is left out.
    """
    passes = apportion(sum(sizes) if steps is None else steps, sizes)
    return [[quota for quota in SPLITS[split](size, n) if quota] for size, n in zip(sizes, passes, strict=True)]


# ---------------------------------------------------------------- commit: confidence -> which places


@dataclass(frozen=True)
class Step:
    """What a commit rule may know of the pass: the rows' quotas (B,) and the rule's own parameter."""

    quota: Tensor
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1


def _sorted(confidence: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence from high to low and the places it belongs to; eligible places first, ties by place."""
    floor = torch.finfo(confidence.dtype).min
    ranked = torch.where(eligible, confidence.clamp_min(floor), -torch.inf)
    return ranked.sort(dim=-1, descending=True, stable=True)


def _first(count: Tensor, order: Tensor, eligible: Tensor) -> Tensor:
    """bool (B, M): the first `count` (B,) places of `order`, at least one, as far as they are eligible."""
    ahead = torch.arange(order.shape[-1], device=order.device)[None] < count.clamp_min(1)[:, None]
    return torch.zeros_like(eligible).scatter(-1, order, ahead) & eligible


def by_quota(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """The `quota` most confident places (LLaDA, arXiv:2502.09992, alg. 5)."""
    _, order = _sorted(confidence, eligible)
    return _first(step.quota, order, eligible)


def by_threshold(confidence: Tensor, eligible: Tensor, step: Step) -> Tensor:
    """Every place with confidence >= tau, else the best one (Fast-dLLM, arXiv:2505.22618, alg. 1)."""
    ranked, order = _sorted(confidence, eligible)
    return _first((ranked >= step.threshold).sum(dim=-1), order, eligible)


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


COMMITS: dict[str, Callable[[Tensor, Tensor, Step], Tensor]] = {
    "quota": by_quota,
    "threshold": by_threshold,
    "factor": by_factor,
    "entropy_bound": by_entropy_bound,
}


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
