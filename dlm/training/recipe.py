"""What every training recipe shares: settings from a YAML and the command line, and a run from data to a model folder.

A recipe is a frozen dataclass of settings (a subclass of `RecipeConfig`) and a function that prepares model and data.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dlm.checkpoints import save
from dlm.checkpoints.pretrained import load_pretrained
from dlm.data.conversations import ChatFormat
from dlm.data.documents import Documents
from dlm.data.examples import Examples
from dlm.data.sources import parse_sources
from dlm.data.streaming import StreamedExamples, StreamedSource
from dlm.kernels.linear import has_kernels
from dlm.objectives.losses import Objective
from dlm.tokenizer import mask_id
from dlm.training.accelerator import make_accelerator, with_precision
from dlm.training.checks import MANY_EPOCHS, check_batch, check_folders, check_length
from dlm.training.config import RecipeConfig, as_trained, lost_visibility
from dlm.training.rollouts import Plan
from dlm.training.sharding import whole_state
from dlm.training.state import check_unused
from dlm.training.trainer import Result, fit
from dlm.utils.files import locked
from dlm.utils.hardware import commit, hardware
from dlm.utils.jsonio import finite, to_json
from dlm.utils.launch import launcher_processes, typed_command

# ------------------------------------------------------------------------------------------------- model and data


def open_model(recipe: RecipeConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model that a recipe goes on from, with its weights in `dtype`, on the host: the trainer places it."""
    opened = load_pretrained(recipe.model, dtype=dtype, device="cpu")
    if recipe.objective != "autoregressive":
        opened.check_diffusion()
    return opened.model


def load_examples(value: str, length: int, load: Callable[[str], Documents]) -> Examples:
    """The examples of at most `length` tokens of a list of sources, mixed by its weights."""
    sources = parse_sources(value)
    weights = [source.weight for source in sources]
    return Examples([load(source.path) for source in sources], length, None if None in weights else weights)


def stream_examples(value: str, length: int, window: int, source: Callable[..., StreamedSource]) -> StreamedExamples:
    """The same, streamed: source(paths, weight=...) reads files one after another; those with weights are mixed."""
    sources = parse_sources(value)
    if sources and sources[0].weight is None:
        return StreamedExamples([source([one.path for one in sources])], length, window)
    return StreamedExamples([source([one.path], weight=one.weight) for one in sources], length, window)


def open_beside(path: str, model, tokenizer, kind: str) -> torch.nn.Module:
    """A model beside the one that is trained, a `reference` or a `teacher` (kind), that reads the same tokens.

    Raises ValueError for one of another vocabulary or objective.
    """
    from dlm.objectives.reference import check_vocabulary

    opened = load_pretrained(path, dtype=torch.float32, device="cpu")
    opened.check_diffusion()
    check_vocabulary(model, opened.model, path, (tokenizer, opened.tokenizer), kind)
    return opened.model


def chat_format(settings: RecipeConfig, tokenizer, longest: int) -> ChatFormat:
    """How rows become tokens. Errors: the chat format without a template, a length beyond the model's."""
    if settings.format == "chat" and not tokenizer.chat_template:
        raise ValueError("format is chat, but the tokenizer has no chat template: use --format plain")
    length = settings.sequence_length or longest
    if length > longest:
        raise ValueError(f"sequence_length is {length}, but the model was made for at most {longest} tokens")
    return ChatFormat(
        chat=settings.format == "chat" or (settings.format == "auto" and bool(tokenizer.chat_template)),
        length=length,
        messages=getattr(settings, "messages_column", ""),
        prompt=getattr(settings, "prompt_column", ""),
        response=getattr(settings, "response_column", ""),
        separator=settings.separator,
        preface=getattr(settings, "preface", ""),
        overlong=getattr(settings, "overlong", "skip"),
        on_bad_row=settings.on_bad_row,
    )


# ------------------------------------------------------------------------------------------------------------- run


