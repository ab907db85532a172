"""Pretrain a masked diffusion language model (or its causal twin) on text. Settings: a YAML and the command line.

python -m train.pretrain --config train/configs/pretrain_stories.yaml --data my.txt --output runs/mine
accelerate launch train/pretrain.py --config …        (any number of processes: the same loss curve)
dlm train pretrain …                                  (from an installed package)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # `accelerate launch train/pretrain.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from dlm import checkpoint
from dlm.data import Examples, load_documents, read_documents
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.tokenizer import load_tokenizer, mask_id, nearest, train_tokenizer
from dlm.training import Result, TrainingConfig, fit, make_accelerator


@dataclass(frozen=True)
class Recipe(TrainingConfig):
    """Everything that can be set: the run (TrainingConfig), the data, the shape of a new model, the export.

    model: a folder or hub id to go on from; without it a new model of the given shape is made, with `tokenizer` (a
    folder) or a tokenizer of `vocab_size` trained on `data`. data, valid: comma separated files.
    """

    output: str = "runs/pretrain"
    max_steps: int = 1000
    data: str = ""
    valid: str = ""
    text_column: str = "text"
    sequence_length: int = 256
    model: str = ""
    tokenizer: str = ""
    vocab_size: int = 4096
    d_model: int = 320
    n_layers: int = 6
    n_heads: int = 5
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    weight_tying: bool = True
    attention_layer_norm: bool = False
    rope_theta: float = 10000.0
    max_sequence_length: int | None = None
    init_fn: str = "normal"
    init_std: float = 0.02
    name: str = ""
    export: str = ""
    export_dtype: str = "bfloat16"
    resume: bool = False


def parse(argv: list[str]) -> Recipe:
    """The recipe of a command line: defaults, then the YAML of --config, then the options.

    Errors: a key that no setting has (the nearest name is given), a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    types_ = typing.get_type_hints(Recipe)
    parser = argparse.ArgumentParser(
        prog="pretrain", description=__doc__, allow_abbrev=False, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="settings by name; the command line overrides them")
    for name, field in fields.items():
        option = "--" + name.replace("_", "-")
        if types_[name] is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(option, default=None, metavar="", help=f"default: {field.default}")
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"the command line: {error}") from error
    if unknown:
        key = unknown[0].split("=")[0]
        options = ["config", *fields]
        guess = nearest(key.lstrip("-").replace("-", "_"), options).replace("_", "-")
        raise ValueError(f"unknown option {key}: did you mean --{guess}?")
    settings: dict = {}
    if given.config:
        settings.update(_read_yaml(Path(given.config), fields))
    settings.update({k: v for k, v in vars(given).items() if k in fields and v is not None})
    return Recipe(**{name: _convert(name, value, types_[name]) for name, value in settings.items()})


def _read_yaml(path: Path, fields) -> dict:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(read, dict):
        raise ValueError(f"--config {path}: a {type(read).__name__}, not a list of `name: value` lines")
    for key in read:
        if key not in fields:
            raise ValueError(f"--config {path}: unknown key {key!r}: did you mean {nearest(str(key), fields)!r}?")
    return read


