"""What can be known before memory is taken and hours are spent: folders that would be replaced, sizes that no machine
has, data without a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlm.data.sources import parse_sources
from dlm.training.config import RecipeConfig, TrainingConfig
from dlm.utils.files import check_replaceable
from dlm.utils.hardware import memory_size

MANY_EPOCHS = 300  # more are likely a slip: steps given for other data
GB = 1e9


def given(argv: Sequence[str]) -> set[str]:
    """Names of the settings that a command line gives."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def check_length(argv: Sequence[str]) -> None:
    """Errors: a command line that says twice how long to train."""
    if {"max_steps", "epochs"} <= given(argv):
        raise ValueError("--max-steps and --epochs both say how long to train: give one of them")


def check_folders(recipe: RecipeConfig) -> None:
    """Errors: a folder that the run would replace at its end, and that holds what is not its own."""
    output = Path(recipe.output).resolve()
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"output is {recipe.output}, and {place} is a file: give the name of a folder")
    check_replaceable(output / "model")
    if not recipe.export:
        return
    export = Path(recipe.export)
    check_replaceable(export)
    place = export.resolve()
    if output == place or place in output.parents:
        raise ValueError(f"export {export} holds the output {recipe.output} and would be replaced: give another folder")
    if any(place == kept or kept in place.parents for kept in (output / "model", output / "checkpoints")):
        raise ValueError(f"export {export} lies in what the run writes itself: give a folder outside {recipe.output}")
    sources = [source.path for value in (recipe.data, recipe.valid) for source in _sources(value)]
    for read in (*sources, recipe.model, recipe.tokenizer):
        path = Path(read).resolve()
        if read and path.exists() and (path == place or place in path.parents):
            raise ValueError(f"export {export} holds {read}, which this run reads: give another folder")


def _sources(value: str):
    return parse_sources(value) if value and value != "generated" else []


# ---------------------------------------------------------------------------------------------------------- sizes


def check_memory(size: float, what: str, fix: str, memory: float | None = None) -> None:
    """Errors: `size` bytes for `what` that this machine (or `memory`) does not have. An unknown memory holds all."""
    memory = memory_size() if memory is None else memory
    if memory and size > memory:
        raise ValueError(f"{what} {_bytes(size)}, and there are {_bytes(memory)} in all: {fix}")


def _bytes(size: float) -> str:
    return f"{size / GB:,.0f} GB" if size < 1e15 else f"{size / GB:.1e} GB"


def check_new_model(shape: dict, vocabulary: int) -> None:
    """Errors: the shape of a new model whose weights, gradients and optimizer state this machine cannot hold.

    shape: d_model, n_layers, mlp_hidden_size and, where they are given, n_heads, n_kv_heads, rope_theta and init_std.
    """
    width, layers = shape["d_model"], shape["n_layers"]
    for name in ("rope_theta", "init_std"):
        value = shape.get(name, 1.0)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}: give a number above 0")
    for name, value in shape.items():
        if name not in ("rope_theta", "init_std") and value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")
    size = layers * (2 * width * width + 3 * width * (shape.get("mlp_hidden_size") or width)) + vocabulary * width
    check_memory(
        12.0 * size,
        f"d_model {width} and n_layers {layers} make at least {size / 1e9:,.1f} billion weights; training them takes",
        "give a smaller shape",
    )


def check_batch(config: TrainingConfig, length: int, model, world: int) -> None:
    """Errors: rows that no micro-batch has room for. What is counted is the least that a training step keeps."""
    shape = getattr(model, "config", None)
    width, layers = getattr(shape, "d_model", 1), getattr(shape, "n_layers", 1)
    rows = config.batch_size // (world * config.accumulation) or 1
    window = getattr(config, "shuffle_window", 0) if getattr(config, "streaming", False) else 0
    check_memory(
        rows * length * (40.0 + 2.0 * width * (1 if config.activation_checkpointing else layers)),
        f"a micro-batch of {rows} rows of sequence_length {length} takes at least",
        "give a smaller sequence_length or batch_size, or more accumulation",
    )
    check_memory(
        200.0 * (config.batch_size + window),
        f"batch_size {config.batch_size}{f' with shuffle_window {window}' if window else ''} takes at least",
        "give a smaller one",
    )


def check_rows(length: int, shape) -> None:
    """Errors: rows longer than the model that goes on (its configuration `shape`) was made for."""
    limit = getattr(shape, "max_sequence_length", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"sequence_length is {length}, but the model was made for at most {limit} tokens: give --sequence-length "
            f"{limit}, or raise max_sequence_length in its config.json first"
        )


def check_targets(train, objective) -> None:
    """Errors: data in which no token carries loss."""
    from dlm.data.examples import Examples, pack

    if not isinstance(train, Examples):
        return
    for index in range(len(train)):  # the first that has one ends it
        batch = pack([[(0, train[index])]], train.length, 0)
        if objective.targets(batch).any():
            return
    raise ValueError(f"no token of {train.describe()} carries loss: there is nothing to learn from these data")
