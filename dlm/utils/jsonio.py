"""JSON read with errors of one line, and written so that every reader takes it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["finite", "parse_json", "read_json", "read_object", "to_json"]


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises ValueError, in one line that begins with `where`, for whatever is no JSON.

    Nesting too deep for Python's parser and numbers of thousands of digits are refused in the same way.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ValueError(f"{where}: not JSON ({error.msg}, {place})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON that can be read ({str(error).split(';')[0]})") from None


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file, with or without a byte-order mark.

    Raises ValueError, in one line that names the file, where it is no JSON or not UTF-8; OSError where it cannot be
    read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); write it anew as UTF-8") from None
    return parse_json(text, str(path))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object {...} in a JSON file. Raises as `read_json`, and ValueError for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{path} must hold an object {{...}}, and holds {kind}: copy the file again")
    return value


def finite(value: Any) -> Any:
    """The value with None in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value


def to_json(value: Any, *, ascii_only: bool = True, indent: int | None = None, sort_keys: bool = False) -> str:
    """The value as JSON that every reader takes: null in place of NaN and infinities."""
    return json.dumps(finite(value), ensure_ascii=ascii_only, allow_nan=False, indent=indent, sort_keys=sort_keys)
