"""The commands of every family, a cell of the table family x capability each: write, chat, fill in, score, grid,
harness, LoRA. Together with `test_family_matrix` (batches, caches, infilling, losses, training) and `test_families`
(saving)."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import dlm
from dlm.data.examples import Example
from dlm.evaluation.lm_eval import Answers
from dlm.objectives.likelihood import LikelihoodConfig, bound
from tests.helpers import commandline, families
from tests.helpers.grids import arguments, read
from train import sft

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures

MOE = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llada": {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 40,
              "max_sequence_length": 128},
    "llada-moe": {"model_type": "llada", **MOE, "expert_intermediate_size": 16, "qk_layernorm": True},
    "illada": {"tie_word_embeddings": True},
    "Dream": {},
    "llada2_moe": {**MOE, "moe_intermediate_size": 16, "num_shared_experts": 1, "n_group": 2, "topk_group": 1,
                   "use_bias": False, "head_dim": 8, "block_length": 4},
    "sdar": {"head_dim": 8, "block_size": 4},
    "sdar_moe": {**MOE, "moe_intermediate_size": 16, "head_dim": 8, "block_size": 4},
    "Fast_dLLM_Qwen": {"bd_size": 8},
    "rnd1": {**MOE, "moe_intermediate_size": 16, "head_dim": 8},
    "a2d-llama": {},
    "a2d-qwen2": {"shift_logits": True},
    "a2d-qwen3": {"block_length": 4},
    "a2d-smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A tiny checkpoint of each family with random weights and a tokenizer."""
    made, root = {}, tmp_path_factory.mktemp("families")
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, changes in FAMILIES.items():
        base = {} if name == "llada" else {**families.BASE, "max_position_embeddings": 128}
        fields = {"model_type": name, **base, "vocab_size": len(tokenizer), **ids, **changes}
        families.checkpoint(root / name, fields, tokenizer=tokenizer)
        made[name] = root / name
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_it_writes_chats_and_fills_in_with_the_authors_settings(folders, run, name):
    options = ["--json", "--gen-length", "12", "--model", folders[name], "--device", "cpu"]
    code, out, error = run("generate", "The cat", *options, model=None)
    assert code == 0, error
    assert "mdm_mask" not in json.loads(out)["text"]
    code, out, error = run("generate", "--chat", "Who are you?", *options, model=None)
    assert code == 0 and json.loads(out), error
    code, out, error = run("infill", "The cat ___{3} and ___{2}.", "--json", "--model", folders[name], model=None)
    assert code == 0, error
    assert json.loads(out)["text"].startswith("The cat")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_is_of_the_guess_for_each_token(folders, name):
    """The chain rule by hand from raw logits: shifted where the family is, blocks hidden where they lie ahead."""
    model, _ = dlm.load(folders[name], dtype="float64")
    mask, block = model.config.mask_token_id, model.config.block_length
    ids, given = [5, 17, 33, 2, 9, 41, 7, 8, 60], 3
    want = 0.0
    for place in range(given, len(ids)):
        end = len(ids) if block is None else min(len(ids), (place // block + 1) * block)
        row = torch.tensor([[*ids[:place], *[mask] * (end - place)]])
        with torch.inference_mode():
            logits = model(row).logits[0, place - 1 if model.config.shift_logits else place]
        want -= float(logits.log_softmax(-1)[ids[place]])
    target = np.arange(len(ids)) >= given
    [found] = bound(model, [Example(np.array(ids), target, 0)], LikelihoodConfig(estimator="chain"), mask_id=mask)
    assert found.nats == pytest.approx(want, rel=1e-9) and found.error == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_harness_asks_it(folders, name):
    model = Answers(str(folders[name]), batch_size=2, estimator="chain", draws=16)
    [(nats, greedy)] = model.loglikelihood([SimpleNamespace(args=("The cat sat on the", " mat"))])
    assert math.isfinite(nats) and nats < 0 and isinstance(greedy, bool)
    [text] = model.generate_until([SimpleNamespace(args=("The cat", {"until": ["\n"], "max_gen_toks": 6}))])
    assert isinstance(text, str) and "\n" not in text


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_through_the_recipe(tmp_path, monkeypatch, folders, name):
    """One step of `dlm train sft --lora`, merged and written by the family's own names."""
    pytest.importorskip("peft")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "Who sat?", "answer": "The cat sat on the mat."}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, _ = dlm.load(folders[name], dtype="float32")
    blocks = before.config.block_length
    settings = {
        "model": folders[name], "data": tmp_path / "rows.jsonl", "output": tmp_path / "run", "max_steps": 1,
        "batch_size": 2, "warmup_steps": 0, "sequence_length": 64, "lora": 2, "precision": "no", "sample_every": 0,
        "learning_rate": 0.1, "tracker": "none", "ema": 0,
    }  # fmt: skip
    if blocks:
        settings |= {"objective": "block_diffusion", "block_length": blocks}
    assert sft.main([f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]) == 0
    after, _ = dlm.load(tmp_path / "run" / "model", dtype="float32")
    assert type(after) is type(before) and after.config.block_length == blocks
    assert after.config.shift_logits == before.config.shift_logits
    moved = {key for key, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[key])}
    own = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    assert {key.split(".")[-2] for key in moved} == {part for part in own if any(part in key for key in moved)}
    assert {"q_proj", "v_proj", "attn_out"} <= {key.split(".")[-2] for key in moved}
    assert not any(word in key for key in moved for word in ("wte", "norm", "router", "transformer.ff_out"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_measures_it(tmp_path, folders, run, tokenizer, name):
    (tmp_path / "prompts.txt").write_text("The cat sat")
    block = dlm.load_pretrained(folders[name]).block_length or 4
    twin = commandline.make_checkpoint(tmp_path / "judge", tokenizer, n_layers=1, objective="autoregressive")
    options = {"methods": "none", "block_lengths": str(block), "steps": "2", "gen_length": 8}
    code, _, error = run("bench", "grid", *arguments(tmp_path, folders[name], twin, **options), model=None)
    assert code == 0, error
    [entry] = read(tmp_path)[0]["none"]
    cell = entry["result"][str(block)]["2"]
    assert math.isfinite(cell["perplexity"]) and isinstance(cell["answer"], str)
