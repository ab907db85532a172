"""Families: the authors' logits, their names and configuration written back, refusals of what is near but not one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import dlm
from dlm.kernels.packed import Packed
from dlm.kernels.packing import packed
from dlm.models.attention import block_causal, full
from dlm.models.families import FAMILIES, expected_tensors, family_of, recognise
from dlm.models.predictor import as_predictor
from dlm.tokenizer import train_tokenizer

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
NAMES = sorted(folder.name for folder in FOLDER.iterdir())


@pytest.fixture(scope="module")
def models():
    return {name: dlm.load(FOLDER / name)[0] for name in NAMES}


def fields(name):
    return json.loads((FOLDER / name / "config.json").read_text())


def shapes(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "logits.safetensors":
            with safe_open(file, "pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "packed"])
def test_the_authors_logits(models, name, form):
    data = load_file(FOLDER / name / "logits.safetensors")
    said = re.search(r"blocks of (\d+)", json.loads((FOLDER / name / "expected.json").read_text())["logits"])
    model = packed(models[name]) if form == "packed" else models[name]
    assert form == "plain" or isinstance(model, Packed)
    for key in (key for key in data if key.startswith("logits")):
        valid = data["padding_mask"].bool() if "padding" in key else None
        visible = full if "full" in key or said is None else block_causal(int(said[1]))
        with torch.inference_mode():
            error = (as_predictor(model)(data["input_ids"], visible=visible, valid=valid) - data[key]).abs()
        assert (error if valid is None else error[valid]).max() < 5e-4


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_known_without_memory(name):
    config = recognise(fields(name)).config.from_dict(fields(name))
    assert expected_tensors(family_of(config).model, config) == shapes(FOLDER / name)


@pytest.mark.parametrize("size", [None, "100KB"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_read(models, tmp_path, name, size):
    models[name].save_pretrained(tmp_path, **({} if size is None else {"max_shard_size": size}))
    assert (size is None) == (tmp_path / "model.safetensors").is_file()
    assert shapes(tmp_path) == shapes(FOLDER / name)
    ours = json.loads((tmp_path / "config.json").read_text())
    assert {k: v for k, v in ours.items() if k != "transformers_version"} == fields(name)
    again, _ = dlm.load(tmp_path)
    for (key, one), other in zip(models[name].state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM])
def test_auto_classes_open_them(models, name, auto):
    config = AutoConfig.from_pretrained(FOLDER / name)
    assert type(config) is type(models[name].config)
    assert type(auto.from_pretrained(FOLDER / name)) is type(models[name])


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG = {
    "a family that is not there": ("dream", {"model_type": "gpt_neox"}, "gpt_neox.*it reads llada, illada, Dream"),
    "a vision variant": ("dream", {"vision_config": {"depth": 3}}, "vision_config.*image encoder"),
    "an encoder and a decoder": ("a2d_llama", {"is_encoder_decoder": True}, "encoder and a decoder"),
    "quantised weights": ("sdar", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "another activation": ("sdar", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "capped logits": ("a2d_llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "clipped queries": ("llada_moe", {"clip_qkv": 8.0}, "clip_qkv"),
    "a window that matters": ("sdar", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window=16"),
    "scaling of another kind": ("dream", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "scaling without its factor": ("dream", {"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
    "heads that do not divide": ("dream", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    "a mask outside": ("dream", {"mask_token_id": 300}, "mask_token_id=300.*vocab_size=300"),
    "a short list of layers without positions": (
        "a2d_llama",
        {"model_type": "a2d-smollm3", "no_rope_layers": [1]},
        "no_rope_layers of length 1 for 2 layers",
    ),
    "groups that do not divide": ("llada2", {"n_group": 3}, "8 experts in 3 groups"),
    "groups of one": ("llada2", {"n_group": 8}, "groups of one"),
    "too few among the groups": ("llada2", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 4}, "too few"),
    "more chosen than there are": ("llada_moe", {"num_experts_per_tok": 9}, "8 experts of which 9"),
    "kinds of layers": ("llada_moe", {"moe_layer_freq": [1, 1]}, "moe_layer_freq for 2 layers"),
    "LLaDA2.2, whose experts are limited": ("llada2", {"expert_capacity": 48}, "expert_capacity=48"),
    "LLaDA2.2, which deletes": (
        "llada2",
        {"delete_token_id": 9},
        "delete_token_id=9: dlm implements family 'llada2_moe'",
    ),
    "no width": ("sdar", {"hidden_size": None}, "has no hidden_size"),
}


@pytest.mark.parametrize(("name", "changes", "words"), WRONG.values(), ids=WRONG.keys())
def test_refused_in_one_line(tmp_path, name, changes, words):
    shutil.copytree(FOLDER / name, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**fields(name), **changes}))
    with pytest.raises(ValueError, match=words) as error:
        dlm.load(tmp_path / "model")
    assert "\n" not in str(error.value)


DAMAGED = {
    "a tensor missing": ("sdar", "model.layers.1.self_attn.q_norm.weight", None, "missing model.layers.1.self_attn.q"),
    "a tensor more": ("dream", "model.layers.0.self_attn.q_norm.weight", (16,), "unexpected model.layers.0.self_attn"),
    "a tensor of LLaDA's name": ("a2d_llama", "model.transformer.ln_f.weight", (64,), "unexpected model.tr"),
    "a router of fewer experts": ("llada2", "model.layers.1.mlp.gate.weight", (4, 64), r"\[4, 64\] and config"),
    "a fused projection cut": ("llada2", "model.layers.0.attention.query_key_value.weight", (64, 64), r" \[64, 64\]"),
    "an expert missing": ("llada_moe", "model.layers.1.mlp.experts.3.up_proj.weight", None, "do not fit"),
}  # fmt: skip
CONTRADICTIONS = {
    "more layers": ("rnd1", {"num_hidden_layers": 3}, "missing model.layers.2.input_layernorm"),
    "wider": ("dream", {"intermediate_size": 177}, "config.json asks for"),
    "other heads": ("sdar", {"head_dim": 32}, "config.json asks for"),
    "more experts": ("rnd1", {"num_experts": 16}, "missing model.layers.0.mlp.experts.10"),
    "another vocabulary": ("fast_dllm_v2", {"vocab_size": 301}, "asks for \\[301, 64\\]"),
    "tied": ("a2d_qwen2", {"tie_word_embeddings": False}, "missing lm_head.weight"),
    "biases": ("sdar", {"attention_bias": True}, "missing model.layers.0.self_attn.k_proj.bias"),
    "10^9 experts": ("rnd1", {"num_experts": 10**9}, "asks for 1000000000 experts"),
}


@pytest.mark.parametrize(("name", "key", "shape", "words"), DAMAGED.values(), ids=DAMAGED.keys())
def test_tensors_that_do_not_fit_are_named_before_memory_is_taken(tmp_path, monkeypatch, name, key, shape, words):
    shutil.copytree(FOLDER / name, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    if shape is None:
        del state[key]
    else:
        state[key] = torch.zeros(shape)
    save_file(state, file, {"format": "pt"})
    refused(monkeypatch, tmp_path / "model", words)


@pytest.mark.parametrize(("name", "changes", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_config_that_contradicts_the_weights_is_refused_before_memory_is_taken(
    tmp_path, monkeypatch, name, changes, words
):
    shutil.copytree(FOLDER / name, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**fields(name), **changes}))
    refused(monkeypatch, tmp_path / "model", words)


def refused(monkeypatch, folder, words):
    """Opening the folder is a ValueError of one line, and no model is made."""

    def made(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("dlm.checkpoints.pretrained.open_model", made)
    with pytest.raises(ValueError, match=words) as error:
        dlm.load(folder)
    assert "\n" not in str(error.value)


def test_another_mask_token_of_the_tokenizer_is_refused(tmp_path):
    """Fault: the tokenizer's mask token was not compared, so prompts were checked for another one."""
    shutil.copytree(FOLDER / "dream", tmp_path / "model")
    tokenizer = train_tokenizer(["the fox saw the sea"] * 4, 270)
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has id 266, and the model was trained with mask_token_id 298") as error:
        dlm.load(tmp_path / "model")
    assert "\n" not in str(error.value)


