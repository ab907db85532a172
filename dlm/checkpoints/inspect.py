"""A checkpoint described without loading its weights."""

from __future__ import annotations

from typing import Any


def describe(path: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Facts about the checkpoint in a folder or at a hub id; without one, about the model that ships.

    Sizes are None where the weights of a hub id are not on this machine.
    Raises as `load_pretrained`, but for what only loading shows.
    """
    from dlm.checkpoints.defaults import family_defaults
    from dlm.checkpoints.files import SHIPPED, read_defaults
    from dlm.checkpoints.folder import DTYPES, Tensors, fetch, read_tensors, weight_files
    from dlm.checkpoints.load import read_config
    from dlm.sampling.methods import methods_for
    from dlm.tokenizer import load_tokenizer

    path = str(SHIPPED) if path is None else path
    folder = fetch(path, revision, weights=False)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    here = str(folder) == path or any(folder.glob("*.safetensors"))
    tensors = read_tensors(weight_files(folder)) if here else Tensors({}, frozenset(), 0)
    named = tokenizer is not None and config.mask_token_id is not None
    return {
        "path": path,
        "family": config.model_type,
        "objective": config.objective,
        "parameters": tensors.parameters if here else None,
        "bytes": tensors.bytes if here else None,
        "dtype": "+".join(sorted({DTYPES.get(name, name) for name in tensors.dtypes})) or None,
        "layers": config.n_layers,
        "width": config.d_model,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "vocabulary": config.vocab_size,
        "tokenizer": len(tokenizer) if tokenizer is not None else None,
        "mask_id": config.mask_token_id,
        "mask_token": tokenizer.convert_ids_to_tokens(config.mask_token_id) if named else None,
        "max_length": config.max_sequence_length,
        "block_causal": config.block_length is not None,
        "block_length": config.block_length,
        "full_attention": config.objective != "autoregressive"
        and (config.block_length is None or bool(getattr(config, "full_attention", False))),
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
        "methods": [] if config.objective == "autoregressive" else methods_for(config),
        "defaults": family_defaults(config) | read_defaults(folder / "generation_config.json"),
    }
