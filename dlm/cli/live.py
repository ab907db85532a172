"""Shows a canvas in a terminal while it denoises, coloured by confidence, and leaves the terminal as it was.

Shapes: B batch, T canvas.
"""

from __future__ import annotations

import codecs
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dlm.utils.printable import safe

PROMPT, QUIET, FILLED = "1", "2", "1;4"  # SGR codes: bold, faint, bold and underlined
NEWEST = "7"  # reversed: the confidence's colour becomes the background
# From unsure to sure, of 256 colours: red, orange, yellow, olive and two greens, all of middle brightness, so
# that each can be read on a black and on a white background.
RAMP = tuple(f"38;5;{colour}" for colour in (160, 166, 136, 100, 64, 28))
FRAME_SECONDS = 1 / 30
LONGEST_CHARACTER = 4  # tokens: a UTF-8 character has at most four bytes
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
NO_WRAP, WRAP = (
    "\x1b[?7l",
    "\x1b[?7h",
)  # a line that was measured wrongly is cut, so the line count stays true
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


def paint(text: str, *styles: str, colour: bool = True) -> str:
    """`text` between SGR codes; without `colour` the codes that set a colour are left out."""
    codes = ";".join(style for style in styles if style and (colour or not style.startswith("38;")))
    return f"\x1b[{codes}m{text}\x1b[0m" if codes else text


@dataclass(frozen=True)
class Piece:
    """A stretch of text in one style; `breakable` where a line may end after each of its characters."""

    text: str
    styles: tuple[str, ...] = ()
    breakable: bool = False
    focus: bool = False


