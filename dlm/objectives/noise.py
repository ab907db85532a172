"""Noise: which tokens of an example are masked, and what each one's cross entropy weighs.

Shapes: L target tokens of an example or of a block; B batch, T row length, E examples in a batch, U units.

The bound of absorbing-state diffusion is -log p(x) <= E_t [w(t) sum over masked tokens of CE], where a token is masked
with probability r(t) = 1 - alpha(t) and w = r'/r. With r as the variable it is the integral over r of (1/r) E[sum of
CE], the same for every schedule. An estimator draws one term: a set of masked tokens and their weight. Noise belongs to
the example: it is a function of (seed, epoch, example index) and, for `stratified`, of the optimizer step; the number
of processes, accumulation, packing and restarts do not change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlm.objectives.config import EPSILON, NoiseSettings
from dlm.utils.random import STRATA, TRAINING, example_generator

Draw = tuple[np.ndarray, float, float]  # masked (L,) bool, weight, mask rate


# ------------------------------------------------------------------------------------------------ noise schedules


@dataclass(frozen=True)
class Schedule:
    """rate(t) = 1 - alpha(t), rising over t in [0, 1]; slope(t) = -alpha'(t); time(rate): when that rate is reached."""

    rate: Callable[[float], float]
    slope: Callable[[float], float]
    time: Callable[[float], float]

    def weight(self, t: float) -> float:
        """-alpha'(t) / (1 - alpha(t)): what a masked token's cross entropy weighs (MDLM, arXiv:2406.07524)."""
        return self.slope(t) / self.rate(t)


def linear() -> Schedule:
    """alpha = 1 - t; weight 1/t."""
    return Schedule(rate=lambda t: t, slope=lambda t: 1.0, time=lambda rate: rate)


def cosine() -> Schedule:
    """alpha = 1 - cos(pi/2 (1 - t)); weight pi/2 tan(pi/2 (1 - t)) (MD4, arXiv:2406.04329)."""
    half = math.pi / 2
    return Schedule(
        rate=lambda t: math.cos(half * (1 - t)),
        slope=lambda t: half * math.sin(half * (1 - t)),
        time=lambda rate: 1 - math.acos(rate) / half,
    )


def polynomial(exponent: float) -> Schedule:
    """alpha = 1 - t^w; weight w/t."""
    return Schedule(
        rate=lambda t: t**exponent,
        slope=lambda t: exponent * t ** (exponent - 1),
        time=lambda rate: rate ** (1 / exponent),
    )


def geometric(low: float = 1e-5, high: float = 20.0) -> Schedule:
    """alpha = exp(-s) with s = low^(1 - t) high^t; weight s log(high / low) / (e^s - 1) (MD4's end points)."""
    growth = math.log(high / low)

    def total(t: float) -> float:
        return low * math.exp(growth * t)

    def time(rate: float) -> float:
        s = -math.log1p(-rate) if rate < 1 else high
        return min(1.0, max(0.0, math.log(max(s, low) / low) / growth))

    return Schedule(
        rate=lambda t: -math.expm1(-total(t)), slope=lambda t: math.exp(-total(t)) * total(t) * growth, time=time
    )


NOISE_SCHEDULES: dict[str, Callable[[float], Schedule]] = {  # of the exponent, which `polynomial` alone reads
    "linear": lambda exponent: linear(),
    "cosine": lambda exponent: cosine(),
    "polynomial": polynomial,
    "geometric": lambda exponent: geometric(),
}
LINEAR = linear()


# ----------------------------------------------------------------------------------------------------- estimators


