"""fit(): the one training loop, on Accelerate, for every objective and any number of processes.

An optimizer step is `batch_size` packed rows, however many processes and micro-batches share them; its loss is one
sum over all of them divided by one count of target tokens. Together with noise that belongs to the example, this
makes the loss curve independent of how the work was cut up, and a resumed run equal to one that never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dlm.data.examples import Examples, drop_prompts, fetch
from dlm.data.streaming import StreamedExamples
from dlm.models.flops import peak_flops, training_flops
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import NoiseSettings, deal_strata, draw_noise
from dlm.tokenizer import decode, encode_prompt
from dlm.training import zero
from dlm.training.accelerator import StopSignal, checkpoint_activations, make_accelerator
from dlm.training.config import TrainingConfig
from dlm.training.ema import EMA
from dlm.training.logging import Display, finish_tracker, start_tracker
from dlm.training.optim import build_optimizers, schedule_factor, set_learning_rates
from dlm.training.sharding import (
    check_processes,
    check_sharding,
    is_sharded,
    keep_sums_exact,
    shard_like,
    tables_in_root,
    whole_average,
)
from dlm.training.state import checkpoints, load_state, read_state, save_state
from dlm.training.validation import Validation, validate

# What decides the data, the noise and the loss of a step: a resumed run needs the same.
EXACT = (
    "batch_size", "seed", "objective", "estimator", "noise_schedule", "noise_exponent", "diffusion_steps",
    "lowest_rate", "highest_rate", "block_length", "random_length", "packing", "eos_padding", "dropout_prompt",
)  # fmt: skip


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


class NonFiniteLoss(ValueError):
    """The loss or the gradient became NaN or infinite; the message says where and which checkpoint is good."""


def fit(
    model: nn.Module,
    tokenizer,
    train: Examples | StreamedExamples,
    valid: Examples | None,
    config: TrainingConfig,
    *,
    mask_id: int,
    resume: bool = False,
    accelerator=None,
    report: Callable[[str], None] = print,
) -> Result:
    """Train `model` on packed examples; checkpoints, metrics.jsonl and samples go to `config.output`.

    tokenizer may be None (no samples then). resume: go on from the newest complete checkpoint, if there is one.
    report: where lines for people go. The model is trained in place.
    Errors: settings that do not fit together; NonFiniteLoss.
    """
    accelerator = accelerator or make_accelerator(config)
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of {accelerator.num_processes} processes x "
            f"accumulation {config.accumulation}: a step must cut into equal micro-batches"
        )
    if not resume and checkpoints(config.output):
        raise ValueError(f"{config.output} holds checkpoints of a run: resume it, or choose another output folder")
    report = report if accelerator.is_main_process else (lambda line: None)
    run = Run(model, tokenizer, train, valid, config, mask_id, accelerator, report)
    if resume:
        run.load_newest()
    with StopSignal() as stop:
        return run.loop(stop)


class Run:
    """One run's moving parts: model, optimizers, EMA, stream of rows, counters. `train_step` is one optimizer step."""

    def __init__(self, model, tokenizer, train, valid, config, mask_id, accelerator, report):
        self.tokenizer, self.train, self.valid, self.config = tokenizer, train, valid, config
        self.mask_id, self.accelerator, self.report = mask_id, accelerator, report
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        self.pad_id = mask_id if pad is None else pad  # no token sees padding: any id would do
        self.end_id = getattr(tokenizer, "eos_token_id", None)
        if self.end_id is None and config.eos_padding != "none":
            raise ValueError("eos_padding needs an end-of-text token, and the tokenizer has none: use eos_padding none")
        if config.objective != "autoregressive" and hasattr(model, "config"):
            model.config.block_length = config.block_length  # what it sees from now on, and says in its checkpoint
        if config.activation_checkpointing:
            checkpoint_activations(model)
        model.to(accelerator.device)  # before the optimizers: they look at where the parameters are
        optimizers = build_optimizers(
            model,
            config.optimizer,
            learning_rate=config.learning_rate,
            muon_learning_rate=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            momentum=config.momentum,
        )
        if config.compile:
            for module in model.modules():
                if type(module).__name__ in (getattr(model, "_no_split_modules", None) or ()):
                    module.compile()  # layer by layer: one shape, one compilation
        check_sharding(accelerator, optimizers)
        keep_sums_exact(accelerator, config.precision)
        zero.configure(accelerator, config)
        with tables_in_root(model):
            self.model, *self.optimizers = accelerator.prepare(model, *optimizers)
        self.plain = accelerator.unwrap_model(self.model)
        self.sharded = any(is_sharded(parameter) for parameter in self.plain.parameters())
        vocabulary = getattr(getattr(model, "config", None), "embedding_size", 0)
        self.micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)
        self.chunk = config.chunk(self.micro_batch * train.length, vocabulary)
        self.ema = EMA(self.plain, config.ema) if config.ema > 0 else None
        self.stream = train.stream(config.seed, config.packing)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.last_checkpoint: Path | None = None
        self.validation: Validation | None = None
        if config.sample_every:  # now, not hours later, is when an import may fail
            from dlm.sampling.config import SamplingConfig
            from dlm.sampling.generate import generate

            self.sampler = (SamplingConfig, generate)
        start_tracker(accelerator, config)
        on_gpu = accelerator.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(accelerator.device)) if on_gpu else None

    # ------------------------------------------------------------------------------------------------ state

    def load_newest(self) -> None:
        """Take over the newest complete checkpoint; a run without one starts from the beginning."""
        found = checkpoints(self.output)
        if not found:
            self.report(f"no checkpoint in {self.output} yet: starting from the beginning")
            return
        step, folder = found[-1]
        state = read_state(folder)
        for name in EXACT:
            before = state["config"].get(name, getattr(TrainingConfig, name, None))
            if before != getattr(self.config, name):
                raise ValueError(
                    f"{folder} was made with {name} {before}, now it is {getattr(self.config, name)}: "
                    f"an exact resume needs the same; start a new output folder to change it"
                )
        made_on = state.get("data", "data that an earlier version did not name")
        if made_on != self.train.signature:
            raise ValueError(
                f"{folder} was made on {made_on}, the data now gives {self.train.signature}: "
                f"an exact resume needs the same data and sequence length"
            )
        check_processes(self.accelerator, state["processes"], folder)
        weights = load_state(self.accelerator, folder)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:  # a rate given anew holds from here on; the state keeps the old one
                group["base_lr"] = self._base_rate(optimizer)
        if self.ema is not None:
            if weights is None:
                raise ValueError(
                    f"{folder} has no moving average, and ema is {self.config.ema}: go on with --ema 0, as it was made"
                )
            for name, parameter in self.plain.named_parameters():
                if name in self.ema.weights:
                    self.ema.weights[name].copy_(shard_like(weights[name], parameter))
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.stream = self.train.stream(self.config.seed, self.config.packing, state["position"])
        self.last_checkpoint = folder
        self._forget_metrics_after(step)
        self.report(f"resumed from {folder} at step {step}")

    def _base_rate(self, optimizer) -> float:
        inner = getattr(optimizer, "optimizer", optimizer)
        muon = isinstance(inner, torch.optim.Muon) and self.config.muon_learning_rate is not None
        return self.config.muon_learning_rate if muon else self.config.learning_rate

    def _forget_metrics_after(self, step: int) -> None:
        """Drop the log lines of steps that will be done again."""
        log = self.output / "metrics.jsonl"
        if self.accelerator.is_main_process and log.is_file():
            records = [json.loads(line) for line in log.read_text().splitlines() if line.strip().endswith("}")]
            kept = [record for record in records if record["step"] <= step]
            log.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "position": list(self.stream.position),
            "data": self.train.signature,
            "processes": self.accelerator.num_processes,
            "config": asdict(self.config),
        }
        ema = self._average()
        self.last_checkpoint = save_state(self.accelerator, self.output, state, ema, self.config.keep_last)

    # ------------------------------------------------------------------------------------------------- steps

    def loop(self, stop: StopSignal) -> Result:
        """All steps from here to the end, or to a request to stop."""
        config = self.config
        display = Display(
            self.report, self.step, config.max_steps, log_every=config.log_every, log_seconds=config.log_seconds,
            peak=None if self.peak is None else self.peak * self.accelerator.num_processes,
        )  # fmt: skip
        stopped = False
        while self.step < config.max_steps and not stopped:
            began = time.perf_counter()
            loss, count, norm, stopped = self.train_step(stop.requested)
            took = time.perf_counter() - began
            self.step, self.tokens, self.seconds = self.step + 1, self.tokens + count, self.seconds + took
            record = display.add(self.step, loss, count, norm, took, self._rates(), self.tokens, self.work)
            if record:
                self.log({"kind": "train", **record})
            last = self.step == config.max_steps
            if self.valid is not None and config.valid_every and (self.step % config.valid_every == 0 or last):
                self.check(None if last else config.valid_rows)
            if config.sample_every and self.tokenizer is not None and (self.step % config.sample_every == 0 or last):
                self.sample()
            if self.step % config.checkpoint_every == 0 or last or stopped:
                self.save()
            if stopped:
                self.report(f"asked to stop ({stop.name or 'by another process'}) in step {self.step}")
        finish_tracker(self.accelerator)
        return Result(self.step, self.tokens, self.seconds, stopped, self._average(), self.validation)

    def _average(self) -> dict[str, torch.Tensor] | None:
        """The moving average, whole in the main process; every process calls this."""
        if self.ema is None:
            return None
        return whole_average(self.ema, self.plain, self.accelerator.is_main_process)

    def train_step(self, stop: bool) -> tuple[float, int, float, bool]:
        """One optimizer step. Returns loss per target token, target tokens, gradient norm, whether to stop."""
        config, accelerator = self.config, self.accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        objective = OBJECTIVES[config.objective]
        step_rows = self.stream.take(config.batch_size)
        strata = None
        if config.estimator == "stratified":  # over the whole step, which every process knows
            strata = deal_strata((key for row in step_rows for key in row), config.seed, self.step)
        rows = step_rows[rank::world]
        size = len(rows) // config.accumulation
        options = {"random_length": config.random_length, "seed": config.seed}
        if not config.packing:  # rows as long as the longest example of the step, whoever has it
            lengths = self.train.lengths
            options["width"] = max(int(lengths[index]) for row in step_rows for _, index in row)
            options["end_id"] = self.end_id if config.eos_padding == "longest" else None
        batches = [fetch(self.train, rows[i : i + size], self.pad_id, **options) for i in range(0, len(rows), size)]
        batches = [drop_prompts(batch, config.dropout_prompt, config.seed, self.mask_id) for batch in batches]
        local = sum(int(objective.targets(batch).sum()) for batch in batches)
        count = int(self._sum([local])[0])
        factor = schedule_factor(
            config.schedule, self.step, config.max_steps, warmup_steps=config.warmup_steps,
            decay_fraction=config.decay_fraction, final_factor=config.final_factor,
        )  # fmt: skip
        set_learning_rates(self.optimizers, factor)
        self.model.train()
        self.work = self.operations(batches[0].tokens.shape[1], count) if self.peak else 0.0
        total, bad = 0.0, []
        for number, batch in enumerate(batches):
            noise = draw_noise(batch, config.noise(), config.seed, strata=strata).to(accelerator.device)
            accelerator.sync_gradients = last = number == len(batches) - 1  # DeepSpeed steps in this backward pass
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = objective.loss(self.model, batch.to(accelerator.device), noise, self.mask_id, self.chunk)
                # DDP averages gradients over processes: times `world` makes the average a sum.
                accelerator.backward(loss.total * (world / max(count, 1)))
            value = float(loss.total.detach())
            total += value
            if not math.isfinite(value):
                bad += [int(i) for i in batch.index[~loss.examples.isfinite().cpu()]]
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), config.clip))
        total, stops, broken = self._sum([total, float(stop), float(not math.isfinite(norm))])
        if not math.isfinite(total) or (broken and config.precision != "fp16"):  # fp16 skips such a step by itself
            raise NonFiniteLoss(self._non_finite(bad, rows, total, norm))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.plain, self.step)
        return total / max(count, 1), count, norm, stops > 0

    def operations(self, width: int, count: int) -> float:
        """Operations of this step over all processes; half of the targets are predicted on average in diffusion."""
        copies = 2 if self.config.objective == "block_diffusion" else 1
        predicted = count if self.config.objective == "autoregressive" else count / 2
        frozen = not all(parameter.requires_grad for parameter in self.plain.parameters())
        tokens = self.config.batch_size * width * copies
        return training_flops(self.plain.config, tokens, width * copies, predicted, frozen=frozen)

    def _sum(self, values: list[float]) -> list[float]:
        """Sum of each value over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float32 if self.accelerator.device.type == "mps" else torch.float64)
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum").tolist()

    def _rates(self) -> list[float]:
        return [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def _non_finite(self, bad: list[int], rows, total: float, norm: float) -> str:
        of = sorted(set(bad)) or sorted({index for row in rows for _, index in row})
        shown = ", ".join(map(str, of[:16])) + (f" … ({len(of)} in all)" if len(of) > 16 else "")
        last = self.last_checkpoint or "none yet"
        return (
            f"step {self.step + 1}: the loss is {total} and the gradient norm {norm}; examples {shown}. "
            f"Last good checkpoint: {last}. Lower learning_rate, raise warmup_steps, or look at those examples"
        )

    # -------------------------------------------------------------------------------- validation and samples

    def check(self, rows: int | None) -> None:
        """Validate the raw weights and their average on the same noise, and log both."""
        config = self.config
        settings = {
            "objective": config.objective,
            "estimator": NoiseSettings(block_length=config.block_length),  # the whole bound, whatever trains it
            "mask_id": self.mask_id,
            "pad_id": self.pad_id,
            "seed": 0,
            "micro_batch": self.micro_batch,
            "rows": rows,
            "chunk": self.chunk,
        }
        self.model.eval()
        raw = averaged = validate(self.model, self.valid, self.accelerator, **settings)
        if self.ema is not None:
            self.ema.swap(self.plain)
            averaged = validate(self.model, self.valid, self.accelerator, **settings)
            self.ema.swap(self.plain)
        self.validation = averaged
        rate = " ".join("-" if b is None else f"{b:.2f}" for b in averaged.buckets)
        self.report(
            f"step {self.step}  validation {averaged.bound:.4f} ± {averaged.error:.4f} nats/token"
            + (f" (average of weights; raw {raw.bound:.4f})" if self.ema is not None else "")
            + f", {averaged.tokens} tokens; CE by mask rate 0.1…1: {rate}"
        )
        entry = {"kind": "valid", "bound": averaged.bound, "error": averaged.error, "raw_bound": raw.bound}
        self.log({**entry, "step": self.step, "tokens": averaged.tokens, "buckets": averaged.buckets})

    def sample(self) -> None:
        """Print what the averaged weights write now."""
        if not (self.accelerator.is_main_process or self.sharded):  # of a sharded model every process has a part
            return
        SamplingConfig, generate = self.sampler
        self.model.eval()
        if self.ema is not None:
            self.ema.swap(self.plain)
        settings = SamplingConfig(gen_length=self.config.sample_length, temperature=0.7, seed=self.config.seed)
        prompts = [encode_prompt(self.tokenizer, text, self.mask_id) for text in self.config.sample_prompts]
        try:
            with torch.compiler.set_stance("force_eager"):
                out = generate(self.plain, prompts, settings, tokenizer=self.tokenizer)
        finally:
            if self.ema is not None:
                self.ema.swap(self.plain)
        for text, ids in zip(self.config.sample_prompts, out.sequences.tolist(), strict=True):
            story = decode(self.tokenizer, ids)
            self.report(f"step {self.step}  sample: {text}{story}")
            self.log({"kind": "sample", "step": self.step, "prompt": text, "text": story})

    def log(self, record: dict) -> None:
        """Append a record to metrics.jsonl (and to the tracker)."""
        if self.accelerator.is_main_process:
            with open(self.output / "metrics.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
        numbers = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, float)}
        self.accelerator.log(numbers, step=self.step)
