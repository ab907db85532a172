"""Rows of token ids -> the lines of a screen: pieces of text in a style, characters with their widths, line breaks.

Nothing here writes: `live` does.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dlm.utils.printable import safe

__all__ = [
    "FILLED",
    "PROMPT",
    "QUIET",
    "RAMP",
    "Glyphs",
    "Piece",
    "RowText",
    "fit",
    "paint",
    "shade",
    "share",
    "window",
    "wrap",
]

PROMPT, QUIET, FILLED = "1", "2", "1;4"  # SGR codes: bold, faint, bold and underlined
NEWEST = "7"  # reversed: the confidence's colour becomes the background
# From unsure to sure, of 256 colours: red, orange, yellow, olive and two greens, all of middle brightness, so
# that each can be read on a black and on a white background.
RAMP = tuple(f"38;5;{colour}" for colour in (160, 166, 136, 100, 64, 28))
LONGEST_CHARACTER = 4  # tokens: a UTF-8 character has at most four bytes


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


def share(wanted: Sequence[int], budget: int) -> list[int]:
    """Divides `budget` lines among rows: at least one each, and none more than it wants."""
    given = [0] * len(wanted)
    while budget > 0 and given != list(wanted):
        for row, want in enumerate(wanted):
            if given[row] < want and budget > 0:
                given[row] += 1
                budget -= 1
    return given
