"""Rewards of free text: GSM8K's answer and its format, a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dlm.rewards.texts import final_number, last_part, text_of

__all__ = ["gsm8k_answer", "gsm8k_format", "pattern"]

_FORMAT = re.compile(r"\s*\S.*?\n\s*####\s*\$?-?[\d,]*\.?\d+\s*", re.DOTALL)


def gsm8k_answer(prompts, completions, answer: Sequence[str], **columns) -> list[float]:
    """1 where the final number of a completion is that of the solution in column `answer`, else 0."""
    scores = []
    for completion, solution in zip(completions, answer, strict=True):
        wanted = final_number(str(solution))
        if wanted is None:
            raise ValueError(f"the solution {str(solution)[-60:]!r} has no number to compare with")
        text = text_of(completion)
        scores.append(float(final_number(text if "####" in text else last_part(text)) == wanted))
    return scores


def gsm8k_format(prompts, completions, **columns) -> list[float]:
    """1 where a completion is reasoning and one last line `#### number`, as GSM8K's solutions are, else 0."""
    texts = [text_of(completion) for completion in completions]
    return [float(text.count("####") == 1 and _FORMAT.fullmatch(text) is not None) for text in texts]


def pattern(expression: str) -> Callable[..., list[float]]:
    """A reward of 1 where the whole completion, without white space at its ends, matches a regular expression.

    Raises ValueError for an expression that cannot be compiled.
    """
    try:
        compiled = re.compile(expression, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward regex:{expression} is no regular expression: {error}") from None

    def matches(prompts, completions, **columns) -> list[float]:
        return [float(compiled.fullmatch(text_of(completion).strip()) is not None) for completion in completions]

    return matches
