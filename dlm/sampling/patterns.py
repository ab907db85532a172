"""What a text must match, as a regular expression: from settings and JSON schemas, with errors of one line.

outlines-core turns a pattern into a DFA over bytes (`pattern_worker`). No tokenizer and no torch here, so that a wrong
pattern is found before a model is loaded.

Shapes: S states.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count

import numpy as np

from dlm.sampling.pattern_worker import TooLarge, automaton_of
from dlm.utils.kept import kept

__all__ = ["bytes_dfa", "check_pattern", "choice_pattern", "region_choice", "schema_pattern"]

# What is appended to a pattern, so that no state of its DFA accepts before the very end: outlines-core 0.2 leaves out
# the steps from an accepting state to one that does not accept ("(ab)*" would not go on after "ab").
END = "\U0010ffff"
LONGEST = 2**16  # characters of a pattern
NOT_INSTALLED = "constraints need outlines-core, which is not installed: pip install 'dlm[constrain]'"


def choice_pattern(choices: Sequence[str]) -> str:
    """A pattern for one of these texts."""
    return "|".join(re.escape(choice) for choice in choices)


def region_choice(choices: Sequence[str]) -> str:
    """`choice_pattern` for a whole region: a word of a byte-level vocabulary begins with its space."""
    return f"[ ]?(?:{choice_pattern(choices)})"


def check_pattern(name: str, pattern: str) -> None:
    """Raises ValueError, from `name` on, for a pattern that cannot be used; ImportError without outlines-core."""
    try:
        bytes_dfa(pattern)
    except ValueError as error:
        raise ValueError(f"{name} is {pattern[:60]!r}: {error}") from None


@kept(2**28, lambda found: found[0].nbytes)  # one of 20,000 states takes 41 MB
def bytes_dfa(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """(S, 256) the next state of a pattern's DFA over bytes, -1 for none, state 0 first; and which accept.

    Raises ValueError with reason and fix for what is no such pattern and for one that matches nothing; ImportError
    where outlines-core is not installed.
    """
    if not _installed():
        raise ImportError(NOT_INSTALLED)
    if len(pattern) > LONGEST:  # Python's parser takes a second for so much, and nothing else runs beside it
        raise ValueError(f"it has {len(pattern):,} characters, above {LONGEST:,}; write a shorter one")
    wrong = _syntax_error(pattern)
    if wrong is not None and "unbalanced" in wrong:  # it would end the group around it
        raise ValueError(f"{wrong}; mend the regular expression")
    try:
        first, accepting, edges = automaton_of(f"(?:{pattern}){END}")
    except TooLarge as error:
        raise ValueError(f"{error}; write it with fewer or smaller repeats") from None
    except ValueError as error:
        if "Found no transitions" in str(error):
            raise ValueError("it matches nothing; check it") from None
        if wrong is not None:
            raise ValueError(f"{wrong}; mend the regular expression") from None
        raise ValueError(
            "no finite automaton can follow it; write it without look-around, back-references, word boundaries and "
            "anchors (the whole text must match anyway)"
        ) from None
    edges = np.array(edges, np.int64).reshape(-1, 3)
    edges = edges[edges[:, 1] < 256]
    names, numbers = np.unique(np.append(edges[:, ::2], first), return_inverse=True)
    order = np.arange(len(names))
    order[[0, numbers[-1]]] = order[[numbers[-1], 0]]  # the first state is 0
    source, target = order[numbers[:-1].reshape(-1, 2)].T
    table = np.full((len(names), 256), -1, np.int64)
    table[source, edges[:, 1]] = target
    final = order[np.isin(names, accepting)]
    here = np.arange(len(names))
    for byte in END.encode():
        here = np.where(here >= 0, table[here, byte], -1)
    return table, np.isin(here, final) & (here >= 0)


def _installed() -> bool:
    try:
        import outlines_core  # noqa: F401
    except ImportError:
        return False
    return True


def _syntax_error(pattern: str) -> str | None:
    """What Python's own parser says against a pattern. (outlines-core says no reason, but knows more: `\\p{L}`.)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or "it is nested too deeply"
    return None


