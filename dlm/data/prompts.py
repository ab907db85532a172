"""Prompts of a user, read from a file or from standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def read_prompts(path: str) -> list[str]:
    """The prompts in a file (`-`: standard input): one a line, or JSONL with "prompt" in each object.

    Raises ValueError where it is not UTF-8, holds no prompt, or a line of JSONL has none.
    """
    name = "standard input" if path == "-" else path
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    lines = [line.rstrip("\r") for line in lines]
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ValueError(f'{name} holds no prompt: write one a line, or JSON objects with "prompt"')
    if path.endswith(".jsonl") or json_prompt(filled[0][1]) is not None:
        prompts = [(number, json_prompt(line)) for number, line in filled]
        for number, prompt in prompts:
            if prompt is None:
                raise ValueError(f'{name}, line {number}: not a JSON object with a text "prompt"')
        return [prompt for _, prompt in prompts if prompt is not None]
    return [line for _, line in filled]


def json_prompt(line: str) -> str | None:
    """The prompt of a line of JSONL, None where it has none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    return prompt if isinstance(prompt, str) else None
