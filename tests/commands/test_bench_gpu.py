"""The measurement of a GPU, rehearsed on a processor: parts that fail or are late end alone."""

import json
import time

import pytest
import torch

from benchmarks import gpu, gpu_parts


def rehearse(folder, *parts):
    """The lines of results of these parts (NAME:SECONDS) at the shape `small`."""
    folder.joinpath(".tests_done").touch()
    options = ["--out", str(folder), "--device", "cpu", "--config", "small", "--dtype", "float32", "--gen-length", "16"]
    options += ["--train-config", "small", "--until", str(time.time() + 60), "--parts", *parts]
    assert gpu_parts.perform(options) == 0
    return [json.loads(line) for line in folder.joinpath("results.jsonl").read_text().splitlines()]


def test_each_part_ends_alone(tmp_path, monkeypatch):
    def fails(bench):
        raise RuntimeError("a broken kernel")

    def sleeps(bench):
        time.sleep(9)

    monkeypatch.setitem(gpu_parts.PARTS, "equal", fails)
    monkeypatch.setitem(gpu_parts.PARTS, "none", sleeps)
    lines = rehearse(tmp_path, "equal:5", "none:2", "machine:5")
    said = [(line["part"], line["state"]) for line in lines if "state" in line]
    ends = {"equal": "failed", "none": "late", "machine": "done"}
    assert said == [(part, state) for part, end in ends.items() for state in ("begun", end)]
    assert "a broken kernel" in next(line["error"] for line in lines if "error" in line)
    assert next(line["torch"] for line in lines if "torch" in line) == torch.__version__
    assert gpu.reached(tmp_path / "results.jsonl") == ["equal", "none", "machine"]


def test_passes_of_each_kind_add_up_to_a_generation(tmp_path):
    """16 places in one block: `dual` computes all 48 slots once and the block's 16 after that."""
    cells = [line for line in rehearse(tmp_path, "dual:30") if line.get("name") == "graphs"]
    assert [(cell["turns"], set(cell["ms"])) for cell in cells] == [(16, {"48", "16"}), (2, {"48", "16"})]
    for cell in cells:
        added = cell["ms_mean"]["48"] + (cell["turns"] - 1) * cell["ms_mean"]["16"]
        assert cell["estimated_seconds"] == pytest.approx(added / 1e3, abs=2e-3)
        assert cell["estimated_seconds"] <= cell["seconds"] + 2e-3


def test_names_of_parts():
    assert gpu.names_of(["none", "machine"]) == ["machine", "none"]
    assert gpu.names_of(["quick"]) == list(gpu.QUICK) and gpu.names_of(["all"]) == list(gpu.PARTS)
    assert set(gpu.PARTS) == set(gpu_parts.PARTS)
    with pytest.raises(ValueError, match="part 'nine' is none of all, quick, machine"):
        gpu.names_of(["nine"])