@dataclass(frozen=True)
class Glyphs:
    """The glyphs for a masked slot, the end of the text, and the separator of the status line."""

    mask: str = "░"
    end: str = "∎"
    dot: str = "·"

    @classmethod
    def of(cls, stream) -> Glyphs:
        """The glyphs that the stream's encoding has."""
        try:
            codecs.encode("".join((cls.mask, cls.end, cls.dot)), getattr(stream, "encoding", None) or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls("_", "#", "|")
        return cls()


def shade(confidence: float, kind: str) -> str:
    """The colour of a token; `kind` is the name of the confidence rule that gave the number."""
    if kind == "random":
        return ""
    sure = math.exp(min(confidence, 0.0)) if kind == "entropy" else confidence
    return RAMP[min(int(max(sure, 0.0) * len(RAMP)), len(RAMP) - 1)] if sure == sure else ""


class RowText:
    """Turns rows of token ids into pieces.

    decode: a tuple of ids -> text. ends: ids that end a text. kind: the confidence rule.
    show_given: whether the prompt is shown too.
    """

    def __init__(
        self,
        decode: Callable[[tuple[int, ...]], str],
        ends: frozenset[int] = frozenset(),
        *,
        glyphs: Glyphs | None = None,
        kind: str = "probability",
        show_given: bool = True,
    ) -> None:
        self.decode = lru_cache(maxsize=65536)(decode)
        self.ends, self.glyphs, self.kind, self.show_given = ends, glyphs or Glyphs(), kind, show_given

    def characters(self, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Split `ids` into (number of tokens, text): tokens that share a UTF-8 character stay together."""
        at = 0
        while at < len(ids):
            count, text = 1, self.decode((ids[at],))
            for more in range(2, LONGEST_CHARACTER + 1):
                if not text.endswith("\ufffd") or at + more > len(ids):
                    break
                longer = self.decode(tuple(ids[at : at + more]))
                if "\ufffd" not in longer:
                    count, text = more, longer
                    break
            yield count, text
            at += count

    def pieces(
        self,
        ids: Sequence[int],
        given: Sequence[bool],
        masked: Sequence[bool],
        confidence: Sequence[float],
        newest: Sequence[bool],
    ) -> list[Piece]:
        """The row as pieces: given text bold, masked slots as a glyph, the rest coloured by confidence.

        All arguments have one entry per valid slot of the row.
        """
        found, at, focused = [], 0, False
        while at < len(ids):
            kind = (masked[at], given[at])
            stop = at + 1
            while stop < len(ids) and (masked[stop], given[stop]) == kind:
                stop += 1
            if masked[at]:
                found.append(Piece(self.glyphs.mask * (stop - at), (QUIET,), breakable=True, focus=not focused))
                focused = True
            elif given[at] and self.show_given:
                found.append(Piece(safe(self.decode(tuple(ids[at:stop]))), (PROMPT,)))
            elif not given[at]:
                found.extend(self._written(ids[at:stop], confidence[at:stop], newest[at:stop]))
            at = stop
        return found

    def plain(self, ids: Sequence[int], editable: Sequence[bool], masked: Sequence[bool]) -> list[Piece]:
        """`pieces` without confidences, for a text that is no longer denoising."""
        given = [not ours for ours in editable]
        return self.pieces(ids, given, masked, [math.nan] * len(ids), [False] * len(ids))

    def _written(self, ids, confidence, newest) -> Iterator[Piece]:
        at = 0
        for count, text in self.characters(ids):
            styles = [shade(min(confidence[at : at + count]), self.kind)]
            if any(newest[at : at + count]):
                styles.append(NEWEST)
            if ids[at] in self.ends:
                text = self.glyphs.end
            yield Piece(safe(text), tuple(styles))
            at += count


@lru_cache(maxsize=65536)
def clusters(text: str) -> tuple[tuple[str, int], ...]:
    """The characters of a text as a reader counts them, each with its columns in a terminal: 0, 1 or 2.

    An accent belongs to its letter, and an emoji of several code points is one character of two columns (UAX #29).
    """
    if text.isascii():
        return tuple((character, int(character != "\n")) for character in text)
    from rich.cells import split_graphemes

    spans, _ = split_graphemes(text)
    return tuple((text[start:end], width) for start, end, width in spans)


def fit(parts: Sequence[tuple[int, str]], columns: int, dot: str) -> str:
    """The parts of a status line that fit into `columns`: (rank, text), those of the lowest ranks, in their order."""
    kept = list(parts)
    while len(kept) > 1 and len(f" {dot} ".join(text for _, text in kept)) > columns:
        kept.remove(max(kept, key=lambda part: part[0]))
    return f" {dot} ".join(text for _, text in kept)[:columns]


class Line(list):
    """One line of the screen: (character, piece) pairs, a character being a grapheme cluster."""

    def text(self, colour: bool) -> str:
        """The line with its SGR codes."""
        parts, at = [], 0
        while at < len(self):
            stop = at
            while stop < len(self) and self[stop][1].styles == self[at][1].styles:
                stop += 1
            parts.append(paint("".join(c for c, _ in self[at:stop]), *self[at][1].styles, colour=colour))
            at = stop
        return "".join(parts)


def wrap(pieces: Sequence[Piece], columns: int) -> tuple[list[Line], int | None]:
    """Break pieces into lines of at most `columns`, at spaces where there are any.

    Returns the lines, and the number of the line that holds the focus (None: no piece has it).
    """
    lines, line, used, breakpoint_ = [], Line(), 0, 0
    for piece in pieces:
        for character, wide in clusters(piece.text):
            if character == "\n":
                lines.append(line)
                line, used, breakpoint_ = Line(), 0, 0
                continue
            if used + wide > columns and line:
                if character == " ":  # the space at which a line ends is not shown
                    lines.append(line)
                    line, used, breakpoint_ = Line(), 0, 0
                    continue
                cut = breakpoint_ or len(line)
                lines.append(Line(line[:cut]))
                line = Line(line[cut:])
                used, breakpoint_ = sum(width for c, _ in line for _, width in clusters(c)), 0
            line.append((character, piece))
            used += wide
            if character == " " or piece.breakable:
                breakpoint_ = len(line)
    lines.append(line)
    focus = next((i for i, held in enumerate(lines) if any(piece.focus for _, piece in held)), None)
    return lines, focus


def window(lines: list, focus: int | None, rows: int) -> tuple[int, list]:
    """The part of `lines` that fits into `rows` and holds `focus` (None: the end): (first line, lines)."""
    if len(lines) <= rows:
        return 0, lines
    # A third above the focus, two thirds below: what comes next is more interesting than what is done.
    first = len(lines) - rows if focus is None else min(max(focus - rows // 3, 0), len(lines) - rows)
    return first, lines[first : first + rows]


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
        written = int((state.canvas.editable & state.canvas.valid & ~masked).sum())
        spent = max(int(state.nfe.max()), 1)
        parts = [(0, f"pass {state.step}" + (f"/{self.passes}" if self.passes else ""))]
        if self.blocks and self.blocks > 1:
            parts.append((2, f"block {min(int(state.block.max()) + 1, self.blocks)}/{self.blocks}"))
        parts.append((4, f"{written / masked.shape[0] / spent:.1f} tok/pass"))
        parts.append((1, f"{written / seconds:.0f} tok/s"))
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


def share(wanted: Sequence[int], budget: int) -> list[int]:
    """Divides `budget` lines among rows: at least one each, and none more than it wants."""
    given = [0] * len(wanted)
    while budget > 0 and given != list(wanted):
        for row, want in enumerate(wanted):
            if given[row] < want and budget > 0:
                given[row] += 1
                budget -= 1
    return given
