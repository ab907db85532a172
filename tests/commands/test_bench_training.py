"""`dlm bench training`: its steps are a run's, what it says of them follows from their times, and refusals."""

import json

import pytest
import torch

from benchmarks import trainers
from benchmarks import training as bench
from dlm.benchmarking import roofline
from dlm.cli.main import main
from dlm.models.flops import training_flops
from dlm.models.shapes import random_model
from dlm.training.config import TrainingConfig
from dlm.training.trainer import Run, fit
from tests.helpers.training import fresh_accelerate

assert fresh_accelerate  # a fixture for every test here

SMALL = ["--config", "small", "--length", "16", "--batch", "4", "--warm-up", "1"]


@pytest.fixture
def taken(monkeypatch):
    """What every step returned."""
    inner, seen = Run.train_step, []

    def watched(self, made):
        seen.append(inner(self, made))
        return seen[-1]

    monkeypatch.setattr(Run, "train_step", watched)
    return seen


def test_training_command(tmp_path, capsys, monkeypatch, taken):
    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1e12)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    where = tmp_path / "rows.json"
    words = [*SMALL, "--steps", "3", "--compile", "both", "--loss-chunk", "auto", "5", "--json", str(where)]
    assert bench.main(words) == 0
    assert len(taken) == 4 * 5 and len(compiled) == 2 * 4  # four layers, in the two variants that compile
    written = json.loads(where.read_text())
    assert [(row["compile"], row["loss_chunk"], row["chunk"]) for row in written["rows"]] == [
        (False, "auto", None), (False, "5", 5), (True, "auto", None), (True, "5", 5),
    ]  # fmt: skip
    operations = training_flops(random_model("small").config, 64, 16, 32)  # half of the tokens are predicted
    for row in written["rows"]:
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["mfu"] == pytest.approx(operations / row["seconds"] / 1e12) and row["first_step"] > 0
    out = capsys.readouterr().out
    assert "1,000 GFLOP/s measured" in out and "(logits of 5)" in out and out.count("MFU") == 4


@pytest.mark.parametrize("objective", ["block_diffusion", "autoregressive"])
def test_its_steps_are_those_of_a_run(tmp_path, capsys, taken, objective):
    """Same weights, rows and noise as `fit` with these settings: the same losses, step by step."""
    words = [*SMALL, "--steps", "2", "--objective", objective, "--block-length", "4", "--ema", "0.9"]
    assert main(["bench", "training", *words]) == 0
    losses = [float(step.total) / step.count for step in taken]
    block = 4 if objective == "block_diffusion" else None
    config = TrainingConfig(
        str(tmp_path), max_steps=4, batch_size=4, learning_rate=1e-4, optimizer="adamw", objective=objective,
        block_length=block, precision="no", log_every=1, sample_every=0, valid_every=0, ema=0.9,
    )  # fmt: skip
    model = random_model("small", length=16)
    data = bench.random_rows(model.config.vocab_size, 16, 16, 0)
    fit(model, None, data, None, config, mask_id=model.config.mask_token_id, report=lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([record["loss"] for record in records], rel=1e-6) and len(losses) == 4


def test_a_plain_loop_beside_it(tmp_path, capsys, monkeypatch):
    """As many steps as ours, and it learns: the loss of the rows it saw falls."""
    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1e12)
    where = tmp_path / "rows.json"
    assert bench.main([*SMALL, "--steps", "2", "--beside", "plain", "--json", str(where)]) == 0
    ours, plain = json.loads(where.read_text())["rows"]
    assert plain["beside"] == "plain" and plain["ratio"] == pytest.approx(plain["seconds"] / ours["seconds"])
    assert "times ours" in capsys.readouterr().out
    torch.manual_seed(0)
    model, rows = random_model("small", length=8), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8]] * 2)
    hidden = rows.masked_fill(rows == 7, model.config.mask_token_id)

    def nats():
        return -model(input_ids=hidden).logits.log_softmax(dim=-1)[:, [2, 6], 7].mean().item()

    before = nats()
    assert len(trainers.other_steps("plain", None, model, rows, 2, 4, False)) == 4
    assert nats() < before - 1


def test_a_variant_that_does_not_fit_is_a_line(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(bench, "measure", full)
    assert bench.main([*SMALL, "--loss-chunk", "0", "7"]) == 0
    assert capsys.readouterr().out.count("out of memory") == 2


@pytest.mark.parametrize(("words", "said"), [
    (["--config", "smal"], "'small'"),
    (["--compile", "yes"], "compile"),
    (["--loss-chunk", "half"], "loss-chunk has 'half'"),
    (["--length", "1"], "length is 1"),
    (["--warm-up", "-1"], "warm-up is -1"),
    (["--objective", "difusion"], "'diffusion'"),
    (["--precision", "bf61"], "'bf16'"),
    (["--batch", "3", "--accumulation", "2"], "equal parts"),
    (["--device", "tpu"], "device tpu cannot be used"),
    (["--precision", "fp16", "--loss-chunk", "8"], "loss_chunk 8"),
    (["--beside", "plan"], "'plain'"),
    (["--beside", "dllm"], "give dllm=PATH, the root of a clone"),
    (["--beside", "dllm=tests"], "tests has no dllm/core/trainers/mdlm.py"),
    (["--beside", "plain=here"], "plain takes no path"),
    (["--beside", "plain", "--objective", "autoregressive"], "--beside compares steps of diffusion"),
])  # fmt: skip
def test_training_refusals(words, said, capsys):
    assert main(["bench", "training", "--config", "small", *words]) == 2
    assert said in capsys.readouterr().err
