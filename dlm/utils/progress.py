"""Progress on standard error: one updated line on a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def counted(
    items: Iterable[T], total: int, name: str, show: bool = True, every: float = 10.0, start: int = 0
) -> Iterator[T]:
    """Yields the items; standard error shows how many of `total` are done and the time left.

    every: seconds between lines where it is no terminal; there the line moves. start: how many were done before.
    """
    live, began = sys.stderr.isatty(), time.perf_counter()
    shown = began
    for number, item in enumerate(items, start + 1):
        yield item
        now = time.perf_counter()
        if show and (number == total or now - shown >= (0.2 if live else every)):
            left = duration((now - began) / (number - start) * (total - number))
            head, end = ("\r\x1b[2K", "\n" if number == total else "") if live else ("", "\n")
            sys.stderr.write(f"{head}{name}: {number}/{total}  left {left}{end}")
            sys.stderr.flush()
            shown = now
