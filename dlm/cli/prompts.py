"""What a user gives to the command line as text: prompts, texts with blanks, conversations -> ids."""

from __future__ import annotations

import sys

from dlm.data.prompts import read_prompts


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
            raise ValueError(
                f"the prompt {prompt[:40]!a} is not UTF-8 text (a lone surrogate): check the locale or the file"
            ) from error
    return prompts
