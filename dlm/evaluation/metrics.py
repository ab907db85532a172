"""Numbers about generated text, and about a grid of measurements. Plain functions of ids and numbers.

A text is a sequence of token ids, as a tokenizer gave them or as a model wrote them; n is its length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

# Held-out stories are far from both limits: over 3,128 windows of 4 to 512 tokens at most 11% of 4-grams repeat, and
# entropy is at least 75% of ln n.
REPEATED = 0.5  # a text is degenerate where more than this share of its 4-grams repeat an earlier one, or ...
FLAT = 0.5  # ... where its unigram entropy is below this share of the largest possible one, ln n
DEGENERATE_RULE = (
    f"an answer is degenerate where it has no token, where more than {REPEATED:.0%} of its 4-grams repeat an earlier "
    f"one, or where its unigram entropy is below {FLAT:.0%} of the largest possible for its length n, ln n"
)


# ---------------------------------------------------------------- of a text


def unigram_entropy(tokens: Sequence[Hashable]) -> float | None:
    """Entropy in nats of the text's own distribution of tokens; None for an empty text.

    Low values show a lack of variety that a judge's perplexity rewards (Zheng et al., arXiv:2409.02908).
    """
    if not tokens:
        return None
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    return max(0.0, -sum(share * math.log(share) for share in shares))


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple]:
    """The n-grams of a text in order; none where it is shorter."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(tokens: Sequence[Hashable], n: int) -> float | None:
    """Different n-grams over n-grams (distinct-n; Li et al., arXiv:1510.03055); None where there is none."""
    all_grams = ngrams(tokens, n)
    return len(set(all_grams)) / len(all_grams) if all_grams else None


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float | None:
    """The share of n-grams that repeat an earlier one, 1 - distinct-n (seq-rep-n; Welleck et al., arXiv:1908.04319)."""
    share = distinct(tokens, n)
    return None if share is None else 1.0 - share


def is_degenerate(tokens: Sequence[Hashable]) -> bool:
    """Whether DEGENERATE_RULE holds: the text is empty, or so repetitive that its perplexity says nothing."""
    if not tokens:
        return True
    repeated = repetition(tokens) or 0.0
    return repeated > REPEATED or unigram_entropy(tokens) < FLAT * math.log(len(tokens))


def perplexity(nll: float, count: int) -> float | None:
    """exp(nll / count) for a negative log-likelihood in nats over `count` tokens; None where there is none."""
    return math.exp(min(nll / count, 700.0)) if count else None


def aup(points: Sequence[tuple[float, float]], best: float | None = None, alpha: float = 3.0) -> float:
    """Accuracy under parallelism: the area under accuracy (in per cent) against tokens per forward.

    points: (tokens per forward, accuracy from 0 to 100). With the points in order of parallelism,
    rho_1 y_1 + sum over i > 1 of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2, with
    W(y) = min(exp(-alpha (1 - y / best)), 1); points with y < y_1 - 5 are dropped. best: the largest accuracy of all
    methods compared (default: of these points). Source: d3LLM (arXiv:2601.07568) and its authors' aup_utils.py.
    Errors: no point; a parallelism that is not above 0; an accuracy outside of 0 to 100.
    """
    if not points:
        raise ValueError("there is no point to take an area under: give (tokens per forward, accuracy) pairs")
    for rho, y in points:
        if not rho > 0 or not 0 <= y <= 100:
            raise ValueError(f"the point ({rho}, {y}) does not fit: tokens per forward above 0, accuracy in 0 to 100")
    ordered = sorted(points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - 5]
    top = max(y for _, y in points) if best is None else best
    weighted = [y * min(math.exp(-alpha * (1 - y / top)), 1.0) if top else 0.0 for _, y in kept]
    steps = range(1, len(kept))
    area = sum((kept[i][0] - kept[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2 for i in steps)
    return kept[0][0] * kept[0][1] + area
