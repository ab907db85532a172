"""Runs that are killed and checkpoints that are damaged: nothing is lost, everything is noticed.

The slow ones are `pytest -m slow tests/training/test_kills.py`: 30 kills of a trainer, 20 damages over all files of a
checkpoint, each met by a run. Ten kills of a grid are in tests/benchmarking/test_sweep.py.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from dlm.tokenizer import train_tokenizer
from dlm.training.state import Damaged, checkpoints, verify
from tests.helpers.recipes import STORIES, fresh, options, records, weights
from train import pretrain

assert fresh  # a fixture for every test here
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked, so that imports are paid once")


def train(argv):
    AcceleratorState._reset_state(reset_partial_state=True)
    return pretrain.main(argv)


def killed_run(tmp_path, kills, **changes):
    """A run killed at random moments and resumed, and one that was not: the same bits, and no torn checkpoint."""
    tqdm.set_lock(threading.RLock())  # its own is shared with forked children, and a killed one would never release it
    settings = {"max_steps": 40, "valid_every": 0, "checkpoint_every": 1, "estimator": "stratified", **changes}
    began = time.perf_counter()
    assert train(options(tmp_path, "whole", **settings)) == 0
    took = time.perf_counter() - began
    command, moments, reached = options(tmp_path, "parts", **settings, resume=True), random.Random(0), []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as sys.stdout:
                os._exit(train(command))
        time.sleep(moments.uniform(0.05, 3 * took / kills))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = checkpoints(tmp_path / "parts")
        for _, folder in found:
            verify(folder)  # whole, whenever the kill came
        reached.append(max([step for step, _ in found], default=0))
    assert reached == sorted(reached)
    assert train(command) == 0
    assert torch.equal(weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model"))
    losses = [[(r["step"], r["loss"]) for r in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    print(f"killed {kills} times; checkpoints reached: {reached}")


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    """SIGKILL, also during the writing of a checkpoint; the last start is left to finish."""
    killed_run(tmp_path, 5, optimizer="muon")


@pytest.mark.slow
def test_a_streamed_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    train_tokenizer(STORIES, 270).save_pretrained(tmp_path / "tokenizer")
    killed_run(tmp_path, 6, streaming=True, shuffle_window=7, tokenizer=tmp_path / "tokenizer")


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
    killed_run(tmp_path, 30, optimizer="muon", max_steps=60)


def damage(path, kind, dice):
    """Flip a bit, cut the file, zero a part or remove it, at a place that the dice choose."""
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        content = content[:place]
    elif kind == "zeros":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{kind} at {place} of {path.name}"


@pytest.mark.parametrize("damages", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_damage_anywhere_is_noticed_and_the_run_goes_on_from_before(tmp_path, capsys, damages):
    """Each damage is refused by file name; a run that may skip goes on from the one before, to the same bits."""
    dice = random.Random(damages)
    changes = {"valid_every": 0, "schedule": "constant", "tracker": "none"}
    assert train(options(tmp_path, "whole", max_steps=6, **changes)) == 0
    assert train(options(tmp_path, "run", **changes)) == 0
    names = sorted(file.name for file in checkpoints(tmp_path / "run")[-1][1].iterdir())
    for number in range(damages):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(tmp_path / "run", folder)
        last, name = checkpoints(folder)[-1][1], names[number % len(names)]
        before = (last / name).read_bytes()
        done = damage(last / name, ("flip", "cut", "zeros", "flip", "gone")[number % 5], dice)
        if (last / name).is_file() and (last / name).read_bytes() == before:
            continue  # zeros were zeros already
        with pytest.raises(Damaged, match=name.replace(".", r"\.")):
            verify(last)
        argv = options(tmp_path, folder.name, max_steps=6, resume=True, **changes)
        capsys.readouterr()
        assert train(argv) == 2, done
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"is damaged ({name} " in told, (done, told)
        assert train([*argv, "--skip-damaged"]) == 0, done
        assert last.with_name(last.name + ".damaged").is_dir()
        assert torch.equal(weights(tmp_path / "whole" / "model"), weights(folder / "model")), done
