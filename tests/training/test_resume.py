"""Exact resume: what must be the same, what may change, and damage to a checkpoint that is noticed file by file."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dlm.data.documents import Documents
from dlm.data.examples import Examples
from dlm.data.streaming import StreamedExamples, StreamedSource
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.training.ema import EMA
from dlm.training.finite import NonFiniteLoss
from dlm.training.state import EMA_FILE, STATE_FILE, Damaged, _seal, checkpoints, read_state, verify
from dlm.training.trainer import fit
from tests.helpers.ranks import MASK, settings, tiny_data, tiny_model
from tests.helpers.training import fresh_accelerate, train, weights

assert fresh_accelerate  # a fixture for every test here
FEW = {"max_steps": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a run of two steps, both kept."""
    folder = tmp_path_factory.mktemp("kept")
    train(folder, **FEW)
    return folder


@pytest.fixture
def run(kept, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


def resume(output, *, model=None, data=None, report=lambda line: None, skip_damaged=False, mask_id=MASK, **changes):
    config = settings(output, **{**FEW, "max_steps": 3, **changes})
    return fit(
        model or tiny_model(), None, data or tiny_data(), None, config, mask_id=mask_id, resume=True, report=report,
        skip_damaged=skip_damaged,
    )  # fmt: skip


def documents(tokens, starts, target=None):
    return Examples([Documents(tokens, starts, target, 21, len(tokens))], 16)


def changed_data(kind):
    """The documents of `tiny_data` with the same number of examples, and one thing else."""
    [part] = tiny_data().documents
    tokens, starts = part.tokens.copy(), part.starts
    if kind == "contents":
        tokens[5] = (tokens[5] + 1) % 21
    elif kind == "order":
        pieces = np.split(tokens, starts[1:-1])
        tokens = np.concatenate(pieces[::-1])
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces[::-1]])])
    elif kind == "targets":
        target = tokens != 21
        target[7] = not target[7]
        return documents(tokens, starts, target)
    return documents(tokens, starts)


@pytest.mark.parametrize("kind", ["contents", "order", "targets"])
def test_other_data_with_the_same_counts_are_refused(run, kind):
    """Fault: a resume compared the number of examples alone."""
    data = changed_data(kind)
    assert data.signature == tiny_data().signature
    with pytest.raises(ValueError, match=r"made on other data.*tokens, targets or order differ"):
        resume(run, data=data)


@pytest.mark.parametrize(
    "changes",
    [{"weight_decay": 0.2}, {"momentum": 0.9}, {"beta1": 0.8}, {"beta2": 0.99}, {"clip": 2.0}, {"optimizer": "adamw"},
     {"precision": "bf16"}, {"ema": 0.9}, {"ema": 0.0}, {"seed": 7}],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)  # fmt: skip
def test_every_setting_that_changes_the_result_is_refused_by_name(run, changes):
    """Fault: weight_decay, momentum and betas were ignored, and recorded as changed."""
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=rf"step-00000002 was made with {name} .*, now it is {value}: an exact"):
        resume(run, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_heads", 1), ("rope_theta", 500.0), ("max_sequence_length", 32), ("rms_norm_eps", 1e-3), ("eos_token_id", 3)],
)
def test_another_model_of_the_same_shapes_is_refused_by_name(run, field, value):
    """Fault: --n-heads, --rope-theta, --max-sequence-length changed what the same weights compute."""
    fields = tiny_model().config.to_dict() | {"dtype": None, field: value}
    if field == "n_heads":
        fields["n_kv_heads"] = None
    with pytest.raises(ValueError, match=f"made with .*a model of {field} .*, now it is {value}"):
        resume(run, model=LLaDAModelLM(LLaDAConfig(**fields)))


def test_another_mask_is_refused(run):
    """Fault: mask_token_id changed between two starts without a word."""
    with pytest.raises(ValueError, match=f"made with mask_id {MASK}, now it is 20"):
        resume(run, mask_id=20)


