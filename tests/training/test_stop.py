"""Signals in the middle of a long operation, ranks that are lost or fail, and what a launcher was asked for."""

import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from dlm.training import accelerator as accelerators
from dlm.training import recipe
from dlm.training.state import checkpoints
from dlm.training.trainer import Run, fit
from dlm.utils import launch
from tests.helpers.ranks import MASK, settings, tiny_data, tiny_model
from tests.helpers.recipes import fresh, options
from train import pretrain

assert fresh  # a fixture for every test here
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked, so that imports are paid once")
SLACK = 8.0  # seconds, on a machine that does other things too


class Child:
    """A forked process: what it wrote to standard error, and how it ended."""

    def __init__(self, folder, run, **environment):
        tqdm.set_lock(threading.RLock())  # its own is shared with forked children
        self.log = folder / f"stderr-{len(list(folder.iterdir()))}"
        self.log.touch()
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environment)
            AcceleratorState._reset_state(reset_partial_state=True)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.stderr = open(self.log, "w", buffering=1)  # noqa: SIM115
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            os._exit(run() or 0)

    def wait_for(self, words, seconds=90.0):
        """Seconds until the words are written."""
        began = time.perf_counter()
        while words not in self.log.read_text():
            assert time.perf_counter() - began < seconds, self.log.read_text()
            time.sleep(0.02)
        return time.perf_counter() - began

    def end(self, seconds=90.0):
        """(exit code, seconds until then); a signal's number is negative."""
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status), time.perf_counter() - began
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s: {self.log.read_text()}")


def long_run(output, seconds):
    """A run whose second step is one operation of about so many seconds, in which Python runs no handler."""
    one, began = torch.randn(512, 512), time.perf_counter()
    one @ one
    side = int(512 * (seconds / max(time.perf_counter() - began, 1e-4)) ** (1 / 3))
    step = Run.train_step

    def slow(self, made):
        if self.step == 1:
            print("begun", file=sys.stderr)
            matrix = torch.empty(min(side, 12000), min(side, 12000)).fill_(1e-3)
            matrix @ matrix
            print("operation done", file=sys.stderr)
        return step(self, made)

    Run.train_step = slow
    config = settings(output, max_steps=50, checkpoint_every=100)
    result = fit(tiny_model(), None, tiny_data(), None, config, mask_id=MASK, report=lambda line: None)
    return 3 if result.interrupted and result.step == 2 else 4


def test_a_signal_in_a_long_operation_is_answered_and_kept(tmp_path):
    """Fault: Ctrl-C in a slow step was answered when the step was over, if at all."""
    child = Child(tmp_path, lambda: long_run(tmp_path / "run", 4.0))
    child.wait_for("begun")
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait_for("SIGTERM: this step is finished and a checkpoint written; a second one stops at once") < SLACK
    assert "operation done" not in child.log.read_text()  # it was answered in the middle
    assert child.end()[0] == 3
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(tmp_path, number):
    child = Child(tmp_path, lambda: long_run(tmp_path / "run", 60.0))
    child.wait_for("begun")
    os.kill(child.pid, number)
    child.wait_for("this step is finished")
    os.kill(child.pid, number)
    code, took = child.end()
    assert code == 128 + number and took < SLACK and "stopped in the middle of a step" in child.log.read_text()
    assert "operation done" not in child.log.read_text()


# -------------------------------------------------------------------------------------------------- several processes


