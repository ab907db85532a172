"""What a grid says, in words, pictures and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlm.benchmarking.charts import (
    BLUES,
    GREENS,
    ORANGES,
    QUIET,
    SERIES,
    Axis,
    Point,
    Series,
    Shade,
    Tile,
    about_one,
    heat_map,
    scatter,
    significant,
)
from dlm.benchmarking.page import table
from dlm.benchmarking.results import Grid, Setting
from dlm.utils.stats import Fit, fit, geometric_mean, pareto

REFERENCE = "none"  # the method that others are compared with


def seconds(value: float) -> str:
    """A time for a person: 12 ms, 3.4 s."""
    return f"{significant(1000 * value, 2)} ms" if value < 1 else f"{significant(value, 3)} s"


# ---------------------------------------------------------------- what the numbers say


@dataclass(frozen=True)
class Quality:
    """What is weighed against latency: its name, where a setting has it (None: nowhere), whether less is better."""

    name: str
    of: Callable[[Setting], float | None]
    less: bool

    def say(self, value: float) -> str:
        return f"{100 * value:.1f}%" if self.name == "accuracy" else significant(value)


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


def named(setting: Setting) -> str:
    """A setting in words."""
    steps = "1 step" if setting.steps == 1 else f"{setting.steps} steps"
    return f"{setting.method}, block {setting.block_length}, {steps}"


def sentences(grid: Grid) -> list[str]:
    """What the numbers support, in sentences: the best settings, the methods against `none`, what is degenerate."""
    settings, by = grid.settings(), quality(grid)
    said, marked = _best(settings, by), [s for s in settings if s.degenerate]
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
    if marked:
        told = f"{len(marked)} of {len(settings)} settings are degenerate"
        lowest = min((s for s in settings if s.perplexity is not None), key=lambda s: s.perplexity, default=None)
        if lowest is not None and lowest.degenerate:
            told += f", among them the one with the lowest perplexity of all ({named(lowest)}: {lowest.perplexity:.2f})"
        said.append(f"{told}; their perplexity says nothing.")
    counted = [cell for cell in grid.cells if "nfe" in cell]
    if counted:
        equal = sum(cell["nfe"] == cell["steps"] for cell in counted)
        said.append(f"The number of forward passes is the number of steps in {equal} of {len(counted)} cells.")
    if line := pass_fit(grid, "positions_computed"):
        said.append(
            f"A pass takes {line.intercept:.2f} ms and {1000 * line.slopes[0]:.1f} µs for each position it computes "
            f"(least squares over all cells' fastest repeats, R² {line.r2:.3f})."
        )
    if plane := pass_fit(grid, "positions_computed", "places_asked"):
        position, place = (1000 * slope for slope in plane.slopes)
        said.append(
            f"With the masked places it is asked about: {plane.intercept:.2f} ms, {position:.1f} µs a position, "
            f"{place:.1f} µs a place for logits and their sampling (R² {plane.r2:.3f})."
        )
    if aup := grid.meta.get("aup"):
        told = "Largest accuracy under parallelism (AUP, arXiv:2601.07568): {aup:.1f} ({method}, block {block_length})."
        said.append(told.format(**aup[0]))
    return said


def _best(settings: Sequence[Setting], by: Quality) -> list[str]:
    """The best setting, and the fastest that is nearly as good; degenerate ones do not count."""
    sound = front(settings, by)
    if not sound:
        return []
    best = sound[-1]
    near = "perplexity at most 1.25 times that" if by.less else "at most 5 points less"
    enough = 1.25 * by.of(best) if by.less else by.of(best) - 0.05
    fast = next(s for s in sound if (by.of(s) <= enough if by.less else by.of(s) >= enough))
    told = f"The best {by.name} is {by.say(by.of(best))} ({named(best)}: {seconds(best.latency)})"
    if fast is best:
        return [f"{told}; no faster setting has {near}."]
    return [
        f"{told}; the fastest setting with {near} takes {seconds(fast.latency)} ({named(fast)}: {by.say(by.of(fast))})."
    ]


# ---------------------------------------------------------------- pictures


def maps(grid: Grid, first: int = 0) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Heat maps of each quantity there is, one a method: (heading, remark, [(method, drawing)]).

    first: the number of the first setting in the page's data.
    """
    settings = grid.settings()
    gains = speedups(settings)
    unit, suffix = (1000.0, "ms") if max(s.latency for s in settings) < 10 else (1.0, "s")
    maps_drawn = []

    def add(heading: str, remark: str, of: Callable[[Setting], float | None], shade, say) -> None:
        values = [value for s in settings if (value := of(s)) is not None]
        if not values:
            return
        colours = shade(values)
        rows, columns = ({s.place[k] for s in settings} for k in (0, 1))
        drawn = []
        for method in grid.methods:
            tiles = {
                s.place: Tile(of(s), bool(s.degenerate), first + i)
                for i, s in enumerate(settings)
                if s.method == method and of(s) is not None
            }
            if tiles:
                drawn.append((method, heat_map(method, sorted(rows), sorted(columns), tiles, colours, say)))
        maps_drawn.append((heading, remark, drawn))

    hatched = " Hatched: degenerate." if any(s.degenerate for s in settings) else ""
    add(
        f"Latency ({suffix})",
        "One answer, the mean over the questions: darker is slower. The largest blocks are at the top; empty places "
        f"cannot be measured (fewer steps than blocks).{hatched}",
        lambda s: unit * s.latency,
        lambda values: Shade.over(BLUES, values),
        lambda value: significant(value, 3) if value < 1000 else f"{value:.0f}",
    )
    add(
        "Perplexity under the judge",
        f"Geometric mean over the questions: darker is less probable.{hatched}",
        lambda s: s.perplexity,
        lambda values: Shade.over(ORANGES, values),
        lambda value: significant(value, 3) if value < 1000 else f"{value:.0f}",
    )
    add(
        "Accuracy (%)",
        f"Share of the questions answered right: darker is better.{hatched}",
        lambda s: None if s.accuracy is None else 100 * s.accuracy,
        lambda values: Shade(GREENS, 0.0, max(max(values), 1.0), log=False),
        lambda value: f"{value:.1f}",
    )
    add(
        "Speed-up over none",
        f"Latency of none over the method's, same block length and steps: green is faster, purple slower.{hatched}",
        lambda s: gains.get((s.method, *s.place)),
        about_one,
        lambda value: f"{value:.2f}",
    )
    return maps_drawn


