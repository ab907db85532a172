"""What a user gives to the command line as text: prompts, texts with blanks, conversations -> ids."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

BLANK = re.compile(r"_{3,}(?:\{(\d+)\})?")


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


def gather_prompts(args, example: str) -> list[str]:
    """Prompts from the arguments, then from --prompts; from standard input where there are neither."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += read_prompts(args.prompts)
    elif not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(f"no prompt: give one ({example}), name a file (--prompts FILE) or pipe text in")
        prompts = read_prompts("-")
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {prompt[:40]!a} is not UTF-8 text: check the terminal's locale") from error
    return prompts


def template(tokenizer, text: str, blank_length: int, mask: int) -> list[int]:
    """Ids of a text with blanks (`___`, or `___{12}` for twelve tokens), the mask id in the blanks.

    In a byte-level vocabulary a word begins with its space (" mat"), so the space before a blank is left to
    the model, which writes it with the word; the text after a blank keeps its own.
    Errors: no blank; a blank of no tokens; text that contains the mask token.
    """
    from dlm.tokenizer import encode_prompt

    blanks = list(BLANK.finditer(text))
    if not blanks:
        raise ValueError(f"no blank in {text[:60]!r}: mark each with ___, or with ___{{12}} for twelve tokens")
    ids: list[int] = []
    at = 0
    for blank in blanks:
        length = int(blank[1]) if blank[1] else blank_length
        if length < 1:
            raise ValueError(f"the blank {blank[0]} has no tokens: give 1 or more")
        piece = text[at : blank.start()]
        if piece.endswith(" ") and not piece.endswith("  "):
            piece = piece[:-1]
        ids += encode_prompt(tokenizer, piece, mask, beginning=not ids) + [mask] * length
        at = blank.end()
    return ids + encode_prompt(tokenizer, text[at:], mask, beginning=False)


def chat_ids(tokenizer, messages: Sequence[dict[str, str]], mask: int) -> list[int]:
    """Ids of a conversation, ready for the answer.

    Errors: a message that contains the mask token.
    """
    ids = list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))
    if mask in ids:
        raise ValueError("the message contains the mask token: remove it")
    return ids
