"""The folder that ships: what `train/release.py` makes of a trained model, of either kind."""

import json
import math
import os

import pytest

import dlm
from tests.helpers.commandline import make_checkpoint, tokenizer  # noqa: F401
from train import release

TEMPLATE = """---
license: mit
chat: false
sampling: {gen_length: 8, steps: 4, block_length: 4, method: none, temperature: 0.5}
samples: [bdf, "gjk"]
---
# {name}
{nats_per_token:.3f} over {documents} documents, {evaluations} evaluations
{samples}
"""


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_release(tmp_path, tokenizer, objective):  # noqa: F811
    model = make_checkpoint(tmp_path / "model", tokenizer, objective=objective)
    notes = {"name": "m", "seconds": 60, "tokens_seen": 9, "recipe": {"sequence_length": 16, "objective": objective}}
    (model / "training.json").write_text(json.dumps(notes))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("bdfg", "jkqb", "fgjkqbd")))
    (tmp_path / "card.md").write_text(TEMPLATE)
    files = ["--card", f"{tmp_path / 'card.md'}", "--valid", f"{tmp_path / 'valid.jsonl'}"]
    assert release.main(["--model", f"{model}", "--output", f"{tmp_path / 'out'}", *files, "--passes", "3"]) == 0

    found = json.loads((tmp_path / "out" / "training.json").read_text())["validation"]
    causal = objective == "autoregressive"
    assert found["documents"] == 3 and found["evaluations"] == 3 * (1 if causal else 3)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# m\n") and "> bdf" in card and "Seed 1:" in card
    assert ('"dlm"' in (tmp_path / "out" / "generation_config.json").read_text()) is not causal
    before = os.umask(0)
    os.umask(before)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~before

    released, words = dlm.load(tmp_path / "out")
    assert released.config.objective == objective
    if causal:
        with pytest.raises(ValueError, match="predicts the next token, and cannot fill in masks"):
            dlm.generate(released, ["b"], dlm.SamplingConfig(gen_length=4), tokenizer=words)
