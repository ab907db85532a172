"""A GGUF file of an autoregressive model -> a folder of safetensors that `load_pretrained` opens.

transformers and the package `gguf` read the file; its weights are dequantized once, and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path

import torch

from dlm.checkpoints.load import quiet
from dlm.utils.errors import one_line
from dlm.utils.files import cache_folder, whole_folder
from dlm.utils.hardware import memory_size

__all__ = ["dequantized", "is_gguf"]

FORMAT = 1  # of what is kept
MAGIC = b"GGUF"
SMALL = 500_000_000  # parameters up to which the kept weights are float32; above it they are float16


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether this names a GGUF file, by its ending."""
    return str(path).lower().endswith(".gguf")


def dequantized(path: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """The folder with the model and the tokenizer of a GGUF file; the work is done once for each content of a file.

    cache: where folders are kept, by default the user's cache. Raises ValueError for a file that is missing or is no
    GGUF, an architecture that transformers does not read from GGUF, and a model that does not fit into memory;
    ImportError without the package `gguf`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path} is no GGUF file: its first four bytes are not GGUF")
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a GGUF file") from None
    folder = Path(cache or cache_folder("gguf")) / f"{path.stem}-{digest[:24]}-{FORMAT}"
    if not (folder / "config.json").is_file():
        _dequantize(path, folder)
    return folder


def _dequantize(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("a GGUF file needs the package gguf: pip install gguf") from None
    try:
        count = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
        _check_memory(4 * count)
        dtype = torch.float32 if count <= SMALL else torch.float16
        print(f"dlm: dequantizing {path}, once ({folder})", file=sys.stderr, flush=True)
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # which shows a bar of its own
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{path} cannot be opened as a causal language model ({one_line(error)}): take another file, or the "
            "model's folder of safetensors"
        ) from error
    model.hf_quantizer = None  # the weights are plain numbers now
    vars(model.config).pop("quantization_config", None)
    with quiet(), whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _check_memory(needed: int) -> None:
    size = memory_size()
    if size is not None and needed > size:
        raise ValueError(f"its weights take {needed / 1e9:.1f} GB in memory and there are {size / 1e9:.1f} GB in all")
