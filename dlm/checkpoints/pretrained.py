"""What a checkpoint is, beyond its weights: kind, defaults, digest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dlm.checkpoints.files import own_defaults
from dlm.kernels.linear import QUANTIZED
from dlm.models.families import recognise

__all__ = ["is_autoregressive", "number_type", "own_defaults"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint that is ready to denoise, and the sampling that its generation_config.json asks for."""

    name: str
    model: Any
    tokenizer: Any
    mask: int
    defaults: dict[str, Any]

    @property
    def has_end(self) -> bool:
        """Whether the checkpoint names an end-of-text token."""
        return self.model.config.eos_token_id is not None

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens removed."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


@contextlib.contextmanager
def hub_errors(path: str) -> Iterator[None]:
    """Errors of the hub in one line that names what was asked for."""
    try:
        yield
    except OSError as error:
        if Path(path).exists():
            raise
        reason = "it cannot be reached" if "connect" in str(error) else str(error).split(". ")[0]
        raise OSError(
            f"{path} is no folder here, and the hub did not give it ({reason}): check the name and the network"
        ) from error


def is_autoregressive(path: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a checkpoint predicts the next token: one of the autoregressive families, one that dlm does not read, or
    one of ours whose config.json names that objective."""
    from transformers import PretrainedConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        return False  # no checkpoint, as `load` will say
    fields, _ = PretrainedConfig.get_config_dict(str(path), revision=revision or "main")
    try:
        if recognise(fields, str(path)).autoregressive:
            return True
    except ValueError:
        return True
    return fields.get("objective") == "autoregressive"


def identify(path: str, revision: str | None, config) -> str:
    """Which weights these are: the hub's commit, or for a folder a digest of what is in it."""
    folder = Path(path)
    if not folder.is_dir():
        return getattr(config, "_commit_hash", None) or revision or "unknown"
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:  # of a large file its first 256 MiB
            while (piece := stream.read(1 << 20)) and stream.tell() <= 1 << 28:
                digest.update(piece)
    return f"sha256:{digest.hexdigest()[:16]}"


def number_type(model: nn.Module) -> str:
    """The type of a model's layers, as --dtype names it: float32, bfloat16, ... or one of `QUANTIZED`."""
    layers = {type(module) for module in model.modules()}
    few = next((name for name, kind in QUANTIZED.items() if kind.layer in layers), None)
    return few or str(model.dtype).removeprefix("torch.")
