"""A checkpoint's folder: fetched where it is a hub id, its small files read, its weights' headers checked.

Shapes: d_model, embedding_size ... as in config.json; a header gives the type and the shape of every tensor of a file.

No weight is read here and no memory is taken for one. What is read was written by others: every file may be damaged
or hostile, and each fault is one line that names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.utils.jsonio import read_object

__all__ = ["Tensors", "check_sizes", "fetch", "hub_errors", "read_tensors", "weight_files"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")
SMALL = ("*.json", "*.jinja", "*.model", "*.txt")  # what is fetched of a hub id: no Python, no pickles
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names of numbers


def fetch(path: str, revision: str | None = None, *, weights: bool = True, variant: str | None = None) -> Path:
    """The folder of a checkpoint: `path` itself, or where a hub id's files lie on this machine.

    weights: False fetches the small files alone. Raises ValueError for a path that is neither, OSError where the hub
    does not give it.
    """
    folder = Path(path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a folder, which has no revisions: leave revision {revision!r} out")
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{path} is not a folder: give the folder of a checkpoint, or a hub id such as name/model")
    from huggingface_hub import snapshot_download

    wanted = [*SMALL, f"model*.{variant}.safetensors" if variant else "model*.safetensors"] if weights else [*SMALL]
    with hub_errors(path):
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))


@contextmanager
def hub_errors(path: str) -> Iterator[None]:
    """Errors of the hub in one line that names what was asked for."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = "it cannot be reached" if "connect" in str(error) else str(error).split(". ")[0]
        raise OSError(
            f"{path} is no folder here, and the hub did not give it ({reason}): check the name and the network"
        ) from error


# ---------------------------------------------------------------- weights


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint, at least one.

    Raises ValueError where there are none (pickles are named, and never opened), where the index names a file outside
    of the folder, or one that is not there.
    """
    if (single := folder / _named(WEIGHTS, variant)).is_file():
        return [single]
    index = folder / _named(INDEX, variant)
    if not index.is_file():
        pickle = next((name for name in PICKLES if (folder / name).is_file()), None)
        if pickle is not None:
            raise ValueError(
                f"{folder} has its weights in {pickle}, a pickle, which dlm never opens because it can run code: "
                f"convert it to {WEIGHTS}"
            )
        raise ValueError(f"{folder} has a config.json but no weights ({single.name}): copy them there")
    content = read_object(index)
    places = content.get("weight_map")
    whole = isinstance(content.get("metadata"), dict) and isinstance(places, dict) and bool(places)
    if not whole or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f'{index} must hold "metadata" and "weight_map", the file of every tensor: copy it again')
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {name!r}, which is no safetensors file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, and {folder} lacks it: copy that file there")
    return [folder / name for name in names]


def _named(name: str, variant: str | None) -> str:
    """`model.safetensors` -> `model.fp16.safetensors`, as transformers names it."""
    head, ending = name.rsplit(".", 1)
    return name if variant is None else f"{head}.{variant}.{ending}"


@dataclass(frozen=True)
class Tensors:
    """What the headers of all files say. shapes: by name of the tensor; dtypes: safetensors' names; bytes: on disk."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: frozenset[str]
    bytes: int

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_tensors(files: list[Path]) -> Tensors:
    """The headers of these safetensors files. Raises ValueError for a file that is cut short or none."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes, size = set(), 0
    for file in files:
        for name, (dtype, shape) in _header(file).items():
            shapes[name] = shape
            dtypes.add(dtype)
        size += file.stat().st_size
    return Tensors(shapes, frozenset(dtypes), size)


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of the tensors of a safetensors file: eight bytes of length, then JSON, then the numbers."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{file} is damaged or cut short (its header does not fit): copy the file again")
        try:
            fields = json.loads(stream.read(length))
            fields.pop("__metadata__", None)
            tensors = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in fields.items()}
            end = max((int(entry["data_offsets"][1]) for entry in fields.values()), default=0)
            if not all(type(size) is int and size >= 0 for _, shape in tensors.values() for size in shape):
                raise ValueError("a size is no whole number")
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError):
            raise ValueError(f"{file} is no safetensors file (its header cannot be read): copy it again") from None
    if 8 + length + end != size:
        raise ValueError(
            f"{file} is damaged or cut short: it has {size:,} bytes and should have {8 + length + end:,}; copy it again"
        )
    return tensors


def check_names(folder: Path, expected: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    """Raises ValueError where a tensor is missing, left over or of another shape than `expected` by name, in the names
    of the files and before memory is taken. Frequencies of rotary positions, which old files hold, are no matter."""
    present = {name: shape for name, shape in tensors.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:  # tied, and written all the same
        present.pop("lm_head.weight", None)
    problems = []
    for kind, names in (
        ("missing", expected.keys() - present.keys()),
        ("unexpected", present.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{kind} {', '.join(sorted(names)[:4])}{more}")
    for name in sorted(expected.keys() & present.keys()):
        if tuple(expected[name]) != tuple(present[name]) and len(problems) < 4:
            problems.append(f"{name} has shape {list(present[name])} and config.json asks for {list(expected[name])}")
    if problems:
        raise ValueError(
            f"the weights of {folder} do not fit its config.json: {'; '.join(problems)}. The checkpoint is damaged or "
            "of another family"
        )


def check_sizes(folder: Path, config: Any, tensors: Tensors) -> None:
    """Raises ValueError where config.json asks for a model much larger than the file, before memory is taken for it.

    config: any family's, by transformers' names of sizes. What fits here and not in detail is found when loading.
    """
    wrong = sorted(tensors.dtypes - DTYPES.keys())
    if wrong:
        raise ValueError(f"{folder} holds tensors of the type {wrong[0]}: dlm reads {', '.join(DTYPES.values())}")
    layers = getattr(config, "num_hidden_layers", None) or 0
    width = getattr(config, "hidden_size", None) or 0
    blocks = {part for name in tensors.shapes for part in name.split(".") if part.isdecimal()}
    if layers > len(blocks):
        raise ValueError(
            f"the weights of {folder} do not fit its config.json, which asks for {layers} layers: the files have "
            f"{len(blocks)}. The checkpoint is damaged or of another family"
        )
    experts = getattr(config, "num_experts", None)
    if isinstance(experts, int) and experts > len(tensors.shapes):
        raise ValueError(
            f"the weights of {folder} do not fit its config.json, which asks for {experts} experts: the files have "
            f"{len(tensors.shapes)} tensors. The checkpoint is damaged or of another family"
        )
    for field in ("vocab_size", "embedding_size", "intermediate_size", "hidden_size"):
        rows = getattr(config, field, None)
        if isinstance(rows, int) and rows * width > tensors.parameters:
            raise ValueError(
                f"the weights of {folder} do not fit its config.json: {field} {rows} by width {width} are more numbers "
                f"than the {tensors.parameters} of the files. The checkpoint is damaged or of another family"
            )
