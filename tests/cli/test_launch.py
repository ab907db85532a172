"""`dlm launch`: the end of several processes is one line that names the rank, never a stack of the launcher."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dlm.cli import launch, main
from dlm.utils import peers
from tests.helpers import commandline
from tests.helpers.commandline import ENVIRONMENT, ROOT

tokenizer, checkpoint = commandline.tokenizer, commandline.checkpoint  # fixtures
CONFIG = ROOT / "train" / "configs" / "accelerate" / "cpu_processes.yaml"


def ends(monkeypatch, exitcode, says=False):
    """`launch_command` that ends with a failed process of this exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def run(args):
        if says:
            assert peers.first_to_say() and not peers.first_to_say()  # the second process is silent
        failure = ProcessFailure(local_rank=1, pid=9, exitcode=exitcode, error_file="none")
        raise ChildFailedError("train/sft.py", {1: failure})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", run)
    return ["launch", "--num_processes", "2", "train", "sft"]


@pytest.mark.parametrize(
    ("exitcode", "says", "code", "line"),
    [
        (-9, False, 1, "dlm launch: rank 1 of 2 was ended by SIGKILL (killed, or out of memory), so this job ends"),
        (-9, True, 1, ""),  # another rank has said it
        (2, True, 2, ""),
        (1, False, 1, ""),
    ],
)
def test_a_failed_process_ends_in_one_line(monkeypatch, capsys, exitcode, says, code, line):
    """Fault: accelerate's launcher printed its own stack after the line of the process."""
    assert main.main(ends(monkeypatch, exitcode, says)) == code
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == bool(line) and peers.SAID not in os.environ


def test_recipes_are_started_by_name_and_scripts_by_file(monkeypatch):
    args = launch._parsed(["--num_processes", "2", "train", "sft", "--lora", "4"])
    assert (args.module, args.training_script) == (True, "dlm")
    assert args.training_script_args == ["train", "sft", "--lora", "4"]
    args = launch._parsed([str(ROOT / "train" / "sft.py"), "--lora", "4"])
    assert args.training_script.endswith("sft.py") and not args.module and args.training_script_args == ["--lora", "4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py"], "no script nowhere.py"),
        (["--num_processes", "x", "train", "sft"], "invalid int value: 'x'"),
        (["--num_processes", "2"], "training_script"),
    ],
)
def test_refusals_are_one_line(capsys, words, message):
    assert main.main(["launch", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dlm: error: ") and message in error and error.count("\n") == 1


def started(tmp_path, checkpoint, *options):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 64)
    words = [
        "--data", "a.jsonl", "--model", str(checkpoint), "--output", "out", "--max-steps", "100000",
        "--precision", "no", "--tracker", "none", "--sample-every", "0", *options,
    ]  # fmt: skip
    command = [sys.executable, "-m", "dlm", "launch", "--config_file", str(CONFIG), "train", "sft", *words]
    with (tmp_path / "log").open("w") as log:
        return subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_two_real_processes_with_a_mistake(tmp_path, checkpoint):
    assert started(tmp_path, checkpoint, "--batch-size", "3").wait(120) == 2
    log = (tmp_path / "log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("sft: ")]
    assert len(lines) == 1 and lines[0].startswith("sft: rank ") and "Traceback" not in log, log


@pytest.mark.slow
def test_two_real_processes_one_of_which_is_killed(tmp_path, checkpoint):
    psutil = pytest.importorskip("psutil")
    job = started(tmp_path, checkpoint, "--batch-size", "4")
    limit = time.monotonic() + 120
    while "warning: max_steps" not in (tmp_path / "log").read_text() and time.monotonic() < limit:
        time.sleep(0.2)
    [killed] = [child for child in psutil.Process(job.pid).children() if child.environ().get("RANK") == "1"]
    killed.send_signal(signal.SIGKILL)
    assert job.wait(60) == 1
    log = (tmp_path / "log").read_text()
    lines = [line for line in log.splitlines() if "so this job ends" in line]
    assert len(lines) == 1 and "rank 1 of 2" in lines[0] and "Traceback" not in log, log
