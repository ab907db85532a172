"""Text of a model, a prompt or a file, made fit for a terminal: it must not steer it."""

from __future__ import annotations

import re

__all__ = ["safe"]

# All control characters but newline and tab, and those that change the direction of the text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def safe(text: str) -> str:
    """`text` with its control characters replaced."""
    return CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\t", "    "))
