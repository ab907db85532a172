"""An animated SVG of a recorded run: the frames that the live view draws, one a pass, played as a film in any browser
and on GitHub, without a script (`dlm replay FILE --svg OUT`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dlm.cli import live
from dlm.cli.lines import RowText

if TYPE_CHECKING:
    from dlm.sampling.trajectory import Recording

__all__ = ["film"]

CELL, LINE, MARGIN, BAR = 8.4, 19, 16, 34  # pixels: a column, a line, the frame's margin, its title bar
PAPER, INK, QUIET = "#14161a", "#e8e8e4", "#7d8590"
COLOURS = {160: "#ff5f56", 166: "#ff8a3d", 136: "#d9a520", 100: "#b5b83a", 64: "#7fc241", 28: "#3fb950"}
HOLD_SECONDS = 3.0  # the finished text, before the film begins again
SGR, CODE = re.compile(r"\x1b\[([\d;]*)m"), re.compile(r"38;5;\d+|[1-9]\d*")


class Screen(io.StringIO):
    """A stream that says it is a terminal of a size, for the live view to draw on."""

    encoding = "utf-8"

    def __init__(self, columns: int):
        super().__init__()
        self.size = columns, 40

    def isatty(self) -> bool:
        return True


def spans(line: str) -> list[tuple[str, tuple[str, ...]]]:
    """A line with SGR codes as (text, codes) pairs."""
    parts, codes, at = [], (), 0
    for match in SGR.finditer(line):
        if match.start() > at:
            parts.append((line[at : match.start()], codes))
        codes, at = tuple(CODE.findall(match[1])), match.end()
    if at < len(line):
        parts.append((line[at:], codes))
    return parts


def draw_line(line: str) -> str:
    """One line of a frame as SVG, its baseline at y = 0: rectangles behind the newest tokens, then the text."""
    from rich.cells import cell_len

    behind, words, column = [], [], 0
    for text, codes in spans(line):
        x, width = round(column * CELL, 1), round(cell_len(text) * CELL, 1)
        colour = next((COLOURS[int(code[5:])] for code in codes if code.startswith("38;5;")), INK)
        fill = QUIET if "2" in codes else colour
        if "7" in codes:
            behind.append(f'<rect x="{x}" y="{5 - LINE}" width="{width}" height="{LINE}" fill="{fill}"/>')
            fill = PAPER
        weight = ' font-weight="bold"' if "1" in codes else ""
        if text.strip():
            words.append(f'<tspan x="{x}" fill="{fill}"{weight} textLength="{width}">{escape(text)}</tspan>')
        column += cell_len(text)
    return "".join(behind) + (f"<text>{''.join(words)}</text>" if words else "")


def svg(frames: Sequence[Sequence[str]], seconds: float, columns: int, title: str) -> str:
    """The film: the frames below each other, moved up by one height every `seconds` / frames; the last one is held.

    A reader who asks for less motion sees the last frame.
    """
    rows = max(map(len, frames))
    film = [*frames, *[frames[-1]] * max(1, round(HOLD_SECONDS * len(frames) / seconds))]
    width, height = columns * CELL + 2 * MARGIN, rows * LINE + MARGIN + BAR
    known: dict[str, int] = {}  # a line that several frames show is drawn once
    lines, reel = [], []
    for number, frame in enumerate(film):
        for row, line in enumerate(frame):
            if line not in known:
                known[line] = len(known)
                lines.append(f'<g id="l{known[line]}">{draw_line(line)}</g>')
            reel.append(f'<use href="#l{known[line]}" y="{(number * rows + row + 1) * LINE - 5}"/>')
    total, distance = seconds * len(film) / len(frames), len(film) * rows * LINE
    final = (len(film) - 1) * rows * LINE
    lights = "".join(
        f'<circle cx="{MARGIN + 4 + 18 * at}" cy="17" r="5.5" fill="{colour}"/>'
        for at, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">
<title>{escape(title)}</title>
<style>
text {{ font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }}
.film {{ animation: film {total:.2f}s steps({len(film)}) infinite; }}
@keyframes film {{ to {{ transform: translateY(-{distance}px); }} }}
@media (prefers-reduced-motion: reduce) {{ .film {{ animation: none; transform: translateY(-{final}px); }} }}
</style>
<defs>
{chr(10).join(lines)}
</defs>
<rect width="100%" height="100%" rx="9" fill="{PAPER}"/>{lights}
<text x="{width / 2:.0f}" y="21" text-anchor="middle" fill="{QUIET}">{escape(title)}</text>
<svg x="{MARGIN}" y="{BAR}" width="{columns * CELL:.1f}" height="{rows * LINE}"><g class="film">
{"".join(reel)}
</g></svg>
</svg>
"""


def frames_of(recording: Recording, columns: int, seconds: Sequence[float]) -> list[list[str]]:
    """The live view's frames as lines with SGR codes, one a pass; seconds: when each pass was over."""
    from dlm.cli.replay import states

    kind = recording.settings.get("confidence", "probability")
    rows, frames, passed = RowText(recording.text, recording.ends, kind=kind), [], [0.0]
    view = live.LiveView(Screen(columns), rows, passes=len(recording.passes), colour=True, clock=lambda: passed[0])
    view._draw, view.started = frames.append, 0.0
    for passed[0], state in zip(seconds, states(recording), strict=True):
        view.last_frame = float("-inf")  # every pass is a frame
        view.show(state)
    return frames


def film(recording: Recording, columns: int = 72, speed: float | None = None) -> str:
    """The SVG of a recording. speed: passes a second; None for the recorded pace, or ten where that is not known."""
    seconds = [turn.seconds for turn in recording.passes]
    if speed is not None or None in seconds:
        seconds = [(at + 1) / (speed or 10.0) for at in range(len(seconds))]
    given = [i for i, is_given in zip(recording.ids[0], recording.given[0], strict=True) if is_given]
    return svg(frames_of(recording, columns, seconds), seconds[-1], columns, f'dlm generate "{recording.text(given)}"')