def draw_count(
    length: int, generator: np.random.Generator, *, u: float | None = None, low: float = 0.0, high: float = 1.0,
    beta: tuple[float, float] = (1.0, 1.0),
) -> Draw:  # fmt: skip
    """Draw l from 1..L and an l-subset; weight L/l. Returns masked (L,) bool, the weight, the rate l/L.

    E[weight * sum of masked CE] = sum over l of (1/l) E[sum of CE | l masked], which is the bound itself: l/L
    masked tokens with t integrated out (LLaDA, arXiv:2502.09992, eq. 6). On the toy of
    tests/objectives/test_estimators.py it has the least variance, of an example (6.4, exactly; uniform 61) and of a
    step of 16 (stratified 5 times as much).
    u in [0, 1): use this place in the range of counts (a stratum) in place of drawing one. low, high: only counts with
    low <= l/L <= high, at least one. beta (a, b): draw counts with probability p(l) in proportion to the density of
    Beta(a, b) at (l - 1/2) / L; the weight is then L / (n l p(l)) with n counts in the range, so that the mean stays
    what it is without it: the bound, where all counts are in the range (n = L).
    """
    least = max(1, math.ceil(low * length))
    most = max(least, math.floor(high * length))
    weight = None
    if beta != (1.0, 1.0):
        shares = count_shares(length, least, most, beta)
        place = np.searchsorted(shares.cumsum(), generator.random() if u is None else u, side="right")
        count = least + int(min(place, most - least))
        weight = length / (len(shares) * count * shares[count - least])
    else:
        count = int(generator.integers(least, most + 1)) if u is None else least + int(u * (most - least + 1))
    masked = np.zeros(length, dtype=bool)
    masked[generator.permutation(length)[:count]] = True
    return masked, length / count if weight is None else weight, count / length


def count_shares(length: int, least: int, most: int, beta: tuple[float, float]) -> np.ndarray:
    """The probability of each count l from least to most: as the density of Beta(a, b) at (l - 1/2) / L."""
    rates = (np.arange(least, most + 1) - 0.5) / length
    logs = (beta[0] - 1) * np.log(rates) + (beta[1] - 1) * np.log1p(-rates)
    shares = np.exp(logs - logs.max())  # a sharp density underflows elsewhere
    return shares / shares.sum()


def draw_halves(length: int, generator: np.random.Generator) -> Draw:
    """Draw l from 0..L and an l-subset, for use together with its complement (LLaDA2, arXiv:2512.15745).

    The pair masks every token exactly once. Of the two, each count l from 1 to L comes up with probability 2 / (L + 1),
    so that the mean of both with weight (L + 1) / l is the bound. Returns the first of the two; `complement` makes the
    other. An empty draw has weight 0.
    """
    count = int(generator.integers(0, length + 1))
    masked = np.zeros(length, dtype=bool)
    masked[generator.permutation(length)[:count]] = True
    return masked, (length + 1) / count if count else 0.0, count / length


