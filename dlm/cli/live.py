"""Shows a canvas in a terminal while it denoises, and leaves the terminal as it was; `lines` says what is drawn.

Shapes: B batch, T canvas.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from dlm.cli.lines import QUIET, RowText, fit, paint, share, window, wrap
from dlm.utils.printable import safe

__all__ = ["LiveView", "is_live", "is_terminal", "note", "printable", "size_of", "wants_colour"]

FRAME_SECONDS = 1 / 30
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"  # a line that was measured wrongly is cut, so the line count stays true
HOLD, RELEASE = "\x1b[?2026h", "\x1b[?2026l"  # terminals that know them draw a frame in one go


def is_terminal(stream) -> bool:
    """Whether `stream` is a terminal, of whatever kind."""
    return bool(getattr(stream, "isatty", lambda: False)())


def is_live(stream) -> bool:
    """Whether `stream` is a terminal that can move its cursor."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb"


def printable(text: str, stream) -> str:
    """`text` as it may be written to `stream`: `safe` where that is a terminal, with or without TERM."""
    return safe(text) if is_terminal(stream) else text


def wants_colour(stream) -> bool:
    """Whether to colour `stream`: a terminal, and NO_COLOR not set (https://no-color.org)."""
    return is_live(stream) and not os.environ.get("NO_COLOR")


def note(stream, text: str) -> None:
    """Put one quiet line on a terminal, in place of the last one; "" removes it. Elsewhere: nothing."""
    if is_live(stream):
        columns, _ = size_of(stream)
        stream.write("\r\x1b[2K" + (paint(safe(text)[: columns - 1], QUIET) if text else ""))
        stream.flush()


def size_of(stream) -> tuple[int, int]:
    """(columns, rows) of a terminal, or the `size` of what stands for one; 80 x 24 where it does not say."""
    try:
        columns, rows = getattr(stream, "size", None) or os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        columns, rows = 0, 0
    return columns or 80, rows or 24


class LiveView:
    """A part of the screen that shows a canvas's newest state; a context manager that cleans up after itself.

    stream: the terminal. passes, blocks: how many there will be, where that is known. delay: seconds to wait
    after each pass, for the reader's sake. clock: seconds; tests replace it.
    """

    def __init__(
        self,
        stream,
        rows: RowText,
        *,
        passes: int | None = None,
        blocks: int | None = None,
        delay: float = 0.0,
        colour: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.stream, self.rows, self.passes, self.blocks, self.delay = stream, rows, passes, blocks, delay
        self.colour = wants_colour(stream) if colour is None else colour
        self.clock = clock
        self.height, self.drawn_columns, self.drawn = 0, 0, []
        self.confidence = self.newest = self.tokens = None
        self.waited, self.last_frame = 0.0, -math.inf
        self.committed = 0  # tokens, of all rows; end-of-text that fills up a row is not among them

    def __enter__(self) -> LiveView:
        self.started = self.clock()
        self.stream.write(HIDE + NO_WRAP)
        self.stream.flush()
        return self

    def __exit__(self, *_) -> None:
        self.erase()
        self.stream.write(RELEASE + WRAP + SHOW)
        self.stream.flush()

    def show(self, state) -> None:
        """Take a DenoiseState; it is drawn now, or with the next one when passes are quicker than the eye."""
        tokens, written = state.canvas.tokens, state.committed | state.revised
        self.committed += int(state.committed.sum())
        # Where a text grew in its middle, its slots have moved: what was known of them is forgotten.
        if self.confidence is None or bool(((self.tokens != tokens) & (self.confidence > 0) & ~written).any()):
            self.confidence = state.confidence.new_zeros(state.confidence.shape).float()
            self.newest = state.committed.new_zeros(state.committed.shape)
        self.confidence = self.confidence.where(~state.committed, state.confidence.float())
        self.newest, self.tokens = self.newest | state.committed, tokens
        masked = state.canvas.masked
        if self.clock() - self.last_frame < FRAME_SECONDS - self.delay and bool(masked.any()):
            return
        self._draw(self.frame(state, masked))
        self.newest = state.committed.new_zeros(state.committed.shape)
        if self.delay:
            before = self.clock()
            try:
                time.sleep(self.delay)
            finally:  # Ctrl-C ends the wait too
                self.waited += self.clock() - before
        self.last_frame = self.clock()

    def frame(self, state, masked) -> list[str]:
        """The lines to draw: the rows of the canvas, cut to the screen, and the status line."""
        columns, height = size_of(self.stream)
        budget = max(height - 2, 1)  # the status line, and the line that the shell's prompt had
        canvas = state.canvas
        count = canvas.tokens.shape[0]
        label = len(str(count)) + 2 if count > 1 else 0
        wrapped = []
        for row in range(min(count, budget)):
            valid = canvas.valid[row]
            pieces = self.rows.pieces(
                canvas.tokens[row][valid].tolist(),
                (~canvas.editable[row][valid]).tolist(),
                masked[row][valid].tolist(),
                self.confidence[row][valid].tolist(),
                self.newest[row][valid].tolist(),
            )
            wrapped.append(wrap(pieces, max(columns - label, 8)))
        shares = share([len(lines) for lines, _ in wrapped], budget)
        shown, hidden = [], 0
        for row, ((lines, focus), rows) in enumerate(zip(wrapped, shares, strict=True)):
            _, part = window(lines, focus, rows)
            hidden += len(lines) - len(part)
            for number, line in enumerate(part):
                name = f"{row + 1:>{label - 2}}  " if label and not number else " " * label
                shown.append((paint(name, QUIET) if name.strip() else name) + line.text(self.colour))
        more = []
        if count > len(wrapped):
            more = [(3, f"{count - len(wrapped)} more rows")]
        elif hidden:
            more = [(3, f"{hidden} more lines")]
        return [*shown, paint(self.status(state, masked, more, columns), QUIET)]

    def status(self, state, masked, more=(), columns: int = 80) -> str:
        """For example `pass 12/64 · block 2/4 · 5.3 tok/pass · 41 tok/s`, as much of it as fits into `columns`."""
        seconds = max(self.clock() - self.started - self.waited, 1e-9)
        spent = max(int(state.nfe.max()), 1)
        parts = [(0, f"pass {state.step}" + (f"/{self.passes}" if self.passes else ""))]
        if self.blocks and self.blocks > 1:
            parts.append((2, f"block {min(int(state.block.max()) + 1, self.blocks)}/{self.blocks}"))
        parts.append((4, f"{self.committed / masked.shape[0] / spent:.1f} tok/pass"))
        parts.append((1, f"{self.committed / seconds:.0f} tok/s"))
        return fit([*parts, *more], columns - 1, self.rows.glyphs.dot)

    def erase(self) -> None:
        """Remove what was drawn; the cursor is then where it was before the first frame."""
        self._draw([])

    def _draw(self, lines: list[str]) -> None:
        columns, _ = size_of(self.stream)
        if lines and lines == self.drawn and columns == self.drawn_columns:
            return
        height = self.height
        if height and columns < self.drawn_columns:  # a terminal that got narrower has broken the old lines
            height *= -(-self.drawn_columns // columns)
        out = [HOLD, "\r", f"\x1b[{height - 1}A" if height > 1 else ""]
        # A line is cleared before it is written: after one that fills the screen the cursor is still in it.
        out.append("\n".join(f"\r\x1b[2K{line}" for line in lines))
        if height > len(lines):
            out.append("\n\x1b[J\x1b[A" if lines else "\x1b[J")
        self.stream.write("".join([*out, RELEASE]))
        self.stream.flush()
        self.height, self.drawn_columns, self.drawn = len(lines), columns, lines