def summary(
    recipe: RecipeConfig,
    prog: str,
    parameters: int,
    train: Examples | StreamedExamples,
    valid: Examples | None,
    result: Result,
    argv: list[str],
    unit: str = "tokens",
) -> dict:
    """What a model card needs to say about the run; sizes in tokens, times in seconds, bounds in nats per token.

    unit: what the objective counts (`Objective.unit`): `tokens_seen` is the tokens that carried loss, of pairs and
    answers it is `pairs_seen` and `answers_seen`.
    """
    bound = result.validation
    streamed = isinstance(train, StreamedExamples)
    rows = 0 if streamed else train.rows_in_epoch(recipe.seed, recipe.packing)
    notes = {
        "name": recipe.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": typed_command(argv, f"dlm train {prog}"),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "parameters": parameters,
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        f"{unit}_seen": result.tokens,
        "tokens_in_data": train.tokens,
        "epochs": round(result.step * recipe.batch_size / rows, 3) if rows else None,  # not known of streamed data
        "recipe": dataclasses.asdict(recipe),
    }
    if bound is not None:
        size = sum(part.bytes for part in valid.documents)
        notes["validation"] = {
            "nats_per_token": bound.bound,
            "standard_error": bound.error,
            "perplexity": float(torch.tensor(bound.bound).exp()),
            "bits_per_byte": bound.bound * bound.tokens / size / float(torch.tensor(2.0).log()),
            "tokens": bound.tokens,
            "evaluations": bound.examples,
            "cross_entropy_by_mask_rate": bound.buckets,
        }
    return notes


@dataclass(frozen=True)
class Prepared:
    """What a recipe trains, and on what. finish(model, state, weights) -> the same: what is exported, of a model, its
    whole state and its moving average (None without one). objective: in place of the one that the settings name.
    rollouts: how answers are written, where they are learned from."""

    model: torch.nn.Module
    tokenizer: object
    train: Examples | StreamedExamples
    valid: Examples | None
    finish: Callable = lambda model, state, weights: (model, state, weights)
    objective: Objective | None = None
    rollouts: Plan | None = None


def run(recipe: RecipeConfig, argv: list[str], prog: str, prepare: Callable[..., Prepared]) -> int:
    """Train, and export on request. Returns the exit code: 130 where it was interrupted."""
    if not parse_sources(recipe.data):
        raise ValueError("no data: give --data with one or more sources, comma separated")
    check_length(argv)
    check_folders(recipe)
    recipe = with_precision(recipe)
    accelerator = make_accelerator(recipe)
    report = print if accelerator.is_main_process else (lambda line: None)
    report(processes_line(accelerator))
    with locked(recipe.output) if accelerator.is_main_process else nullcontext():
        check_unused(recipe.output, recipe.resume)  # before anything of the folder is made anew
        return _run(recipe, argv, prog, prepare, accelerator, report)


def _run(recipe, argv, prog, prepare, accelerator, report) -> int:
    ready = prepare(recipe, accelerator)
    model, train = ready.model, ready.train
    recipe = as_trained(recipe, model.config)
    if recipe.model and (lost := lost_visibility(recipe, model.config)):
        report(
            f"warning: {recipe.model} knows {lost}, and this run trains and exports it without: --objective model "
            f"keeps what a model knows"
        )
    check_batch(recipe, train.length, model, accelerator.num_processes)
    try:
        model.set_attn_implementation(recipe.attn_implementation)
    except ImportError as error:
        raise ValueError(f"attn_implementation {recipe.attn_implementation} cannot be used: {error}") from error
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "" if trained == sum(sizes) else f", {trained / 1e6:.2f}M of them trained"
    report(f"model: {sum(sizes) / 1e6:.2f}M parameters{share}; data: {train.describe()}")
    if not recipe.streaming:
        _report_counts(report, train.documents)
    recipe = with_epochs(recipe, train, report)
    if recipe.warmup_steps >= recipe.max_steps:
        report(
            f"warning: warmup_steps {recipe.warmup_steps} is all of max_steps {recipe.max_steps}: the learning rate "
            f"never reaches {recipe.learning_rate:g}; give --warmup-steps {recipe.max_steps // 10}"
        )
    result = fit(
        model,
        ready.tokenizer,
        train,
        ready.valid,
        recipe,
        mask_id=mask_id(ready.tokenizer, model.config),
        resume=recipe.resume,
        skip_damaged=recipe.skip_damaged,
        accelerator=accelerator,
        objective=ready.objective,
        rollouts=ready.rollouts,
    )
    if result.interrupted:
        again = typed_command(argv, f"dlm train {prog}", without=["--skip-damaged"], more=["--resume"])
        report(f"stopped after step {result.step}; a checkpoint is in {recipe.output}. Go on with:\n  {again}")
        return 130
    if recipe.streaming:
        _report_counts(report, train.sources)
    _export(recipe, argv, prog, ready, result, sum(sizes), accelerator, report)
    accelerator.wait_for_everyone()
    return 0


