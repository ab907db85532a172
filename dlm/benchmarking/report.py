"""A grid in pictures and a table."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence

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
    mix,
    scatter,
    significant,
)
from dlm.benchmarking.findings import (
    ACCURACY,
    LEAST_R2,
    a_pass,
    counted,
    error_of_logits,
    front,
    named,
    pass_fit,
    quality,
    seconds,
    speedups,
)
from dlm.benchmarking.page import table
from dlm.benchmarking.results import Grid, Setting

METHOD_COLOURS = dict(zip(("none", "prefix", "dual", "vicinity", "c2f", "block_causal"), SERIES, strict=False))


def colour_of(method: str) -> str:
    """A method's colour, the same wherever it is drawn; `dual threshold:0.9` has a shade of that of `dual`."""
    name = re.split(r"[^A-Za-z0-9_]", method, maxsplit=1)[0]
    colour = METHOD_COLOURS.get(name, SERIES[6 + zlib.crc32(name.encode()) % (len(SERIES) - 6)])
    if name == method:
        return colour
    number = zlib.crc32(method.encode())
    ground, share = ("#ffffff", "#000000")[number % 2], 0.25 + 0.4 * (number // 2 % 97) / 97
    return mix((colour, ground), share)


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
                drawn.append(
                    (method, heat_map(method, sorted(rows), sorted(columns), tiles, colours, say, colour_of(method)))
                )
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
) -> str | None:
    """Latency against quality of every setting, and each grid's front; the second grid's points are rings.

    None where no setting has a quality.
    first: the number of each grid's first setting in the page's data. latency, across: what the x axis shows.
    """
    by = quality(*grids)
    if all(by.of(setting) is None for grid in grids for setting in grid.settings()):
        return None
    axis = Axis("accuracy (%)", log=False) if by is ACCURACY else Axis("perplexity under the judge")
    scale = 100.0 if by is ACCURACY else 1.0
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
            if points:
                series.append(Series(label, points, colour=colour_of(method), hollow=number > 0))
        path = [(latency(grid, s), scale * by.of(s)) for s in front(settings, by)]
        label = "front" if len(grids) == 1 else f"front · {grid.name}"
        series.append(Series(label, (), path, stairs=True, dash="" if number == 0 else "5 4", colour="#333333"))
    note = "The front: no other setting is faster and better. Degenerate settings are not on it."
    return scatter(title, series, Axis(across), axis, note=note)


def pass_chart(grid: Grid) -> str | None:
    """Milliseconds a pass against positions a pass, with the line; None where the file does not say."""
    line = pass_fit(grid, "positions_computed")
    if line is None:
        return None
    points: dict[str, list[Point]] = {method: [] for method in grid.methods}
    for cell in counted(grid, "positions_computed"):
        points[cell["method"]].append(Point(a_pass(cell, "positions_computed"), a_pass(cell, "milliseconds")))
    series = [Series(method, points[method], colour=colour_of(method)) for method in grid.methods]
    if line.r2 < LEAST_R2:
        note = f"A point is a cell. No line: positions explain too little of the time (R² {line.r2:.2f})"
    else:
        reach = max(point.x for one in series for point in one.points)
        path = [(0.0, line.intercept), (reach, line.intercept + line.slopes[0] * reach)]
        series.append(Series("least squares", (), path, dash="5 4", colour=QUIET))
        cost = f"{line.intercept:.2f} ms + {1000 * line.slopes[0]:.1f} µs a position"
        note = f"{cost}, R² {line.r2:.3f}; a point is a cell"
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
        ("ties (%)", lambda s: None if (v := s.known("ties")) is None else 100 * v, lambda v: f"{v:.2f}"),
        ("cache error", lambda s: s.known("cache_rms"), error_of_logits),
        ("cache same (%)", lambda s: None if (v := s.known("cache_same")) is None else 100 * v, lambda v: f"{v:.1f}"),
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
