"""The authors' samplers, token for token: every recorded case, its number of passes, and when each token was committed.

The four cases of dllm whose passes do not divide the block's tokens split 8 tokens over 3 passes as 3, 2, 3 (it rounds
what is left), LLaDA as 3, 3, 2: they run with split="rounded".
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dlm
from tests.helpers.toys import trace

FOLDER = Path(__file__).parents[1] / "fixtures"


def cases():
    for name in ("mha", "gqa"):
        for number, case in enumerate(json.loads((FOLDER / name / "expected.json").read_text())["cases"]):
            words = [name, str(number), case["source"].split()[0], case["method"], case["commit"]]
            yield pytest.param(name, case, id="-".join(words))


@pytest.fixture(scope="module")
def models():
    return {name: dlm.load(FOLDER / name)[0] for name in ("mha", "gqa")}


def settings(case):
    names = (
        "gen_length",
        "steps",
        "block_length",
        "method",
        "commit",
        "threshold",
        "factor",
        "cfg_scale",
        "eos_token_id",
    )
    split = "rounded" if case["source"] == "dllm" else "remainder_first"
    return dlm.SamplingConfig(**{name: case[name] for name in names if name in case}, split=split)


def prompts(case):
    masks = case.get("attention_mask", [[1] * len(row) for row in case["prompt"]])
    return [[t for t, m in zip(row, mask, strict=True) if m] for row, mask in zip(case["prompt"], masks, strict=True)]


@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_tokens_passes_and_commit_steps(models, name, case):
    model, rows = models[name], prompts(case)
    out = dlm.generate(model, rows, settings(case))
    assert out.sequences.tolist() == case["sequences"]
    assert (out.nfe <= case["nfe_of_source"]).all()
    canvas = dlm.Canvas.from_prompts(rows, case["gen_length"], model.config.mask_token_id)
    states, steps = trace(model, canvas, settings(case))
    assert out.nfe.tolist() == states[-1].nfe.tolist()
    for i, prompt in enumerate(rows):
        region = slice(len(prompt), len(prompt) + case["gen_length"])
        assert states[-1].canvas.tokens[i, region].tolist() == case["sequences"][i]
        if "commit_step" in case:
            # Passes that committed nothing are passes we do not spend: number the others 1, 2, 3 …
            useful = sorted(set(case["commit_step"][i]))
            assert steps[i, region].tolist() == [useful.index(s) + 1 for s in case["commit_step"][i]]
            assert out.nfe[i] == len(useful)


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_logits(models, name):
    data = load_file(FOLDER / name / "logits.safetensors")
    with torch.inference_mode():
        logits = models[name](data["input_ids"]).logits
    assert (logits - data["logits"]).abs().max() < 1e-4


def test_every_method_and_commit_was_recorded():
    seen = {(p.values[1]["method"], p.values[1]["commit"]) for p in cases()}
    assert seen >= {
        ("none", "quota"), ("none", "threshold"), ("prefix", "quota"), ("prefix", "threshold"), ("prefix", "factor"),
        ("dual", "quota"), ("dual", "threshold"), ("dual", "factor"), ("c2f", "quota"),
    }  # fmt: skip
