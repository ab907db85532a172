"""What a reward function reads of a prompt or a completion: its text, the part with the answer, its final number."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

__all__ = ["final_number", "last_part", "text_of"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def text_of(value) -> str:
    """The text of a prompt or a completion: itself, or the content of the last of its messages."""
    return value if isinstance(value, str) else value[-1]["content"]


def last_part(text: str) -> str:
    """What stands in the last <answer> tags of a text, else its last line."""
    matches = _ANSWER.findall(text)
    lines = text.strip().splitlines()
    return matches[-1] if matches else lines[-1] if lines else ""


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, as GSM8K's answers end (arXiv:2110.14168), else the last number; None: none."""
    _, mark, tail = text.rpartition("####")
    matches = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", (tail if mark else text).replace("$", ""))
    try:
        return Decimal((matches[0] if mark else matches[-1]).replace(",", "")) if matches else None
    except InvalidOperation:
        return None
