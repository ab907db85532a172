"""The places of a match: the tokens that an automaton allows at each, whatever the others hold.

Shapes: V vocabulary, S states, K classes of tokens, N places.

A set of states is bytes, one a state, 0 or 1. A step from a set is taken once and remembered with the automaton: over
empty places the same sets come again and again, in this request and in the next. After a place was written the sets of
the others are brought up to date where they are asked for, and no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dlm.sampling.automaton import MEMORY, Automaton

__all__ = ["Places"]


def _states(sets: bytes) -> np.ndarray:
    """bool (S,): a set of states."""
    return np.frombuffer(sets, bool)


class Places:
    """The places of one match: what each holds, and the states it can be in before and after each.

    `ahead(i)` are the states that what stands before place i can lead to, `back(i)` those from which what stands from
    place i on can end in a match; an empty place counts as any token.
    """

    def __init__(self, automaton: Automaton, tokens: Sequence[int | None]):
        """Raises ValueError where no text that matches fits these places."""
        self.automaton, self.tokens = automaton, list(tokens)
        self._kinds = [self._kind(token) for token in self.tokens]  # the class of each token, -1 for any
        size = len(self.tokens)
        start = np.zeros(automaton.states, bool)
        start[automaton.start] = True
        self._ahead = [start.tobytes()] + [b""] * size
        self._back = [b""] * size + [automaton.accepting.astype(bool).tobytes()]
        # ahead[: low + 1] and back[high:] are up to date. Behind `last` (before `first`) nothing has changed since they
        # all were: a set that comes out as it was there leaves all the others as they are.
        self._low, self._last = 0, size
        self._high, self._first = size, -1
        if not _states(self.back(0))[automaton.start]:
            raise ValueError(
                f"no text that matches {automaton.pattern[:60]!r} fits {size} tokens: "
                "give more of them, or a pattern with shorter matches"
            )

    def _kind(self, token: int | None) -> int:
        return -1 if token is None else int(self.automaton.classes[token])

    def ahead(self, place: int) -> bytes:
        """The states before a place."""
        sets, i = self._ahead, self._low
        if i >= place:
            return sets[place]
        kinds, memo, last, here = self._kinds, self.automaton.memo, self._last, sets[i]
        while i < place:
            key = (_after, here, kinds[i])
            here = memo.get(key) or self._step(key)
            if i >= last and here == sets[i + 1]:
                i = len(kinds)
                break
            i += 1
            sets[i] = here
        self._low = i
        return sets[place]

    def back(self, place: int) -> bytes:
        """The states from which what stands from a place on can end."""
        sets, i = self._back, self._high
        if i <= place:
            return sets[place]
        kinds, memo, first, there = self._kinds, self.automaton.memo, self._first, sets[i]
        while i > place:
            key = (_before, there, kinds[i - 1])
            there = memo.get(key) or self._step(key)
            if i - 1 <= first and there == sets[i - 1]:
                i = 0
                break
            i -= 1
            sets[i] = there
        self._high = i
        return sets[place]

    def _step(self, key: tuple[Callable, bytes, int]) -> bytes:
        """A step that was not taken yet: the rule, the set and the class of the token, -1 for any."""
        take, states, kind = key
        found = take(self.automaton, states, kind)
        _keep(self.automaton, key, found)
        return found

    def set(self, place: int, token: int | None) -> None:
        """Puts a token there, or empties the place; the sets of the other places follow."""
        size = len(self.tokens)
        self.tokens[place], self._kinds[place] = token, self._kind(token)
        self._last = place if self._low >= size else max(self._last, place, self._low)
        self._low = min(self._low, place)
        self._first = place if self._high <= 0 else min(self._first, place, self._high - 1)
        self._high = max(self._high, place + 1)

    def classes(self, places: Sequence[int]) -> list[np.ndarray]:
        """For each of these empty places bool (K,): the classes of tokens with which a match can still be completed."""
        memo = self.automaton.memo
        keys = [(self.ahead(place), self.back(place + 1)) for place in places]
        known = {key: memo.get(key) for key in keys}
        new = [key for key, value in known.items() if value is None]
        for key, value in zip(new, _open(self.automaton, new) if new else (), strict=True):
            known[key] = value
            _keep(self.automaton, key, value)
        return [known[key] for key in keys]

    def allowed(self, place: int) -> np.ndarray:
        """bool (V,): the tokens at an empty place with which a match can still be completed."""
        return self.classes([place])[0][self.automaton.classes]

    def permits(self, place: int, token: int) -> bool:
        """Whether `allowed(place)` holds the token."""
        to = self.automaton.delta[:, self.automaton.classes[token]][_states(self.ahead(place))]
        return bool(_states(self.back(place + 1))[to[to >= 0]].any())

    def best(self, scores: dict[int, np.ndarray]) -> list[int]:
        """The word with the largest sum of scores (V,) over the places that have them; the others take any token that
        fits. Viterbi over the states (DINGO, arXiv:2505.23061)."""
        automaton, size = self.automaton, len(self.tokens)
        value, steps = np.full(automaton.states, -np.inf), []
        value[automaton.start] = 0.0
        order, count = np.argsort(automaton.classes, kind="stable"), automaton.delta.shape[1]
        starts = np.searchsorted(automaton.classes[order], np.arange(count))
        members = np.unpackbits(automaton.sets, axis=1, count=count).astype(bool)
        for i in range(size):
            if self.tokens[i] is not None:
                gain = np.full(count, -np.inf)
                gain[automaton.classes[self.tokens[i]]] = 0.0
                token_of = np.full(count, self.tokens[i])
            else:
                score = scores.get(i, np.zeros(len(automaton.classes)))[: len(automaton.classes)]
                gain = np.maximum.reduceat(score[order], starts)
                best = np.lexsort((np.arange(len(order)), -score, automaton.classes))
                token_of = best[np.searchsorted(automaton.classes[best], np.arange(count))]
            inside = np.where(members, gain, -np.inf)  # (D, K)
            edge = inside.max(axis=1)[automaton.kind] + value[automaton.source]
            edge[~_states(self.back(i + 1))[automaton.target]] = -np.inf
            after = np.full(automaton.states, -np.inf)
            np.maximum.at(after, automaton.target, edge)
            steps.append((edge, inside.argmax(axis=1), token_of, after))
            value = after
        state = int(np.where(automaton.accepting, value, -np.inf).argmax())
        word: list[int] = []
        for edge, chosen, token_of, after in reversed(steps):
            here = int(((automaton.target == state) & (edge == after[state]) & np.isfinite(edge)).argmax())
            word.append(int(token_of[chosen[automaton.kind[here]]]))
            state = int(automaton.source[here])
        return word[::-1]


def _keep(automaton: Automaton, key: tuple, value) -> None:
    """Remembers what a step gave."""
    if len(automaton.memo) * automaton.states >= MEMORY:
        automaton.memo.clear()
    automaton.memo[key] = value


def _after(automaton: Automaton, here: bytes, kind: int) -> bytes:
    """The states after a token of class `kind`, or after any token (-1)."""
    states = _states(here)
    if kind < 0:
        reached = np.bitwise_or.reduce(automaton.follow[states], axis=0)
        return np.unpackbits(reached, count=automaton.states).tobytes()
    reached = np.zeros(automaton.states, bool)
    to = automaton.delta[:, kind][states]
    reached[to[to >= 0]] = True
    return reached.tobytes()


def _before(automaton: Automaton, there: bytes, kind: int) -> bytes:
    """The states before a token of class `kind`, or before any token (-1)."""
    states = _states(there)
    if kind < 0:
        return (automaton.follow & np.packbits(states)).any(axis=1).tobytes()
    to = automaton.delta[:, kind]
    return ((to >= 0) & states[to]).tobytes()


def _open(automaton: Automaton, pairs: Sequence[tuple[bytes, bytes]]) -> np.ndarray:
    """bool (N, K): for N pairs of sets the classes with a step from a state of the first to one of the second."""
    here, there = (_states(b"".join(each)).reshape(len(pairs), -1) for each in zip(*pairs, strict=True))
    edges = here.take(automaton.source, axis=1) & there.take(automaton.target, axis=1)  # (N, E)
    if automaton.holds is not None:
        return edges.astype(np.float32) @ automaton.holds > 0
    packed = [np.bitwise_or.reduce(automaton.sets[np.unique(automaton.kind[row])], axis=0) for row in edges]
    return np.unpackbits(np.stack(packed), axis=1, count=automaton.delta.shape[1]).astype(bool)
