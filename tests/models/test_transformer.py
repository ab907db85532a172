"""The mask predictor: LLaDA's layout, variants against a second implementation, loading and refusals."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import dlm
from dlm.kernels.packing import packed
from tests.helpers import oracle
from tests.helpers.toys import tiny_config, tiny_model

VARIANTS = {
    "grouped queries": {},
    "as many heads": {"n_kv_heads": 4},
    "multi-query": {"n_kv_heads": 1},
    "multi-query by its flag": {"n_kv_heads": None, "multi_query_attention": True},
    "tied weights": {"weight_tying": True},
    "biases": {"include_bias": True, "bias_for_layer_norm": False},
    "biases of q, k and v": {"include_qkv_bias": True},
    "query and key norms": {"attention_layer_norm": True},
    "a wider embedding": {"embedding_size": 64},
    "block-causal": {"block_length": 4},
    "another rope base": {"rope_theta": 500000.0},
    "another epsilon": {"rms_norm_eps": 1e-3},
}


def names(folder):
    found = []
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found += list(tensors.keys())
    return sorted(found)


def ids(batch, length, seed=0):
    return torch.randint(0, 39, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- computing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_a_second_implementation(changes):
    model = tiny_model(1, **changes)
    tokens = ids(2, 11)
    with torch.inference_mode():
        logits = model.predict(tokens)
    network = oracle.Network.of(model)
    assert logits.shape == (2, 11, model.config.embedding_size)
    for row in range(2):
        want = network(tokens[row].tolist(), list(range(11)), {})
        assert (logits[row] - want).abs().max() < 1e-9


def test_embedding_norm_and_scaled_logits():
    """Gemma's input scale and OLMo's output scale, both sqrt(d_model) = sqrt(32)."""
    plain, scaled = tiny_model(1), tiny_model(1, scale_logits=True)
    tokens = ids(1, 6)
    with torch.inference_mode():
        assert torch.allclose(scaled.predict(tokens) * 32**0.5, plain.predict(tokens))
        normed = tiny_model(1, input_emb_norm=True)
        plain.model.transformer.wte.weight.mul_(32**0.5)
        assert torch.allclose(normed.predict(tokens), plain.predict(tokens))


def test_logits_to_keep():
    model, tokens = tiny_model(2), ids(2, 9)
    with torch.inference_mode():
        everything = model.predict(tokens)
        flat = torch.zeros(2, 9, dtype=torch.bool)
        flat[0, [1, 4]] = flat[1, 8] = True
        got = model.predict(tokens, logits_to_keep=flat)
        assert got.shape == (3, 40)
        assert torch.allclose(got, torch.stack([everything[0, 1], everything[0, 4], everything[1, 8]]))
        picked = torch.tensor([[3, 0], [8, 8]])
        got = model.predict(tokens, logits_to_keep=picked)
        assert got.shape == (2, 2, 40)
        assert torch.allclose(got[0], everything[0, [3, 0]])
        assert torch.allclose(got[1], everything[1, [8, 8]])
        assert model.predict(tokens, logits_to_keep=torch.zeros(2, 9, dtype=torch.bool)).shape == (0, 40)


def test_positions_are_per_row():
    """Rotary attention depends on differences of positions alone, and each row has its own."""
    model, tokens = tiny_model(3), ids(2, 7)
    with torch.inference_mode():
        plain = model.predict(tokens)
        moved = model.predict(tokens, torch.arange(7) + torch.tensor([[0], [31]]))
        assert (moved - plain).abs().max() < 1e-9
        order = torch.tensor([[6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 8, 10, 12]])
        other = model.predict(tokens, order)
        reversed_row = model.predict(tokens[:1].flip(1))
        assert (other[0] - reversed_row[0].flip(0)).abs().max() < 1e-9
        assert (other[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_of_weights_is_dtype_of_logits(dtype, fixtures):
    model, _ = dlm.load(fixtures / "mha", dtype=dtype)
    with torch.inference_mode():
        logits = model.predict(ids(1, 5))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits.dtype == dtype
    want = load_file(fixtures / "mha" / "logits.safetensors")
    with torch.inference_mode():
        error = (model.predict(want["input_ids"]) - want["logits"]).abs()
    if dtype == torch.bfloat16:
        assert error.mean() < 0.02 * want["logits"].std()
    else:
        assert error.max() < 1e-4


def test_gradients_and_checkpointing_agree():
    tokens = ids(2, 8)
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(4).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.predict(tokens).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads)
    assert grads[0].abs().max() > 0


# --- LLaDA's files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_what_is_saved_has_exactly_the_names_of_the_authors(fixtures, tmp_path, name):
    source = fixtures / name
    model, _ = dlm.load(source)
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == names(source)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, source))
    assert set(ours) - {"transformers_version", "objective"} == set(theirs)
    assert {k: v for k, v in ours.items() if k in theirs} == theirs
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_save_and_load_give_the_same_model(tmp_path, changes):
    model = tiny_model(7, **changes)
    model.save_pretrained(tmp_path)
    again, _ = dlm.load(tmp_path)
    tokens = ids(1, 9)
    with torch.inference_mode():
        assert torch.allclose(again.predict(tokens), model.predict(tokens), rtol=0, atol=1e-12)
    old, new = model.config.to_dict(), again.config.to_dict()
    for name in ("_name_or_path", "torch_dtype"):
        old.pop(name, None), new.pop(name, None)
    assert old == new
    assert {p.dtype for p in again.parameters()} == {torch.float64}  # dtype="auto" is that of the file
    if changes.get("weight_tying"):
        assert "model.transformer.ff_out.weight" not in names(tmp_path)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    if "block_length" in changes:
        assert again.config.block_length == 4
    else:
        assert "block_length" not in json.loads((tmp_path / "config.json").read_text())


def test_the_authors_config_asks_for_remote_code_and_gets_none(checkpoint):
    """LLaDA-8B's config.json names its modelling files in auto_map; nothing of it is asked for or run."""
    auto_map = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    edit(checkpoint, auto_map=auto_map, _name_or_path="", transformers_version="4.46.3")
    (checkpoint / "configuration_llada.py").write_text("raise SystemExit('remote code was run')")
    (checkpoint / "modeling_llada.py").write_text("raise SystemExit('remote code was run')")
    model, _ = dlm.load(checkpoint)
    assert type(model) is dlm.LLaDAModelLM


