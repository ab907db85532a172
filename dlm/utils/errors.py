"""Errors as a user reads them."""

from __future__ import annotations

import errno

from dlm.utils.printable import safe

__all__ = ["cause_of", "one_line", "shortened"]


def one_line(error: BaseException) -> str:
    """The message of an error on one line, without control characters."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"{error.strerror}, for standard output or a file: make room, or name another place"
    return safe(" ".join(text.split())) or type(error).__name__


def shortened(text: str, most: int = 500) -> str:
    """The text, its middle left out where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def cause_of(error: BaseException) -> str:
    """What an error of a library began with, on one line: its own message often says only that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)