def draw_block_counts(
    sizes: np.ndarray, generator: np.random.Generator, low: float = 0.0, high: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`draw_count` of many blocks of sizes (U,) at once: masked (sum of sizes,) bool, weights (U,), rates (U,)."""
    least = np.maximum(1, np.ceil(low * sizes)).astype(np.int64)
    most = np.maximum(least, np.floor(high * sizes)).astype(np.int64)
    counts = least + (generator.random(len(sizes)) * (most - least + 1)).astype(np.int64)
    inside = np.arange(sizes.max())[None] < sizes[:, None]
    order = np.where(inside, generator.random(inside.shape), 2.0).argsort(axis=1).argsort(axis=1)
    return (order < counts[:, None])[inside], sizes / counts, counts / sizes


def draw_uniform(
    length: int, generator: np.random.Generator, *, t: float | None = None, u: float | None = None,
    low: float = EPSILON, high: float = 1.0, schedule: Schedule = LINEAR,
) -> Draw:  # fmt: skip
    """Draw a time and mask each token with that time's rate; weight w(t), which is 1/t under the linear schedule.

    t: use this time. u in [0, 1): use this place in the range of times (a stratum) in place of drawing one.
    The rate lies in (low, high]. Its mean is the mean of (1/r) E[sum of CE] over r in that range, for every schedule:
    the weight holds the ratio of the range of times to that of rates, which is 1 for the linear one.
    Returns masked (L,) bool, the weight, the rate.
    """
    first, last = schedule.time(low), schedule.time(high)
    if t is None:
        t = last - (last - first) * (generator.random() if u is None else u)  # in (first, last]
    rate = schedule.rate(t)
    return generator.random(length) < rate, schedule.weight(t) * (last - first) / (high - low), rate


def draw_d3pm(length: int, generator: np.random.Generator, *, steps: int, schedule: Schedule = LINEAR) -> Draw:
    """One term of the bound in `steps` discrete times T (D3PM, arXiv:2107.03006, absorbing state).

    With rates r_0 = 0 < r_1 < ... < r_T = 1 the bound is the sum over i of (r_i - r_(i-1)) / r_i E[sum of CE at r_i]:
    a masked token is revealed on the way from i to i - 1 with that probability, in q as in p, which leaves its CE of
    the KL term. Draws i from 1..T; weight T times that factor. T to infinity gives the continuous bound.
    """
    i = int(generator.integers(1, steps + 1))
    rate = 1.0 if i == steps else schedule.rate(i / steps)
    before = 0.0 if i == 1 else schedule.rate((i - 1) / steps)
    return generator.random(length) < rate, steps * (rate - before) / rate, rate


Strata = dict[tuple[int, int], tuple[int, int]]


def deal_strata(keys: Iterable[tuple[int, int]], seed: int, step: int) -> Strata:
    """Deal the examples (epoch, index) of a whole optimizer step one stratum each: (its number, how many), permuted.

    A function of (seed, step) and the step's examples in order, which every process knows.
    """
    keys = list(keys)
    order = example_generator(seed, 0, step, STRATA).permutation(len(keys))
    return {key: (int(place), len(keys)) for key, place in zip(keys, order, strict=True)}


def _draws(
    lengths: list[int], generator: np.random.Generator, settings: NoiseSettings, stratum: tuple[int, int]
) -> list[Draw]:
    """One draw for each unit of an example, with `lengths` target tokens."""
    name = settings.estimator
    if settings.complementary:
        return [draw_halves(length, generator) for length in lengths]
    if name == "count":
        options = {"low": settings.lowest_rate, "high": settings.highest_rate, "beta": settings.beta}
        return [draw_count(length, generator, **options) for length in lengths]
    schedule = NOISE_SCHEDULES[settings.noise_schedule](settings.noise_exponent)
    if name == "d3pm":
        return [draw_d3pm(length, generator, steps=settings.diffusion_steps, schedule=schedule) for length in lengths]
    low, units = max(settings.lowest_rate, EPSILON), len(lengths)
    places: list[float | None] = [None] * units
    if name == "stratified":  # the blocks of an example stand evenly around the circle from the example's own place
        place = (stratum[0] + generator.random()) / stratum[1]
        places = [(place + unit / units) % 1.0 for unit in range(units)]
    return [
        draw_uniform(length, generator, u=u, low=low, high=settings.highest_rate, schedule=schedule)
        for length, u in zip(lengths, places, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class Noise:
    """What is masked in a batch: masked (B, T) bool, weight (B, T) fp32 (0 where not scored), rate (U,) fp32.

    What is scored is masked; under decoding-like noise the places after the block are masked and not scored. A unit is
    what had one draw: an example, or with `block_length` a block of one. units (B, T) int64: each token's
    unit; None: `batch.segments`, the examples.
    """

    masked: Tensor
    weight: Tensor
    rate: Tensor
    units: Tensor | None = None
    block_length: int | None = None

    def __post_init__(self):
        assert self.masked.shape == self.weight.shape and self.masked.dtype == torch.bool
        assert (self.units is None) == (self.block_length is None)

    @property
    def scored(self) -> Tensor:
        """(B, T) bool: the places whose cross entropy counts."""
        return self.weight > 0

    def to(self, device) -> Noise:
        units = None if self.units is None else self.units.to(device, non_blocking=True)
        masked, weight, rate = (x.to(device, non_blocking=True) for x in (self.masked, self.weight, self.rate))
        return Noise(masked, weight, rate, units, self.block_length)


def draw_noise(
    batch, estimator: str | NoiseSettings, seed: int, *, stream: int = TRAINING, strata: Strata | None = None
) -> Noise:
    """Draw the noise of every example of a batch, each from its own generator.

    `batch` has target, segments, positions (B, T) and index, epoch (E,): `segments[b, s] = e` says that the token
    belongs to example e of the batch. estimator: settings, or the name of one with defaults. strata: of the whole
    optimizer step (`deal_strata`), for `stratified`. Errors: an unknown estimator.
    """
    settings = NoiseSettings(estimator) if isinstance(estimator, str) else estimator
    target, segments = batch.target.numpy().reshape(-1), batch.segments.numpy().reshape(-1)
    block = None if settings.block_length is None else batch.positions.numpy().reshape(-1) // settings.block_length
    masked = np.zeros(target.shape, dtype=bool)
    weight = np.zeros(target.shape, dtype=np.float32)
    units = None if block is None else np.zeros(target.shape, dtype=np.int64)
    examples = len(batch.index)
    rates: list[float] = [0.0] * examples if block is None else []
    # An example is contiguous in its row, so sorting target places by example gives one run of places each.
    places = np.flatnonzero(target)
    places = places[np.argsort(segments[places], kind="stable")]
    bounds = np.searchsorted(segments[places], np.arange(examples + 1))
    for e, key in enumerate(zip(batch.epoch.tolist(), batch.index.tolist(), strict=True)):
        own = places[bounds[e] : bounds[e + 1]]
        if len(own) == 0:
            continue
        generator = example_generator(seed, *key, stream)
        sizes = None if block is None else np.diff(np.flatnonzero(np.diff(block[own], prepend=-1)), append=len(own))
        if sizes is not None and len(sizes) > 1 and settings.counts_blocks:
            low, high = settings.lowest_rate, settings.highest_rate
            chosen, factors, drawn_rates = draw_block_counts(sizes, generator, low, high)
            numbers = np.repeat(np.arange(len(sizes)), sizes)
            masked[own] = chosen
            weight[own] = np.where(chosen, factors[numbers], 0)
            units[own] = len(rates) + numbers
            rates += drawn_rates.tolist()
            continue
        if settings.decoding_share and generator.random() < settings.decoding_share:
            chosen, factors, rates[e] = decoding_noise(len(own), generator, settings.decoding_block)
            masked[own], weight[own] = chosen, factors
            continue
        parts = [own] if sizes is None else np.split(own, np.cumsum(sizes)[:-1])
        stratum = (0, 1) if strata is None else strata[key]
        drawn = _draws([len(part) for part in parts], generator, settings, stratum)
        for part, (chosen, factor, rate) in zip(parts, drawn, strict=True):
            masked[part] = chosen
            weight[part[chosen]] = factor
            if units is None:
                rates[e] = rate
            else:
                units[part] = len(rates)
                rates.append(rate)
    shape = batch.target.shape
    return Noise(
        torch.from_numpy(masked).view(shape),
        torch.from_numpy(weight).view(shape),
        torch.tensor(rates, dtype=torch.float32),
        None if units is None else torch.from_numpy(units).view(shape),
        settings.block_length,
    )


def decoding_noise(
    length: int, generator: np.random.Generator, block_length: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """What left-to-right decoding shows: clean text before a block, the block partly masked, all after it masked.

    One block of the example, drawn evenly among its n = ceil(L / block_length), with a count l of its K tokens masked
    as in `draw_count`; these alone are scored, with weight n K / l. The mean is the sum over blocks of each one's
    bound given the clean tokens before it, a bound on -log p of the whole (Blockwise SFT, arXiv:2508.19529).
    Returns masked (L,) bool, weight (L,), the rate l / K.
    """
    blocks = -(-length // block_length)
    start = int(generator.integers(blocks)) * block_length
    size = min(block_length, length - start)
    chosen, factor, rate = draw_count(size, generator)
    masked, weight = np.arange(length) >= start + size, np.zeros(length)
    masked[start : start + size] = chosen
    weight[start : start + size] = np.where(chosen, blocks * factor, 0.0)
    return masked, weight, rate


def complement(batch, noise: Noise) -> Noise:
    """The other half of noise that was drawn with `complementary`: every target token that `noise` leaves is masked."""
    units = batch.segments if noise.units is None else noise.units
    number = units.clamp_min(0)[batch.target]
    sizes = torch.bincount(number, minlength=len(noise.rate))
    masked = batch.target & ~noise.masked
    counts = torch.bincount(units.clamp_min(0)[masked], minlength=len(noise.rate))
    factor = torch.where(counts > 0, (sizes + 1) / counts.clamp_min(1), 0.0)
    weight = torch.where(masked, factor[units.clamp_min(0)], 0.0)
    return Noise(masked, weight, counts / sizes.clamp_min(1), noise.units, noise.block_length)


def corrupt(tokens: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """x_t: `tokens` (B, T) with `mask_id` where `masked`."""
    return torch.where(masked, mask_id, tokens)
