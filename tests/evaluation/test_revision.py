"""`dlm eval revision`: the damage by hand, and the command on a tiny model."""

import json

import numpy as np
import pytest

from eval.revision import damaged, main
from tests.helpers import commandline

tokenizer, checkpoint = commandline.tokenizer, commandline.checkpoint  # fixtures


def test_damage_replaces_a_share_by_other_tokens():
    clean, ids = np.tile(np.arange(10), (2000, 1)), np.arange(10)
    wrong = damaged(clean, 0.1, ids, np.random.default_rng(0))
    changed = wrong != clean
    assert changed.mean() == pytest.approx(0.1, abs=0.01) and set(wrong[changed]) == set(range(10))
    assert (damaged(clean, 0.999999, ids, np.random.default_rng(0)) != clean).all()  # none by itself


def test_the_command_on_a_tiny_model(checkpoint, tmp_path, capsys):
    data, out = tmp_path / "held.txt", tmp_path / "revision.json"
    data.write_text(commandline.STORY * 4)
    words = ["--data", str(data), "--model", str(checkpoint), "--rows", "4", "--length", "8", "--device", "cpu"]
    words += ["--rules", "none,edit:0.5,verify:0.1,loop", "--gen-length", "8", "--steps", "4", "--out", str(out)]
    assert main([*words, "--texts", "0"]) == 0
    said, results = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["rule"] for row in results["repair"]] == ["edit:0.5", "verify:0.1", "loop"] and "mended" in said
    for row in results["repair"]:
        assert row["after"] == pytest.approx(row["before"] + row["change"])
    for bad, what in (
        (["--share", "0"], "--share is 0"), (["--rules", "edti:0.5"], "edit"), (["--rules", "edit:x"], "edit:x"),
        (["--rules", "none:1"], "takes no number"), ([], "no judge of its own"),
        (["--texts", "0", "--rows", "900"], "give fewer --rows"), (["--steps", "4,x"], "--steps is '4,x'"),
    ):  # fmt: skip
        assert main([*words, *bad]) == 2
        assert what in capsys.readouterr().err
