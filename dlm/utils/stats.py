"""Means with their errors, fits and fronts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------- of a set of answers


def geometric_mean(values: Sequence[float]) -> float | None:
    """exp of the mean logarithm, the mean for perplexities and ratios; None where there is no value."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def proportion(right: Sequence[bool]) -> tuple[float, float | None]:
    """The share that is right and its standard error, sqrt(p (1 - p) / (n - 1)); None for one answer alone."""
    share, count = sum(right) / len(right), len(right)
    return share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def mean_and_error(total: float, squares: float, count: float) -> tuple[float, float | None]:
    """The mean and its standard error from a sum, a sum of squares and a count; no error of one value alone."""
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return mean, math.sqrt(variance / (count - 1)) if count > 1 else None


# ---------------------------------------------------------------- of measurements


@dataclass(frozen=True)
class Fit:
    """y = intercept + slopes · x by least squares; r2: the share of y's variance that it explains."""

    intercept: float
    slopes: tuple[float, ...]
    r2: float


def fit(y: Sequence[float], *x: Sequence[float]) -> Fit:
    """Least squares of y on one or several x. Raises ValueError for too few measurements or a collinear x."""
    table = np.column_stack([np.ones(len(y)), *x])
    coefficients, _, rank, _ = np.linalg.lstsq(table, np.asarray(y, dtype=float), rcond=None)
    if rank < table.shape[1]:
        raise ValueError(f"{len(y)} measurements do not determine {table.shape[1]} coefficients: measure more cells")
    residual = np.asarray(y) - table @ coefficients
    total = float(np.square(np.asarray(y) - np.mean(y)).sum())
    r2 = 1 - float(residual @ residual) / total if total else 1.0
    return Fit(float(coefficients[0]), tuple(map(float, coefficients[1:])), r2)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the Pareto front of points (lower is better in both numbers), in order of the first number."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


# ----------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Measure:
    """A mean over texts and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Measure:
        """The mean of the values that are not None (NaN for none)."""
        there = np.array([value for value in values if value is not None], dtype=float)
        if len(there) == 0:
            return cls(math.nan, math.nan)
        return cls(
            float(there.mean()), float(there.std(ddof=1)) / math.sqrt(len(there)) if len(there) > 1 else math.nan
        )


def ratio(values: torch.Tensor, sizes: torch.Tensor) -> tuple[float, float]:
    """sum(values) / sum(sizes) over clusters and its standard error, linearised (Cochran, Sampling Techniques)."""
    values, sizes = values[sizes > 0], sizes[sizes > 0]
    mean = float(values.sum() / sizes.sum())
    clusters = len(values)
    if clusters < 2:
        return mean, math.nan
    residual = values - mean * sizes
    variance = clusters / (clusters - 1) * float(residual.square().sum()) / float(sizes.sum()) ** 2
    return mean, math.sqrt(variance)
