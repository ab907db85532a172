"""Unmasking rules: what to write on a masked place (propose) and which places to commit now (commit).

Shapes: B rows, M places asked about, V vocabulary. All arithmetic is in fp32 (fp64 for an fp64 model) through
logsumexp, over the M places alone. Ties go to the lowest place.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONFIDENCES", "drawn_order", "propose", "sampled_from"]


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
        outside[..., 0] = False  # a top_p that rounds to 0 keeps the most probable token too
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


def drawn_order(
    confidence: Tensor, temperature: float, counts: Sequence[int], generators: Sequence[torch.Generator]
) -> Tensor:
    """Scores (B, M) whose n largest are a draw of n places without replacement by softmax(confidence / temperature)
    (Gumbel top-k, arXiv:1903.06059); Dream's alg_temp."""
    uniform = _uniform(counts, generators, confidence[..., None])
    tiny = torch.finfo(uniform.dtype).tiny
    gumbel = -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()
    return (confidence.to(uniform.dtype) / temperature + gumbel).to(confidence.dtype)


BLOCK = 64  # how many numbers of a row a search looks at together


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Tokens of probability softmax(scores), scores (..., V) of which the largest is 0: where the cumulative
    distribution passes `uniform` (...).

    The law of argmax(scores + Gumbel noise) for one random number instead of V, and without its error in fp32, which
    cuts the tails (Zheng et al., arXiv:2409.02908): cumulative sums are in fp64. The search goes by blocks, then
    inside of one.
    """
    weights, missing = scores.exp(), -scores.shape[-1] % BLOCK
    weights = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, BLOCK))
    sums = weights.sum(dim=-1).to(uniform.dtype).cumsum(dim=-1)  # (..., V / BLOCK)
    below_one = uniform.clamp_max(1 - torch.finfo(uniform.dtype).eps / 2)  # times a number it is rounded to less
    place = below_one[..., None] * sums[..., -1:]
    block = torch.searchsorted(sums, place, right=True)  # (..., 1); never one without weight
    block = block.clamp_max(sums.shape[-1] - 1)  # of weights that are no numbers, which are refused after the pass
    place = place - F.pad(sums, (1, 0)).gather(-1, block)
    inside = weights.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :].to(sums.dtype).cumsum(dim=-1)
    last = inside[..., -1:]  # which a place may reach by rounding
    place = torch.minimum(place, last.nextafter(torch.zeros_like(last)))
    token = block * BLOCK + torch.searchsorted(inside, place, right=True)
    return token[..., 0].clamp_max(scores.shape[-1] - 1)


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


def sampled_from(
    open_logits: Tensor, temperature: float, tempered: bool, top_k: int | None, top_p: float | None
) -> Tensor:
    """The logits (..., V) that tokens are drawn from: tempered, the largest at 0, and without what top_k and top_p
    leave out; `open_logits` themselves at temperature 0."""
    if not tempered and temperature == 0:
        return open_logits
    sampled = open_logits if tempered else filter_logits(open_logits, top_k, top_p)
    if temperature > 0:  # the largest is moved to 0, so that no temperature overflows
        sampled = (sampled - sampled.amax(dim=-1, keepdim=True)).div_(temperature)
    if tempered:  # Dream cuts what was tempered, by mass and then by rank
        sampled = filter_logits(filter_logits(sampled, None, top_p), top_k, None)
    return sampled


def propose(
    logits: Tensor,
    generators: Sequence[torch.Generator] = (),
    *,
    counts: Sequence[int] = (),
    forbidden: Tensor | None = None,
    allowed: Tensor | None = None,
    confidence: str = "probability",
    temperature: float = 0.0,
    tempered: bool = False,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Token and confidence at every place: logits (B, M, V) -> int64 (B, M), float (B, M).

    The token is drawn from softmax(l / T), argmax(l) at T = 0, among the ids that are not `forbidden` (N,), that
    are `allowed` (B, M, V) at their place, and that top_k and top_p leave.
    Confidence is of the model's whole prediction, untempered and unfiltered (LLaDA), or with
    `tempered` of the distribution that was sampled from (Dream). counts (B): the places of each row that are real; a
    row draws numbers for those alone, from its own generator, so that what it draws does not depend on the batch.
    """
    open_logits = logits if forbidden is None else logits.index_fill(-1, forbidden, -torch.inf)
    if allowed is not None:
        open_logits = open_logits.masked_fill(~allowed, -torch.inf)
    sampled = sampled_from(open_logits, temperature, tempered, top_k, top_p)
    token = draw(sampled, _uniform(counts, generators, sampled)) if temperature > 0 else largest(open_logits)
    rule = CONFIDENCES[confidence]
    if rule is None:
        return token, _uniform(counts, generators, logits).to(logits.dtype)
    return token, rule(sampled, sampled, token) if tempered else rule(logits, open_logits, token)
