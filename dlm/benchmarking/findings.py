"""What the numbers of a grid say: the front, which setting to use and for what, what a pass costs, its noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dlm.benchmarking.charts import significant
from dlm.benchmarking.results import Grid, Setting
from dlm.utils.stats import Fit, fit, geometric_mean, pareto

REFERENCE = "none"  # the method that others are compared with
LEAST_R2 = 0.3  # a fit that explains less of the variance is no finding
REPEATS_DIFFER = 0.10  # a run is noisy where the repeats of a cell differ by more than this (median over the cells),
REFERENCE_DIFFERS = 0.20  # or where its reference generation takes longer or shorter by more than this while it lasts
PURPOSES = (  # for what, the perplexity that is allowed (times the best), the accuracy that is allowed (less, 0 to 1)
    ("quality", 1.0, 0.0),
    ("speed", 1.25, 0.05),
    ("a quick draft", 2.0, 0.15),
)


def seconds(value: float) -> str:
    """A time for a person: 12 ms, 3.4 s."""
    return f"{significant(1000 * value, 2)} ms" if value < 1 else f"{significant(value, 3)} s"


@dataclass(frozen=True)
class Quality:
    """What is weighed against latency: its name, where a setting has it (None: nowhere), whether less is better."""

    name: str
    of: Callable[[Setting], float | None]
    less: bool

    def say(self, value: float) -> str:
        return f"{100 * value:.1f}%" if self.name == "accuracy" else significant(value)

    def near(self, times: float, less: float) -> str:
        """What `allows` allows, in words."""
        return f"perplexity at most {times:g} times the best" if self.less else f"at most {100 * less:g} points lost"

    def allows(self, value: float, best: float, times: float, less: float) -> bool:
        """Whether a value is near enough to the best: `times` as high a perplexity, `less` accuracy."""
        return value <= times * best if self.less else value >= best - less - 1e-12


ACCURACY = Quality("accuracy", lambda setting: setting.accuracy, less=False)
PERPLEXITY = Quality("perplexity", lambda setting: setting.perplexity, less=True)


def quality(*grids: Grid) -> Quality:
    """Accuracy where all of the grids have it, else perplexity."""
    having = [any(setting.accuracy is not None for setting in grid.settings()) for grid in grids]
    return ACCURACY if all(having) else PERPLEXITY


def front(settings: Sequence[Setting], by: Quality) -> list[Setting]:
    """The settings that no other beats in latency and quality both; degenerate ones do not count."""
    sound = [s for s in settings if not s.degenerate and by.of(s) is not None]
    return [sound[i] for i in pareto([(s.latency, by.of(s) if by.less else -by.of(s)) for s in sound])]


def speedups(settings: Sequence[Setting]) -> dict[tuple[str, int, int], float]:
    """Latency of `none` over that of each other method at the same block length and steps."""
    slow = {s.place: s.latency for s in settings if s.method == REFERENCE}
    return {
        (s.method, *s.place): slow[s.place] / s.latency for s in settings if s.method != REFERENCE and s.place in slow
    }


def named(setting: Setting) -> str:
    """A setting in words."""
    steps = "1 step" if setting.steps == 1 else f"{setting.steps} steps"
    return f"{setting.method}, block {setting.block_length}, {steps}"


# ---------------------------------------------------------------- what a pass costs


def a_pass(cell: dict, name: str) -> float:
    """A cell's number for each of its passes: milliseconds (of the fastest repeat, the least disturbed), or a count."""
    value = 1000 * cell.get("latency_min", cell["latency"]) if name == "milliseconds" else cell[name]
    return value / cell["nfe"]


def counted(grid: Grid, *names: str) -> list[dict]:
    """The cells that say how many passes there were, and these counts."""
    return [cell for cell in grid.cells if all(cell.get(name) for name in ("nfe", *names))]