LENGTHS = {
    "sdar": (4, {8: "trained with blocks of 4: leave it out", 2: "trained with blocks of 4"}),
    "fast_dllm_v2": (32, {12: "leave it out or give a number that divides it", 64: "trained with blocks of 32"}),
}


@pytest.mark.parametrize(("name", "own", "wrong"), [(k, *v) for k, v in LENGTHS.items()], ids=LENGTHS.keys())
def test_block_lengths_that_the_attention_was_not_trained_with_are_refused(models, name, own, wrong):
    model = models[name]
    model.config.mask_token_id, before, model.config.block_length = 298, model.config.block_length, own
    options = {"gen_length": 4, "method": "block_causal"}
    try:
        for length, words in wrong.items():
            with pytest.raises(ValueError, match=words):
                dlm.generate(model, [[5, 7]], dlm.SamplingConfig(block_length=length, **options))
        dlm.generate(model, [[5, 7]], dlm.SamplingConfig(block_length=own, **options))
    finally:
        model.config.block_length = before


def test_windows_that_a_family_does_not_read_are_no_matter(tmp_path):
    shutil.copytree(FOLDER / "dream", tmp_path / "model")
    more = {"use_sliding_window": True, "sliding_window": 16}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**fields("dream"), **more}))
    dlm.load(tmp_path / "model")


