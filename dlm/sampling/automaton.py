"""A regular expression as an automaton over a tokenizer's tokens.

Shapes: V vocabulary, S states, K classes of tokens that no state tells apart, E edges (state, state), N places.

outlines-core turns the pattern into a DFA over bytes; each token is walked through it. The automaton has one state
more than the walk gives: the end, which end-of-text leads to from every accepting state, and which only end-of-text
follows. A word of N places is thus a match and then end-of-text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from dlm.tokenizer import token_bytes

__all__ = ["Automaton", "compile_pattern", "schema_pattern"]

# What is appended to a pattern, so that no state of its DFA accepts before the very end: outlines-core 0.2 leaves out
# the steps from an accepting state to one that does not accept ("(ab)*" would not go on after "ab").
END = "\U0010ffff"


@dataclass(frozen=True, eq=False)
class Automaton:
    """classes (V,): the class of each token, 0 for what is never allowed. delta (S, K): the next state, -1 for none.
    follow (S, S/8): packed sets of the states one token away. source, target (E,): pairs of states with a token
    between them, kind (E,): which row of `sets` (D, K/8), packed, holds the classes that lead there. accepting (S,)."""

    pattern: str
    classes: np.ndarray
    delta: np.ndarray
    follow: np.ndarray
    source: np.ndarray
    target: np.ndarray
    kind: np.ndarray
    sets: np.ndarray
    accepting: np.ndarray
    start: int
    memo: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)

    @property
    def states(self) -> int:
        return len(self.accepting)

    @cached_property
    def holds(self) -> np.ndarray | None:
        """fp32 (E, K): 1 where a class leads along an edge; None where that would be large."""
        if len(self.source) * self.delta.shape[1] > 2**23:
            return None
        return np.unpackbits(self.sets, axis=1, count=self.delta.shape[1])[self.kind].astype(np.float32)

    def spread(self, sets: np.ndarray, size: int, device: torch.device) -> Tensor:
        """bool (N, size): the tokens of sets of classes, bool (N, K); False past the vocabulary."""
        if (device, size) not in self.copies:
            classes = torch.zeros(size, dtype=torch.int64)  # class 0 is never allowed
            classes[: len(self.classes)] = torch.from_numpy(self.classes)[:size]
            with torch.inference_mode(False):  # it outlives the caller's mode
                self.copies[device, size] = classes.clone().to(device)
        classes = self.copies[device, size]
        if device.type == "cpu":  # torch takes columns one by one there
            return torch.from_numpy(np.stack([one[classes.numpy()] for one in sets]))
        return torch.from_numpy(sets).to(device).index_select(1, classes)


# ---------------------------------------------------------------- from a pattern


_VOCABULARIES: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The bytes of a vocabulary's tokens: table (V, L) padded with 0, lengths (V,), 0 for what is never written."""

    table: np.ndarray
    lengths: np.ndarray
    first: dict[int, np.ndarray]


def compile_pattern(tokenizer, pattern: str, eos: tuple[int, ...]) -> Automaton:
    """The automaton of a regular expression over the tokens of a tokenizer; kept, since requests repeat.

    Raises ValueError for a pattern that is none, that matches nothing, or the empty text alone; ImportError where
    outlines-core is not installed.
    """
    if tokenizer not in _VOCABULARIES:
        words = token_bytes(tokenizer)
        table = np.zeros((len(words), max(map(len, words), default=1) or 1), np.uint8)
        for i, word in enumerate(words):
            table[i, : len(word)] = np.frombuffer(word, np.uint8)
        lengths = np.array([len(word) for word in words])
        first = {byte: np.flatnonzero((table[:, 0] == byte) & (lengths > 0)) for byte in range(256)}
        _VOCABULARIES[tokenizer] = _Tokens(table, lengths, first)
    return _compile(_VOCABULARIES[tokenizer], pattern, tuple(eos))


