"""What every training recipe shares: settings from a YAML and the command line, and a run from data to a model folder.

A recipe is a frozen dataclass of settings (a subclass of `RecipeConfig`) and a function that prepares model and data.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dlm.checkpoints import save
from dlm.checkpoints.pretrained import load_pretrained
from dlm.data.documents import Documents
from dlm.data.examples import Examples
from dlm.data.sources import parse_sources
from dlm.data.streaming import StreamedExamples, StreamedSource
from dlm.tokenizer import mask_id
from dlm.training.accelerator import make_accelerator
from dlm.training.config import RecipeConfig
from dlm.training.sharding import whole_state
from dlm.training.trainer import Result, fit
from dlm.utils.hardware import commit, hardware

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


# ------------------------------------------------------------------------------------------------------------- run


def summary(
    recipe: RecipeConfig,
    prog: str,
    parameters: int,
    train: Examples | StreamedExamples,
    valid: Examples | None,
    result: Result,
    argv: list[str],
) -> dict:
    """What a model card needs to say about the run; sizes in tokens, times in seconds, bounds in nats per token."""
    bound = result.validation
    notes = {
        "name": recipe.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(["python", "-m", f"train.{prog}", *argv]),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "parameters": parameters,
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "tokens_seen": result.tokens,
        "tokens_in_data": train.tokens,
        "epochs": round(result.tokens / train.tokens, 3) if train.tokens else None,  # not known of streamed data
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
    """What a recipe trains, and on what. finish(model, weights) -> (model, weights): what is exported."""

    model: torch.nn.Module
    tokenizer: object
    train: Examples | StreamedExamples
    valid: Examples | None
    finish: Callable = lambda model, weights: (model, weights)


def run(recipe: RecipeConfig, argv: list[str], prog: str, prepare: Callable[..., Prepared]) -> int:
    """Train, and export on request. Returns the exit code: 130 where it was interrupted."""
    if not recipe.data:
        raise ValueError("no data: give --data with one or more sources, comma separated")
    accelerator = make_accelerator(recipe)
    ready = prepare(recipe, accelerator)
    model, train = ready.model, ready.train
    try:
        model.set_attn_implementation(recipe.attn_implementation)
    except ImportError as error:
        raise ValueError(f"attn_implementation {recipe.attn_implementation} cannot be used: {error}") from error
    report = print if accelerator.is_main_process else (lambda line: None)
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = "" if trained == sum(sizes) else f", {trained / 1e6:.2f}M of them trained"
    report(f"model: {sum(sizes) / 1e6:.2f}M parameters{share}; data: {train.describe()}")
    if not recipe.streaming:
        _report_counts(report, train.documents)
    masked = mask_id(ready.tokenizer, model.config)
    result = fit(
        model,
        ready.tokenizer,
        train,
        ready.valid,
        recipe,
        mask_id=masked,
        resume=recipe.resume,
        skip_damaged=recipe.skip_damaged,
        accelerator=accelerator,
    )
    if result.interrupted:
        again = " ".join([f"python -m train.{prog}", shlex.join(argv), "" if recipe.resume else "--resume"]).strip()
        report(f"stopped after step {result.step}; a checkpoint is in {recipe.output}. Go on with:\n  {again}")
        return 130
    if recipe.streaming:
        _report_counts(report, train.sources)
    state = whole_state(accelerator.unwrap_model(model), accelerator.is_main_process)
    if accelerator.is_main_process:
        notes = summary(recipe, prog, sum(sizes), train, ready.valid, result, argv)
        plain, weights = ready.finish(accelerator.unwrap_model(model), result.ema)
        targets = [(Path(recipe.output) / "model", None)]
        if recipe.export:
            targets.append((Path(recipe.export), getattr(torch, recipe.export_dtype)))
        for folder, dtype in targets:
            own = state if plain is accelerator.unwrap_model(model) else None  # not of merged adapters
            save.save_model(plain, folder, ready.tokenizer, state=own, weights=weights, dtype=dtype, notes=notes)
            report(f"wrote {folder}")
        report(json.dumps({key: notes[key] for key in ("steps", "seconds", "tokens_seen", "epochs")}))
    accelerator.wait_for_everyone()
    return 0


def _report_counts(report: Callable[[str], None], sources) -> None:
    for counts in (source.counts for source in sources if source.counts):
        report("data: " + ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items()))
