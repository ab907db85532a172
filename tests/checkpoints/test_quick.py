"""A packed copy from the file itself: what the model's copy is, to the last bit; all else is left to the model."""

import dataclasses
import json

import pytest
import torch

from dlm.checkpoints import quick
from dlm.checkpoints.load import read_config, read_fields
from dlm.checkpoints.pretrained import load_pretrained
from dlm.kernels.linear import has_kernels
from dlm.kernels.packed import Packed
from dlm.kernels.packing import packed
from dlm.models.fields import LLaDAFields
from tests.helpers.toys import tiny_model

SHAPES = [
    {},
    {"n_kv_heads": 1, "weight_tying": True, "scale_logits": True, "input_emb_norm": True},
    {"attention_layer_norm": True, "include_qkv_bias": True},
    {"include_bias": True, "bias_for_layer_norm": False},
    {"block_length": 4, "n_layers": 1, "embedding_size": 64},
]
pytestmark = pytest.mark.skipif(not has_kernels(torch.float32), reason="oneDNN is not in this torch")


def saved(folder, dtype=torch.float32, **changes):
    tiny_model(1, dtype=dtype, **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", SHAPES)
def test_logits_are_those_of_the_models_copy(tmp_path, changes, dtype):
    opened = load_pretrained(saved(tmp_path, dtype, **changes), device="cpu")
    predictor = opened.predictor
    assert type(predictor) is Packed and "model" not in vars(opened) and opened.predictor is predictor
    assert opened.number_type == "float32" and predictor.device.type == "cpu"
    tokens = torch.randint(0, 39, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(predictor(tokens), packed(opened.model)(tokens))
    shapes = {name: tuple(weight.shape) for name, weight in opened.model.state_dict().items()}
    assert shapes == quick.expected(opened.config)


def test_a_model_that_is_there_is_the_one_that_is_used(tmp_path):
    opened = load_pretrained(saved(tmp_path), device="cpu")
    with torch.no_grad():
        opened.model.model.transformer.ln_f.weight.mul_(2)
    tokens = torch.arange(9)[None]
    assert opened.predictor is packed(opened.model)
    assert (opened.predictor(tokens) - load_pretrained(tmp_path, device="cpu").predictor(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"attn_implementation": "eager"}, {"device_map": "cpu"}])
def test_what_is_left_to_the_model(tmp_path, options):
    opened = load_pretrained(saved(tmp_path), **options)
    assert quick.packed_from(opened.folder, opened.config, opened.tensors, opened.placing) is None
    assert opened.predictor is not None


def test_damage_is_left_to_the_model_which_names_it(tmp_path):
    model = tiny_model(1, dtype=torch.float32)
    with torch.no_grad():
        model.model.transformer.ln_f.weight[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity"):
        _ = load_pretrained(tmp_path, device="cpu").predictor
    saved(tmp_path / "other", mlp_hidden_size=32)
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"mlp_hidden_size": 32', '"mlp_hidden_size": 24'))
    with pytest.raises(ValueError, match="do not fit its config"):
        _ = load_pretrained(tmp_path / "other", device="cpu").predictor


@pytest.mark.parametrize("changes", SHAPES)
def test_fields_are_those_of_transformers_class(tmp_path, changes):
    fields = read_fields(saved(tmp_path, **changes))
    config = read_config(tmp_path)
    assert type(fields) is LLaDAFields and isinstance(config, LLaDAFields) and type(config) is not LLaDAFields
    derived = [name for name, value in vars(LLaDAFields).items() if isinstance(value, property)]
    for name in [field.name for field in dataclasses.fields(LLaDAFields)] + derived + ["bos_token_id", "model_type"]:
        assert getattr(fields, name) == getattr(config, name, None), name
    opened = load_pretrained(tmp_path, device="cpu")
    assert type(opened.predictor.config) is LLaDAFields and type(opened.config) is type(config)


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"num_experts": 2}, {"n_heads": "4"}, {"rope": False}])
def test_other_configurations_are_left_to_transformers_class(tmp_path, changes):
    """Names of transformers', other families, and faults, which it names."""
    file = saved(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert read_fields(tmp_path) is None
