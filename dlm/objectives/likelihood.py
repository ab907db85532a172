"""Bounds on -log p(x) and their standard errors: of a text, or of an answer given its prompt.

Shapes: B rows of a forward pass, T their length, L target tokens of an example, N scored tokens, V vocabulary.

A draw masks some of an example's target tokens and weighs the cross entropy of some of them; its mean over draws is
the bound. Noise belongs to the example, a function of (seed, draw, index): examples with the same index share it
(the options of a question), and neither batch nor process matters. Probabilities are the model's softmax over all of
its ids, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm.data.examples import Example
from dlm.models.attention import Visible, block_causal
from dlm.objectives.noise import EPSILON, draw_count, draw_uniform
from dlm.objectives.rows import Row, cross_entropies
from dlm.utils.names import check_name
from dlm.utils.random import VALIDATION, example_generator

__all__ = ["ESTIMATORS", "Bound", "LikelihoodConfig", "Row", "answer", "bound", "cross_entropies", "likelihood"]

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]  # tokens, valid, keep (B, T) -> (N, V): after each place kept


@torch.inference_mode()
def likelihood(logits: Logits, examples: Sequence[Example], *, device=None, batch_size: int = 16) -> list[Bound]:
    """-log p of the target tokens of each example given all tokens before each of them: exact, one evaluation.

    The first token of an example has no context and is not scored.
    Errors: no numbers (FloatingPointError).
    """
    bounds = [Bound(0.0, 0.0, 0, 0)] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    for start in range(0, len(order), batch_size):
        here = order[start : start + batch_size]
        longest = len(examples[here[0]].tokens)
        tokens = torch.zeros(len(here), longest, dtype=torch.int64)
        scored, valid = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
        for row, i in enumerate(here):
            size = len(examples[i].tokens)
            tokens[row, :size], valid[row, :size] = torch.from_numpy(examples[i].tokens), True
            scored[row, 1:size] = torch.from_numpy(examples[i].target[1:])
        predicting = scored.roll(-1, dims=1)  # the place before; column 0 is never scored
        tokens, valid, scored = tokens.to(device), valid.to(device), scored.to(device)
        if bool(scored.any()):
            got = logits(tokens, valid, predicting.to(device))
            got = got if got.dtype == torch.float64 else got.float()
            ce = F.cross_entropy(got, tokens[scored], reduction="none").double().cpu()
        else:
            ce = torch.zeros(0, dtype=torch.float64)
        if bool(ce.isnan().any()):
            raise FloatingPointError("the model's logits are no numbers: its weights are damaged, or overflow")
        counts = scored.sum(dim=1).tolist()
        for i, count, part in zip(here, counts, ce.split(counts), strict=True):
            bounds[i] = Bound(float(part.sum()), 0.0, int(count > 0), count)
    return bounds


ESTIMATORS = ("count", "uniform", "stratified", "chain", "block")
VISIBILITIES = ("full", "block_causal")


@dataclass(frozen=True)
class LikelihoodConfig:
    """How a bound is estimated.

    estimator: `count` (the number of masked tokens from 1..L, weight L/l, in strata), `uniform` (independent times,
    rates from 1e-3 up, which leaves out what is below: LLaDA's), `stratified` (times in strata), `chain` (left to
    right, one token a draw and none twice: exact from L draws on), `block` (blocks left to right, each given those
    before and everything after masked: the bound of block-wise sampling); None: `block` for a block-causal model,
    else `count`. draws: for each example; an even number, for strata hold two draws each. block_length: of `block`;
    None: the model's own, else 32. cfg_scale: guidance w, the score being l = u + (w + 1)(c - u) with u the prompt
    masked. visibility: `full` or `block_causal`, of a checkpoint that was trained under both; None: full attention
    there, and what it was trained with elsewhere. target_error: go on, `draws` at a time, until an example's
    standard error in nats is no larger, or `max_draws` were made. batch_size: rows of a forward pass.
    """

    estimator: str | None = None
    draws: int = 64
    block_length: int | None = None
    cfg_scale: float = 0.0
    seed: int = 0
    target_error: float | None = None
    max_draws: int = 4096
    batch_size: int = 16
    visibility: str | None = None

    def __post_init__(self):
        if self.visibility is not None:
            check_name("visibility", self.visibility, VISIBILITIES)
        if self.estimator is not None:
            check_name("estimator", self.estimator, ESTIMATORS)
        for name in ("draws", "max_draws", "batch_size", "block_length"):
            value = getattr(self, name)
            optional = value is None and name == "block_length"
            if not optional and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}: give 1 or more, a whole number")
        if self.draws > 1 and self.draws % 2 and self.estimator in (None, "count", "stratified", "block"):
            raise ValueError(f"draws is {self.draws}: strata hold two draws each, so give an even number (or 1)")
        if self.target_error is not None and (not isinstance(self.target_error, Real) or not self.target_error > 0):
            raise ValueError(f"target_error is {self.target_error!r}: it is a standard error in nats, above 0")
        if self.target_error is not None and self.draws < 2:
            raise ValueError("draws is 1, and one draw has no standard error: give 2 or more with target_error")
        if not isinstance(self.cfg_scale, Real) or not 0 <= self.cfg_scale < math.inf:
            raise ValueError(f"cfg_scale is {self.cfg_scale!r}: it must be 0 or more")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}: give 0 or more, a whole number below 2**63")


@dataclass(frozen=True)
class Bound:
    """nats: an upper bound on -log p(target | given), or its exact value; error: the standard error of nats (NaN
    after a single draw); evaluations: rows that went through the model; tokens: how many were scored."""

    nats: float
    error: float
    evaluations: int
    tokens: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(self.per_token)


def answer(given: Sequence[int], target: Sequence[int], index: int = 0) -> Example:
    """The example that asks for -log p(target | given); index: names its noise."""
    tokens = np.array([*given, *target], dtype=np.int64)
    return Example(tokens, np.arange(len(tokens)) >= len(given), index)


# ------------------------------------------------------------------------------------------------------------ draws


@dataclass(frozen=True)
class Settings:
    """What a draw needs to know: the estimator in force, its draws a round, its blocks, the seed."""

    estimator: str
    draws: int
    block_length: int | None
    aligned: bool  # blocks count from slot 0 (block-causal models), not from the first target token
    seed: int

    @property
    def strata(self) -> int:
        """Strata of a round: two draws in each."""
        return max(1, self.draws // 2) if self.estimator in ("count", "stratified", "block") else 1


def in_force(model, config: LikelihoodConfig) -> Settings:
    """What the draws of a model's bound are made with. Errors: a visibility or blocks that it was not trained with."""
    checkpoint = getattr(model, "config", None)
    trained, either = getattr(checkpoint, "block_length", None), getattr(checkpoint, "full_attention", False)
    own = "full" if trained is None or either else "block_causal"
    visibility = config.visibility or own
    if visibility != own and not (either and trained is not None):
        raise ValueError(f"visibility is {visibility!r}, and this model was trained under {own!r} alone: leave it out")
    blocks = trained if visibility == "block_causal" else None
    estimator = config.estimator or ("count" if blocks is None else "block")
    if blocks is not None and config.block_length not in (None, blocks):
        raise ValueError(
            f"block_length is {config.block_length}, but this model was trained with blocks of {blocks}: leave it out"
        )
    return Settings(estimator, config.draws, blocks or config.block_length or 32, blocks is not None, config.seed)


