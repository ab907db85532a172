"""The batches of an optimizer step: which rows this process computes, laid out, with their noise.

Everything here is on the CPU and a function of (seed, step, data) alone, so that a step can be made ahead of its time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dlm.data.examples import Batch, Examples, drop_prompts, fetch
from dlm.data.streaming import StreamedExamples
from dlm.objectives.config import NoiseSettings
from dlm.objectives.losses import Objective
from dlm.objectives.noise import Noise, complement, deal_strata
from dlm.training.config import TrainingConfig

GOLDEN = (5**0.5 - 1) / 2


def under_full_attention(number: int, share: float) -> bool:
    """Whether row `number` of a step is of the `share` that is trained under full attention.

    Multiples of the golden ratio fall evenly into [0, 1), also where only every n-th row is looked at (a process's).
    """
    return (number + 1) * GOLDEN % 1.0 < share


@dataclass(frozen=True)
class StepBatches:
    """One process's part of an optimizer step.

    parts: (batch, noise) of each forward and backward pass, in order: a micro-batch is one, or two where its rows are
    of two visibilities, or where masks come with their complement. count: this process's share of the step's
    normaliser. examples: the numbers of the examples, for messages. position, window: of the stream after the step and
    a digest of the streamed examples there, for a checkpoint.
    """

    parts: list[tuple[Batch, Noise]]
    count: int
    examples: list[int]
    position: list
    window: str


class Batches:
    """Makes a run's steps from packed examples, one after another; `position` says where it stands."""

    ahead = True  # other processes may make steps ahead of their time

    def __init__(
        self, data: Examples | StreamedExamples, config: TrainingConfig, objective: Objective, *,
        rank: int, world: int, pad_id: int, end_id: int | None, mask_id: int,
    ):  # fmt: skip
        self.data, self.config, self.objective = data, config, objective
        self.rank, self.world = rank, world
        self.pad_id, self.end_id, self.mask_id = pad_id, end_id, mask_id
        self.go_to(None)

    def go_to(self, position, window: str = "", folder=None) -> None:
        """Go on from what a checkpoint in `folder` kept; position None: from the beginning.

        Errors: streamed data whose window is not what it was; a position that the data does not have.
        """
        self.stream = self.data.stream(self.config.seed, self.config.packing, position)
        if position is None:
            return
        self.stream.fill()
        if self.stream.window_digest != window:
            raise ValueError(
                f"{folder} was made on other data: the streamed examples at {position} differ. An exact resume needs "
                f"the same data and tokenizer; start a new output folder to change them"
            )

    @property
    def position(self) -> list:
        """Where the next step begins."""
        return list(self.stream.position)

    def next(self, step: int) -> StepBatches:
        """The micro-batches of optimizer step `step` (0-based) in this process."""
        config = self.config
        step_rows = self.stream.take(config.batch_size)
        strata = None
        if config.estimator == "stratified":  # over the whole step, which every process knows
            strata = deal_strata((key for row in step_rows for key in row), config.seed, step)
        numbers = range(len(step_rows))[self.rank :: self.world]
        size = len(numbers) // config.accumulation
        options = {"random_length": config.random_length, "seed": config.seed}
        if not config.packing:  # rows as long as the longest example of the step, whoever has it
            lengths = self.data.lengths
            options["width"] = max(int(lengths[index]) for row in step_rows for _, index in row)
            options["end_id"] = self.end_id if config.eos_padding == "longest" else None
        parts = []
        for start in range(0, len(numbers), size):
            for some, settings in self._by_visibility(numbers[start : start + size], step):
                batch = fetch(self.data, [step_rows[number] for number in some], self.pad_id, **options)
                batch = drop_prompts(batch, config.dropout_prompt, config.seed, self.mask_id)
                noise = self.objective.noise(batch, settings, config.seed, strata)
                parts.append((batch, noise))
                if config.complementary:
                    parts.append((batch, complement(batch, noise)))
        count = sum(self.objective.count(batch) for batch, _ in parts)
        return StepBatches(
            parts, count, sorted({index for number in numbers for _, index in step_rows[number]}),
            self.position, self.stream.window_digest,
        )  # fmt: skip

    def _by_visibility(self, numbers: range, step: int) -> list[tuple[list[int], NoiseSettings]]:
        """The rows of a micro-batch that are computed together, and how their noise is drawn."""
        config, share = self.config, self.config.full_share
        if not share:
            return [(list(numbers), config.noise(step=step))]
        full = [number for number in numbers if under_full_attention(number, share)]
        blocks = [number for number in numbers if not under_full_attention(number, share)]
        if not full or not blocks:
            raise ValueError(
                f"full_share is {share}, and of a micro-batch of {len(numbers)} rows none is left for one of the two "
                f"visibilities: use a larger batch_size, less accumulation, or one visibility"
            )
        return [(blocks, config.noise(step=step)), (full, config.noise(full=True))]

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the batches, beside their position: nothing."""
        return {}

    def skip(self) -> None:
        """Leave out a step, which another process makes."""
        self.stream.take(self.config.batch_size)
