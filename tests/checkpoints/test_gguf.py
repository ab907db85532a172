"""A GGUF file opens as the model that it was made of, once; what is no GGUF says so."""

import numpy as np
import pytest
import torch

import dlm
from dlm.checkpoints import gguf as ours
from dlm.checkpoints.gguf import dequantized, is_gguf
from dlm.evaluation.judge import open_judge
from dlm.models.attention import causal

gguf = pytest.importorskip("gguf")
LETTERS = [*"abcdefgh "]
TOKENS = [*"abcdefgh", "\u0120", "ab", "<|endoftext|>"]  # bytes as a byte-level tokenizer writes them
WIDTH, HEADS, LAYERS, INNER = 32, 2, 2, 64


def permuted(weight):
    """Rows of queries or keys in the order that llama's GGUF files have: rotary pairs side by side."""
    return weight.reshape(HEADS, 2, WIDTH // HEADS // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(file, {name: weight}): a llama of two layers, its products' weights in Q8_0, as the package gguf writes them."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    generator, kept = np.random.default_rng(0), {}

    def add(name, *shape, ones=False, order=lambda weight: weight):
        weight = np.ones(shape, np.float32) if ones else generator.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if ones else gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(order(weight), kind)
        kept[name] = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", len(TOKENS), WIDTH)
    add("output.weight", len(TOKENS), WIDTH)
    add("output_norm.weight", WIDTH, ones=True)
    for layer in range(LAYERS):
        for name, order in (("attn_q", permuted), ("attn_k", permuted), ("attn_v", None), ("attn_output", None)):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH, order=order or (lambda weight: weight))
        add(f"blk.{layer}.ffn_gate.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
        add(f"blk.{layer}.attn_norm.weight", WIDTH, ones=True)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH, ones=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, kept


def test_the_weights_are_those_of_the_file_and_the_work_is_done_once(written, tmp_path, monkeypatch):
    file, kept = written
    folder = dequantized(file, tmp_path / "cache")
    model = dlm.load_pretrained(folder, device="cpu", causal=True).model
    blocks = model.model.transformer.blocks
    assert np.array_equal(
        model.model.transformer.wte.weight.numpy(force=True)[: len(TOKENS)], kept["token_embd.weight"]
    )
    for layer, block in enumerate(blocks):
        for name, ours_name in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("ffn_down", "ff_out")):
            weight = getattr(block, ours_name).weight.numpy(force=True)
            assert np.array_equal(weight, kept[f"blk.{layer}.{name}.weight"]), name
    monkeypatch.setattr(ours, "_dequantize", None)  # a second call would fail
    assert dequantized(file, tmp_path / "cache") == folder


def test_a_gguf_judge_scores_as_its_model_by_hand(written, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path))
    judge = open_judge(str(written[0]), device="cpu")
    assert judge.facts["id"] == str(written[0]) and judge.facts["tokenizer"] == "its own"
    [score] = judge.score([("ab c", "da")])
    ids = [TOKENS.index(token) for token in ("ab", "\u0120", "c", "d", "a")]
    assert judge.tokenizer("ab cda", add_special_tokens=False)["input_ids"] == ids
    first = judge.tokenizer("ab cda")["input_ids"][: -len(ids)]
    model = dlm.load_pretrained(dequantized(written[0]), device="cpu", causal=True).model
    with torch.no_grad():
        logs = model.predict(torch.tensor([first + ids]), visible=causal).double().log_softmax(-1)[0]
    nll = -sum(float(logs[len(first) + place - 1, ids[place]]) for place in (3, 4))
    assert score.tokens == 2 and abs(score.nll - nll) < 1e-6


@pytest.mark.parametrize("content", [b"", b"GGML", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_what_is_no_gguf_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gguf (is no GGUF file|cannot be opened)") as refused:
        dequantized(file, tmp_path / "cache")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="cannot be read"):
        dequantized(tmp_path / "none.gguf", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_names():
    assert is_gguf("a/b.GGUF") and not is_gguf("gguf")


def test_free_pages_do_not_decide_but_the_machines_memory_does(monkeypatch):
    """Its fault: pages that hold files count as not free, so that a small judge was refused on a busy machine."""
    monkeypatch.setattr(ours, "memory_size", lambda: 8_000_000_000)
    monkeypatch.setattr(ours.os, "sysconf", lambda name: 1, raising=False)  # nothing is free
    ours._check_memory(7_000_000_000)
    with pytest.raises(ValueError, match=r"9\.0 GB in memory and there are 8\.0 GB in all"):
        ours._check_memory(9_000_000_000)
    monkeypatch.setattr(ours, "memory_size", lambda: None)  # a system that does not say
    ours._check_memory(9_000_000_000)