@lru_cache(maxsize=64)
def _compile(tokens: _Tokens, pattern: str, eos: tuple[int, ...]) -> Automaton:
    table, accepting = _bytes_dfa(pattern)
    source, token, target = _walk(table, tokens)
    size = len(table)
    for ending in eos:  # the end is state `size`
        here = np.append(np.flatnonzero(accepting), size)
        source, token = np.append(source, here), np.append(token, np.full(len(here), ending))
        target = np.append(target, np.full(len(here), size))
    accepting = np.append(accepting, bool(eos))
    alive = _useful(size + 1, source, target, accepting)
    if not alive[0]:
        raise ValueError(f"the pattern {pattern[:60]!r} matches nothing that this vocabulary can write: check it")
    if not (alive[source] & alive[target] & ~np.isin(token, eos)).any():
        raise ValueError(f"the pattern {pattern[:60]!r} matches only the empty text: there is nothing to write")
    kept = alive[source] & alive[target]
    number = np.cumsum(alive) - 1
    source, token, target = number[source[kept]], token[kept], number[target[kept]]
    return _automaton(pattern, len(tokens.lengths), source, token, target, accepting[alive])


def _bytes_dfa(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """(S, 256) the next state of a pattern's DFA over bytes, -1 for none, state 0 first; and which accept."""
    try:
        from outlines_core import Index, Vocabulary
    except ImportError:
        raise ImportError(
            "constraints need outlines-core, which is not installed: pip install 'dlm[constrain]'"
        ) from None
    try:
        index = Index(f"(?:{pattern}){END}", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except ValueError as error:
        reason = " ".join(str(error).split())
        if "Found no transitions" in reason:
            raise ValueError(f"the pattern {pattern[:60]!r} matches nothing: check it") from None
        raise ValueError(
            f"the pattern {pattern[:60]!r} cannot be used ({reason[:100]}): give a regular expression without "
            "look-around, back-references or anchors"
        ) from None
    found = index.get_transitions()
    states = {index.get_initial_state(): 0}
    for state, steps in found.items():
        for name in (state, *steps.values()):
            states.setdefault(name, len(states))
    table = np.full((len(states), 256), -1, np.int64)
    for state, steps in found.items():
        for byte, target in steps.items():
            if byte < 256:
                table[states[state], byte] = states[target]
    final = {states[state] for state in index.get_final_states() if state in states}
    here = np.arange(len(states))
    for byte in END.encode():
        here = np.where(here >= 0, table[here, byte], -1)
    return table, np.isin(here, list(final)) & (here >= 0)


def _walk(table: np.ndarray, tokens: _Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every (state, token, state) such that the token's bytes lead from the one to the other."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for state, steps in enumerate(table):
        starts = [tokens.first[byte] for byte in np.flatnonzero(steps >= 0).tolist()]
        here = np.concatenate(starts) if starts else np.zeros(0, np.int64)
        at = steps[tokens.table[here, 0]]
        for place in range(1, tokens.table.shape[1]):
            longer = tokens.lengths[here] > place
            if not longer.any():
                break
            step = table[at[longer], tokens.table[here[longer], place]]
            at[longer] = step
            here, at = here[at >= 0], at[at >= 0]
        found.append((np.full(len(here), state), here, at))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def _useful(size: int, source: np.ndarray, target: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """bool (S,): the states that the start reaches and from which an accepting state is reached."""
    pairs = np.unique(np.stack([source, target]), axis=1)

    def closure(seen: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        while True:
            more = seen.copy()
            more[b[seen[a]]] = True
            if (more == seen).all():
                return seen
            seen = more

    start = np.zeros(size, bool)
    start[0] = True
    return closure(start, pairs[0], pairs[1]) & closure(accepting.copy(), pairs[1], pairs[0])


def _automaton(pattern, vocabulary, source, token, target, accepting) -> Automaton:
    """Tokens that lead from the same states to the same states become one class, pairs of states edges."""
    states = len(accepting)
    order = np.lexsort((source, token))
    source, token, target = source[order], token[order], target[order]
    first = np.searchsorted(token, np.arange(vocabulary + 1))
    step = (source * states + target).astype(np.int64)
    classes, numbers, members = np.zeros(vocabulary, np.int64), {b"": 0}, [np.zeros(0, np.int64)]
    for i in np.unique(token).tolist():
        column = step[first[i] : first[i + 1]]
        key = column.tobytes()
        if key not in numbers:
            numbers[key] = len(members)
            members.append(column)
        classes[i] = numbers[key]
    count = len(members)
    delta = np.full((states, count), -1, np.int32, order="F")  # a step reads the column of one class
    of_class = np.repeat(np.arange(count), [len(column) for column in members])
    every = np.concatenate(members)
    delta[every // states, of_class] = every % states
    edges, which = np.unique(every, return_inverse=True)
    holds = np.zeros((len(edges), count), bool)
    holds[which, of_class] = True
    sets, kind = np.unique(np.packbits(holds, axis=1), axis=0, return_inverse=True)
    near = np.zeros((states, states), bool)
    near[edges // states, edges % states] = True
    return Automaton(
        pattern,
        classes,
        delta,
        np.packbits(near, axis=1),
        edges // states,
        edges % states,
        kind.reshape(-1),
        sets,
        accepting,
        0,
    )


# ---------------------------------------------------------------- from a JSON schema

# Keywords that outlines-core puts into the pattern, and those that say nothing about the text.
_KNOWN = {"type", "properties", "required", "items", "prefixItems", "minItems", "maxItems", "enum", "const", "anyOf"}
_KNOWN |= {"oneOf", "$ref", "$defs", "definitions", "minLength", "maxLength", "pattern", "format", "minProperties"}
_KNOWN |= {"maxProperties", "additionalProperties"}
_SAYS_NOTHING = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}


def schema_pattern(schema: str) -> str:
    """The regular expression of a JSON schema. Raises ValueError, with the place in the schema, for text that is no
    JSON, for a schema that refers to itself, and for keywords that the pattern would not hold to."""
    try:
        whole = json.loads(schema)
    except json.JSONDecodeError as error:
        raise ValueError(f"the JSON schema is not JSON ({error}): give the text of a schema") from None
    if not isinstance(whole, dict):
        raise ValueError(f'the JSON schema is {schema[:40]!r}: give an object, such as {{"type": "object"}}')
    _check_schema(whole, whole, "#", ())
    from outlines_core.json_schema import build_regex_from_schema

    try:
        return build_regex_from_schema(schema)
    except ValueError as error:
        raise ValueError(f"the JSON schema cannot be used ({' '.join(str(error).split())[:120]})") from None


def _check_schema(node, whole: dict, place: str, inside: tuple[str, ...]) -> None:
    if not isinstance(node, dict):
        raise ValueError(f"the JSON schema has {json.dumps(node)[:40]} at {place}, where a schema must be")
    for key in node:
        if key not in _KNOWN | _SAYS_NOTHING:
            raise ValueError(f"the JSON schema has {key!r} at {place}, which a pattern cannot hold to: remove it")
    if (name := node.get("$ref")) is not None:
        if name in inside:
            raise ValueError(f"the JSON schema refers to itself at {place} ({name}): no pattern has unlimited depth")
        target = whole
        for part in str(name).removeprefix("#").strip("/").split("/"):
            if part:
                target = target.get(part) if isinstance(target, dict) else None
        if not str(name).startswith("#") or not isinstance(target, dict):
            raise ValueError(f"the JSON schema refers to {name!r} at {place}, which is not in it")
        _check_schema(target, whole, str(name), (*inside, str(name)))
    for key in ("properties", "$defs", "definitions"):
        for name, child in (node.get(key) or {}).items():
            if key == "properties":
                _check_schema(child, whole, f"{place}/{key}/{name}", inside or ("#",))
    for key in ("anyOf", "oneOf", "prefixItems"):
        for i, child in enumerate(node.get(key) or ()):
            _check_schema(child, whole, f"{place}/{key}/{i}", inside or ("#",))
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            _check_schema(node[key], whole, f"{place}/{key}", inside or ("#",))
