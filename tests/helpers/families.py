"""Tiny checkpoints of any family with random weights, by the authors' names."""

import json

import torch
from safetensors.torch import save_file

from dlm.models.families import expected_tensors, recognise

BASE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "mask_token_id": 49,
    "eos_token_id": 48,
    "tie_word_embeddings": False,
}


def checkpoint(folder, fields, seed=0, tokenizer=None):
    """Write a folder with random weights of these fields of config.json; returns its tensors."""
    config = recognise(fields).config.from_dict(dict(fields))
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in expected_tensors(recognise(fields).model, config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("expert_bias"):
            state[name] = 0.1 * noise
        elif len(shape) == 1:
            state[name] = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
        else:
            state[name] = noise * (1.0 if "embed" in name else 1.5 / shape[-1] ** 0.5)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return state