def test_what_may_change_is_applied_and_said(run):
    told = []
    resume(run, learning_rate=1e-4, report=told.append, log_every=7, accumulation=2)
    assert "from here on max_steps is 3 (was 2), learning_rate is 0.0001 (was 0.01)" in "\n".join(told)
    assert read_state(checkpoints(run)[-1][1])["config"]["learning_rate"] == 1e-4


def test_a_run_that_time_limits_goes_on_at_the_saved_second(tmp_path, monkeypatch):
    """The first steps after a resume had the rate of a run that begins, and a run whose time was over took one more."""

    def go(output, **more):
        clock = iter(range(10_000))  # a step takes one second
        monkeypatch.setattr("dlm.training.trainer.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
        config = settings(output, max_steps=1000, max_seconds=8.0, schedule="wsd", decay_fraction=1.0, warmup_steps=0,
                          checkpoint_every=3, keep_last=9, log_every=1)  # fmt: skip
        model = tiny_model()
        result = fit(model, None, tiny_data(), None, config, mask_id=MASK, report=len, **more)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return result, [record["learning_rate"] for record in records], weights(model)

    whole, rates, final = go(tmp_path / "whole")
    assert whole.step == 8 and rates[5] == pytest.approx(rates[0] * (1 - 5 / 8))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step, folder in checkpoints(tmp_path / "killed"):
        if step > 3:
            shutil.rmtree(folder)
    resumed, again, same = go(tmp_path / "killed", resume=True)
    assert (resumed.step, again) == (8, rates) and torch.equal(final, same)
    assert go(tmp_path / "killed", resume=True)[0].step == 8  # its time is over


def test_streamed_data_that_changed_are_refused(tmp_path):
    """Fault: a streamed source was known by its name alone."""

    def data(shift):
        rows = [(np.arange(9) + number + shift) % 20 for number in range(40)]

        def read(skip):
            return ((number, rows[number], rows[number] >= 0) for number in range(skip, len(rows)))

        return StreamedExamples([StreamedSource("memory", read)], 16, 7)

    fit(tiny_model(), None, data(0), None, settings(tmp_path, **FEW), mask_id=MASK, report=lambda line: None)
    with pytest.raises(ValueError, match="made on other data: the streamed examples"):
        resume(tmp_path, data=data(1))
    assert resume(tmp_path, data=data(0)).step == 3


# ------------------------------------------------------------------------------------------------------------ damage


def flip(path, place=None):
    """Flip one bit in the middle of a file, or of its byte `place`."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def zero_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


DAMAGE = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "zeroed half": zero_half,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}  # fmt: skip
FILES = ("model.safetensors", "optimizer.bin", "optimizer_1.bin", EMA_FILE, "random_states_0.pkl", STATE_FILE)


def test_every_file_of_a_checkpoint_is_named_here(run):
    last = checkpoints(run)[-1][1]
    assert sorted(file.name for file in last.iterdir()) == sorted(FILES)
    assert sorted(read_state(last)["files"]) == sorted(set(FILES) - {STATE_FILE})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_file_name(run, kind, name):
    """Fault: a flipped bit, a zeroed half and a missing RNG file were loaded without a word."""
    last = checkpoints(run)[-1][1]
    DAMAGE[kind](last / name)
    with pytest.raises(Damaged, match=rf"step-00000002 is damaged \({name} .*--resume --skip-damaged"):
        verify(last)


def test_a_resume_refuses_what_is_damaged(run):
    flip(checkpoints(run)[-1][1] / "optimizer.bin")
    with pytest.raises(ValueError, match=r"step-00000002 is damaged \(optimizer.bin does not have the checksum"):
        resume(run)


def test_a_damaged_checkpoint_is_skipped_where_that_is_asked_for(run, tmp_path):
    """The run goes on from the one before, to the same bits, and the damaged one is kept aside."""
    told, model = [], tiny_model()
    flip(checkpoints(run)[-1][1] / "model.safetensors")
    resume(run, model=model, report=told.append, skip_damaged=True, max_steps=2)
    assert "step-00000002 is damaged (model.safetensors does not have the checksum" in told[0]
    assert told[0].endswith("step-00000002.damaged") and "step-00000001 at step 1" in told[1]
    assert (run / "checkpoints" / "step-00000002.damaged" / STATE_FILE).is_file()
    whole, _ = train(tmp_path / "whole", **FEW)
    assert torch.equal(weights(whole), weights(model))
    assert [step for step, _ in checkpoints(run)] == [1, 2]


@pytest.mark.parametrize("kind", ["nan", "shape", "name"])
def test_a_moving_average_that_cannot_be_is_refused(run, kind):
    """Fault: NaN in the average was loaded, one of another shape was broadcast."""
    last = checkpoints(run)[-1][1]
    average = load_file(last / EMA_FILE)
    name = next(name for name, tensor in average.items() if tensor.ndim == 2)
    if kind == "nan":
        average[name][0, 0] = math.nan
    elif kind == "shape":
        average[name] = average[name][:1].clone()
    else:
        average["other"] = average.pop(name)
    save_file(average, last / EMA_FILE)
    seal_again(last)
    words = {"nan": "not finite", "shape": "of shape", "name": "on one side only"}
    with pytest.raises(ValueError, match=f"the moving average in .*step-00000002.*{words[kind]}"):
        resume(run)


def seal_again(folder, **changes):
    """Write `trainer.json` anew, with these entries in place of its own, and right checksums."""
    state = json.loads((folder / STATE_FILE).read_text())
    _seal(folder, {key: value for key, value in state.items() if key not in ("files", "sha256")} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": [0, -1]}, "position .*not negative"),
        ({"position": "0"}, "position of type str"),
        ({"step": "2"}, "step '2'"),
        ({"step": 1}, "says step 1"),
        ({"seconds": -1.0}, "seconds -1.0"),
        ({"tokens": True}, "tokens True"),
        ({"config": []}, "config of type list"),
        ({"format": 9}, "format 9"),
    ],
)
def test_wrong_types_in_trainer_json_are_one_line(run, changes, words):
    """Fault: a negative position was taken as one, other types were tracebacks."""
    seal_again(checkpoints(run)[-1][1], **changes)
    with pytest.raises(ValueError, match=rf"damaged \({STATE_FILE} .*{words}"):
        resume(run)


def test_a_position_behind_the_data_is_refused(run):
    seal_again(checkpoints(run)[-1][1], position=[0, 10_000])
    with pytest.raises(ValueError, match=r"position \[0, 10000\] is none of these data"):
        resume(run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(run):
    (checkpoints(run)[-1][1] / "model.safetensors").chmod(0)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(Permission denied\)"):
        resume(run, skip_damaged=True)


def test_unreadable_is_not_damaged(run, monkeypatch):
    """Fault: a file without permission was called damaged, with the advice to remove the folder."""
    from dlm.training import state

    def refused(path, sync=False):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(state, "checksum", refused)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): nothing says.*damaged"):
        resume(run, skip_damaged=True)
    assert len(checkpoints(run)) == 2


@pytest.mark.parametrize("damage", [b'{"step": 1, "lo', b"\xff\xfe\x00", b"[]\n", b'{"step": "x"}\n', b"[" * 9000])
def test_a_damaged_log_does_not_block_a_good_resume(run, damage):
    """Fault: metrics.jsonl with a broken line ended the resume in a traceback."""
    log, told = run / "metrics.jsonl", []
    log.write_bytes(log.read_bytes() + damage + b"\n" + b'{"kind": "train", "step": 9}\n')
    resume(run, report=told.append)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    assert any("1 damaged lines are left out" in line for line in told)


@pytest.mark.parametrize("where", ["weights", "average"])
def test_numbers_that_the_last_update_breaks_are_not_kept(tmp_path, monkeypatch, where):
    """Fault: an infinity that appeared in the last update was exported, and its checkpoint called good."""
    update = EMA.update

    def breaks(self, model, step):
        update(self, model, step)
        if step == 1:
            held = list(model.parameters()) if where == "weights" else list(self.weights.values())
            held[3].data.view(-1)[0] = math.inf

    monkeypatch.setattr(EMA, "update", breaks)
    with pytest.raises(NonFiniteLoss, match=r"step 2: its update left numbers that are not finite in .*step-00000001"):
        train(tmp_path, **FEW)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