# ---------------------------------------------------------------- from a JSON schema

# Keywords that outlines-core puts into the pattern, and those that say nothing about the text.
_KNOWN = {"type", "properties", "required", "items", "prefixItems", "minItems", "maxItems", "enum", "const", "anyOf"}
_KNOWN |= {"oneOf", "$ref", "$defs", "definitions", "minLength", "maxLength", "pattern", "format", "minProperties"}
_KNOWN |= {"maxProperties", "additionalProperties"}
_SAYS_NOTHING = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}


@lru_cache(maxsize=64)
def schema_pattern(schema: str) -> str:
    """The regular expression of a JSON schema. Raises ValueError, with the place in the schema, for text that is no
    JSON, for a schema that refers to itself, and for keywords that the pattern would not hold to; ImportError without
    outlines-core."""
    try:
        whole = json.loads(schema)
        if not isinstance(whole, dict):
            raise ValueError("it is no object")
    except RecursionError:
        raise ValueError(f"json_schema is {schema[:40]!r}: it is nested too deeply; give a flatter one") from None
    except ValueError as error:
        problem = f"it is not JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(
            f'json_schema is {schema[:40]!r}: {problem}; give a schema, such as {{"type": "object"}}'
        ) from None
    try:
        _check_schema(whole, whole, "#", (), count())
    except RecursionError:
        raise ValueError(f"json_schema is {schema[:40]!r}: it is nested too deeply; give a flatter one") from None
    try:
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError:
        raise ImportError(NOT_INSTALLED) from None
    try:
        return build_regex_from_schema(schema)
    except (ValueError, TypeError) as error:  # TypeError: more than 128 levels are no JSON to it
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"json_schema is {schema[:40]!r}: it has no pattern ({reason}); write it otherwise") from None


MOST_PARTS = 10_000  # of a schema, what it refers to counted each time: the pattern has all of them


def _check_schema(node, whole: dict, place: str, inside: tuple[str, ...], visits: Iterator[int]) -> None:
    if next(visits) > MOST_PARTS:
        raise ValueError(
            f"json_schema has more than {MOST_PARTS:,} parts once its references are written out: give a smaller one"
        )
    if not isinstance(node, dict):
        raise ValueError(f"json_schema has {_shown(node)} at {place}: a schema must be there; give an object")
    for key in node:
        if key not in _KNOWN | _SAYS_NOTHING:
            raise ValueError(f"json_schema has {key!r} at {place}, which a pattern cannot hold to: remove it")
    if (name := node.get("$ref")) is not None:
        if name in inside:
            raise ValueError(
                f"json_schema refers to itself at {place} ({name}), and no pattern has unlimited depth: write the "
                "levels out"
            )
        target = whole
        for part in str(name).removeprefix("#").strip("/").split("/"):
            if part:
                target = target.get(part) if isinstance(target, dict) else None
        if not str(name).startswith("#") or not isinstance(target, dict):
            raise ValueError(f"json_schema refers to {name!r} at {place}, which is not in it: add it")
        _check_schema(target, whole, str(name), (*inside, str(name)), visits)
    for key in ("properties", "$defs", "definitions"):
        for name, child in _held(node, key, dict, place).items():
            if key == "properties":
                _check_schema(child, whole, f"{place}/{key}/{name}", inside or ("#",), visits)
    for key in ("anyOf", "oneOf", "prefixItems"):
        for i, child in enumerate(_held(node, key, list, place)):
            _check_schema(child, whole, f"{place}/{key}/{i}", inside or ("#",), visits)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            _check_schema(node[key], whole, f"{place}/{key}", inside or ("#",), visits)


def _held(node: dict, key: str, kind: type, place: str):
    """What a schema has under a key, an empty one where there is nothing."""
    value = node.get(key) or kind()
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise ValueError(f"json_schema has {_shown(value)} at {place}/{key}: it must be {wanted}")
    return value


def _shown(value) -> str:
    return json.dumps(value)[:40]
