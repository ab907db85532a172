"""Speed at equal quality: the fastest setting of a grid that is about as good as one token a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlm.benchmarking.findings import REFERENCE, Quality, named, quality, seconds
from dlm.benchmarking.results import Grid, Setting

__all__ = ["EqualQuality", "equal_quality"]

WITHIN = 0.02  # of the reference's perplexity or accuracy
PEERS = ("none", "prefix", "dual")  # methods that others' samplers have, at the same blocks and steps


@dataclass(frozen=True)
class EqualQuality:
    """slow: `none` with one token a pass, the best of them; fast: the fastest that is as good; plain: the fastest of
    those that others' samplers have too; by: what is compared."""

    slow: Setting
    fast: Setting
    plain: Setting
    by: Quality

    def lines(self, tokens: float) -> list[str]:
        """For people; tokens: of an answer."""

        def line(what: str, one: Setting) -> str:
            return (
                f"{what}: {named(one)}: {seconds(one.latency)}, {tokens / one.latency:,.0f} tokens/s "
                f"({self.slow.latency / one.latency:.2f}x), {self.by.name} {self.by.say(self.by.of(one))}"
            )

        cells = " ".join(f"{one.method}:{one.block_length}:{one.steps}" for one in (self.slow, self.plain))
        return [
            line("one token a pass", self.slow),
            line(f"fastest within {WITHIN:.0%}", self.fast),
            f"others' samplers on these weights: dlm bench peers --cells {cells} --peer NAME=PATH ...",
        ]


def equal_quality(grid: Grid) -> EqualQuality:
    """The comparison of a grid's settings; degenerate ones do not count.

    Raises ValueError where no setting of `none` has one token a pass, or nothing says how good the answers are.
    """
    by = quality(grid)
    settings = [one for one in grid.settings() if by.of(one) is not None and not one.degenerate]
    slow = [one for one in settings if one.method == REFERENCE and one.mean("tokens_per_forward") == 1]
    if not slow:
        raise ValueError(
            f"{grid.name} has no judged cell of none with one token a pass: run dlm bench grid with as many --steps as "
            "--gen-length, and a judge or a task"
        )
    best = min(slow, key=lambda one: by.of(one) if by.less else -by.of(one))
    good = [one for one in settings if _as_good(one, best, by)]
    return EqualQuality(best, _fastest(good), _fastest([one for one in good if one.method in PEERS]), by)


def _as_good(one: Setting, best: Setting, by: Quality) -> bool:
    return by.of(one) <= (1 + WITHIN) * by.of(best) if by.less else by.of(one) >= (1 - WITHIN) * by.of(best)


def _fastest(settings: Sequence[Setting]) -> Setting:
    return min(settings, key=lambda one: one.latency)
