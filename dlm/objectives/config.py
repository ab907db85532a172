"""Choices of the objectives and their noise, checked without torch: names here, functions in `losses` and `noise`."""

from __future__ import annotations

from dataclasses import dataclass

from dlm.utils.names import check_name

__all__ = ["EPSILON", "ESTIMATORS", "NOISE_SCHEDULE_NAMES", "OBJECTIVE_NAMES", "NoiseSettings"]

OBJECTIVE_NAMES = ("diffusion", "block_diffusion", "autoregressive")  # the keys of `losses.OBJECTIVES`
NOISE_SCHEDULE_NAMES = ("linear", "cosine", "polynomial", "geometric")  # the keys of `noise.NOISE_SCHEDULES`
EPSILON = 1e-3  # smallest mask rate of the estimators that draw a time: LLaDA's
ESTIMATORS = ("count", "uniform", "stratified", "d3pm")


@dataclass(frozen=True)
class NoiseSettings:
    """How noise is drawn.

    estimator: `count`, `uniform`, `stratified` (uniform, with the times spread evenly over the optimizer step) or
    `d3pm` (of `steps` discrete times). schedule: of the estimators that draw a time; exponent: of `polynomial`.
    low, high: mask rates to draw from; a narrower range than 0 to 1 is no bound, but has less variance (BD3-LM,
    arXiv:2503.09573, section 5). block_length: a draw for each block of so many tokens; None: one for each example.
    """

    estimator: str = "count"
    schedule: str = "linear"
    exponent: float = 2.0
    steps: int = 1000
    low: float = 0.0
    high: float = 1.0
    block_length: int | None = None

    def __post_init__(self):
        check_name("estimator", self.estimator, ESTIMATORS)
        check_name("noise schedule", self.schedule, NOISE_SCHEDULE_NAMES)
        if self.estimator == "count" and self.schedule != "linear":
            raise ValueError(
                f"noise schedule {self.schedule!r} changes nothing under estimator count, which has the time "
                f"integrated out: use estimator uniform or stratified, or leave the schedule out"
            )
        if self.exponent <= 0:
            raise ValueError(f"the noise schedule's exponent is {self.exponent}: it must be above 0")
        if self.steps < 1:
            raise ValueError(f"d3pm has {self.steps} discrete times: give 1 or more")
        if not 0 <= self.low < self.high <= 1 or (self.high <= EPSILON and self.estimator != "count"):
            raise ValueError(
                f"mask rates from {self.low} to {self.high}: give 0 <= lowest < highest <= 1, "
                f"the highest above {EPSILON}"
            )
        if self.estimator == "d3pm" and (self.low, self.high) != (0, 1):
            raise ValueError("estimator d3pm takes all mask rates: use uniform or count to draw from some of them")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}: a block holds at least one token")