def front_chart(
    grids: Sequence[Grid],
    title: str,
    first: Sequence[int],
    latency: Callable[[Grid, Setting], float] = lambda grid, setting: setting.latency,
    across: str = "seconds an answer",
) -> str:
    """Latency against quality of every setting, and each grid's front; the second grid's points are rings.

    first: the number of each grid's first setting in the page's data. latency, across: what the x axis shows.
    """
    by = quality(*grids)
    axis = Axis("accuracy (%)", log=False) if by is ACCURACY else Axis("perplexity under the judge")
    scale = 100.0 if by is ACCURACY else 1.0
    methods = list(dict.fromkeys(method for grid in grids for method in grid.methods))
    series = []
    for number, grid in enumerate(grids):
        settings = grid.settings()
        for method in grid.methods:
            points = [
                Point(latency(grid, s), scale * by.of(s), bool(s.degenerate), first[number] + i)
                for i, s in enumerate(settings)
                if s.method == method and by.of(s) is not None
            ]
            label = method if len(grids) == 1 else f"{method} · {grid.name}"
            colour = SERIES[methods.index(method) % len(SERIES)]
            if points:
                series.append(Series(label, points, colour=colour, hollow=number > 0))
        path = [(latency(grid, s), scale * by.of(s)) for s in front(settings, by)]
        label = "front" if len(grids) == 1 else f"front · {grid.name}"
        series.append(Series(label, (), path, stairs=True, dash="" if number == 0 else "5 4", colour="#333333"))
    note = "The front: no other setting is faster and better. Degenerate settings are not on it."
    width = 760 if len(grids) == 1 else 900
    return scatter(title, series, Axis(across), axis, note=note, width=width, height=480)


