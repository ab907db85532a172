"""Exact values for short texts, by enumeration of masks or of orders, and the likelihood of one order of unmasking.

Shapes: L target tokens of an example, S = 2^L sets of them.

For tests and for study: what the estimators of `likelihood` estimate, how far the bound is from -log p(x), and what a
fixed order costs. All values are of -log p of the target tokens given the others, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from dlm.data.examples import Example
from dlm.objectives.likelihood import Bound, blocks_of, in_block
from dlm.objectives.rows import Row, cross_entropies, measured
from dlm.utils.names import check_name

__all__ = ["exact_bound", "exact_likelihood", "greedy", "order_likelihood"]

LONGEST = 14  # target tokens, or those of a block: 2^14 rows


def _sets(length: int, index: int) -> np.ndarray:
    """(S, L) bool: row s holds the bits of s."""
    if length > LONGEST:
        raise ValueError(
            f"example {index} has {length} target tokens in a block, and listing all sets of them takes 2^{length} "
            f"evaluations: give at most {LONGEST}, or estimate with likelihood.bound"
        )
    return (np.arange(2**length)[:, None] >> np.arange(length) & 1).astype(bool)


def _integral(masked: int, length: int, low: float) -> float:
    """The integral of r^(l - 1) (1 - r)^(L - l) over mask rates r from `low` to 1: the weight of an l-subset."""
    others = np.polynomial.Polynomial([1.0, -1.0]) ** (length - masked)
    whole = (np.polynomial.Polynomial([0.0, 1.0]) ** (masked - 1) * others).integ()
    return float(whole(1.0) - whole(low))


def exact_bound(
    model, example: Example, *, mask_id: int, block_length: int | None = None, cfg_scale: float = 0.0,
    low: float = 0.0, batch_size: int = 64,
) -> Bound:  # fmt: skip
    """The masked diffusion bound, the integral over r of (1/r) E[sum of CE], over every set of masked tokens.

    block_length: the sum of the blocks' bounds, each given the blocks before it and with those after it masked
    (None: the model's own, or one block). With blocks of one token it is the left-to-right chain rule. low: the
    integral from this mask rate up over its length: the mean of the estimators that draw a time.
    Errors: more than 14 target tokens in a block.
    """
    settings = getattr(model, "config", None)
    trained = None if getattr(settings, "full_attention", False) else getattr(settings, "block_length", None)
    length = int(example.target.sum())
    rows, weights = [], []
    for block in blocks_of(example, trained or block_length or length, trained is not None):
        for chosen in _sets(len(block), example.index)[1:]:
            rows.append(in_block(example, block, chosen, trained is not None))
            weights.append(_integral(int(chosen.sum()), len(block), low) / (1 - low))
    costs = cross_entropies(model, rows, mask_id=mask_id, cfg_scale=cfg_scale, batch_size=batch_size)
    nats = sum(weight * float(cost.sum()) for weight, cost in zip(weights, costs, strict=True))
    return Bound(nats, 0.0, len(rows) * (2 if cfg_scale else 1), length)


def exact_likelihood(model, example: Example, *, mask_id: int, cfg_scale: float = 0.0, batch_size: int = 64) -> Bound:
    """-log p of the sampler that unmasks one token at a time in a uniformly random order; never above the bound.

    p(S), the probability to have written the tokens of S when |S| are written, follows from smaller sets: the sum over
    i in S of p(S - i) p(x_i | S - i) / (L - |S| + 1) (an order-agnostic model, arXiv:2110.02037).
    Errors: more than 14 target tokens.
    """
    length = int(example.target.sum())
    sets = _sets(length, example.index)  # here: what is written
    rows = [Row.of(example, ~written) for written in sets]
    costs = np.full(sets.shape, np.inf)
    nats = cross_entropies(model, rows, mask_id=mask_id, cfg_scale=cfg_scale, batch_size=batch_size)
    costs[~sets] = np.concatenate(nats)
    log_p = np.full(len(sets), -np.inf)
    log_p[0] = 0.0
    for s in range(1, len(sets)):
        before = [s ^ 1 << i for i in range(length) if s >> i & 1]
        steps = [log_p[b] - costs[b, (s ^ b).bit_length() - 1] - math.log(length - b.bit_count()) for b in before]
        log_p[s] = np.logaddexp.reduce(steps)
    return Bound(-float(log_p[-1]), 0.0, len(rows) * (2 if cfg_scale else 1), length)


# ------------------------------------------------------------------------------------------------------- one order


def order_likelihood(
    model, examples: Sequence[Example], order: str | Sequence[int] = "left_to_right", *, mask_id: int,
    cfg_scale: float = 0.0, batch_size: int = 16,
) -> list[Bound]:  # fmt: skip
    """-log p of the sampler that writes one token at a time in an order that is fixed by what stands there.

    order: `left_to_right`; `confident` (next the place whose prediction has the largest probability, whatever token
    is then drawn there); or the places 0..L-1 of the target tokens in some order. L evaluations each.
    """
    scale = 2 if cfg_scale else 1
    if order == "confident":
        walks = _walk(model, examples, mask_id, cfg_scale, batch_size, whole=True)
        return [Bound(walk.nats, 0.0, walk.steps * scale, walk.steps) for walk in walks]
    if isinstance(order, str):
        check_name("order", order, ("left_to_right", "confident"))
    rows, owners = [], []
    for number, example in enumerate(examples):
        length = int(example.target.sum())
        places = range(length) if order == "left_to_right" else order
        if sorted(places) != list(range(length)):
            raise ValueError(f"the order of example {example.index} does not name each of 0..{length - 1} once")
        rank = np.empty(length, dtype=np.int64)
        rank[list(places)] = np.arange(length)
        rows += [Row.of(example, rank >= step, rank == step) for step in range(length)]
        owners += [number] * length
    costs = cross_entropies(model, rows, mask_id=mask_id, cfg_scale=cfg_scale, batch_size=batch_size)
    nats = np.zeros(len(examples))
    np.add.at(nats, owners, [float(cost.sum()) for cost in costs])
    counts = np.bincount(owners, minlength=len(examples)).tolist()
    return [Bound(float(total), 0.0, count * scale, count) for total, count in zip(nats, counts, strict=True)]


@dataclass
class _Walk:
    """An example on its way, written place by place, most confident first."""

    example: Example
    left: np.ndarray = field(init=False)  # (L,) bool: not yet written
    nats: float = 0.0
    steps: int = 0
    greedy: bool = True

    def __post_init__(self):
        self.left = np.ones(int(self.example.target.sum()), dtype=bool)

    def advance(self, told: np.ndarray) -> None:
        """told (N, 3) of the places left: -log p of the true token, log p of the best one, whether they are one."""
        best = int(told[:, 1].argmax())
        self.nats += float(told[best, 0])
        self.greedy &= bool(told[best, 2])
        self.left[np.flatnonzero(self.left)[best]] = False
        self.steps += 1


def _walk(model, examples: Sequence[Example], mask_id: int, cfg_scale: float, batch_size: int, *, whole: bool):
    """The walks of all examples, one pass a place; whole: go on after a place where another token is likelier."""

    def measure(logits, truth):
        log_p = logits.log_softmax(dim=-1)
        log_p[:, mask_id] = -torch.inf  # never proposed
        best, token = log_p.max(dim=-1)
        return torch.stack([F.cross_entropy(logits, truth, reduction="none"), best, token == truth], dim=-1)

    walks = [_Walk(example) for example in examples]
    while active := [walk for walk in walks if walk.left.any() and (whole or walk.greedy)]:
        rows = [Row.of(walk.example, walk.left) for walk in active]
        told = measured(model, rows, measure, mask_id=mask_id, cfg_scale=cfg_scale, batch_size=batch_size)
        for walk, values in zip(active, told, strict=True):
            walk.advance(values)
    return walks


def greedy(
    model, examples: Sequence[Example], *, mask_id: int, cfg_scale: float = 0.0, batch_size: int = 16
) -> list[bool]:
    """Whether decoding one token a pass, most confident first and at temperature 0, writes just the target tokens.

    It is over at an example's first other token.
    """
    return [walk.greedy for walk in _walk(model, examples, mask_id, cfg_scale, batch_size, whole=False)]