def visible_of(model, settings: Settings) -> Visible | None:
    """The rule of a bound, where it is not the model's own."""
    asked = settings.aligned and getattr(getattr(model, "config", None), "full_attention", False)
    return block_causal(settings.block_length) if asked else None


def blocks_of(example: Example, block_length: int, aligned: bool) -> list[np.ndarray]:
    """The target tokens of each block, as numbers from 0..L-1; aligned: blocks count from slot 0."""
    places = np.flatnonzero(example.target)
    block = (places if aligned else np.arange(len(places))) // block_length
    return np.split(np.arange(len(places)), np.flatnonzero(np.diff(block)) + 1)


def _draw(example: Example, settings: Settings, number: int) -> list[tuple[Row, float]]:
    """The rows of draw `number` and what the sum of each one's cross entropies weighs."""
    length, name = int(example.target.sum()), settings.estimator
    if length == 1:
        return [(Row.of(example, np.ones(1, dtype=bool)), 1.0)]
    if name == "chain":
        order = example_generator(settings.seed, 0, example.index, VALIDATION).permutation(length)
        return [(after(example, int(order[number])), float(length))]
    generator = example_generator(settings.seed, number, example.index, VALIDATION)
    stratum, strata = number % settings.draws % settings.strata, settings.strata
    if name == "uniform":
        masked, weight, _ = draw_uniform(length, generator, low=EPSILON)
        return [(Row.of(example, masked), weight)]
    place = (stratum + generator.random()) / strata
    if name == "stratified":
        masked, weight, _ = draw_uniform(length, generator, u=place, low=EPSILON)
        return [(Row.of(example, masked), weight)]
    if name == "count":
        masked, weight, _ = draw_count(length, generator, u=place)
        return [(Row.of(example, masked), weight)]
    rows, blocks = [], blocks_of(example, settings.block_length, settings.aligned)
    for turn, block in enumerate(blocks):  # the blocks of an example stand evenly around the circle of rates
        chosen, weight, _ = draw_count(len(block), generator, u=(place + turn / len(blocks)) % 1.0)
        rows.append((in_block(example, block, chosen, settings.aligned), weight))
    return rows


def after(example: Example, place: int) -> Row:
    """Target token `place` with it and all later ones masked."""
    later = np.arange(int(example.target.sum()))
    return Row.of(example, later >= place, later == place)


