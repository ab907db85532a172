"""Choices of the objectives and their noise, checked without torch: names here, functions in `losses` and `noise`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from dlm.utils.names import check_name

__all__ = [
    "AS_MODEL",
    "EPSILON",
    "ESTIMATORS",
    "NOISE_SCHEDULE_NAMES",
    "OBJECTIVE_NAMES",
    "POLICY_NAMES",
    "TEACHING_NAMES",
    "NoiseSettings",
]

OBJECTIVE_NAMES = ("diffusion", "block_diffusion", "autoregressive")  # the keys of `losses.OBJECTIVES`
AS_MODEL = "model"  # of a recipe: the objective, the blocks and the visibilities that its model was trained with
NOISE_SCHEDULE_NAMES = ("linear", "cosine", "polynomial", "geometric")  # the keys of `noise.NOISE_SCHEDULES`
EPSILON = 1e-3  # smallest mask rate of the estimators that draw a time: LLaDA's
POLICY_NAMES = ("diffu_grpo", "trace", "wd1")  # the keys of `policy.METHODS`
TEACHING_NAMES = ("certainty", "sdtt", "consistency")  # what `dlm train distill` learns by
ESTIMATORS = ("count", "uniform", "stratified", "d3pm")


@dataclass(frozen=True)
class NoiseSettings:
    """How noise is drawn.

    estimator: `count`, `uniform`, `stratified` (uniform, with the times spread evenly over the optimizer step) or
    `d3pm` (of `diffusion_steps` discrete times). noise_schedule: of the estimators that draw a time; noise_exponent: of
    `polynomial`. lowest_rate, highest_rate: mask rates to draw from; a narrower range than 0 to 1 is no bound, but has
    less variance (the clipped schedules of BD3-LM, arXiv:2503.09573). block_length: a draw for each block of so many
    tokens; None: one for each example. rate_alpha, rate_beta: of the Beta distribution of the mask rates under `count`;
    1, 1 is uniform. complementary: draws that come with their complement (`noise.draw_halves`). decoding_share: the
    share of the examples that get the pattern of left-to-right decoding in place of independent masks, with blocks of
    decoding_block tokens (`noise.decoding_noise`).
    """

    estimator: str = "count"
    noise_schedule: str = "linear"
    noise_exponent: float = 2.0
    diffusion_steps: int = 1000
    lowest_rate: float = 0.0
    highest_rate: float = 1.0
    block_length: int | None = None
    rate_alpha: float = 1.0
    rate_beta: float = 1.0
    complementary: bool = False
    decoding_share: float = 0.0
    decoding_block: int = 4

    @property
    def counts_blocks(self) -> bool:
        """Whether the counts of all blocks of an example can be drawn at once."""
        return self.estimator == "count" and self.beta == (1.0, 1.0) and not self.complementary

    @property
    def beta(self) -> tuple[float, float]:
        """The parameters of the mask rates' Beta distribution."""
        return self.rate_alpha, self.rate_beta

    def __post_init__(self):
        check_name("estimator", self.estimator, ESTIMATORS)
        self._check_patterns()
        check_name("noise schedule", self.noise_schedule, NOISE_SCHEDULE_NAMES)
        if self.estimator == "count" and self.noise_schedule != "linear":
            raise ValueError(
                f"noise schedule {self.noise_schedule!r} changes nothing under estimator count, which has the time "
                f"integrated out: use estimator uniform or stratified, or leave the schedule out"
            )
        if not 0 < self.noise_exponent < math.inf:
            raise ValueError(f"the noise schedule's exponent is {self.noise_exponent}: it must be a number above 0")
        if self.diffusion_steps < 1:
            raise ValueError(f"d3pm has {self.diffusion_steps} discrete times: give 1 or more")
        tiny = self.highest_rate <= EPSILON and self.estimator != "count"
        if not 0 <= self.lowest_rate < self.highest_rate <= 1 or tiny:
            raise ValueError(
                f"mask rates from {self.lowest_rate} to {self.highest_rate}: give 0 <= lowest < highest <= 1, "
                f"the highest above {EPSILON}"
            )
        if self.estimator == "d3pm" and (self.lowest_rate, self.highest_rate) != (0, 1):
            raise ValueError("estimator d3pm takes all mask rates: use uniform or count to draw from some of them")
        if self.block_length is not None and (not isinstance(self.block_length, Integral) or self.block_length < 1):
            raise ValueError(f"block_length is {self.block_length}: a block holds a whole number of tokens, 1 or more")

    def _check_patterns(self) -> None:
        if not all(0 < one < math.inf for one in self.beta):
            raise ValueError(f"rate_alpha and rate_beta are {self.beta[0]} and {self.beta[1]}: give numbers above 0")
        if not 0 <= self.decoding_share <= 1:
            raise ValueError(f"decoding_share is {self.decoding_share}: it is a share of the examples, from 0 to 1")
        if self.decoding_block < 1:
            raise ValueError(f"decoding_block is {self.decoding_block}: a block holds at least one token")
        plain = self.estimator == "count" and (self.lowest_rate, self.highest_rate) == (0, 1)
        if self.beta != (1.0, 1.0) and self.estimator != "count":
            raise ValueError(
                f"rate_alpha and rate_beta shape the counts of estimator count, and it is {self.estimator!r}: use "
                f"count, or leave them at 1"
            )
        if self.complementary and not (plain and self.beta == (1.0, 1.0) and not self.decoding_share):
            raise ValueError(
                "complementary masks need estimator count with all mask rates, rate_alpha and rate_beta 1 and "
                "decoding_share 0: leave the others out"
            )
        if self.decoding_share and self.block_length is not None:
            raise ValueError(
                "decoding_share is for full attention: a block-causal model (block_length) meets the pattern of "
                "decoding at every step"
            )
