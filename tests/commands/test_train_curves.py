"""Curves of runs: what is drawn is what was logged, and bad input is one line."""

import json
import xml.etree.ElementTree as ET

import pytest

from dlm.cli.main import main
from train.curves import names_of, picture, points, read_run, smoothed


def log(folder, records, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return str(folder)


SAME = {"kind": "train", "learning_rate": 1e-3, "grad_norm": 1.0}
TRAIN = [{**SAME, "step": step, "loss": 4.0 - step / 10} for step in (10, 20, 30)]
VALID = [{"kind": "valid", "step": 20, "bound": 2.5, "error": 0.5}]


def test_smoothed_is_the_mean_of_the_last_steps():
    assert smoothed([(1, 2.0), (2, 4.0), (3, 9.0), (9, 1.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5), (9, 1.0)]
    assert smoothed([(10, 2.0), (20, 4.0)], 1) == [(10, 2.0), (20, 4.0)]


def test_numbers_that_are_none_are_left_out():
    records = [{"kind": "train", "step": 1, "loss": None}, {"kind": "train", "step": 2, "loss": 1}]
    assert points(records, "train", "loss") == [(2, 1.0)]


def test_panels_are_those_that_the_runs_log(tmp_path, capsys):
    grpo = [{"kind": "rollouts", "step": s, "reward": s / 10, "tokens_per_pass": 2.0} for s in (1, 2)]
    a, b = log(tmp_path / "a", TRAIN + VALID), log(tmp_path / "b", grpo, tail='{"kind": "tra')  # being written
    out = tmp_path / "curves.svg"
    assert main(["train", "curves", a, b, "--out", str(out), "--smooth", "20"]) == 0
    assert capsys.readouterr().out == f"wrote {out}: a to step 30, b to step 2\n"
    tree, space = ET.fromstring(out.read_text()), "{http://www.w3.org/2000/svg}"
    panels = {panel.get("aria-label"): panel for panel in tree.findall(f"{space}svg")}
    assert list(panels) == [
        "Loss", "Validation: bound, nats a token", "Reward", "Tokens a pass of the answers",
        "Gradient norm, before it is clipped", "Learning rate",
    ]  # fmt: skip
    legends = {name: [t.text for t in panel.iter(f"{space}title")] for name, panel in panels.items()}
    assert legends["Loss"] == ["a"] and legends["Reward"] == ["b"]
    raw, mean = [path.get("d") for path in panels["Loss"].iter(f"{space}path") if path.get("stroke-opacity")][:2]
    heights = [[float(place.split()[1]) for place in line[1:].split("L")] for line in (raw, mean)]
    assert heights[1][1] == pytest.approx((heights[0][0] + heights[0][1]) / 2, abs=0.1)  # the mean of both steps
    bar = next(
        path.get("d") for path in panels["Validation: bound, nats a token"].iter(f"{space}path") if path.get("d")
    )
    assert bar.count("L") == 1 and "prefers-color-scheme" in out.read_text()


def test_runs_of_the_same_name_are_told_apart():
    assert names_of(["x/a", "y/a", "z/b/metrics.jsonl"]) == ["x/a", "y/a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file; give the output folder of a run"),
        ("", "has no record yet"),
        ('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n', "line 2 is no record of a run"),
        ("[1]\n", "line 1 is no record"),
        ('{"kind": "sample", "step": 1}\n', "no numbers to draw in run"),
    ],
)
def test_bad_runs_are_one_line(tmp_path, capsys, text, said):
    folder = tmp_path / "run"
    if text is not None:
        log(folder, [], tail=text)
    assert main(["train", "curves", str(folder), "--out", str(tmp_path / "c.svg")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "c.svg").exists()


def test_one_record_is_drawn(tmp_path):
    run = log(tmp_path / "run", TRAIN[:1])
    ET.fromstring(picture({"run": read_run(run)}))