def pass_fit(grid: Grid, *names: str) -> Fit | None:
    """Milliseconds a pass over all cells as a linear function of these counts a pass; None where it cannot be told."""
    cells = counted(grid, *names)
    try:
        counts = [[a_pass(cell, name) for cell in cells] for name in names]
        return fit([a_pass(cell, "milliseconds") for cell in cells], *counts)
    except ValueError:
        return None


def pass_sentences(grid: Grid) -> list[str]:
    """The cost of a pass in words; a fit below `LEAST_R2` is named as what it is, without its numbers."""
    said = []
    if line := pass_fit(grid, "positions_computed"):
        if line.r2 < LEAST_R2:
            said.append(
                f"How long a pass takes does not follow from the positions it computes here (R² {line.r2:.2f}, below "
                f"{LEAST_R2:g}): no cost of a position is given."
            )
        else:
            said.append(
                f"A pass takes {line.intercept:.2f} ms and {1000 * line.slopes[0]:.1f} µs for each position it "
                f"computes (least squares over all cells' fastest repeats, R² {line.r2:.3f})."
            )
    plane = pass_fit(grid, "positions_computed", "places_asked")
    if plane and plane.r2 >= LEAST_R2:
        position, place = (1000 * slope for slope in plane.slopes)
        said.append(
            f"With the masked places it is asked about: {plane.intercept:.2f} ms, {position:.1f} µs a position, "
            f"{place:.1f} µs a place for logits and their sampling (R² {plane.r2:.3f})."
        )
    return said


# ---------------------------------------------------------------- how noisy a run was


def noise(grid: Grid) -> tuple[float | None, float | None]:
    """(how much the repeats of a cell differ, how much the reference did over the run), as shares; None where the
    file does not say.

    Repeats: longest / shortest - 1, the median over the cells. Reference: its 90th percentile / its 10th - 1, the
    largest of the processes and starts.
    """
    repeats = [
        cell["latency_max"] / cell["latency_min"] - 1
        for cell in grid.cells
        if cell.get("latency_min") and cell.get("latency_max")
    ]
    if grid.meta.get("settings", {}).get("repeats") == 1:
        repeats = []
    launches: dict[object, list[float]] = {}
    for record in grid.meta.get("reference", ()):
        launches.setdefault((record.get("launch"), record.get("rank")), []).append(record["latency"])
    reference = [
        float(np.quantile(times, 0.9) / np.quantile(times, 0.1)) - 1 for times in launches.values() if len(times) > 1
    ]
    return (median(repeats) if repeats else None), (max(reference) if reference else None)


def noise_sentences(grid: Grid) -> list[str]:
    """A warning where a run was noisy; [] where it was not, or where that is not known."""
    repeats, reference = noise(grid)
    told = []
    if reference is not None and reference > REFERENCE_DIFFERS:
        told.append(f"its reference generation took {100 * reference:.0f}% longer at some times than at others")
    if repeats is not None and repeats > REPEATS_DIFFER:
        told.append(f"the repeats of a cell differ by {100 * repeats:.0f}% (median)")
    if not told:
        return []
    most = max(value for value in (repeats, reference) if value is not None)
    return [
        f"This run is noisy: {' and '.join(told)}. Seconds that differ by less than {100 * most:.0f}% may be the "
        "machine: measure again on a quiet one, or compare “÷ reference”, which corrects for it in part."
    ]


# ---------------------------------------------------------------- sentences


def advice(settings: Sequence[Setting], by: Quality) -> list[str]:
    """Which setting to use, and for what: a sentence for each of `PURPOSES` that has a setting of its own."""
    sound = front(settings, by)
    if not sound:
        return []
    best, said, used = sound[-1], [], []
    for purpose, times, less in PURPOSES:
        one = next(s for s in sound if by.allows(by.of(s), by.of(best), times, less))
        near = f"the fastest with {by.near(times, less)}"
        if one is best and used and len(sound) > 1:  # nothing faster is so near: then the next of the front
            one, near = sound[-2], f"nothing faster has {by.near(times, less)}"
        if one in used:
            continue
        numbers = f"{by.name} {by.say(by.of(one))}, {seconds(one.latency)} an answer"
        gain = f"{best.latency / one.latency:.1f} times as fast; {near}" if used else f"the best {by.name} of all"
        said.append(f"For {purpose} use {named(one)}: {numbers} ({gain}).")
        used.append(one)
    if len(used) == 1:
        said.append("No faster setting is sound, so use it for speed as well.")
    return said


