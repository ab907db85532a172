"""Chances of one step of the reverse process: a masked place takes its token, a committed place is masked again.

Shapes: R rows of a pass, M places asked about.

Time runs from 1 (all masked) to 0, alpha is the share that is not masked; a step goes from t to s < t. With sigma the
chance that a committed place is masked again, a masked place takes a token with (alpha_s - (1 - sigma) alpha_t) /
(1 - alpha_t) (ReMDM, arXiv:2503.00307, eq. 6); sigma 0 is the plain ancestral sampler (MDLM, arXiv:2406.07524).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlm.objectives.noise import NOISE_SCHEDULES

if TYPE_CHECKING:
    from dlm.sampling.config import SamplingConfig
    from dlm.sampling.row import Row

__all__ = ["REMASKS", "Chances", "Drawn", "chances", "draw_steps", "looped", "shares"]

ETA = {
    "cap": 0.008,
    "rescale": 0.015,
    "confidence": 1.0,
    "loop": 0.02,
    "forward_backward": 1.0,
}  # the paper's, where none is given


@dataclass(frozen=True)
class Chances:
    """take: of a masked place; again: of a committed place; shared: whether `again` is the sum over the row's places,
    shared out by a softmax of how unsure each was."""

    take: float
    again: float
    shared: bool = False


def _chances(alpha_t: float, alpha_s: float, sigma: float) -> Chances:
    left = 1 - alpha_t
    take = (alpha_s - (1 - sigma) * alpha_t) / left if left > 0 else 1.0
    return Chances(min(1.0, max(0.0, take)), sigma)


def _largest(alpha_t: float, alpha_s: float) -> float:
    """The largest sigma for which every chance is one."""
    return min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0


def never(t: float, s: float, alpha: Callable[[float], float], eta: float) -> Chances:
    """The plain ancestral sampler."""
    return _chances(alpha(t), alpha(s), 0.0)


def cap(t: float, s: float, alpha: Callable[[float], float], eta: float) -> Chances:
    """sigma at most eta."""
    return _chances(alpha(t), alpha(s), min(eta, _largest(alpha(t), alpha(s))))


def rescale(t: float, s: float, alpha: Callable[[float], float], eta: float) -> Chances:
    """eta times the largest sigma."""
    return _chances(alpha(t), alpha(s), eta * _largest(alpha(t), alpha(s)))


def by_confidence(t: float, s: float, alpha: Callable[[float], float], eta: float) -> Chances:
    """eta times the largest sigma, shared out over the places by how unsure each was when it was committed."""
    take = _chances(alpha(t), alpha(s), 0.0).take
    return Chances(take, eta * _largest(alpha(t), alpha(s)), shared=True)


def forward_backward(t: float, s: float, alpha: Callable[[float], float], eta: float) -> Chances:
    """eta times the sigma that a step back and then forward again makes (DFM, arXiv:2407.15595; ReMDM, sec. 4.3)."""
    alpha_t, alpha_s = alpha(t), alpha(s)
    sigma = (alpha_s - alpha_t) / alpha_t if alpha_t > 0 else 1.0
    return _chances(alpha_t, alpha_s, min(eta * sigma, _largest(alpha_t, alpha_s)))


def looped(t: float, s: float, eta: float, on: float, off: float, alpha_on: float) -> Chances:
    """A step of a loop: until time `on` a share alpha_on is written, until `off` that share is kept, then the rest."""
    if t > on:
        return _chances((1 - t) * alpha_on / (1 - on), (1 - s) * alpha_on / (1 - on), 0.0)
    if t > off:
        return Chances(min(1.0, alpha_on * eta / (1 - alpha_on)), eta)
    return _chances(1 - t * (1 - alpha_on) / off, 1 - s * (1 - alpha_on) / off, 0.0)


def loop(t: float, s: float, alpha: Callable[[float], float], eta: float) -> Chances:
    """Writes most of the text, then masks and writes again at a fixed share, then writes the rest; times and share as
    in the paper's scripts."""
    return looped(t, s, eta, on=0.55, off=0.05, alpha_on=0.9)


REMASKS: dict[str, Callable[[float, float, Callable[[float], float], float], Chances]] = {
    "cap": cap,
    "rescale": rescale,
    "confidence": by_confidence,
    "loop": loop,
    "forward_backward": forward_backward,
}


def chances(config: SamplingConfig, t: float, s: float) -> Chances:
    """The chances of a step from t to s under these settings."""
    rate = NOISE_SCHEDULES[config.noise_schedule](2.0).rate
    rule = REMASKS[config.remask] if config.revise == "remask" else never
    eta = ETA[config.remask] if config.remask_eta is None else config.remask_eta
    return rule(t, s, lambda time: 1 - rate(time), eta)


def shares(chance: Chances, certain: Tensor, revisable: Tensor) -> Tensor:
    """(M,) the chance that each place is masked again, of those where `revisable` (M,) is True; certain (M,): how sure
    each was when it was committed."""
    if not chance.shared:
        return torch.full(certain.shape, chance.again, dtype=torch.float64, device=certain.device)
    unsure = (-certain.double()).masked_fill(~revisable, -torch.inf)
    return chance.again * unsure.softmax(dim=0).nan_to_num(0.0)


@dataclass(frozen=True)
class Drawn:
    """bool (R, M) each: which masked places may take their token, which committed places are masked again."""

    take: Tensor
    again: Tensor


def draw_steps(rows: Sequence[Row], eligible: Tensor, revisable: Tensor, certain: Tensor) -> Drawn:
    """Draws a step of each row, and the next ones too while a step changes nothing: the prediction is the same.

    certain (R, M): how sure each place was when it was committed. A row draws for its own places from its own
    generator.
    """
    take, again = torch.zeros_like(eligible), torch.zeros_like(revisable)
    for i, row in enumerate(rows):
        asked = row.asked
        while True:
            chance = chances(row.config, *row.times)
            uniform = torch.ones(eligible.shape[1], dtype=torch.float64, device=eligible.device)
            uniform[:asked].uniform_(generator=row.generator)
            back = shares(chance, certain[i], revisable[i])
            again[i] = revisable[i] & (uniform < back) & (not row.last_step)
            take[i] = eligible[i] & ((uniform < chance.take) | row.last_step)
            if row.last_step or row.config.commit != "ancestral" or bool((take[i] | again[i]).any()):
                break
            row.turn += 1
    return Drawn(take, again)
