"""Charts as SVG text, without a plotting library: heat maps and scatter plots that a page can make answer to a mouse.

An element that stands for a measurement carries data-i, its number; a page may show more about it. Lengths in pixels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

FONT = 'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif"'
LETTER, LEGEND_ROW = 6.8, 20  # the mean width of a letter at 12 pixels (a little above it), and a row of a legend
INK, QUIET, RULE = "#1a1a1a", "#5f6368", "#dadce0"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#555555")  # Okabe and Ito's
BLUES = ("#f2f7fc", "#c3dbee", "#7fb3d8", "#3a7fb8", "#0b4f8a")
ORANGES = ("#fef4ea", "#fcd5ae", "#f5a463", "#d96f22", "#943f06")
GREENS = ("#eff8f0", "#c3e6c8", "#81c78b", "#3d9b50", "#10662a")
DIVERGING = ("#8e4a9e", "#cba6d4", "#f7f7f7", "#9fd3a6", "#23803a")  # 1 is in the middle
HATCH = (
    '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="7" stroke="#b00020" stroke-width="1.6" stroke-opacity="0.75"/></pattern>'
)


def svg(width: float, height: float, body: str, label: str) -> str:
    """A drawing with its size and what it shows, for those who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" {FONT}>'
        f'<defs>{HATCH}</defs><rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>'
    )


def text(
    x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle", ink: str = INK, more: str = ""
) -> str:
    """Words at a place; anchor: start, middle or end."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{ink}" {more}'
    return f"<text {place.strip()}>{escape(words)}</text>"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent: 0.0123, 1.20, 45.1, 1234."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


# ---------------------------------------------------------------- colours


def mix(colours: Sequence[str], share: float) -> str:
    """The colour at a share from 0 to 1 of the way along a row of colours."""
    at = min(max(share, 0.0), 1.0) * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    pair = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in colours[low : low + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in zip(*pair, strict=True))


def ink_on(colour: str) -> str:
    """Black or white, whichever is read more easily on a colour (relative luminance, WCAG 2.1)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.22 else INK


@dataclass(frozen=True)
class Shade:
    """Values -> colours along a row of them, by the logarithm (`log`) or evenly; the same for charts to be compared."""

    colours: Sequence[str]
    low: float
    high: float
    log: bool = True

    @classmethod
    def over(cls, colours: Sequence[str], values: Sequence[float], log: bool = True) -> Shade:
        """From the least to the largest of the values."""
        return cls(colours, min(values), max(values), log)

    def colour(self, value: float) -> str:
        scale = math.log if self.log else float
        span = scale(self.high) - scale(self.low)
        return mix(self.colours, (scale(value) - scale(self.low)) / span if span else 0.5)


def about_one(values: Sequence[float]) -> Shade:
    """Colours for ratios, 1 in the middle, as far to both sides as the farthest value goes (at least to 1.5)."""
    reach = max(1.5, *(max(value, 1 / value) for value in values))
    return Shade(DIVERGING, 1 / reach, reach)


# ---------------------------------------------------------------- heat map


@dataclass(frozen=True)
class Tile:
    """A value in a heat map; marked: hatched; index: for the page."""

    value: float
    marked: bool = False
    index: int | None = None


