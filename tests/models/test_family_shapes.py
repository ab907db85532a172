"""Shapes of the families that no recorded folder has, against a second implementation in float64."""

import pytest
import torch

import dlm
from dlm.kernels.packed import Packed
from dlm.kernels.packing import packed
from tests.helpers import family_oracle
from tests.helpers.families import BASE, checkpoint

LLADA2 = {
    "model_type": "llada2_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "use_bias": False,
    "head_dim": 8,
    "block_length": 4,
}
MOE = {
    "model_type": "llada",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "expert_intermediate_size": 16,
    "dense_intermediate_size": 40,
    "qk_layernorm": True,
}
RND1 = {
    "model_type": "rnd1",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "head_dim": 8,
    "rope_scaling": False,
}
SDAR_MOE = {
    "model_type": "sdar_moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "head_dim": 8,
    "block_size": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "dream": {"model_type": "Dream"},
    "dream, tied, one key head": {"model_type": "Dream", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "dream, as many key heads": {"model_type": "Dream", "num_key_value_heads": None},
    "sdar, wide heads, biases": {"model_type": "sdar", "head_dim": 16, "attention_bias": True, "block_size": 4},
    "sdar, tied, narrow heads": {"model_type": "sdar", "head_dim": 4, "tie_word_embeddings": True, "block_size": 8},
    "fast-dllm": {"model_type": "Fast_dLLM_Qwen", "bd_size": 8},
    "fast-dllm, tied, linear": {
        "model_type": "Fast_dLLM_Qwen",
        "bd_size": 4,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "a2d llama, llama3": {"model_type": "a2d-llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "a2d llama, biases": {"model_type": "a2d-llama", "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "a2d llama, block-causal": {"model_type": "a2d-llama", "block_length": 5},
    "a2d qwen3, yarn": {
        "model_type": "a2d-qwen3",
        "head_dim": 12,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "a2d qwen2, dynamic": {
        "model_type": "a2d-qwen2",
        "max_position_embeddings": 8,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "a2d qwen2, dynamic, short": {"model_type": "a2d-qwen2", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama": {"model_type": "llama", "rope_scaling": LLAMA3},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "llada2": LLADA2,
    "llada2, all mixtures": {**LLADA2, "first_k_dense_replace": 0},
    "llada2, all dense": {**LLADA2, "first_k_dense_replace": 2},
    "llada2, no shared": {**LLADA2, "num_shared_experts": 0},
    "llada2, shared null": {**LLADA2, "num_shared_experts": None},
    "llada2, two shared": {**LLADA2, "num_shared_experts": 2},
    "llada2, one group": {**LLADA2, "n_group": 1, "topk_group": 1},
    "llada2, one chosen": {**LLADA2, "num_experts_per_tok": 1},
    "llada2, many chosen": {**LLADA2, "num_experts_per_tok": 4},
    "llada2, no norms": {**LLADA2, "use_qk_norm": False},
    "llada2, biases": {**LLADA2, "use_qkv_bias": True, "use_bias": True},
    "llada2, full rotary": {**LLADA2, "partial_rotary_factor": 1.0},
    "llada2, a quarter": {**LLADA2, "partial_rotary_factor": 0.25},
    "llada2, tied": {**LLADA2, "tie_word_embeddings": True, "routed_scaling_factor": 1.0},
    "llada2, yarn": {
        **LLADA2,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    },
    "illada": {"model_type": "illada", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "illada, untied, biases": {"model_type": "illada", "attention_bias": True, "mlp_bias": True},
    "rnd1": RND1,
    "rnd1, not renormalised, biases": {**RND1, "norm_topk_prob": False, "attention_bias": True},
    "rnd1, one chosen": {**RND1, "num_experts_per_tok": 1},
    "sdar-moe": SDAR_MOE,
    "sdar-moe, not renormalised, dense first": {**SDAR_MOE, "norm_topk_prob": False, "mlp_only_layers": [0]},
    "sdar-moe, every second": {**SDAR_MOE, "decoder_sparse_step": 2, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "a2d smollm3, untied, biases": {
        "model_type": "a2d-smollm3",
        "no_rope_layers": [0, 1, 0],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llada-moe": MOE,
    "llada-moe, dense first": {**MOE, "moe_layer_freq": [0, 1]},
    "llada-moe, shared expert": {**MOE, "shared_expert_intermediate_size": 20},
    "llada-moe, router bias": {**MOE, "moe_router_enable_expert_bias": True},
    "llada-moe, half rotary": {**MOE, "partial_rotary_factor": 0.5, "num_key_value_heads": 4, "hidden_size": 32},
    "llada-moe, all": {
        **MOE,
        "moe_layer_freq": [0, 1],
        "shared_expert_intermediate_size": 20,
        "moe_router_enable_expert_bias": True,
        "attention_bias": True,
        "qk_layernorm": False,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_equals_a_second_implementation(tmp_path, changes):
    fields = {**BASE, **changes}
    state = checkpoint(tmp_path / "model", fields)
    model, _ = dlm.load(tmp_path / "model", dtype="float64")
    config = model.config
    block = {"full": None, "causal": 1, "block_causal": config.block_length}[config.attention]
    tokens = torch.randint(0, 48, (1, 19), generator=torch.Generator().manual_seed(5))
    want = family_oracle.logits(state, fields, tokens[0].tolist(), block)
    with torch.inference_mode():
        assert (model(tokens).logits[0] - want).abs().max() < 1e-9
    small, _ = dlm.load(tmp_path / "model")
    fast = packed(small)
    if isinstance(fast, Packed):
        assert (fast(tokens)[0] - want).abs().max() < 5e-4
    else:
        assert config.rotary.scaling == "dynamic"
