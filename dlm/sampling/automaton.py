"""A regular expression as an automaton over a tokenizer's tokens.

Shapes: V vocabulary, S states, K classes of tokens that no state tells apart, E edges (state, state), N places.

Each token is walked through the pattern's DFA over bytes (`patterns.bytes_dfa`). The automaton has one state
more than the walk gives: the end, which end-of-text leads to from every accepting state, and which only end-of-text
follows. A word of N places is thus a match and then end-of-text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from dlm.sampling.patterns import bytes_dfa, check_pattern
from dlm.tokenizer import token_bytes
from dlm.utils.kept import kept

__all__ = ["MEMORY", "Automaton", "compile_pattern", "read_vocabulary"]

MEMORY = 2**24  # bytes of sets of states that an automaton remembers, about


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

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, with what it may come to remember."""
        arrays = (self.classes, self.delta, self.follow, self.source, self.target, self.kind, self.sets)
        return sum(array.nbytes for array in arrays) + MEMORY

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
    return _compile(read_vocabulary(tokenizer), pattern, tuple(eos))


def read_vocabulary(tokenizer) -> _Tokens:
    """The bytes of a tokenizer's tokens, read once: afterwards `compile_pattern` asks it nothing."""
    if tokenizer not in _VOCABULARIES:
        words = token_bytes(tokenizer)
        table = np.zeros((len(words), max(map(len, words), default=1) or 1), np.uint8)
        for i, word in enumerate(words):
            table[i, : len(word)] = np.frombuffer(word, np.uint8)
        lengths = np.array([len(word) for word in words])
        first = {byte: np.flatnonzero((table[:, 0] == byte) & (lengths > 0)) for byte in range(256)}
        _VOCABULARIES[tokenizer] = _Tokens(table, lengths, first)
    return _VOCABULARIES[tokenizer]


@kept(2**30, lambda automaton: automaton.nbytes)
def _compile(tokens: _Tokens, pattern: str, eos: tuple[int, ...]) -> Automaton:
    check_pattern("the pattern", pattern)
    table, accepting = bytes_dfa(pattern)
    source, token, target = _walk(table, tokens)
    size = len(table)
    for ending in eos:  # the end is state `size`
        here = np.append(np.flatnonzero(accepting), size)
        source, token = np.append(source, here), np.append(token, np.full(len(here), ending))
        target = np.append(target, np.full(len(here), size))
    accepting = np.append(accepting, bool(eos))
    alive = _useful(size + 1, source, target, accepting)
    if not alive[0]:
        raise ValueError(f"the pattern is {pattern[:60]!r}: this vocabulary can write nothing that matches; check it")
    if not (alive[source] & alive[target] & ~np.isin(token, eos)).any():
        raise ValueError(f"the pattern is {pattern[:60]!r}: it matches only the empty text; there is nothing to write")
    kept = alive[source] & alive[target]
    number = np.cumsum(alive) - 1
    source, token, target = number[source[kept]], token[kept], number[target[kept]]
    return _automaton(pattern, len(tokens.lengths), source, token, target, accepting[alive])


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
