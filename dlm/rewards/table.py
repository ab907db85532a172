"""Reward functions by name, and what they return, checked.

Shapes: R answers, F functions.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

from dlm.rewards.answers import gsm8k_answer, gsm8k_format, pattern
from dlm.rewards.puzzles import countdown, sudoku4x4, sudoku9x9, sudoku_solved
from dlm.rewards.texts import text_of
from dlm.utils.errors import one_line
from dlm.utils.names import nearest

__all__ = ["REWARDS", "Reward", "RewardError", "check_columns", "open_rewards", "score", "weighted"]

REWARDS: dict[str, Callable] = {
    "countdown": countdown,
    "sudoku4x4": sudoku4x4,
    "sudoku9x9": sudoku9x9,
    "sudoku_solved": sudoku_solved,
    "gsm8k_answer": gsm8k_answer,
    "gsm8k_format": gsm8k_format,
}
PATTERN = "regex:"
SHOWN = 60  # characters of a text in a message


class RewardError(ValueError):
    """A reward function that failed, or whose answer cannot be used; the message names the row and the text."""


@dataclass(frozen=True)
class Reward:
    """name: as it was given; function: `(prompts, completions, **columns) -> list`; weight: in the sum."""

    name: str
    function: Callable
    weight: float = 1.0


def open_rewards(names: Sequence[str], weights: Sequence[float] = ()) -> tuple[Reward, ...]:
    """The functions of these names: one of REWARDS, `regex:EXPRESSION`, or `module:function` (from where Python looks,
    and from the working folder).

    Raises ValueError for no name, a name twice, a function that is not there, and weights that do not fit.
    """
    if not names or not all(names):
        raise ValueError(f"no reward: give --rewards with one or more of {', '.join(REWARDS)}, {PATTERN}EXPRESSION, "
                         f"module:function")  # fmt: skip
    if len(set(names)) < len(names):
        raise ValueError(f"rewards {', '.join(names)} name one twice: give it once, with a weight")
    if weights and len(weights) != len(names):
        raise ValueError(
            f"there are {len(names)} rewards and {len(weights)} reward_weights: give one for each, or none"
        )
    if not all(math.isfinite(weight) for weight in weights) or (weights and not any(weights)):
        raise ValueError(f"reward_weights are {', '.join(map(str, weights))}: give numbers, one of them not 0")
    return tuple(Reward(name, _function(name), weight) for name, weight in
                 zip(names, weights or [1.0] * len(names), strict=True))  # fmt: skip


def _function(name: str) -> Callable:
    if name.startswith(PATTERN):
        return pattern(name.removeprefix(PATTERN))
    if name in REWARDS:
        return REWARDS[name]
    place, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"no reward {name!r}: the nearest is {nearest(name, REWARDS)!r} (one of {', '.join(REWARDS)}, "
            f"{PATTERN}EXPRESSION, or your own as module:function)"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise ValueError(f"reward {name}: the module {place} cannot be imported ({one_line(error)})") from error
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"reward {name}: {place} fails at import ({type(error).__name__}: {one_line(error)})"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value)]
        near = f"; the nearest is {nearest(attribute, names)!r}" if names else ""
        raise ValueError(f"reward {name}: {module.__file__} has no function {attribute!r}{near}")
    return found


def score(reward: Reward, prompts: Sequence, completions: Sequence, columns: dict[str, list], places: Sequence[str]):
    """What a reward function says of R completions: R numbers, None where it does not apply.

    columns: the other columns of the rows, R values each; places: where each row stands, for messages.
    Raises RewardError where it raises, returns another number of values, or a value that is no finite number.
    """
    given = _accepted(reward.function, {"prompts": list(prompts), "completions": list(completions), **columns})
    try:
        values = reward.function(**given)
    except Exception as error:
        what = f"raised {type(error).__name__}: {one_line(error)}"
        raise _error(reward, what, _culprit(reward, given, len(completions)), completions, places) from error
    if not isinstance(values, Iterable):
        what = f"returned a {type(values).__name__} and not a list of numbers,"
        if inspect.iscoroutine(values):
            values.close()
        raise _error(reward, what, 0, completions, places)
    values = [value.item() if getattr(value, "shape", None) == () else value for value in values]
    if len(values) != len(completions):
        what = f"returned {len(values)} values for {len(completions)} completions"
        raise _error(reward, what, 0, completions, places)
    for number, value in enumerate(values):
        if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
            raise _error(reward, f"returned {value!r}, which is no finite number,", number, completions, places)
    return [None if value is None else float(value) for value in values]


def weighted(rewards: Sequence[Reward], scores: Sequence[Sequence[float | None]]) -> list[float]:
    """The weighted sum (R,) of scores (F, R); what does not apply adds nothing."""
    return [
        sum(reward.weight * value for reward, value in zip(rewards, row, strict=True) if value is not None)
        for row in zip(*scores, strict=True)
    ]


def _accepted(function: Callable, given: dict) -> dict:
    """What a function takes of the arguments: all, where it has **columns."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    taken = {parameter.name for parameter in parameters}
    return {name: value for name, value in given.items() if name in taken}


def check_columns(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Raises ValueError for a function that must be given a column which the data do not have."""
    for reward in rewards:
        try:
            parameters = inspect.signature(reward.function).parameters.values()
        except (TypeError, ValueError):  # a callable without a signature
            continue
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        asked = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in kinds]
        missing = [name for name in asked if name not in ("prompts", "completions", *columns)]
        if missing:
            raise ValueError(
                f"reward {reward.name} reads the column {missing[0]!r}, and the data have "
                f"{', '.join(map(repr, columns)) or 'none beside the prompt'}: add it to the data, or give the "
                f"function a default for it"
            )


def _culprit(reward: Reward, given: dict, count: int) -> int:
    """The first row that the function fails on by itself; 0 where it is none of them alone."""
    for number in range(count):
        try:
            reward.function(**{name: value[number : number + 1] for name, value in given.items()})
        except Exception:
            return number
    return 0


def _error(reward: Reward, what: str, number: int, completions: Sequence, places: Sequence[str]) -> RewardError:
    text = text_of(completions[number])
    shown = repr(text[:SHOWN] + ("…" if len(text) > SHOWN else ""))
    return RewardError(f"reward {reward.name} {what} at {places[number]}, completion {shown}: mend the function")
