"""Checkpoints that others wrote: damaged, hostile, of a wrong type or size. One line that names the file, at once."""

import json
import pathlib

import pytest
import torch

import dlm
from dlm.checkpoints.folder import read_tensors, weight_files
from dlm.checkpoints.pretrained import load_pretrained
from dlm.cli.main import main
from tests.checkpoints.test_pretrained import change
from tests.helpers import commandline
from tests.helpers.commandline import make_checkpoint

tokenizer = commandline.tokenizer  # a fixture
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(tmp_path, tokenizer):
    return make_checkpoint(tmp_path / "model", tokenizer)


def fails(capsys, folder, *words, command=("generate", "x", "--gen-length", "2")):
    """The one line that the command says of a checkpoint."""
    code = main([*command, "--model", str(folder), *words])
    out, error = capsys.readouterr()
    assert code == 2 and out == "" and error.count("\n") == 1 and "Traceback" not in error, error
    return error


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", "256"), ("d_model", None), ("d_model", [1]), ("d_model", True), ("d_model", 2.5), ("d_model", -1),
        ("n_layers", {}), ("n_layers", 0), ("n_heads", "x"), ("n_kv_heads", []), ("mlp_hidden_size", "y"),
        ("vocab_size", 1e300), ("embedding_size", "z"), ("rope_theta", "q"), ("rope_theta", 0), ("rms_norm_eps", "e"),
        ("rms_norm_eps", float("nan")), ("max_sequence_length", "long"), ("max_sequence_length", 10**15),
        ("mask_token_id", "m"), ("mask_token_id", -1), ("mask_token_id", 10**9), ("eos_token_id", ["a"]),
        ("eos_token_id", 10**9), ("weight_tying", "yes"), ("block_length", "b"), ("objective", 3),
        ("objective", "sorting"), ("torch_dtype", "float8_e5m2"), ("torch_dtype", 7), ("architectures", 5),
        ("init_fn", 1), ("model_type", 5), ("model_type", None), ("model_type", ["llada"]), ("include_bias", "no"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_fields_of_config_json(capsys, folder, field, value):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    error = fails(capsys, folder)
    assert "config.json" in error or field in error or "family" in error


@pytest.mark.parametrize("field", ["d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "embedding_size"])
@pytest.mark.parametrize("size", [10**9, 10**18])
def test_sizes_are_checked_before_memory_is_taken(capsys, folder, field, size):
    """d_model of 10^9 asked for petabytes, n_layers of 10^9 for hours."""
    rows = {"vocab_size": {"embedding_size": size}}.get(field, {})
    assert "config" in fails(capsys, change(folder, **{field: size}, **rows))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    ["null", "[1]", "5", '"text"', "{", "", DEEP, "\ud800".encode("utf-16", "surrogatepass"), f'{{"a": {"9" * 5000}}}'],
    ids=["null", "list", "number", "text", "open", "empty", "deep", "utf-16", "digits"],
)  # fmt: skip
def test_files_that_are_no_json_objects(capsys, folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in fails(capsys, folder)


@pytest.mark.parametrize(
    "value", [5, "x", [1], {"steps": "many"}, {"temperature": []}, {"chat": 3}, {"stop": 1}, {"method": 7}], ids=str
)
def test_wrong_sampling_defaults(capsys, folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"dlm": value}))
    assert "generation_config.json" in fails(capsys, folder)


def test_no_sampling_defaults_are_none(folder):
    (folder / "generation_config.json").write_text('{"dlm": null}')
    assert load_pretrained(folder).defaults == {}


def test_a_byte_order_mark_is_skipped(folder):
    file = folder / "config.json"
    file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    assert load_pretrained(folder).family == "llada"


# ---------------------------------------------------------------- weights


def shard(folder, places):
    """The weights under an index that says where each tensor is."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"a": "../other/model.safetensors"}, "../other/model.safetensors"),
        ({"a": "/etc/passwd"}, "/etc/passwd"),
        ({"a": "model.bin"}, "model.bin"),
        ({"a": "model-00009-of-00001.safetensors"}, "lacks it"),
        ({"a": 5}, "weight_map"),
        ({}, "weight_map"),
        ("x", "weight_map"),
        (None, "weight_map"),
    ],
)
def test_the_index_names_files_of_the_folder(capsys, folder, places, said):
    """A name with ../ opened a file outside of the checkpoint."""
    assert said in fails(capsys, shard(folder, places))


def test_shards_are_read(folder):
    names = list(read_tensors(weight_files(folder)).shapes)
    before, _ = dlm.load(folder)
    after, _ = dlm.load(shard(folder, dict.fromkeys(names, "model-00001-of-00001.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_pickles_are_named_and_never_opened(capsys, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
    assert "pytorch_model.bin, a pickle, which dlm never opens" in fails(capsys, folder)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 5}', b'{"a": {"dtype": "F32"}}', DEEP.encode(),
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'],
    ids=lambda header: header[:40].decode())  # fmt: skip
def test_headers_that_are_none(capsys, folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors" in fails(capsys, folder)


def test_an_unreadable_file_is_not_called_damaged(capsys, folder, monkeypatch):
    """It was: "damaged or cut short: copy the file again"."""
    kept = pathlib.Path.open

    def refuse(self, *words, **more):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return kept(self, *words, **more)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    error = fails(capsys, folder)
    assert "Permission denied" in error and "damaged" not in error


def test_weights_that_are_no_numbers_are_named(capsys, folder):
    model, _ = dlm.load(folder)
    with torch.no_grad():
        model.model.transformer.blocks[1].ff_proj.weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    assert "hold NaN or infinity (model.transformer.blocks.1.ff_proj.weight)" in fails(capsys, folder)


def test_numbers_that_dlm_does_not_read(capsys, folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    assert "tensors of the type I8" in fails(capsys, folder)


# ---------------------------------------------------------------- tokenizer, device, type


def test_a_tokenizer_that_is_larger_than_the_embeddings(capsys, folder, tokenizer):
    """It was found at the first id without an embedding: an IndexError."""
    more = type(tokenizer).from_pretrained(folder)
    more.add_tokens([f"<new{n}>" for n in range(9)])
    more.save_pretrained(folder)
    error = fails(capsys, folder)
    assert f"the tokenizer has {len(more)} tokens and the model {len(tokenizer)} embeddings" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "meta"], "device meta cannot be used here"),
        (["--device", "cuda:99"], "device cuda:99 cannot be used here"),
        (["--dtype", "float8_e5m2"], "dtype is 'float8_e5m2'"),
        (["--dtype", "int32"], "dtype is 'int32'"),
        (["--dtype", "float"], "dtype is 'float'"),
        (["--revision", "main"], "is a folder, which has no revisions"),
    ],
)
def test_places_and_types_that_cannot_be(capsys, folder, words, said):
    assert said in fails(capsys, folder, *words)
