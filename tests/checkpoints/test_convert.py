"""Conversion: the same weights under another attention, a mask token that is free, everything said in config.json."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dlm
from dlm.checkpoints.convert import convert
from dlm.checkpoints.files import TWIN
from dlm.checkpoints.save import save_model
from dlm.data.documents import Documents
from dlm.data.examples import Examples
from dlm.models.attention import block_causal, full
from dlm.models.predictor import as_predictor
from dlm.tokenizer import BOS, EOS
from dlm.training.config import TrainingConfig
from dlm.training.trainer import fit
from tests.helpers.families import BASE, checkpoint
from train.convert import main

ROWS = 50
WORDS = ["the", "fox", "saw", "sea", "and", ".", "went", "home"]


def bare_tokenizer(*more):
    """A tokenizer of words without a mask token; more: special tokens that it has besides."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([BOS, EOS, *more])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def source(folder, tokenizer=None, **changes):
    """A tiny autoregressive checkpoint; returns (folder, its tensors)."""
    fields = {**BASE, "model_type": "llama", **changes}
    del fields["mask_token_id"]
    if tokenizer is not None:
        fields["eos_token_id"] = tokenizer.eos_token_id
    return folder, checkpoint(folder, fields, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("block", [None, 4])
def test_the_weights_under_another_attention(tmp_path, kind, block):
    folder, state = source(tmp_path / "ar", bare_tokenizer(), model_type=kind)
    before, _ = dlm.load(folder)
    made = convert(folder, tmp_path / "out", block_length=block, shift=True)
    assert (made.family, made.attention) == (f"a2d-{kind}", "full" if block is None else "block_causal")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == made.family and fields["mask_token_id"] == made.mask.number
    assert fields.get("block_length") == block and fields["shift_logits"] is True
    assert fields["converted_from"] == {"name": "ar", "family": kind} and fields["vocab_size"] == ROWS
    after, tokenizer = dlm.load(tmp_path / "out")
    assert after.config.objective == ("diffusion" if block is None else "block_diffusion")
    assert tokenizer.mask_token_id == made.mask.number and tokenizer.mask_token == "<|mask|>"
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert new.keys() == state.keys()
    others = [row for row in range(ROWS) if row != made.mask.number]
    for name, tensor in new.items():
        rows = others if len(tensor) == ROWS else slice(None)
        assert torch.equal(tensor[rows], state[name][rows]), name
    ids = torch.randint(0, 8, (1, 13), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = as_predictor(before)(ids, visible=block_causal(block) if block else full)
        assert torch.allclose(want[..., others], after(ids).logits[..., others], atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("origin", ["free", "grown", "taken", "named", "own"])
def test_where_the_mask_token_comes_from(tmp_path, tied, origin):
    reserved = "<|reserved_special_token_7|>"
    tokenizer = bare_tokenizer(*([reserved] if origin in ("taken", "named") else []))
    if origin == "own":
        tokenizer.add_special_tokens({"mask_token": "<|m|>"})
    rows = ROWS if origin in ("free", "named") else len(tokenizer)
    folder, state = source(tmp_path / "ar", tokenizer, tie_word_embeddings=tied, vocab_size=rows)
    made = convert(folder, tmp_path / "out", mask_token=reserved if origin == "named" else None)
    model, new = dlm.load(tmp_path / "out")
    assert made.mask.origin == {"named": "taken"}.get(origin, origin)
    assert new.mask_token_id == model.config.mask_token_id == made.mask.number
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == rows + (origin == "grown")
    assert len(new) == len(tokenizer) + (origin in ("free", "grown"))
    assert new("the fox").input_ids == tokenizer("the fox").input_ids
    tables = {"model.embed_tokens.weight": model.get_input_embeddings().weight}
    if not tied:
        tables["lm_head.weight"] = model.get_output_embeddings().weight
    for name, table in tables.items():
        old = state[name]
        kept = [row for row in range(len(old)) if row != made.mask.number or origin == "own"]
        assert torch.equal(table[kept], old[kept])
        if origin != "own":  # the mean of the rows that tokens have
            others = [row for row in range(len(new)) if row != made.mask.number]
            assert torch.allclose(table[made.mask.number], old[others].mean(0), atol=1e-6)


def test_without_a_tokenizer_one_row_is_added(tmp_path):
    folder, _ = source(tmp_path / "ar")
    made = convert(folder, tmp_path / "out")
    assert (made.mask.number, made.mask.word, made.mask.origin) == (ROWS, None, "grown")
    dlm.load(tmp_path / "out")
    with pytest.raises(ValueError, match="has no tokenizer"):
        convert(folder, tmp_path / "out", mask_token="<|mask|>")


def test_number_types_stay_and_an_old_result_is_replaced(tmp_path):
    folder, state = source(tmp_path / "ar")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "model.safetensors")
    for _ in range(2):
        convert(folder, tmp_path / "out", block_length=2)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert dlm.load_pretrained(tmp_path / "out").defaults == {"split": "rounded", "method": "block_causal"}


REFUSED = {
    "a diffusion model": ({"model_type": "a2d-llama", "mask_token_id": 49}, {}, "is a diffusion model already"),
    "another family": ({"model_type": "gpt2", "n_positions": 32}, {}, "'gpt2', which dlm does not convert"),
    "a block beyond the model": ({}, {"block_length": 65}, "at most 64 tokens"),
    "a block of none": ({}, {"block_length": 0}, "block_length is 0"),
    "a word of texts": ({}, {"mask_token": "the"}, "'the', an ordinary token"),
    "its end of text": ({}, {"mask_token": EOS}, "begins, ends or pads"),
    "a token of the chat": ({}, {"mask_token": "<|reserved|>"}, "a token of its chat template"),
}


@pytest.mark.parametrize(("fields", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line_and_nothing_is_written(tmp_path, capsys, fields, options, words):
    tokenizer = bare_tokenizer("<|reserved|>")
    tokenizer.chat_template = "{% for m in messages %}<|reserved|>{{ m['content'] }}{% endfor %}"
    folder, _ = source(tmp_path / "ar", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    more = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["--from", str(folder), "--to", str(tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_that_are_not_ours_stay(tmp_path, capsys):
    folder, _ = source(tmp_path / "ar")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poem.txt").write_text("mine")
    assert main(["--from", str(folder), "--to", str(tmp_path / "mine")]) == 2
    assert "holds what dlm did not write" in capsys.readouterr().err and (tmp_path / "mine" / "poem.txt").is_file()
    assert main(["--from", str(folder), "--to", str(folder)]) == 2
    assert "is the checkpoint that is converted" in capsys.readouterr().err


def test_the_shipped_twin_is_converted_trained_and_writes(tmp_path, capsys):
    """A few steps on one sentence: the loss falls, and what is written has no masks."""
    out = tmp_path / "out"
    assert main(["--from", str(TWIN), "--to", str(out), "--block-length", "4"]) == 0
    assert "block-causal with blocks of 4" in capsys.readouterr().out
    model, tokenizer = dlm.load(out, dtype="float32")
    ids = tokenizer("Once upon a time there was a fox. It saw the sea, and went home.").input_ids[:16]
    document = Documents(np.array(ids * 4, np.uint16), np.arange(0, 65, 16), None, ids[0], 256)
    config = TrainingConfig(
        output=str(tmp_path / "run"), max_steps=24, batch_size=1, learning_rate=1e-3, optimizer="adamw", warmup_steps=2,
        objective="block_diffusion", block_length=4, precision="no", valid_every=0, sample_every=0, ema=0.0,
        checkpoint_every=100, log_every=1, log_seconds=1e9,
    )  # fmt: skip
    data = Examples([document], 16)
    fit(model, None, data, None, config, mask_id=tokenizer.mask_token_id, report=lambda line: None)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.7 * sum(losses[:6])
    settings = dlm.SamplingConfig(gen_length=8, method="block_causal")
    written = dlm.generate(model.eval(), ["Once"], settings, tokenizer=tokenizer).sequences[0].tolist()
    assert tokenizer.mask_token_id not in written and len(written) == 8
    again = dlm.load_pretrained(save_model(model, tmp_path / "trained", tokenizer))
    assert again.defaults == {"method": "block_causal"} and again.block_length == 4
    model.config.block_length, model.config.objective = None, "diffusion"  # as training under full attention leaves it
    assert dlm.load_pretrained(save_model(model, tmp_path / "full", tokenizer)).defaults == {}
