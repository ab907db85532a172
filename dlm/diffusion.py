"""Forward process: which target tokens of an example are masked, and with what weight.

Shapes: L target tokens of one example; B batch, T row length, E examples in a batch.

The bound of absorbing-state diffusion is -log p(x) <= E_t [(1/t) sum over masked tokens of CE]. An estimator
draws one term of it: a set of masked tokens and the weight of each one's cross entropy. Noise belongs to the
example: it is a function of (seed, epoch, example index) and of nothing else, so that neither the number of
processes, the batch, the packing nor a restart changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-3  # smallest mask rate of `uniform`: LLaDA's
TRAINING, VALIDATION = 0, 1  # streams of randomness that never meet


def example_generator(seed: int, epoch: int, index: int, stream: int = TRAINING) -> np.random.Generator:
    """A generator for one example: Philox with key (seed, stream) and counter (0, 0, epoch, index).

    Two examples are 2^128 draws apart, so that their streams never overlap.
    Errors: a negative seed, epoch or index.
    """
    if min(seed, epoch, index) < 0:
        raise ValueError(f"seed, epoch and index must not be negative: got {seed}, {epoch}, {index}")
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, epoch, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw_count(length: int, generator: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Draw l from 1..L and an l-subset; weight L/l. Returns masked (L,) bool, the weight, the rate l/L.

    E[weight * sum of masked CE] = sum over l of (1/l) E[sum of CE | l masked], which is the bound itself: l/L
    masked tokens with t integrated out (LLaDA, arXiv 2502.09992, eq. 6; least variance of the three).
    """
    count = int(generator.integers(1, length + 1))
    masked = np.zeros(length, dtype=bool)
    masked[generator.permutation(length)[:count]] = True
    return masked, length / count, count / length


def draw_uniform(
    length: int, generator: np.random.Generator, *, t: float | None = None, epsilon: float = EPSILON
) -> tuple[np.ndarray, float, float]:
    """Draw t from (epsilon, 1] and mask each token with probability t; weight 1/t.

    Returns masked (L,) bool, the weight, the rate t. `t`: use this rate (a stratum) in place of drawing one.
    """
    if t is None:
        t = 1.0 - (1.0 - epsilon) * generator.random()  # random() is in [0, 1): t is in (epsilon, 1]
    return generator.random(length) < t, 1.0 / t, t


ESTIMATORS: dict[str, Callable[..., tuple[np.ndarray, float, float]]] = {
    "count": draw_count,
    "uniform": draw_uniform,
}


@dataclass(frozen=True)
class Noise:
    """What is masked in a batch: masked (B, T) bool, weight (B, T) fp32 (0 where not masked), rate (E,) fp32."""

    masked: Tensor
    weight: Tensor
    rate: Tensor

    def __post_init__(self):
        assert self.masked.shape == self.weight.shape and self.masked.dtype == torch.bool

    def to(self, device) -> Noise:
        return Noise(self.masked.to(device), self.weight.to(device), self.rate.to(device))


def draw_noise(batch, estimator: str, seed: int, *, stream: int = TRAINING) -> Noise:
    """Draw the noise of every example of a batch, each from its own generator.

    `batch` has target, segments (B, T) and index, epoch (E,): `segments[b, s] = e` says that the token belongs
    to example e of the batch. Errors: an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: use one of {', '.join(sorted(ESTIMATORS))}")
    draw = ESTIMATORS[estimator]
    target, segments = batch.target.numpy().reshape(-1), batch.segments.numpy().reshape(-1)
    masked = np.zeros(target.shape, dtype=bool)
    weight = np.zeros(target.shape, dtype=np.float32)
    rate = np.zeros(len(batch.index), dtype=np.float32)
    # An example is contiguous in its row, so sorting target places by example gives one run of places each.
    places = np.flatnonzero(target)
    places = places[np.argsort(segments[places], kind="stable")]
    bounds = np.searchsorted(segments[places], np.arange(len(batch.index) + 1))
    for e, (index, epoch) in enumerate(zip(batch.index.tolist(), batch.epoch.tolist(), strict=True)):
        own = places[bounds[e] : bounds[e + 1]]
        if len(own) == 0:
            continue
        chosen, factor, rate[e] = draw(len(own), example_generator(seed, epoch, index, stream))
        masked[own] = chosen
        weight[own[chosen]] = factor
    shape = batch.target.shape
    return Noise(torch.from_numpy(masked).view(shape), torch.from_numpy(weight).view(shape), torch.from_numpy(rate))


def corrupt(tokens: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x_t: `tokens` (B, T) with `mask_id` where `masked`."""
    return torch.where(masked, mask_id, tokens)
