"""Ids that are final -> text, piece by piece: nothing is sent that a later token could change.

A piece is held back while it ends inside a character (byte-level vocabularies), or may be the beginning of a stop text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

__all__ = ["FinalText", "up_to_end"]

BROKEN = "\ufffd"  # what a decoder writes for the first bytes of a character


def up_to_end(ids: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """The ids before the first that ends a text, and whether there was one."""
    for i, token in enumerate(ids):
        if token in ends:
            return list(ids[:i]), True
    return list(ids), False


class FinalText:
    """The text of one row as it becomes final.

    decode: ids -> text. ends: ids that end a text; stop: texts that end it; trim: a space at its start is left out.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        stop: Sequence[str] = (),
        trim: bool = False,
    ):
        self.decode, self.ends, self.stop, self.trim = decode, ends, tuple(stop), trim
        self.sent = ""
        self.seen = -1  # ids that the text of the last call was made of
        self.ended = False  # by an end-of-text or a stop text
        self.whole: int | None = None  # characters before the stop text, with a trimmed space

    def update(self, ids: Sequence[int], last: bool = False) -> str:
        """What is new in the text of ids, all of which are final; with `last` nothing more comes."""
        if self.ended or (len(ids) == self.seen and not last):
            return ""
        self.seen = len(ids)
        kept, ended = up_to_end(ids, self.ends)
        whole = self.decode(kept) if kept else ""
        trimmed = self.trim and whole.startswith(" ")
        if trimmed:
            whole = whole[1:]
        stops = [at for text in self.stop if (at := whole.find(text)) >= 0]
        if stops:
            whole, ended = whole[: min(stops)], True
            self.whole = len(whole) + trimmed if whole else 0
        elif not (last or ended):
            whole = whole.rstrip(BROKEN) if whole.endswith(BROKEN) else whole
            whole = whole[: len(whole) - self._held(whole)]
        self.ended = ended
        if not whole.startswith(self.sent):  # a decoder that joins tokens otherwise: what was sent stays
            return ""
        new, self.sent = whole[len(self.sent) :], whole
        return new

    def _held(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop text."""
        most = max((len(stop) for stop in self.stop), default=1) - 1
        for count in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - count :]) for stop in self.stop):
                return count
        return 0
