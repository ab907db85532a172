"""Prompts of a user, read from a file or from standard input."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


def read_prompts(path: str) -> list[str]:
    """The prompts in a file (`-`: standard input): one a line, or JSONL with "prompt" in each object.

    Raises ValueError where it is not UTF-8, holds no prompt, or a line of JSONL has none.
    """
    if path == "-":
        return list(prompts_of(io.BytesIO(sys.stdin.buffer.read()), "standard input"))
    return list(iter_prompts(path))


def iter_prompts(path: str) -> Iterator[str]:
    """The prompts in a file as `read_prompts` gives them, of which one line at a time is in memory."""
    with open(path, "rb") as file:
        yield from prompts_of(file, path)


def prompts_of(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The prompts in the lines of a file called `name`. Raises as `read_prompts`."""
    at, objects = 0, None
    for number, raw in enumerate(lines, 1):
        start = len(BOM) if number == 1 and raw.startswith(BOM) else 0
        try:
            line = raw[start:].decode("utf-8").rstrip("\n").rstrip("\r")
        except UnicodeDecodeError as error:
            place = at + start + error.start
            raise ValueError(f"{name} is not UTF-8 text (byte {place}): convert it to UTF-8") from error
        at += len(raw)
        if not line.strip():
            continue
        prompt = json_prompt(line)
        objects = name.endswith(".jsonl") or prompt is not None if objects is None else objects
        if objects and prompt is None:
            raise ValueError(f'{name}, line {number}: not a JSON object with a text "prompt"')
        yield prompt if objects else line
    if objects is None:
        raise ValueError(f'{name} holds no prompt: write one a line, or JSON objects with "prompt"')


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts that was read through once. count: its prompts; digest: of its bytes."""

    path: str
    count: int
    digest: str

    @classmethod
    def of(cls, path: str) -> PromptFile:
        """Raises as `read_prompts`, OSError."""
        digest = hashlib.sha256()

        def seen(lines: Iterable[bytes]) -> Iterator[bytes]:
            for line in lines:
                digest.update(line)
                yield line

        with open(path, "rb") as file:
            count = sum(1 for _ in prompts_of(seen(file), path))
        return cls(path, count, f"sha256:{digest.hexdigest()[:32]}")


def json_prompt(line: str) -> str | None:
    """The prompt of a line of JSONL, None where it has none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    return prompt if isinstance(prompt, str) else None