def two_ranks(tmp_path, run):
    """Two forked processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    return [Child(tmp_path, lambda r=r: run(r), **shared, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]


def recipe_that(tmp_path, happens, **changes):
    """A recipe on this rank in which `happens(rank)` comes before the third step."""
    step = Run.train_step

    def watched(self, made):
        if self.step == 2:
            happens(self.accelerator.process_index)
        return step(self, made)

    def run(rank):
        Run.train_step = watched
        settings = {"max_steps": 400, "checkpoint_every": 2, "valid_every": 0, "tracker": "none", **changes}
        return pretrain.main(options(tmp_path, "run", **settings))

    return run


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_all_within_seconds_with_its_number(tmp_path, lost):
    """Fault: the others waited for ever, or ended in a traceback that named no rank."""

    def killed(rank):
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)

    ranks = two_ranks(tmp_path, recipe_that(tmp_path, killed))
    assert ranks[lost].end()[0] == -signal.SIGKILL
    code, took = ranks[1 - lost].end()
    told = ranks[1 - lost].log.read_text()
    assert code == 1 and took < SLACK and "Traceback" not in told, told
    assert f"rank {lost} of 2 is gone (killed, or out of memory), so this job ends: go on with --resume" in told


def test_an_error_of_one_rank_is_one_line_that_names_it(tmp_path):
    """Fault: the error of one rank was followed by tracebacks of the others."""

    def fails(rank):
        if rank == 1:
            raise ValueError("line 7 of the data is damaged")

    ranks = two_ranks(tmp_path, recipe_that(tmp_path, fails))
    codes = [rank.end()[0] for rank in ranks]
    told = "".join(rank.log.read_text() for rank in ranks)
    lines = [line for line in told.splitlines() if line.startswith("pretrain: ")]
    assert lines == ["pretrain: rank 1: line 7 of the data is damaged"] and "Traceback" not in told, told
    assert all(code in (1, 2) for code in codes)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line(tmp_path):
    ranks = two_ranks(tmp_path, recipe_that(tmp_path, lambda rank: None, batch_size=3))
    assert [rank.end()[0] for rank in ranks] == [2, 2]
    told = "".join(rank.log.read_text() for rank in ranks)
    assert told.count("batch_size 3 is not a multiple of 2 processes") == 1, told


# ----------------------------------------------------------------------------------------------------- the launcher


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["python", "bin/accelerate", "launch", "--cpu", "--num_processes", "2", "train/sft.py"], 2),
        (["accelerate", "launch", "--num_processes=8", "train/sft.py"], 8),
        (["torchrun", "--nproc_per_node", "4", "train/sft.py"], 4),
        (["accelerate", "launch", "--config_file", "{file}", "train/sft.py"], 3),
        (["accelerate", "launch", "train/sft.py"], None),
        (["pytest", "-n", "4"], None),
    ],
)
def test_what_the_launcher_was_asked_for(tmp_path, monkeypatch, words, number):
    """Fault: `accelerate launch --cpu --num_processes 2` runs one process, and nothing said so."""
    (tmp_path / "a.yaml").write_text("num_processes: 3\n")
    words = [word.format(file=tmp_path / "a.yaml") for word in words]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(launch, "_command_line", lambda pid: words)
    assert launch.launcher_processes() == number


@pytest.mark.parametrize(
    ("precision", "quick", "taken"), [("auto", True, "bf16"), ("auto", False, "no"), ("bf16", False, "bf16")]
)
def test_auto_takes_bf16_where_the_processor_has_it(tmp_path, monkeypatch, precision, quick, taken):
    """Was: bf16 by default, many times slower than fp32 on a processor without its instructions."""
    monkeypatch.setattr(accelerators, "has_kernels", lambda dtype: quick)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerators.with_precision(settings(tmp_path, precision=precision)).precision == taken


@pytest.mark.parametrize(
    ("precision", "quick", "warned"), [("bf16", False, True), ("bf16", True, False), ("no", False, False)]
)
def test_bf16_on_a_processor_without_it_is_said(monkeypatch, precision, quick, warned):
    """Was: bf16 is slow on such processors, and nothing said so."""
    monkeypatch.setattr(recipe, "has_kernels", lambda dtype: quick)
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"), mixed_precision=precision)
    assert ("--precision fp32 is faster" in recipe.processes_line(accelerator)) == warned


@pytest.mark.parametrize(
    ("own", "parent", "typed"),
    [
        (["/e/bin/python", "/e/bin/dlm", "train", "sft", "--data", "a b"], [], "dlm train sft --data 'a b' --resume"),
        (["python", "-m", "dlm", "train", "sft", "--data", "a b"], [], "python -m dlm train sft --data 'a b' --resume"),
        (["python", "train/sft.py", "--data", "a b"], [], "python train/sft.py --data 'a b' --resume"),
        (
            ["/e/bin/python", "-u", "train/sft.py", "--data", "a b"],
            ["/e/bin/python", "/e/bin/accelerate", "launch", "--cpu", "train/sft.py", "--data", "a b"],
            "accelerate launch --cpu train/sft.py --data 'a b' --resume",
        ),
        (["pytest", "tests"], [], "dlm train sft --data 'a b' --resume"),
    ],
)
def test_the_command_that_was_typed(monkeypatch, own, parent, typed):
    """Fault: the hint for going on named `python -m train.sft`, whatever had been typed."""
    monkeypatch.setattr(sys, "orig_argv", own)
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/e/bin/{name}")
    monkeypatch.setattr(launch, "_command_line", lambda pid: parent)
    monkeypatch.setattr(launch, "launched", lambda: bool(parent))
    assert launch.typed_command(["--data", "a b"], "dlm train sft", more=["--resume"]) == typed
    assert launch.typed_command(["--data", "a b"], "x", without=["a b"], more=["--data"]).endswith(" --data")