def _export(recipe, argv, prog, ready: Prepared, result: Result, size: int, accelerator, report) -> None:
    """Write the model of a run that ended to its output, and where `export` says; every process calls this."""
    plain = accelerator.unwrap_model(ready.model)
    state = whole_state(plain, accelerator.is_main_process)
    if not accelerator.is_main_process:
        return
    unit = "tokens" if ready.objective is None else ready.objective.unit
    notes = summary(recipe, prog, size, ready.train, ready.valid, result, argv, unit)
    made, state, weights = ready.finish(plain, state, result.ema)
    targets = [(Path(recipe.output) / "model", None)]
    if recipe.export:
        targets.append((Path(recipe.export), getattr(torch, recipe.export_dtype)))
    for folder, dtype in targets:
        save.save_model(made, folder, ready.tokenizer, state=state, weights=weights, dtype=dtype, notes=finite(notes))
        report(f"wrote {folder}")
    report(to_json({key: notes[key] for key in ("steps", "seconds", f"{unit}_seen", "epochs")}))


def processes_line(accelerator) -> str:
    """How many processes this job is, with a warning where its launcher was asked for another number, and where the
    processor computes bf16 slower than fp32."""
    world, asked = accelerator.num_processes, launcher_processes()
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    line = f"processes: {world}, on {accelerator.device.type} in {precision}"
    if asked is not None and asked != world:
        line += (
            f"\nwarning: the launcher was asked for {asked} processes, and this job has {world}: for several on CPUs "
            f"accelerate launch needs --config_file train/configs/accelerate/cpu_processes.yaml"
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and not has_kernels(torch.bfloat16):
        line += "\nwarning: this processor has no bf16 instructions, and bf16 is slow on it: --precision fp32 is faster"
    return line


def with_epochs(recipe: RecipeConfig, train, report: Callable[[str], None]) -> RecipeConfig:
    """The settings with the steps that `epochs` means; says how often the run goes through its data.

    Errors: epochs of streamed data, whose end is not known.
    """
    if isinstance(train, StreamedExamples):
        if recipe.epochs is not None:
            raise ValueError("epochs of streamed data are not known: give --max-steps in place of --epochs")
        return recipe
    rows = train.rows_in_epoch(recipe.seed, recipe.packing)
    if recipe.epochs is not None:
        recipe = dataclasses.replace(recipe, max_steps=max(1, math.ceil(recipe.epochs * rows / recipe.batch_size)))
    passes = recipe.max_steps * recipe.batch_size / rows
    report(f"steps: {recipe.max_steps:,} of {recipe.batch_size} rows, {passes:,.3g} epochs of {rows:,} rows")
    if passes > MANY_EPOCHS:
        report(
            f"warning: max_steps {recipe.max_steps} goes through the data {passes:,.0f} times, more than a model "
            f"learns from: give --epochs 3, say, or fewer --max-steps"
        )
    return recipe


def _report_counts(report: Callable[[str], None], sources) -> None:
    for counts in (source.counts for source in sources if source.counts):
        report("data: " + ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items()))