def test_dtype_is_saved_under_the_name_the_authors_use(fixtures, tmp_path):
    model, _ = dlm.load(fixtures / "mha", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in dlm.load(tmp_path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_half_precision_is_widened_on_a_cpu(fixtures, tmp_path):
    """Small models only, and only where no dtype is asked for; what is saved then says what it is."""
    dlm.load(fixtures / "mha", dtype="bfloat16")[0].save_pretrained(tmp_path / "half")
    model, _ = dlm.load(tmp_path / "half", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float31", "int", "matmul"])
def test_unknown_dtype(fixtures, dtype):
    with pytest.raises(ValueError, match=dtype):
        dlm.load(fixtures / "mha", dtype=dtype)


def test_loading_is_silent(fixtures, capfd):
    dlm.load(fixtures / "mha")
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_registered_with_auto_classes(fixtures):
    assert isinstance(AutoConfig.from_pretrained(fixtures / "gqa"), dlm.LLaDAConfig)
    model = AutoModel.from_pretrained(fixtures / "gqa")
    assert isinstance(model, dlm.LLaDAModelLM)
    assert model.config.n_kv_heads == 2
    assert AutoConfig.for_model("llada").model_type == "llada"


def test_sharded_checkpoint(fixtures, tmp_path):
    model, _ = dlm.load(fixtures / "mha")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    again, _ = dlm.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_sharded_checkpoint_with_a_lost_shard(fixtures, tmp_path):
    dlm.load(fixtures / "mha")[0].save_pretrained(tmp_path, max_shard_size="200KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises((ValueError, OSError), match=lost.name):
        dlm.load(tmp_path)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_attn_implementation_is_taken(fixtures, kernel):
    model, _ = dlm.load(fixtures / "mha", attn_implementation=kernel)
    assert model.config._attn_implementation == kernel
    want = load_file(fixtures / "mha" / "logits.safetensors")
    with torch.inference_mode():
        assert (model.predict(want["input_ids"]) - want["logits"]).abs().max() < 1e-4


def test_unknown_attn_implementation(fixtures):
    with pytest.raises(ValueError, match="flesh"):
        dlm.load(fixtures / "mha", attn_implementation="flesh_attention")


def test_device_map(fixtures):
    model, _ = dlm.load(fixtures / "mha", device_map="cpu")
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    assert not model.training


def test_loaded_model_is_in_eval_mode(fixtures):
    assert not dlm.load(fixtures / "mha")[0].training


# --- refusals ----------------------------------------------------------------------------------------------------

REFUSED = [
    ("alibi", True),
    ("rope", False),
    ("block_type", "sequential"),
    ("block_type", "parallel"),
    ("block_group_size", 2),
    ("activation_type", "gelu"),
    ("activation_type", "relu"),
    ("activation_type", "swiglu"),
    ("layer_norm_type", "default"),
    ("layer_norm_type", "low_precision"),
    ("layer_norm_type", "gemma_rms"),
    ("layer_norm_type", "amd_compatible"),
    ("layer_norm_with_affine", False),
    ("attention_layer_norm_with_affine", False),
    ("bias_for_layer_norm", True),
]


@pytest.fixture
def checkpoint(fixtures, tmp_path):
    shutil.copytree(fixtures / "mha", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{f}={v}" for f, v in REFUSED])
def test_variants_not_implemented_are_refused_by_name(checkpoint, field, value):
    edit(checkpoint, **{field: value})
    with pytest.raises(ValueError, match=field) as error:
        dlm.load(checkpoint)
    assert repr(value) in str(error.value) or str(value).lower() in str(error.value)


def test_biases_of_norms_follow_include_bias_in_llada():
    """In LLaDA's code bias_for_layer_norm=null means "as include_bias": such a model has norm biases, ours has none."""
    with pytest.raises(ValueError, match="bias_for_layer_norm"):
        tiny_config(include_bias=True, bias_for_layer_norm=None)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"d_model": 0}, "d_model"),
        ({"n_layers": 0}, "n_layers"),
        ({"embedding_size": 39}, "embedding_size"),
        ({"block_length": 0}, "block_length"),
        ({"multi_query_attention": True, "n_kv_heads": 2}, "multi_query_attention"),
    ],
)
def test_sizes_that_do_not_fit(changes, word):
    with pytest.raises(ValueError, match=word):
        tiny_config(**changes)


def test_missing_tensor_is_named(checkpoint):
    state = load_file(checkpoint / "model.safetensors")
    del state["model.transformer.blocks.1.k_proj.weight"]
    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*blocks\.1\.k_proj\.weight"):
        dlm.load(checkpoint)


def test_unexpected_tensor_is_named(checkpoint):
    state = load_file(checkpoint / "model.safetensors")
    state["model.transformer.blocks.1.q_norm.weight"] = torch.ones(64)
    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected.*blocks\.1\.q_norm\.weight"):
        dlm.load(checkpoint)


def test_tensor_of_another_shape_is_named(checkpoint):
    edit(checkpoint, mlp_hidden_size=160)
    with pytest.raises((ValueError, RuntimeError), match="ff_proj"):
        dlm.load(checkpoint)


def test_truncated_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises((ValueError, OSError)) as error:
        dlm.load(checkpoint)
    assert "model.safetensors" in str(error.value) or "truncated" in str(error.value)


def test_empty_weights(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises((ValueError, OSError)) as error:
        dlm.load(checkpoint)
    assert "weights" in str(error.value)


def test_folder_without_config(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        dlm.load(checkpoint)


def test_folder_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="safetensors"):
        dlm.load(checkpoint)


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        dlm.load(tmp_path / "nowhere")


def test_file_instead_of_a_folder(checkpoint):
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        dlm.load(checkpoint / "model.safetensors")


def test_config_that_is_not_json(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        dlm.load(checkpoint)


def test_another_family_is_named(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match="gpt2"):
        dlm.load(checkpoint)


def test_a_family_nobody_knows_is_named(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "lladda"}))
    with pytest.raises(ValueError, match="lladda"):
        dlm.load(checkpoint)


def test_errors_are_one_line(checkpoint):
    """The command line prints these as they are."""
    edit(checkpoint, alibi=True)
    with pytest.raises(ValueError, match="alibi") as error:
        dlm.load(checkpoint)
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_a_batch_of_nothing_has_no_logits(kv_heads, shape):
    """Was: with fewer heads of keys than of queries an error about a reshape."""
    model = tiny_model(0, dtype=torch.float32, n_kv_heads=kv_heads)
    tokens = torch.zeros(shape, dtype=torch.int64)
    with torch.no_grad():
        assert model(tokens).logits.shape == (*shape, 40)
        assert packed(model)(tokens).shape == (*shape, 40)