def error_of_logits(value: float) -> str:
    """A difference of logits; below a millionth it is rounding."""
    return "0" if value < 1e-6 else significant(value, 2)


def rounding_sentences(settings: Sequence[Setting]) -> list[str]:
    """How much of the answers other hardware could change, and how much each method's cache does."""
    said, tied = [], [s.known("ties") for s in settings if s.known("ties") is not None]
    if tied:
        mean, most = 100 * sum(tied) / len(tied), 100 * max(tied)
        said.append(f"{mean:.2f}% of the commits lie within rounding of a tie ({most:.2f}% at most in a setting).")
    errors: dict[str, list[tuple[float, float]]] = {}
    for setting in settings:
        if (rms := setting.known("cache_rms")) is not None:
            errors.setdefault(setting.method, []).append((rms, setting.known("cache_same")))
    if errors:
        parts = [
            f"{method} {error_of_logits(sum(r for r, _ in pairs) / len(pairs))} "
            f"({100 * sum(same for _, same in pairs) / len(pairs):.1f}% the same first token)"
            for method, pairs in errors.items()
        ]
        said.append(f"What a cache changes in the logits, root mean square: {', '.join(parts)}.")
    return said


def sentences(grid: Grid) -> list[str]:
    """What the numbers support, in sentences: which setting to use, the methods against `none`, what is degenerate."""
    settings, by = grid.settings(), quality(grid)
    said, marked = noise_sentences(grid) + advice(settings, by), [s for s in settings if s.degenerate]
    gains = speedups(settings)
    place = {(s.method, *s.place): s for s in settings}
    for method in grid.methods:
        keys = [key for key in gains if key[0] == method]
        if not keys:
            continue
        rate = geometric_mean([gains[key] for key in keys])
        pairs = [(by.of(place[key]), by.of(place[REFERENCE, *key[1:]])) for key in keys]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        change = ""
        if pairs and by.less:
            change = f"; its perplexity is {geometric_mean([a / b for a, b in pairs]):.2f} times that of none"
        elif pairs:
            change = f"; its accuracy differs by {100 * sum(a - b for a, b in pairs) / len(pairs):+.1f} points"
        low, high = min(gains[key] for key in keys), max(gains[key] for key in keys)
        said.append(
            f"{method} is {rate:.2f} times as fast as none (geometric mean of {len(keys)} settings with the same block "
            f"length and steps, from {low:.2f} to {high:.2f}){change}."
        )
    said += rounding_sentences(settings)
    if marked:
        told = f"{len(marked)} of {len(settings)} settings are degenerate"
        lowest = min((s for s in settings if s.perplexity is not None), key=lambda s: s.perplexity, default=None)
        if lowest is not None and lowest.degenerate:
            told += f", among them the one with the lowest perplexity of all ({named(lowest)}: {lowest.perplexity:.2f})"
        said.append(f"{told}; their perplexity says nothing.")
    passes = [cell for cell in grid.cells if "nfe" in cell]
    if passes:
        equal = sum(cell["nfe"] == cell["steps"] for cell in passes)
        said.append(f"The number of forward passes is the number of steps in {equal} of {len(passes)} cells.")
    said += pass_sentences(grid)
    if aup := grid.meta.get("aup"):
        told = "Largest accuracy under parallelism (AUP, arXiv:2601.07568): {aup:.1f} ({method}, block {block_length})."
        said.append(told.format(**aup[0]))
    return said
