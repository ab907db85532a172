"""A checkpoint described without loading its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors calls them


def describe(path: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Facts about the checkpoint in a folder or at a hub id; without one, about the model that ships.

    Sizes are None where the weights of a hub id are not on this machine.
    Errors: as `dlm.load`; a file of weights that is cut short.
    """
    from dlm.checkpoints.load import SHIPPED, read_config
    from dlm.checkpoints.pretrained import hub_errors, own_defaults
    from dlm.sampling.methods import methods_for
    from dlm.tokenizer import load_tokenizer

    path = str(SHIPPED) if path is None else path
    with hub_errors(path):
        config = read_config(path, revision)
    tokenizer = load_tokenizer(path, revision)
    tensors, size = weights(path, revision)
    causal = config.block_length is not None
    shapes = [tensor["shape"] for tensor in tensors]
    named = tokenizer is not None and config.mask_token_id is not None
    return {
        "path": path,
        "family": config.model_type,
        "parameters": sum(math.prod(shape) for shape in shapes) if tensors else None,
        "bytes": size,
        "dtype": "+".join(sorted({DTYPES.get(tensor["dtype"], tensor["dtype"]) for tensor in tensors})) or None,
        "layers": config.n_layers,
        "width": config.d_model,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "vocabulary": config.vocab_size,
        "tokenizer": len(tokenizer) if tokenizer is not None else None,
        "mask_id": config.mask_token_id,
        "mask_token": tokenizer.convert_ids_to_tokens(config.mask_token_id) if named else None,
        "max_length": config.max_sequence_length,
        "block_causal": causal,
        "block_length": config.block_length,
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
        "methods": methods_for(config),
        "defaults": own_defaults(path),
    }


def weights(path: str, revision: str | None = None) -> tuple[list[dict[str, Any]], int | None]:
    """The headers of all tensors of a checkpoint ({"dtype", "shape"} each), and the size of their files in bytes.

    Errors: a file that is cut short or is no safetensors file.
    """
    folder = Path(path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        found = cached_file(path, "config.json", revision=revision, local_files_only=True)
        folder = Path(found).parent
    files = sorted(folder.glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in header(file)]
    return tensors, sum(file.stat().st_size for file in files) if files else None


def header(file: Path) -> list[dict[str, Any]]:
    """The tensors that a safetensors file names: eight bytes of length, then JSON, then the numbers."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{file} is damaged or cut short (its header does not fit): copy the file again")
        try:
            fields = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON") from None
    fields.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in fields.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(
            f"{file} is damaged or cut short: it has {size:,} bytes and should have {8 + length + end:,}; copy it again"
        )
    return list(fields.values())
