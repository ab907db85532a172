"""Tuning: which settings write as well as the slow ones do, in the least time, searched under a budget.

Every candidate is measured on a few questions; those that are too slow or clearly worse are dropped, the others are
measured on twice as many, and so on (successive halving, arXiv:1502.07943). All candidates meet the same questions and
seeds, so that they are compared with the reference question by question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from dlm.benchmarking.cost import Machine, Shape, generation
from dlm.benchmarking.grid import block_sizes
from dlm.evaluation.metrics import aup, is_degenerate, unigram_entropy
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig
from dlm.sampling.schedule import schedule
from dlm.utils.stats import Measure, pareto

__all__ = ["REVISIONS", "Candidate", "Outcome", "Search", "candidates", "curves", "machine_here", "outcome"]

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
REVISIONS: dict[str, dict] = {
    "none": {},
    "edit": {"revise": "edit", "edit_threshold": 0.9},
    "shadow": {"revise": "edit", "edit_shadow": True, "edit_threshold": 0.97},
    "verify": {"revise": "verify", "verify_threshold": 0.0001},
}
TOKENS_A_PASS = (1, 2, 3, 4, 8)
FIRST = 4  # questions of the first rung
KEPT = 0.5  # share of the candidates that goes on to the next rung
GUESSED = 4  # tokens a pass that a commit rule with a threshold is taken to reach, before it is measured


@dataclass(frozen=True)
class Candidate:
    """Fields of SamplingConfig and their values; tokens: a pass, where the steps say so, else None."""

    settings: tuple[tuple[str, object], ...]
    tokens: float | None = None

    @property
    def fields(self) -> dict[str, object]:
        return dict(self.settings)

    @property
    def curve(self) -> str:
        """What it has in common with those that differ in how many tokens a pass commits."""
        own = self.fields
        revise = "" if own.get("revise", "none") == "none" else f", revise {own['revise']}"
        return f"{own['method']}, block {own['block_length']}, {own['commit']}{revise}"

    def __str__(self) -> str:
        own = self.fields
        amount = f"{own['steps']} steps" if own["commit"] == "quota" else f"{own['threshold']:g}"
        return f"{self.curve}: {amount}"


def candidates(
    sampling: SamplingConfig,
    methods: Sequence[str],
    blocks: Callable[[str], Sequence[int]],
    revisions: Sequence[dict] = tuple(REVISIONS.values()),
) -> tuple[Candidate, list[Candidate]]:
    """(reference, others): one token a pass of method none under the settings given, and what may be faster.

    blocks: the block lengths that suit a method; revisions: the fields of each that is tried.
    """
    length, tried = sampling.gen_length, []

    def one(method: str, block: int, **rest) -> Candidate | None:
        tokens = length / rest["steps"] if "steps" in rest else None
        own = {"method": method, "block_length": block, **rest}
        try:
            replace(sampling, **({"steps": None, "steps_per_block": None} | own))
        except ValueError:
            return None  # settings that do not go together
        return Candidate(tuple(own.items()), tokens)

    for method in methods:
        for block in blocks(method):
            count = -(-length // block)
            for revise in revisions:
                steps = {max(count, -(-length // tokens)) for tokens in TOKENS_A_PASS}
                rows = [{"commit": "quota", "steps": passes} for passes in sorted(steps, reverse=True)]
                rows += [{"commit": "threshold", "threshold": sure} for sure in THRESHOLDS]
                tried += [one(method, block, **row, **revise) for row in rows]
    slowest = "none" if "none" in methods else methods[0]
    choices = blocks(slowest)
    block = sampling.block_length if sampling.block_length in choices else min(choices, key=lambda x: abs(x - 32))
    reference = one(slowest, block, commit="quota", steps=length)
    assert reference is not None
    return reference, [each for each in dict.fromkeys(tried) if each is not None and each != reference]


def feasible(model, canvases: Sequence[Canvas], sampling: SamplingConfig, candidate: Candidate) -> bool:
    """Whether a candidate can write every canvas: a block-causal model's blocks count from slot 0, so that a region
    may have one more than its length says, and each needs a pass."""
    try:
        config = replace(sampling, **candidate.fields)
        for canvas in canvases:
            sizes = block_sizes(model, canvas, config)
            if config.commit == "quota":
                schedule(config.steps, sizes)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- what it would cost


def machine_here(device: torch.device, dtype: torch.dtype, name: str) -> Machine:
    """This machine, from a product and a copy that are timed now: enough to say which of two settings is slower."""
    size = 512 if device.type == "cpu" else 4096
    x = torch.full((size, size), 0.5, device=device).to(dtype)
    wide = torch.ones(2**24, dtype=torch.uint8, device=device)

    def timed(work: Callable[[], object]) -> float:
        spent = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - start)
        return min(spent)

    rate, width = 2 * size**3 / timed(lambda: x @ x), 2 * len(wide) / timed(lambda: wide.clone())
    return Machine("here", {name: rate}, width, 1e-5, math.inf)


def predicted(candidate: Candidate, config, machine: Machine, dtype: str, length: int, prompt: int) -> float:
    """Seconds of a generation by the cost model; of a threshold's as if it committed GUESSED tokens a pass."""
    own = candidate.fields
    block = min(own["block_length"], length)
    steps = own.get("steps") or max(-(-length // GUESSED), -(-length // block))
    shape = Shape(1, prompt, length, block, steps, own["method"])
    shadowed = own.get("revise") == "verify" or own.get("edit_shadow", False)
    return generation(config, machine, dtype, shape) * (2.0 if shadowed else 1.0)


# ---------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Outcome:
    """A candidate over the questions that it was measured on. latency: seconds; tokens: a pass; quality: accuracy, or
    minus the judge's nats a token; kept: quality over the reference's on the same questions (for nats the ratio of
    perplexities), with its error; varied: unigram entropy over the reference's (None: not counted); degenerate: share
    of the answers."""

    candidate: Candidate
    questions: int
    latency: Measure
    tokens: Measure
    quality: Measure
    kept: Measure
    varied: float | None
    degenerate: float

    def keeps(self, share: float, slack: float = 0.0) -> bool:
        """Whether it is as good as the reference to a share, give or take `slack` errors."""
        error = 0.0 if math.isnan(self.kept.error) else self.kept.error
        return self.kept.value + slack * error >= share and (self.varied is None or self.varied >= share - 0.02 * slack)

    def record(self) -> dict:
        """The JSON object."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        own |= {
            name: {"value": value.value, "error": None if math.isnan(value.error) else value.error}
            for name, value in own.items()
            if isinstance(value, Measure)
        }
        return own | {"candidate": str(self.candidate), "settings": self.candidate.fields}


def outcome(candidate: Candidate, mine: Sequence[dict], theirs: Sequence[dict], prose: bool) -> Outcome:
    """The Outcome from a candidate's records and the reference's of the same questions, in the same order."""
    if all("correct" in record for record in mine):
        own, other = ([float(record["correct"]) for record in records] for records in (mine, theirs))
        base = sum(other) / len(other)
        gain = Measure.of([a - b for a, b in zip(own, other, strict=True)])
        share = (sum(own) / len(own)) / base if base else 1.0
        kept = Measure(share, gain.error / base if base else math.nan)
    else:
        pairs = [
            (a["perplexity"], b["perplexity"])
            for a, b in zip(mine, theirs, strict=True)
            if a.get("perplexity") and b.get("perplexity")
        ]
        own = [-math.log(a) for a, _ in pairs]
        gain = Measure.of([math.log(b / a) for a, b in pairs])
        kept = Measure(math.exp(gain.value), math.exp(gain.value) * gain.error) if pairs else Measure(0.0, math.nan)
    varied = None
    if prose:
        spread = [[unigram_entropy(record["token_ids"]) or 0.0 for record in records] for records in (mine, theirs)]
        varied = sum(spread[0]) / sum(spread[1]) if sum(spread[1]) else 1.0
    marks = [is_degenerate(record["token_ids"]) if prose else not record["token_ids"] for record in mine]
    return Outcome(
        candidate,
        len(mine),
        Measure.of([record["latency"] for record in mine]),
        Measure.of([record["tokens_per_forward"] for record in mine]),
        Measure.of(own),
        kept,
        varied,
        sum(marks) / len(marks),
    )


def front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no other beats in latency and quality kept, of those measured on half of the questions or more;
    degenerate ones do not count."""
    most = max((one.questions for one in outcomes), default=0)
    sound = [one for one in outcomes if one.degenerate < 0.5 and 2 * one.questions >= most]
    return [sound[i] for i in pareto([(one.latency.value, -one.kept.value) for one in sound])]


def curves(outcomes: Sequence[Outcome], accuracy: bool) -> list[dict]:
    """AUP of each curve, the largest first; without a task's accuracy, of quality kept in per cent, at most 100."""

    def per_cent(one: Outcome) -> float:
        return min(100.0, 100 * (one.quality.value if accuracy else one.kept.value))

    best, groups = max(map(per_cent, outcomes), default=0.0), {}
    for one in outcomes:
        groups.setdefault(one.candidate.curve, []).append((one.tokens.value, per_cent(one)))
    areas = [{"curve": name, "points": len(points), "aup": aup(points, best)} for name, points in groups.items()]
    return sorted(areas, key=lambda each: -each["aup"])


# ---------------------------------------------------------------- the search


@dataclass
class Search:
    """Successive halving. measure((candidate, question) pairs) -> records, which a journal may already hold; budget:
    seconds of generating; spent: so far. keep: the share of the reference's quality that is asked for."""

    measure: Callable[[Sequence[tuple[Candidate, int]]], list[dict]]
    questions: int
    keep: float
    budget: float
    prose: bool
    report: Callable[[str], None] = lambda line: None
    spent: float = 0.0
    records: dict[Candidate, list[dict]] = field(default_factory=dict)
    stopped: bool = False

    def run(self, reference: Candidate, others: Sequence[Candidate]) -> list[Outcome]:
        """The outcomes of all that was measured, the reference's first."""
        alive, rung = list(others), min(FIRST, self.questions)
        while True:
            for candidate in [reference, *alive]:
                if not self._extend(candidate, rung):
                    break
            ranked = self._ranked(reference, alive)
            self.report(f"{rung} questions, {len(alive)} candidates, {self.spent:.0f} s of {self.budget:.0f} spent")
            if self.stopped or rung >= self.questions:
                return [self._outcome(reference, reference), *self._all(reference, others)]
            alive = ranked[: max(3, math.ceil(KEPT * len(ranked)))]
            rung = min(2 * rung, self.questions)

    def _extend(self, candidate: Candidate, rung: int) -> bool:
        """Measures a candidate up to `rung` questions; False where the budget is spent."""
        have = self.records.setdefault(candidate, [])
        if self.spent >= self.budget and len(have) < rung:
            self.stopped = True
            return False
        new = self.measure([(candidate, question) for question in range(len(have), rung)])
        have += new
        self.spent += sum(record["spent"] for record in new)
        return True

    def _outcome(self, reference: Candidate, candidate: Candidate) -> Outcome:
        mine = self.records[candidate]
        count = min(len(mine), len(self.records[reference]))
        return outcome(candidate, mine[:count], self.records[reference][:count], self.prose)

    def _all(self, reference: Candidate, others: Sequence[Candidate]) -> list[Outcome]:
        return [self._outcome(reference, one) for one in others if self.records.get(one)]

    def _ranked(self, reference: Candidate, alive: Sequence[Candidate]) -> list[Candidate]:
        """Those that may still be chosen: good enough to two errors and faster than the reference; first those that no
        other beats in latency and quality, then those that only they beat, and so on."""
        slow = self._outcome(reference, reference).latency.value
        outcomes = self._all(reference, alive)
        left = [one for one in outcomes if one.keeps(self.keep, slack=2.0) and one.latency.value < slow]
        ranked: list[Candidate] = []
        while layer := front(left):
            ranked += [one.candidate for one in layer]
            left = [one for one in left if one not in layer]
        return ranked


def chosen(outcomes: Sequence[Outcome], keep: float) -> Outcome:
    """The fastest of those measured on the most questions that keeps the quality; the reference, the first, always
    does."""
    most = max(one.questions for one in outcomes)
    limit = max(0.05, outcomes[0].degenerate)
    able = [one for one in outcomes if one.questions == most and one.keeps(keep) and one.degenerate <= limit]
    return min(able, key=lambda one: one.latency.value, default=outcomes[0])