def heat_map(
    title: str,
    rows: Sequence[int],
    columns: Sequence[int],
    tiles: dict[tuple[int, int], Tile],
    shade: Shade,
    say: Callable[[float], str],
    colour: str = INK,
) -> str:
    """Block lengths (rows, the largest above) by steps (columns); a place without a tile could not be measured.

    colour: of the dot before the title, by which the same method is found in a scatter plot.
    """
    wide, high, left, top = 48, 28, 58, 40
    body = [
        f'<circle cx="{left + 5}" cy="13" r="5" fill="{colour}"/>',
        text(left + 16, 18, title, size=14, anchor="start", more='font-weight="600"'),
    ]
    for r, row in enumerate(reversed(rows)):
        y = top + r * high
        body.append(text(left - 8, y + high / 2 + 4, str(row), anchor="end", ink=QUIET))
        for c, column in enumerate(columns):
            x, tile = left + c * wide, tiles.get((row, column))
            box = f'x="{x}" y="{y}" width="{wide - 2}" height="{high - 2}" rx="2"'
            if tile is None:
                body.append(f'<rect {box} fill="#fafafa" stroke="{RULE}" stroke-dasharray="2 3"/>')
                continue
            ground = shade.colour(tile.value)
            mark = f'<rect {box} fill="url(#hatch)"/>' if tile.marked else ""
            halo = f'paint-order="stroke" stroke="{ground}" stroke-width="4"' if tile.marked else ""
            number = "" if tile.index is None else f' data-i="{tile.index}"'
            label = text(x + wide / 2 - 1, y + high / 2 + 3, say(tile.value), ink=ink_on(ground), more=halo)
            body.append(f'<g{number}><rect {box} fill="{ground}"/>{mark}{label}</g>')
    bottom = top + len(rows) * high
    for c, column in enumerate(columns):
        body.append(text(left + c * wide + wide / 2 - 1, bottom + 14, str(column), ink=QUIET))
    body.append(text(left + len(columns) * wide / 2, bottom + 32, "steps", ink=QUIET))
    middle = top + len(rows) * high / 2
    body.append(text(14, middle, "block length", ink=QUIET, more=f'transform="rotate(-90 14 {middle})"'))
    width = max(left + len(columns) * wide, left + 16 + LETTER * 14 / 12 * len(title)) + 10
    return svg(width, bottom + 42, "".join(body), title)


# ---------------------------------------------------------------- scatter


@dataclass(frozen=True)
class Axis:
    """What an axis shows. log: by the logarithm; zero: an axis without it shows 0 too."""

    title: str
    log: bool = True
    zero: bool = True


@dataclass(frozen=True)
class Point:
    """x, y; marked: a cross in place of a dot; index: for the page."""

    x: float
    y: float
    marked: bool = False
    index: int | None = None


