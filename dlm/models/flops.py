"""Arithmetic of training, counted: floating point operations of a step, and what accelerators can do in a second.

Shapes: T row length, V vocabulary. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import re

# Dense matrix products in bf16 (fp16 where a GPU has no bf16), operations a second, from the makers' data sheets.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(name: str) -> float | None:
    """Peak of a device by its name, e.g. "NVIDIA H100 80GB HBM3"; None where it is not known."""
    for device, peak in PEAKS.items():
        if re.search(rf"(?<![A-Za-z0-9]){device}(?![A-Za-z0-9])", name):
            return peak
    return None


def _attention_parameters(config) -> int:
    """Weights of a layer's matrices of attention: queries and output, keys and values."""
    return 2 * config.d_model * config.head_dim * (config.n_heads + config.n_kv_heads)


def _ffn_parameters(config, layer: int, *, active: bool) -> int:
    """Weights of a layer's feed-forward part; active: those that one token passes through."""
    experts = config.experts
    if experts is None or not experts.layers[layer]:
        return 3 * config.d_model * config.mlp_hidden_size
    number = experts.chosen if active else experts.number
    return config.d_model * (experts.number + 3 * (number * experts.width + experts.shared))


def block_parameters(config, *, active: bool = True) -> int:
    """Weights of the matrices of all layers, which every token passes through (norms and biases are not counted); of a
    mixture's experts those that a token chooses, or all."""
    layers = range(config.n_layers)
    return sum(_attention_parameters(config) + _ffn_parameters(config, layer, active=active) for layer in layers)


def parameters(config) -> int:
    """All weights of a model without biases."""
    norms = config.d_model * (2 * config.n_layers + 1)
    if config.qk_norm == "all":
        norms += config.n_layers * config.head_dim * (config.n_heads + config.n_kv_heads)
    elif config.qk_norm == "head":
        norms += config.n_layers * 2 * config.head_dim
    tables = 1 if config.weight_tying else 2
    return block_parameters(config, active=False) + norms + tables * config.embedding_size * config.d_model


def training_flops(config, tokens: float, width: int, predicted: float, *, frozen: bool = False) -> float:
    """Operations of forward and backward over `tokens` tokens in rows of `width`, with logits at `predicted` of them.

    Six a weight and token (two forward, four backward; two backward where the weights are frozen), twelve a layer,
    width, token and column for attention, in which every token of a row meets every other (arXiv:2204.02311,
    appendix B). What masks hide counts too, and activation checkpointing does not: this is what the model needs, not
    what the hardware does.
    """
    each = 4 if frozen else 6
    attention = 12 * config.layers_applied * config.n_heads * config.head_dim * width
    logits = each * config.d_model * config.embedding_size
    blocks = each * config.layer_repeats * block_parameters(config)
    return tokens * (blocks + attention) + predicted * logits


def pass_flops(config, computed: int, keys: int, asked: int) -> float:
    """Operations of a forward pass for one row: `computed` slots that look at `keys`, with logits at `asked` of them.

    The least that gives those logits and every slot's keys and values: the last layer needs queries, output and MLP
    at the places asked about alone.
    """
    d, kv, width = config.d_model, config.n_kv_heads * config.head_dim, config.n_heads * config.head_dim
    rest = [2 * d * width + _ffn_parameters(config, layer, active=True) for layer in range(config.n_layers)]
    rest = rest * config.layer_repeats
    layers = config.layers_applied - 1
    products = computed * (sum(rest[:-1]) + config.layers_applied * 2 * d * kv) + asked * rest[-1]
    attention = 2 * width * keys * (layers * computed + asked)
    return 2 * (products + attention + asked * d * config.embedding_size)


def pass_bytes(config, rows: int, keys: int, itemsize: int) -> float:
    """Bytes that a forward pass must read: every matrix as often as its layer is applied, and the keys and values."""
    cache = 2 * rows * keys * config.n_kv_heads * config.head_dim * config.layers_applied
    return itemsize * (config.layer_repeats * block_parameters(config) + config.d_model * config.embedding_size + cache)
