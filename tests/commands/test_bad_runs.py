"""Bad input to a run: damaged or misfit checkpoints, full disks. One line that says what to do; exit code 2."""

import os
import re
import shutil
import subprocess

import pytest
from accelerate.state import AcceleratorState

from dlm.training.state import EMA_FILE, STATE_FILE, checkpoints
from tests.helpers.recipes import fresh, options
from train import pretrain

assert fresh  # a fixture for every test here


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of four steps that ended."""
    folder = tmp_path_factory.mktemp("finished")
    cache, os.environ["DLM_CACHE"] = os.environ.get("DLM_CACHE"), str(folder / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert pretrain.main(options(folder, "run")) == 0
    if cache is not None:
        os.environ["DLM_CACHE"] = cache
    return folder


def fails(capsys, argv) -> str:
    """The one line of a run that fails."""
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert pretrain.main(argv) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("pretrain: ") and "Traceback" not in told, told
    return told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "muon"}, ["step-00000004 was made with optimizer adamw, now it is muon"]),
        ({"d_model": 32}, ["step-00000004 was made with d_model 16, now it is 32", "start a new output folder"]),
        ({"n_layers": 1}, ["step-00000004 was made with n_layers 2, now it is 1"]),
        ({"n_heads": 1}, ["made with n_heads 2, now it is 1", "a model of n_heads 2, now it is 1"]),
        ({"sequence_length": 16}, ["made with sequence_length 24, now it is 16"]),
        ({"seed": 3}, ["made with seed 0, now it is 3"]),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, finished, capsys, changes, words):
    shutil.copytree(finished / "run", tmp_path / "run")
    told = fails(capsys, options(tmp_path, "run", resume=True, max_steps=6, **changes))
    assert all(word in told for word in words), told


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", EMA_FILE, STATE_FILE])
@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_a_damaged_checkpoint_says_which_and_the_one_before_goes_on(tmp_path, finished, capsys, name, kind):
    shutil.copytree(finished / "run", tmp_path / "run")
    [_, (_, last)] = checkpoints(tmp_path / "run")
    argv = options(tmp_path, "run", resume=True, max_steps=5)
    (last / name).write_bytes((last / name).read_bytes()[:-60])
    if kind == "gone":
        (last / name).unlink()
    assert f"the checkpoint {last} is damaged ({name} " in fails(capsys, argv)
    if kind == "cut":
        AcceleratorState._reset_state(reset_partial_state=True)
        assert pretrain.main([*argv, "--skip-damaged"]) == 0  # what the line says
        assert last.with_name("step-00000004.damaged").is_dir()


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): the folder of a disk of that size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can make a small disk")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (24, "tokenized data cannot be written to .*No space left on device.*DLM_CACHE"),
        (100, "step 2 cannot be written.*the last good one is none yet. Make room, then go on with --resume"),
        (240, "step 4 cannot be written.*the last good one is .*step-00000002. Make room, then go on with --resume"),
        (440, "run/model cannot be written.*make room, then go on with --resume"),
    ],
)
def test_a_full_disk(tmp_path, small_disk, capsys, monkeypatch, size, message):
    """Wherever the room ends: tokens, a checkpoint, the model. What was whole stays, and the run goes on from there."""
    disk = small_disk(size)
    monkeypatch.setenv("DLM_CACHE", str(disk / "cache"))
    argv = options(tmp_path, "disk/run", tracker="none")
    told = fails(capsys, argv)
    assert re.search(message, told), told
    assert not [child for child in disk.rglob(".*-*") if child.is_dir()]  # no half-written folder keeps the room
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert pretrain.main([*argv, "--resume"]) == 0
