"""fit(): exact resume, equal steps however they are cut up, EMA and schedule by hand, what stops a run."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch

import dlm
from dlm.data.documents import Documents
from dlm.data.examples import Examples
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.training.ema import EMA
from dlm.training.finite import NonFiniteLoss
from dlm.training.optim import build_optimizers, parameter_groups, schedule_factor
from dlm.training.state import checkpoints
from dlm.training.trainer import fit
from dlm.utils.stats import ratio
from tests.conftest import FIXTURES
from tests.helpers.ranks import MASK, settings, tiny_data, tiny_model
from tests.helpers.training import fresh_accelerate, train, weights  # noqa: F401


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "precision": "bf16", "accumulation": 2}])
def test_resume_is_bitwise_equal(tmp_path, changes):
    whole, result = train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", **changes)
    for step, folder in checkpoints(tmp_path / "parts"):
        if step > 4:  # as if killed after step 4
            shutil.rmtree(folder)
    torch.manual_seed(99)
    again, resumed = train(tmp_path / "parts", resume=True, **changes)
    assert torch.equal(weights(whole), weights(again)) and not torch.equal(weights(whole), weights(tiny_model()))
    assert all(torch.equal(result.ema[name], resumed.ema[name]) for name in result.ema)
    assert (result.step, result.tokens) == (resumed.step, resumed.tokens)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[(r["step"], r["loss"]) for r in map(json.loads, log)] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_accumulation_does_not_change_the_run(tmp_path, objective):
    changes = {"objective": objective, "optimizer": "adamw", "max_steps": 3, "clip": 1e9}
    one, _ = train(tmp_path / "one", **changes)
    four, _ = train(tmp_path / "four", accumulation=4, **changes)
    assert (weights(one) - weights(four)).abs().max() < 1e-5
    assert (weights(one) - weights(tiny_model())).abs().max() > 1e-3


def test_the_newest_checkpoints_are_kept_and_a_used_folder_is_refused(tmp_path):
    train(tmp_path, keep_last=2, checkpoint_every=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 6]
    with pytest.raises(ValueError, match="holds checkpoints of a run"):
        train(tmp_path)
    with pytest.raises(ValueError, match="made with seed 0, now it is 7"):
        train(tmp_path, resume=True, seed=7)
    other = LLaDAModelLM(LLaDAConfig(**{**tiny_model().config.to_dict(), "d_model": 32, "dtype": None}))
    with pytest.raises(ValueError, match="made with a model of d_model 16, now it is 32"):
        train(tmp_path, resume=True, model=other)


def test_an_interrupt_writes_a_checkpoint(tmp_path):
    def interrupt(line):
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGINT)

    _, result = train(tmp_path, report=interrupt, checkpoint_every=100, log_seconds=0.0)
    assert result.interrupted and result.step == 4
    assert [step for step, _ in checkpoints(tmp_path)] == [4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nan_stops_with_step_examples_and_checkpoint(tmp_path):
    model = tiny_model()

    def break_it(line):
        if line.startswith("step 3/"):
            with torch.no_grad():
                model.model.transformer.wte.weight.fill_(math.nan)

    with pytest.raises(NonFiniteLoss, match=r"step 4: the loss is nan.*examples \d+.*step-00000002"):
        train(tmp_path, model=model, report=break_it, log_seconds=0.0)


def test_validation_is_fixed_and_leaves_the_weights_alone(tmp_path):
    lines = []
    held_out = tiny_data(seed=1)
    quiet, _ = train(tmp_path / "quiet")
    looked, result = train(tmp_path / "looked", valid=held_out, valid_every=2, valid_rows=4, report=lines.append)
    assert torch.equal(weights(quiet), weights(looked))
    records = [json.loads(line) for line in (tmp_path / "looked" / "metrics.jsonl").read_text().splitlines()]
    bounds = [r for r in records if r["kind"] == "valid"]
    assert [b["step"] for b in bounds] == [2, 4, 6] and bounds[-1]["tokens"] > bounds[0]["tokens"]
    assert result.validation.bound == bounds[-1]["bound"] and 0 < result.validation.error < 1
    assert any("±" in line for line in lines)


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_context_is_learned(tmp_path, objective):
    """Each document counts upwards from a random start: one visible token tells all the others."""
    random = np.random.default_rng(0)
    tokens = (random.integers(0, 16, 400)[:, None] + np.arange(8)) % 16
    tokens = np.concatenate([np.full((400, 1), 21), tokens], axis=1).astype(np.uint16).ravel()
    data = Examples([Documents(tokens, np.arange(401) * 9, None, 21, 1)], 18)
    changes = {"max_steps": 200, "batch_size": 16, "log_every": 50, "checkpoint_every": 200, "objective": objective}
    config = settings(tmp_path, learning_rate=3e-2, **changes)
    fit(tiny_model(), None, data, None, config, mask_id=MASK, report=lambda line: None)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = math.log(16) / 8  # only the first token seen is unknown
    assert losses[-1] < 2.5 * best and losses[-1] > 0.9 * best


def test_ratio_by_hand():
    mean, error = ratio(torch.tensor([2.0, 6.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]))
    assert mean == pytest.approx(8 / 3)
    # residuals 2 - 8/3 and 6 - 16/3, n = 2
    assert error == pytest.approx(math.sqrt(2 * (2 * (2 / 3) ** 2) / 9))


def test_schedules_by_hand():
    def factor(name, step, **more):
        given = {"warmup_steps": 4, "decay_fraction": 0.5, "final_factor": 0.0, **more}
        return schedule_factor(name, step, 104, **given)

    assert [factor("wsd", s) for s in (0, 3, 4, 54, 79, 104)] == pytest.approx([0.2, 0.8, 1, 1, 0.5, 0])
    assert [factor("cosine", s) for s in (4, 54, 104)] == pytest.approx([1, 0.5, 0])
    assert factor("cosine", 54, final_factor=0.1) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor("constant", 99) == 1


def test_ema_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = EMA(model, decay=0.5)
    model.weight.data.fill_(2.0)
    ema.update(model, 0)  # decay (1 + 0) / (10 + 0)
    assert ema.weights["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    ema.update(model, 100)  # decay 0.5
    assert ema.weights["weight"].item() == pytest.approx(0.5 * 1.9 + 0.5 * 2)
    ema.swap(model)
    assert model.weight.item() == pytest.approx(1.95) and ema.weights["weight"].item() == 2.0


@pytest.mark.parametrize("tying", [True, False])
def test_each_parameter_has_one_optimizer_and_decay(tying):
    model = tiny_model(tying)
    groups = parameter_groups(model)
    assert len(groups["head"]) == (0 if tying else 1) and len(groups["matrices"]) == 14
    adamw, muon = build_optimizers(
        model, "muon", learning_rate=1e-3, muon_learning_rate=None, weight_decay=0.1, betas=(0.9, 0.95), momentum=0.95
    )
    held = [p for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == len(set(map(id, held)))
    assert id(model.model.transformer.wte.weight) in {id(p) for p in adamw.param_groups[-1]["params"]}
    assert adamw.param_groups[-1]["weight_decay"] == 0


def test_experts_are_moved_by_adamw_under_muon():
    """A regression test: pretraining a mixture of experts with the default optimizer ended in Muon's own refusal."""
    model, _ = dlm.load(FIXTURES / "families" / "llada2", device="cpu", dtype="float32")
    rates = {
        "learning_rate": 1e-3,
        "muon_learning_rate": None,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "momentum": 0.9,
    }
    adamw, muon = build_optimizers(model, "muon", **rates)
    decayed, plain = (group["params"] for group in adamw.param_groups)
    assert {one.ndim for one in muon.param_groups[0]["params"]} == {2} and 3 in {one.ndim for one in decayed}
    held = [*decayed, *plain, *muon.param_groups[0]["params"]]
    assert len(held) == len(set(map(id, held))) == len([one for one in model.parameters() if one.requires_grad])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"muon_learning_rate": -1.0}, "muon_learning_rate is -1.0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"beta2": 1.0}, "beta2 is 1.0: no gradient"),
        ({"seed": 2**64}, "give a number below 2"),
        ({"ema": 1.5}, "between 0 and 1"),
        ({"batch_size": 6, "accumulation": 4}, "cannot be cut into"),
    ],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)