def in_block(example: Example, block: np.ndarray, chosen: np.ndarray, aligned: bool) -> Row:
    """A block with the chosen tokens of it masked, and everything after it."""
    length = int(example.target.sum())
    scored = np.zeros(length, dtype=bool)
    scored[block[chosen]] = True
    row = Row.of(example, scored | (np.arange(length) > block[-1]), scored)
    if not aligned:
        return row
    return row.until(int(np.flatnonzero(example.target)[block[-1]]) + 1)  # a block-causal model does not look further


# ------------------------------------------------------------------------------------------------------------ bound


def bound(
    model, examples: Sequence[Example], config: LikelihoodConfig | None = None, *, mask_id: int, first_draw: int = 0
) -> list[Bound]:
    """A bound on -log p(target tokens | the other tokens) of each example, with its standard error.

    The bound is that of LLaDA (arXiv:2502.09992, eq. 6 for `count`, eq. 3 for the times); an answer of one token is
    exact. Examples of any lengths share forward passes. first_draw: the number of the first draw, to go on where
    another call ended (a multiple of `draws`; `chain` begins at 0 alone). Errors: an example that is too long for the
    model, holds the mask token, or whose blocks do not suit the model.
    """
    config = config or LikelihoodConfig()
    assert first_draw % config.draws == 0
    settings = in_force(model, config)
    _check(model, examples, mask_id)
    values: list[list[float]] = [[] for _ in examples]
    evaluations = [0] * len(examples)
    bounds = [Bound(0.0, 0.0, 0, 0)] * len(examples)
    active = [i for i, example in enumerate(examples) if example.target.any()]
    done = 0
    while active:
        jobs = []  # (example, place in its values, row, weight)
        for i in active:
            for number in range(done, min(done + config.draws, _most(examples[i], settings))):
                rows = _draw(examples[i], settings, first_draw + number)
                jobs += [(i, len(values[i]), row, weight) for row, weight in rows]
                values[i].append(0.0)
        costs = cross_entropies(
            model, [job[2] for job in jobs], mask_id=mask_id, cfg_scale=config.cfg_scale, batch_size=config.batch_size,
            visible=visible_of(model, settings),
        )  # fmt: skip
        for (i, place, _, weight), cost in zip(jobs, costs, strict=True):
            values[i][place] += weight * float(cost.sum())
            evaluations[i] += 2 if config.cfg_scale else 1
        done += config.draws
        for i in active:
            length = int(examples[i].target.sum())
            mean, error = _estimate(np.array(values[i]), length, settings)
            bounds[i] = Bound(mean, error, evaluations[i], length)
        active = [i for i in active if _goes_on(bounds[i], examples[i], config, settings, done)]
    return bounds


def _most(example: Example, settings: Settings) -> int:
    """Draws after which nothing is left to chance."""
    length = int(example.target.sum())
    return 1 if length == 1 else length if settings.estimator == "chain" else 2**62


def _goes_on(bound: Bound, example: Example, config: LikelihoodConfig, settings: Settings, done: int) -> bool:
    if config.target_error is None or done >= min(config.max_draws, _most(example, settings)):
        return False
    return bound.error > config.target_error


def _estimate(values: np.ndarray, length: int, settings: Settings) -> tuple[float, float]:
    """The mean of the draws and its standard error.

    `chain` takes places without replacement, which the finite population correction counts; two draws in a stratum
    give the variance of its mean (Cochran 1977, chapters 2 and 5); rounds are independent of each other.
    """
    count, mean = len(values), float(values.mean())
    if length == 1 or (settings.estimator == "chain" and count == length):
        return mean, 0.0
    if count == 1:
        return mean, math.nan
    if settings.strata == 1 or settings.draws == 1:
        share = 1 - count / length if settings.estimator == "chain" else 1.0
        return mean, math.sqrt(share * float(values.var(ddof=1)) / count)
    pairs = values.reshape(-1, 2, settings.strata)  # (rounds, 2, strata): draw n is in stratum n mod strata
    variances = np.square(pairs[:, 0] - pairs[:, 1]) / 4  # of the mean of a pair
    return mean, math.sqrt(float(variances.sum())) / variances.size


def _check(model, examples: Sequence[Example], mask_id: int) -> None:
    limit, size = (
        getattr(getattr(model, "config", None), name, None) for name in ("max_sequence_length", "embedding_size")
    )
    for example in examples:
        if limit is not None and len(example.tokens) > limit:
            raise ValueError(
                f"example {example.index} has {len(example.tokens)} tokens, above the model's max_sequence_length "
                f"{limit}: cut it into pieces, or shorten its prompt from the left"
            )
        wrong = example.tokens[(example.tokens < 0) | (example.tokens >= (size or 2**62))]
        if len(wrong):
            last = size - 1 if size else "…"
            raise ValueError(
                f"example {example.index} holds id {wrong[0]}, but the model's ids go from 0 to {last}: tokenize it "
                "with the model's own tokenizer"
            )
        if (example.tokens[example.target] == mask_id).any():
            raise ValueError(
                f"example {example.index} holds the mask token (id {mask_id}) where it is scored: remove it"
            )