def pass_chart(grid: Grid) -> str | None:
    """Milliseconds a pass against positions a pass, with the line; None where the file does not say."""
    line = pass_fit(grid, "positions_computed")
    if line is None:
        return None
    points: dict[str, list[Point]] = {method: [] for method in grid.methods}
    for cell in counted(grid, "positions_computed"):
        points[cell["method"]].append(Point(a_pass(cell, "positions_computed"), a_pass(cell, "milliseconds")))
    series = [Series(method, points[method]) for method in grid.methods]
    reach = max(point.x for one in series for point in one.points)
    path = [(0.0, line.intercept), (reach, line.intercept + line.slopes[0] * reach)]
    series.append(Series("least squares", (), path, dash="5 4", colour=QUIET))
    note = f"{line.intercept:.2f} ms + {1000 * line.slopes[0]:.1f} µs a position, R² {line.r2:.3f}; a point is a cell"
    x, y = Axis("positions computed in a pass", log=False), Axis("milliseconds a pass", log=False)
    return scatter("Latency of a pass", series, x, y, note=note)


# ---------------------------------------------------------------- the table, and what the mouse brings up

Column = tuple[str, Callable[[Setting], object], Callable[[object], str]]  # heading, value to sort by, as it is shown


def columns_of(grid: Grid) -> list[Column]:
    """The columns for which a grid has numbers."""
    gains = speedups(grid.settings())

    def mean(name: str) -> Callable[[Setting], object]:
        return lambda setting: setting.mean(name)

    every: list[Column] = [
        ("method", lambda s: s.method, str),
        ("block", lambda s: s.block_length, str),
        ("steps", lambda s: s.steps, str),
        ("latency (s)", lambda s: s.latency, significant),
        ("÷ reference", mean("latency_relative"), significant),
        ("speed-up", lambda s: gains.get((s.method, *s.place)), lambda v: f"{v:.2f}"),
        ("tokens/s", mean("tokens_per_s"), significant),
        ("passes", mean("nfe"), lambda v: f"{v:g}"),
        ("tokens/pass", mean("tokens_per_forward"), lambda v: f"{v:.2f}"),
        ("perplexity", lambda s: s.perplexity, significant),
        ("bound (nats)", mean("bound_per_token"), lambda v: f"{v:.2f}"),
        ("entropy", mean("unigram_entropy"), lambda v: f"{v:.2f}"),
        ("distinct-2", mean("distinct_2"), lambda v: f"{v:.2f}"),
        ("repetition", mean("repetition"), lambda v: f"{v:.2f}"),
        ("accuracy (%)", lambda s: None if s.accuracy is None else 100 * s.accuracy, lambda v: f"{v:.1f}"),
        ("± s.e.", lambda s: None if s.accuracy_error is None else 100 * s.accuracy_error, lambda v: f"{v:.1f}"),
        (
            "degenerate",
            lambda s: None if s.degenerate is None else sum(bool(a.get("degenerate")) for a in s.answers),
            str,
        ),
    ]
    settings = grid.settings()
    return [column for column in every if any(column[1](setting) is not None for setting in settings)]


def table_of(grid: Grid, first: int = 0) -> str:
    """All settings as a table that sorts by any column. first: the number of the first one in the page's data."""
    columns = columns_of(grid)
    rows = []
    for i, setting in enumerate(grid.settings()):
        values = [of(setting) for _, of, _ in columns]
        shown = ["" if v is None else say(v) for v, (_, _, say) in zip(values, columns, strict=True)]
        rows.append((list(zip(values, shown, strict=True)), bool(setting.degenerate), first + i))
    return table([heading for heading, _, _ in columns], rows)


def tips(grid: Grid) -> list[dict]:
    """What the mouse brings up for each setting: its numbers and its answers."""
    return [_tip(setting) for setting in grid.settings()]


def _tip(setting: Setting) -> dict:
    facts = [seconds(setting.latency)]
    if setting.perplexity is not None:
        facts.append(f"perplexity {significant(setting.perplexity)}")
    if setting.accuracy is not None:
        facts.append(f"accuracy {100 * setting.accuracy:.1f}%")
    answers = [
        {"question": cell["question"], "answer": cell["answer"], "note": _note(cell)}
        for cell in setting.answers[:4]
        if "answer" in cell
    ]
    return {
        "head": named(setting),
        "facts": ", ".join(facts),
        "degenerate": bool(setting.degenerate),
        "answers": answers,
    }


def _note(cell: dict) -> str:
    said = [] if cell.get("perplexity") is None else [f"perplexity {significant(cell['perplexity'])}"]
    if "correct" in cell:
        said.append("right" if cell["correct"] else "wrong")
    if cell.get("degenerate"):
        said.append("degenerate")
    return ", ".join(said)
