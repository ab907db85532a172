"""fit(): the one training loop, on Accelerate, for every objective and any number of processes.

An optimizer step is `batch_size` packed rows, however many processes and micro-batches share them; its loss is one
sum over all of them divided by one count of target tokens. Together with noise that belongs to the example, this
makes the loss curve independent of how the work was cut up, and a resumed run equal to one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dlm.data.examples import Examples
from dlm.data.streaming import StreamedExamples
from dlm.models.flops import peak_flops, training_flops
from dlm.objectives.losses import Objective
from dlm.objectives.losses import objective as named_objective
from dlm.rewards.table import RewardError
from dlm.training.accelerator import make_accelerator, prepare_model, sum_over_processes, with_precision
from dlm.training.ahead import Ahead, usual_workers
from dlm.training.batches import Batches, StepBatches
from dlm.training.checks import check_batch, check_targets
from dlm.training.config import TrainingConfig, as_trained
from dlm.training.ema import EMA
from dlm.training.finite import refuse_loss, refuse_state
from dlm.training.growth import plan
from dlm.training.logging import Display, Metrics, finish_tracker, start_tracker
from dlm.training.optim import schedule_factor, set_learning_rates
from dlm.training.resume import identify, load_newest, plain_settings
from dlm.training.rollouts import ROLLOUT_FILE, Plan, RolloutBatches
from dlm.training.sharding import is_sharded, whole_average
from dlm.training.state import OBJECTIVE_FILE, check_unused, save_state
from dlm.training.stop import StopSignal
from dlm.training.validation import Validation, check_in
from dlm.utils.files import locked
from dlm.utils.peers import meet_peers


@dataclass(frozen=True)
class Result:
    """How a run ended: steps done, target tokens seen, seconds of training (over all restarts), whether it was
    interrupted, the EMA weights by name (None without EMA) and the last validation (None without data for it)."""

    step: int
    tokens: int
    seconds: float
    interrupted: bool
    ema: dict[str, torch.Tensor] | None
    validation: Validation | None


class Step(NamedTuple):
    """An optimizer step that was given to the device: its number (from 1), the sum of this process's losses and the
    gradient norm as they will be there, target tokens of all processes, operations, the numbers of its examples, and
    (numbers, losses) of those of each pass."""

    number: int
    total: torch.Tensor
    norm: torch.Tensor
    count: int
    work: float
    examples: list[int]
    losses: list[tuple[torch.Tensor, torch.Tensor]]


def fit(
    model: nn.Module,
    tokenizer,
    train: Examples | StreamedExamples,
    valid: Examples | None,
    config: TrainingConfig,
    *,
    mask_id: int,
    resume: bool = False,
    skip_damaged: bool = False,
    accelerator=None,
    report: Callable[[str], None] = print,
    objective: Objective | None = None,
    rollouts: Plan | None = None,
) -> Result:
    """Train `model` on packed examples; checkpoints, metrics.jsonl and samples go to `config.output`.

    tokenizer may be None (no samples then). resume: go on from the newest checkpoint, if there is one; skip_damaged:
    where that one is damaged, set it aside and take the one before.
    report: where lines for people go. objective: an object in place of the one that `config.objective` names.
    rollouts: answers that the model writes are learned from, to the prompts of `train` (`data.questions`).
    The model is trained in place. Errors: settings that do not fit together; NonFiniteLoss.
    """
    config = as_trained(with_precision(config), getattr(model, "config", None))
    accelerator = accelerator or make_accelerator(config)
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of {accelerator.num_processes} processes x "
            f"accumulation {config.accumulation}: a step must cut into equal micro-batches"
        )
    check_unused(config.output, resume)
    if objective is not None and config.repeat_share:
        raise ValueError(
            f"repeat_share is {config.repeat_share:g}, and this recipe has a loss of its own: leave it out; it is of "
            f"pretrain, sft and sudoku"
        )
    objective = objective or named_objective(config.objective, config.repeat_share)
    check_batch(config, train.length, model, accelerator.num_processes)
    check_targets(train, objective)
    report = report if accelerator.is_main_process else (lambda line: None)
    with locked(config.output) if accelerator.is_main_process else nullcontext():
        run = Run(model, tokenizer, train, valid, config, mask_id, accelerator, report, objective, rollouts)
        if config.block_growth:
            report(plan(config.block_growth, config.block_length, config.max_steps))
        if resume:
            load_newest(run, skip_damaged)
        elif earlier := run.metrics.begin_anew():
            report(f"the log of an earlier run, which left no checkpoint, is now {earlier}")
        return run.loop()


class Run:
    """One run's moving parts: model, optimizers, EMA, batches, counters. `train_step` is one optimizer step."""

    def __init__(
        self, model, tokenizer, train, valid, config, mask_id, accelerator, report, objective=None, rollouts=None
    ):  # fmt: skip
        self.tokenizer, self.valid, self.config = tokenizer, valid, config
        self.mask_id, self.accelerator, self.report = mask_id, accelerator, report
        self.objective = (objective or named_objective(config.objective, config.repeat_share)).to(accelerator.device)
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        vocabulary = getattr(getattr(model, "config", None), "embedding_size", 0)
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        end_id = getattr(tokenizer, "eos_token_id", None)
        if end_id is None and config.eos_padding != "none":
            raise ValueError("eos_padding needs an end-of-text token, and the tokenizer has none: use eos_padding none")
        self.model, self.optimizers = prepare_model(accelerator, model, config)
        self.plain = accelerator.unwrap_model(self.model)
        self.sharded = any(is_sharded(parameter) for parameter in self.plain.parameters())
        self.micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)
        self.chunk = config.chunk(self.micro_batch * train.length, vocabulary)
        self.ema = EMA(self.plain, config.ema) if config.ema > 0 else None
        make = Batches if rollouts is None else partial(RolloutBatches, self, rollouts)
        self.batches = make(
            train, config, self.objective, rank=accelerator.process_index, world=accelerator.num_processes,
            pad_id=mask_id if pad is None or pad >= vocabulary else pad,  # no token sees padding: any id would do
            end_id=end_id, mask_id=mask_id,
        )  # fmt: skip
        self.position, self.window = self.batches.position, ""
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.notes: dict[str, torch.Tensor | float] = {}  # sums of what an objective notes, since the last record
        self.noted = 0  # over so many of what it counts
        self.waiting: list[Step] = []  # steps that were given to the device and not read yet
        self.since, self.time_share = 0.0, 0.0  # when training went on; the share of max_seconds that is over
        self.last_checkpoint: Path | None = None
        self.validation: Validation | None = None
        if config.sample_every:  # now, not hours later, is when an import may fail
            from dlm.training.samples import show_samples

            self.show_samples = show_samples
        start_tracker(accelerator, config)
        self.metrics = Metrics(accelerator, self.output)
        on_gpu = accelerator.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(accelerator.device)) if on_gpu else None

    # ------------------------------------------------------------------------------------------------- steps

    def loop(self) -> Result:
        """All steps from here to the end, or to a request to stop."""
        with StopSignal(self.accelerator.is_main_process, meet_peers()) as stop:
            stopped = self._steps(stop)
        finish_tracker(self.accelerator)
        return Result(self.step, self.tokens, self.seconds, stopped, self._average(), self.validation)

    def _steps(self, stop: StopSignal) -> bool:
        """The steps of `loop`; whether they ended on a request to stop."""
        config = self.config
        display = Display(
            self.report, self.step, config.max_steps, log_every=config.log_every, log_seconds=config.log_seconds,
            peak=None if self.peak is None else self.peak * self.accelerator.num_processes, unit=self.objective.unit,
        )  # fmt: skip
        device, ahead = self.accelerator.device, None
        workers = usual_workers(device, self.batches.data) if config.workers is None else config.workers
        workers = workers if self.batches.ahead else 0
        every = config.log_every if device.type == "cuda" else 1
        stopped, ended = False, self.step >= config.max_steps or self.time_share >= 1
        try:
            ahead = Ahead(self.batches, self.step, workers)
            self.since = time.perf_counter()
            if ended and self.valid is not None and config.valid_every:  # stopped between the last step and the export
                self.validation = check_in(self, None)
            while not (ended or stopped):
                self.waiting.append(self.train_step(self._next(ahead)))
                self.step += 1
                due = self._due()
                asked = stop.requested and self.accelerator.num_processes == 1  # several must agree: with `read`
                if not any(due.values()) and self.step % every and not asked:
                    continue
                records, stopped, took = self.read(stop.requested)
                ended = due["end"] or self.time_share >= 1
                for number, (step, loss, norm) in enumerate(records, 1):
                    self.tokens += step.count
                    record = display.add(
                        step.number, loss, step.count, norm, took / len(records), self._rates(), self.tokens, step.work,
                        self.time_share, last=ended and number == len(records),
                    )  # fmt: skip
                    if record:
                        self.metrics.add({"kind": "train", **record, **self._noted()})
                if self.valid is not None and (due["valid"] or (ended and config.valid_every)):
                    self.validation = check_in(self, None if ended else config.valid_rows)
                if due["sample"] or (ended and config.sample_every and self.tokenizer is not None):
                    self.show_samples(self)
                if due["checkpoint"] or ended or stopped:
                    self.save()
                if stopped:
                    self.report(f"asked to stop ({stop.name or 'by another process'}) in step {self.step}")
                self.since = time.perf_counter()
        finally:
            if ahead is not None:
                ahead.close()
        return stopped

    def _next(self, ahead: Ahead) -> StepBatches:
        """The next step's batches. Errors: RewardError, after a checkpoint to go on from."""
        try:
            return ahead.next()
        except RewardError as error:
            if self.accelerator.num_processes > 1:  # the others are not here
                last = self.last_checkpoint or "none yet"
                raise RewardError(f"{error} (last good checkpoint: {last}), then go on with --resume") from error
            self.save()
            raise RewardError(f"{error}, then go on with --resume from {self.last_checkpoint}") from error

    def _due(self) -> dict[str, bool]:
        """What is to be done after this step, beside training."""
        config, step = self.config, self.step
        return {
            "valid": bool(self.valid is not None and config.valid_every) and step % config.valid_every == 0,
            "sample": bool(config.sample_every and self.tokenizer is not None) and step % config.sample_every == 0,
            "checkpoint": step % config.checkpoint_every == 0,
            "end": step == config.max_steps,
        }

    def train_step(self, made: StepBatches) -> Step:
        """One optimizer step. On a GPU nothing of its outcome is read yet: `read` does that later."""
        config, accelerator = self.config, self.accelerator
        count = int(self.sum([made.count])[0])
        self._set_rates()
        self.model.train()
        total, losses = self._backward(made.parts, count)
        norm = torch.as_tensor(accelerator.clip_grad_norm_(self.model.parameters(), config.clip))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        work = self.operations(made.parts) if self.peak else 0.0
        step = Step(self.step + 1, total, norm.detach(), count, work, made.examples, losses)
        if accelerator.device.type != "cuda":  # where reading is free, bad numbers do not reach the weights
            whole, broken = self.sum([float(total), float(not math.isfinite(norm))])
            refuse_loss(step, whole, float(norm), not broken, self.last_checkpoint, self.config.precision)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.plain, self.step)
        self.objective.after_step(self.plain, self.step + 1)
        self.position, self.window = made.position, made.window
        return step

    def _backward(self, parts, count: int) -> tuple[torch.Tensor, list]:
        """Gradients of this process's passes; the sum of their losses, (numbers, losses) of the examples of each."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        total, losses = torch.zeros((), device=accelerator.device), []
        for number, (batch, noise) in enumerate(parts):
            accelerator.sync_gradients = last = number == len(parts) - 1  # DeepSpeed steps in this backward pass
            index, batch, noise = batch.index, batch.to(accelerator.device), noise.to(accelerator.device)
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.objective.loss(self.model, batch, noise, self.mask_id, self.chunk)
                # DDP averages gradients over processes: times `world` makes the average a sum.
                accelerator.backward(loss.total * (world / max(count, 1)))
            total += loss.total.detach()
            for name, value in loss.notes.items():
                self.notes[name] = self.notes.get(name, 0.0) + value
            self.noted += self.objective.count(batch) if loss.notes else 0
            losses.append((index, loss.examples))
        return total, losses

    def read(self, stop: bool) -> tuple[list[tuple[Step, float, float]], bool, float]:
        """(step, loss per target token, gradient norm) of the steps that wait; whether to stop; their seconds.

        stop: this process was asked to. The host waits for the device here, and nowhere else.
        """
        steps, self.waiting = self.waiting, []
        device = self.accelerator.device
        numbers = torch.stack([step.total for step in steps] + [step.norm.to(device, torch.float32) for step in steps])
        totals, norms = numbers.view(2, -1).tolist()
        took = time.perf_counter() - self.since
        self.seconds += took
        broken = [float(not math.isfinite(norm)) for norm in norms]
        *sums, stops, spent = self.sum([*totals, *broken, float(stop), self.seconds])
        totals, broken = sums[: len(steps)], sums[len(steps) :]
        for step, total, bad, norm in zip(steps, totals, broken, norms, strict=True):
            refuse_loss(step, total, norm, not bad, self.last_checkpoint, self.config.precision)
        if self.config.max_seconds:
            self.spend(spent / self.accelerator.num_processes)
        losses = [(s, total / max(s.count, 1), norm) for s, total, norm in zip(steps, totals, norms, strict=True)]
        return losses, stops > 0, took

    def _noted(self) -> dict[str, float]:
        """The means of what the objective noted since the last record, over all processes."""
        if not self.notes:
            return {}
        *sums, count = self.sum([*map(float, self.notes.values()), float(self.noted)])
        means = {name: value / max(count, 1) for name, value in zip(self.notes, sums, strict=True)}
        self.notes, self.noted = {}, 0
        return means

    def operations(self, parts) -> float:
        """Operations of a step over all processes; half of the targets are predicted on average in diffusion."""
        frozen = not all(parameter.requires_grad for parameter in self.plain.parameters())
        total = 0.0
        for batch, noise in parts:
            rows, width = batch.tokens.shape
            copies = 1 if noise.block_length is None else 2
            predicted = self.objective.count(batch) * (1.0 if self.config.objective == "autoregressive" else 0.5)
            total += training_flops(self.plain.config, rows * width * copies, width * copies, predicted, frozen=frozen)
        return total * self.accelerator.num_processes

    def sum(self, values: list[float]) -> list[float]:
        """The sums of numbers over all processes."""
        return sum_over_processes(self.accelerator, values)

    def spend(self, seconds: float) -> None:
        """Training has taken so long, by the clocks of all processes: where it counts, the learning rate follows."""
        self.seconds = seconds
        self.time_share = seconds / self.config.max_seconds if self.config.max_seconds else 0.0

    def _set_rates(self) -> None:
        config = self.config
        factor = schedule_factor(
            config.schedule, self.step, config.max_steps, warmup_steps=config.warmup_steps,
            decay_fraction=config.decay_fraction, final_factor=config.final_factor, time_share=self.time_share,
        )  # fmt: skip
        set_learning_rates(self.optimizers, factor)

    def _rates(self) -> list[float]:
        return [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    # ------------------------------------------------------------------------------------------------- state

    @cached_property
    def identity(self) -> dict:
        """What the run is made of, beside its settings: model, data, ids."""
        return identify(self)

    def save(self) -> None:
        """Write a checkpoint of this moment. Errors: NonFiniteLoss, where the last step made numbers that are none."""
        refuse_state(self)
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "position": list(self.position),
            "window": self.window,
            "identity": self.identity if self.accelerator.is_main_process else {},
            "processes": self.accelerator.num_processes,
            "config": plain_settings(self.config),
        }
        kept = {OBJECTIVE_FILE: self.objective.state() if self.accelerator.is_main_process else {}}
        kept[ROLLOUT_FILE.format(self.accelerator.process_index)] = self.batches.kept()
        self.last_checkpoint = save_state(
            self.accelerator, self.output, state, self._average(), self.config.keep_last, kept
        )

    def _average(self) -> dict[str, torch.Tensor] | None:
        """The moving average, whole in the main process; every process calls this."""
        if self.ema is None:
            return None
        return whole_average(self.ema, self.plain, self.accelerator.is_main_process)