@dataclass(frozen=True)
class Series:
    """Points of one name and colour, rings where hollow; path: a line through these (x, y); stairs: in steps; faint: as
    behind others. One without a name is not in the legend."""

    name: str
    points: Sequence[Point]
    path: Sequence[tuple[float, float]] = ()
    stairs: bool = False
    dash: str = ""
    colour: str | None = None
    hollow: bool = False
    faint: bool = False


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within a range, for an axis: 1, 2, 5 times powers of ten."""
    if log:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high / low < 2000 else (1,)
        candidates = [factor * 10.0**decade for decade in decades for factor in factors]
    else:
        raw = (high - low) / 5 or 1.0
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
        candidates = [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def scatter(
    title: str, series: Sequence[Series], x: Axis, y: Axis, *, width: float = 600, height: float = 420, note: str = ""
) -> str:
    """Points and lines on two axes, the legend beneath them in as many rows as it needs. note: under the title."""
    left, right, below = 70, 16, 48
    remarks = _broken(note, (width - left - right) / LETTER) if note else []
    top = 30 + 17 * len(remarks)
    colours = [line.colour or SERIES[number % len(SERIES)] for number, line in enumerate(series)]
    names: list[tuple[str, int | None]] = [(line.name, number) for number, line in enumerate(series) if line.name]
    if any(p.marked for line in series for p in line.points):
        names.append(("degenerate", None))
    places, rows = _legend([name for name, _ in names], left, width - right)
    xs = [p.x for s in series for p in s.points] + [a for s in series for a, _ in s.path]
    ys = [p.y for s in series for p in s.points] + [b for s in series for _, b in s.path]
    across, x_low, x_high = _scale(xs, x, left, width - right)
    upward, y_low, y_high = _scale(ys, y, height - below, top)
    body = [text(left, 20, title, size=14, anchor="start", more='font-weight="600"')]
    body += [text(left, 38 + 17 * row, words, anchor="start", ink=QUIET) for row, words in enumerate(remarks)]
    for tick in ticks(x_low, x_high, x.log):
        at = across(tick)
        body.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - below}" stroke="{RULE}"/>')
        body.append(text(at, height - below + 17, _tick(tick), ink=QUIET))
    for tick in ticks(y_low, y_high, y.log):
        at = upward(tick)
        body.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="{RULE}"/>')
        body.append(text(left - 8, at + 4, _tick(tick), anchor="end", ink=QUIET))
    middle = (top + height - below) / 2
    body.append(text((left + width - right) / 2, height - 10, x.title))
    body.append(text(18, middle, y.title, more=f'transform="rotate(-90 18 {middle})"'))
    for line, colour in zip(series, colours, strict=True):
        body.append(_path(line, colour, across, upward))
        body += [_dot(p, colour, across, upward, line.hollow) for p in line.points]
    for (name, number), (start, row, shown) in zip(names, places, strict=True):
        sample, label = Point(start + 9, height + 12 + LEGEND_ROW * row), f"<title>{escape(name)}</title>"
        if number is None:
            body.append(_dot(Point(sample.x, sample.y, True), QUIET, float, float))
        else:
            line, colour = series[number], colours[number]
            if line.points:
                body.append(_dot(sample, colour, float, float, line.hollow))
            else:
                body.append(
                    f'<line x1="{start}" x2="{start + 18}" y1="{sample.y}" y2="{sample.y}" stroke="{colour}" '
                    f'stroke-width="2" stroke-dasharray="{line.dash}"/>'
                )
        body.append(f"<g>{label}{text(start + 23, sample.y + 4, shown, anchor='start')}</g>")
    return svg(width, height + 4 + LEGEND_ROW * rows, "".join(body), title)


def _legend(names: Sequence[str], left: float, right: float) -> tuple[list[tuple[float, int, str]], int]:
    """Where each name of a legend stands: (x of its sample, row, the name as it is shown), and how many rows there are.

    A name that is longer than a row loses its middle.
    """
    places, x, row = [], left, 0
    most = int((right - left - 23) / LETTER)
    for name in names:
        shown = name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"
        wide = 23 + LETTER * len(shown)
        if x > left and x + wide > right:
            x, row = left, row + 1
        places.append((x, row, shown))
        x += wide + 14
    return places, row + 1


def _broken(words: str, most: float) -> list[str]:
    """A remark in lines of at most so many letters."""
    return textwrap.wrap(words, max(10, int(most)))


def _scale(values: Sequence[float], axis: Axis, start: float, end: float):
    """A function from values to pixels, and the range that it shows: a little more than that of the values."""
    scale, back = (math.log, math.exp) if axis.log else (float, float)
    low, high = scale(min(values)), scale(max(values))
    from_zero = axis.zero and not axis.log and low >= 0
    if axis.zero and not axis.log:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = (low if from_zero else low - margin), high + margin
    return (lambda value: start + (scale(value) - low) / (high - low) * (end - start)), back(low), back(high)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"


def _dot(point: Point, colour: str, across, upward, hollow: bool = False) -> str:
    x, y = across(point.x), upward(point.y)
    number = "" if point.index is None else f' data-i="{point.index}"'
    if point.marked:
        shape = f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{colour}" stroke-width="1.8" fill="none"/>'
        return f'<g{number}>{shape}<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="transparent"/></g>'
    look = f'fill="#ffffff" stroke="{colour}" stroke-width="1.6"' if hollow else f'fill="{colour}" stroke="#ffffff"'
    return f'<circle{number} cx="{x:.1f}" cy="{y:.1f}" r="4.3" {look} fill-opacity="0.85"/>'


def _path(line: Series, colour: str, across, upward) -> str:
    if len(line.path) < 2:
        return ""
    places = [(across(a), upward(b)) for a, b in line.path]
    steps = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for a, b in places[1:]:
        steps += f"H{a:.1f}V{b:.1f}" if line.stairs else f"L{a:.1f} {b:.1f}"
    return (
        f'<path d="{steps}" fill="none" stroke="{colour}" stroke-width="{1 if line.faint else 1.8}" '
        f'stroke-opacity="{0.3 if line.faint else 0.85}" '
        f'stroke-dasharray="{line.dash}"/>'
    )