# --- transformers' own classes ------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
THEIRS = {  # what transformers makes, and what its config.json is changed to
    "smollm3": ("SmolLM3", {}, {}),
    "smollm3 with another interval": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}, {}),
    "llama": ("Llama", {"tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {"head_dim": 12}, {}),
    "sdar_moe": (
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": True},
        {"model_type": "sdar_moe", "block_size": 1, "num_experts": 6},
    ),
    "sdar_moe, some dense": (
        "Qwen3Moe",
        {**EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1], "decoder_sparse_step": 1},
        {"model_type": "sdar_moe", "block_size": 1, "num_experts": 6},
    ),
}


@pytest.mark.parametrize(("name", "options", "changes"), THEIRS.values(), ids=THEIRS.keys())
def test_logits_are_those_of_transformers_own_class(tmp_path, name, options, changes):
    """Autoregressive families read what transformers wrote; SDAR's mixture is Qwen3's, causal with blocks of one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **options})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():  # far from what initialisation gives: norms and routers count
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if weight.ndim == 1 else torch.randn_like(weight) / 5)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    model, _ = dlm.load(tmp_path)
    tokens = torch.randint(0, 50, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = theirs(tokens).logits
        assert (model(tokens).logits - want).abs().max() < 1e-4 < want.abs().max()
        assert isinstance(fast := packed(model), Packed)
        assert (fast(tokens) - want).abs().max() < 1e-4


def test_every_family_has_a_table():
    assert {"llada", "llada-moe", "Dream", "llada2_moe", "sdar", "Fast_dLLM_Qwen", "rnd1", "illada"} <= set(FAMILIES)
    assert {"sdar_moe", "smollm3", "a2d-smollm3"} <= set(FAMILIES)
    for family in FAMILIES.values():
        assert family.model.config_class is family.config


# Released sizes: what of config.json decides the number, and the number that is documented, exact where it is whole:
# counts of the tensors in the published safetensors files, as the hub's metadata and people's records of loading them
# have it. LLaDA-8B and SmolLM3-3B are their own; Dream is of Qwen2.5-7B's shape, SDAR-8B, SDAR-30B-A3B and RND1 are of
# those of Qwen3-8B and Qwen3-30B-A3B, Fast-dLLM v2 of Qwen2.5-1.5B's, from whose weights they began.
# Not exact: LLaDA2.0 is known by the bytes of its files (mini: 30.28 GiB of bf16; flash: 205.85 GB of fp16), so a per
# mille may differ, which is more than the width of flash's one dense layer decides; iLLaDA's is documented as 7.62B,
# and 6.98B without its 155,136 embeddings; of LLaDA-MoE-7B-A1B the experts alone are, 12,288 MiB in bf16 (last test).
QWEN = {"head_dim": 128, "vocab_size": 151_936}
LLADA2 = {
    "model_type": "llada2_moe",
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "vocab_size": 157_184,
    "use_bias": False,
}
COUNTS = {
    "LLaDA-8B": ({"model_type": "llada", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 126_464,
                  "mlp_hidden_size": 12_288}, 8_015_581_184),
    "iLLaDA-8B": ({"model_type": "illada", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 155_136,
                   "tie_word_embeddings": True}, 7_615_025_152),
    "Dream-7B": ({"model_type": "Dream", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                  "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064}, 7_615_616_512),
    "LLaDA2.0-mini": ({**LLADA2, "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
                       "num_hidden_layers": 20, "num_attention_heads": 16}, 30.28 * 2**30 / 2),
    "LLaDA2.0-flash": ({**LLADA2, "hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024,
                        "num_hidden_layers": 32, "num_attention_heads": 32}, 205_852_119_520 / 2),
    "SDAR-8B": ({**QWEN, "model_type": "sdar", "hidden_size": 4096, "intermediate_size": 12_288,
                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}, 8_190_735_360),
    "SDAR-30B-A3B": ({**QWEN, "model_type": "sdar_moe", "hidden_size": 2048, "num_hidden_layers": 48,
                      "num_experts": 128, "moe_intermediate_size": 768, "num_attention_heads": 32,
                      "num_key_value_heads": 4}, 30_532_122_624),
    "Fast-dLLM v2 1.5B": ({"model_type": "Fast_dLLM_Qwen", "hidden_size": 1536, "intermediate_size": 8960,
                           "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                           "vocab_size": 151_936, "tie_word_embeddings": True}, 1_543_714_304),
    "RND1-Base": ({**QWEN, "model_type": "rnd1", "hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 128,
                   "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4}, 30_532_122_624),
    "Qwen3-0.6B": ({**QWEN, "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
                    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                    "tie_word_embeddings": True}, 596_049_920),
    "Qwen2.5-0.5B": ({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                      "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
                      "tie_word_embeddings": True}, 494_032_768),
    "SmolLM2-135M": ({"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                      "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
                      "tie_word_embeddings": True}, 134_515_008),
    "SmolLM3-3B": ({"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
                    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128_256}, 3_075_098_624),
    "Qwen2.5-7B": ({"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064}, 7_615_616_512),
    "Qwen3-4B": ({**QWEN, "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
                  "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                  "tie_word_embeddings": True}, 4_022_468_096),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "count"), COUNTS.values(), ids=COUNTS.keys())
def test_released_sizes_have_their_number_of_parameters(fields, count):
    """Counted on the meta device: no memory is taken."""
    family = recognise(fields)
    shapes = expected_tensors(family.model, family.config.from_dict(dict(fields)))
    found = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert found == count if isinstance(count, int) else abs(found - count) < 1e-3 * count


def test_experts_of_llada_moe_have_the_bytes_that_are_documented():
    fields = {"model_type": "llada", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
              "vocab_size": 157_184, "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024,
              "qk_layernorm": True}  # fmt: skip
    family = recognise(fields)
    shapes = expected_tensors(family.model, family.config.from_dict(fields))
    experts = sum(torch.Size(shape).numel() for name, shape in shapes.items() if ".experts." in name)
    assert 2 * experts == 12_288 * 2**20