def _convert(name: str, value, wanted):
    """A YAML or command-line value as the type of its setting. Errors: a value that does not fit, by name."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(None) in options:
        if value is None or value == "" or value == "none":
            return None
        wanted = next(option for option in options if option is not type(None))
    if typing.get_origin(wanted) is tuple:
        return tuple(value) if isinstance(value, list | tuple) else tuple(str(value).split("|"))
    if value is None:
        value = ""
    try:
        if wanted is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if wanted is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if wanted is str and isinstance(value, bool):
            return "yes" if value else "no"  # YAML reads the bare words yes and no as truth values
        return wanted(value)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} is {value!r}: it must be a{'n int' if wanted is int else ' ' + wanted.__name__}"
        ) from None


def prepare(recipe: Recipe, accelerator):
    """Model, tokenizer and examples of a recipe; the first process trains and tokenizes, the others wait for it."""
    if not recipe.data:
        raise ValueError("no data: give --data with one or more text or JSONL files, comma separated")
    with accelerator.main_process_first():
        tokenizer = _tokenizer(recipe)
        train = _examples(recipe, recipe.data, tokenizer)
        valid = _examples(recipe, recipe.valid, tokenizer) if recipe.valid else None
    torch.manual_seed(recipe.seed)  # the weights that a new model starts from
    if recipe.model:
        model = LLaDAModelLM.from_pretrained(recipe.model, dtype=torch.float32)
    else:
        model = LLaDAModelLM(_config(recipe, tokenizer))
    if len(tokenizer) > model.config.embedding_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.embedding_size} embeddings: "
            f"use the tokenizer that belongs to the model"
        )
    return model, tokenizer, train, valid


def _tokenizer(recipe: Recipe):
    kept = Path(recipe.output) / "tokenizer"
    source = recipe.tokenizer or recipe.model or (kept if kept.is_dir() else None)
    if source is not None:
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source} holds no tokenizer: give one with --tokenizer")
        return tokenizer
    texts = (text for path in _paths(recipe.data) for text in read_documents(path, recipe.text_column))
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    with checkpoint.whole_folder(kept) as temporary:
        tokenizer.save_pretrained(temporary)
    return load_tokenizer(kept)


def _paths(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _examples(recipe: Recipe, value: str, tokenizer) -> Examples:
    parts = [load_documents(path, tokenizer, column=recipe.text_column) for path in _paths(value)]
    return Examples(parts, recipe.sequence_length)


def _config(recipe: Recipe, tokenizer) -> LLaDAConfig:
    return LLaDAConfig(
        d_model=recipe.d_model,
        n_layers=recipe.n_layers,
        n_heads=recipe.n_heads,
        n_kv_heads=recipe.n_kv_heads,
        # SwiGLU's usual 8/3 of the width, in whole 64s
        mlp_hidden_size=recipe.mlp_hidden_size or -(-recipe.d_model * 8 // 3 // 64) * 64,
        vocab_size=len(tokenizer),
        embedding_size=len(tokenizer),
        weight_tying=recipe.weight_tying,
        attention_layer_norm=recipe.attention_layer_norm,
        rope_theta=recipe.rope_theta,
        max_sequence_length=recipe.max_sequence_length or recipe.sequence_length,
        init_fn=recipe.init_fn,
        init_std=recipe.init_std,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def summary(recipe: Recipe, model, train: Examples, valid: Examples | None, result: Result, argv: list[str]) -> dict:
    """What a model card needs to say about the run; sizes in tokens, times in seconds, bounds in nats per token."""
    bound = result.validation
    notes = {
        "name": recipe.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(["python", "-m", "train.pretrain", *argv]),
        "commit": _commit(),
        "hardware": _hardware(),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": result.step,
        "seconds": round(result.seconds, 1),
        "tokens_seen": result.tokens,
        "tokens_in_data": train.tokens,
        "epochs": round(result.tokens / train.tokens, 3),
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


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"CPU {name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def run(recipe: Recipe, argv: list[str]) -> int:
    """Train, and export on request. Returns the exit code."""
    export_dtype = getattr(torch, recipe.export_dtype, None)
    if not isinstance(export_dtype, torch.dtype):
        raise ValueError(f"export_dtype is {recipe.export_dtype!r}: use bfloat16, float16 or float32")
    accelerator = make_accelerator(recipe)
    model, tokenizer, train, valid = prepare(recipe, accelerator)
    report = print if accelerator.is_main_process else (lambda line: None)
    size = sum(parameter.numel() for parameter in model.parameters())
    report(f"model: {size / 1e6:.2f}M parameters; data: {train.tokens:,} tokens in {len(train):,} examples")
    masked = mask_id(tokenizer, model.config)
    result = fit(model, tokenizer, train, valid, recipe, mask_id=masked, resume=recipe.resume, accelerator=accelerator)
    if result.interrupted:
        again = " ".join(["python -m train.pretrain", shlex.join(argv), "" if recipe.resume else "--resume"]).strip()
        report(f"stopped after step {result.step}; a checkpoint is in {recipe.output}. Go on with:\n  {again}")
        return 130
    if accelerator.is_main_process:
        notes = summary(recipe, model, train, valid, result, argv)
        plain = accelerator.unwrap_model(model)
        targets = [(Path(recipe.output) / "model", None)]
        if recipe.export:
            targets.append((Path(recipe.export), export_dtype))
        for folder, dtype in targets:
            checkpoint.save_model(plain, folder, tokenizer, weights=result.ema, dtype=dtype, notes=notes)
            report(f"wrote {folder}")
        report(json.dumps({key: notes[key] for key in ("steps", "seconds", "tokens_seen", "epochs")}))
    accelerator.wait_for_everyone()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(parse(argv), argv)
    except ValueError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
