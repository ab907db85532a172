"""Prompts of a user, read from a file or from standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def read_prompts(path: str) -> list[str]:
    """The prompts in a file (`-`: standard input): one a line, or JSONL with "prompt" in each object.

    Errors: a file that cannot be read, is not UTF-8 or holds no prompt; a line of JSONL without a prompt.
    """
    name = "standard input" if path == "-" else path
    raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    lines = [line.rstrip("\r") for line in lines]
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f'{name} holds no prompt: write one a line, or JSON objects with "prompt"')
    if path.endswith(".jsonl") or json_prompt(found[0][1]) is not None:
        prompts = [(number, json_prompt(line)) for number, line in found]
        for number, prompt in prompts:
            if prompt is None:
                raise ValueError(f'{name}, line {number}: not a JSON object with a text "prompt"')
        return [prompt for _, prompt in prompts if prompt is not None]
    return [line for _, line in found]


def json_prompt(line: str) -> str | None:
    """The prompt of a line of JSONL, None where it has none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    return prompt if isinstance(prompt, str) else None
