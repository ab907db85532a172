"""Speed at equal quality: which setting is the reference, and which is the fastest that is about as good."""

import json

import pytest

from dlm.benchmarking.equal import equal_quality
from dlm.benchmarking.results import Grid
from dlm.cli.main import main


def cell(method, block, steps, latency, perplexity, per_pass, **more):
    return {
        "method": method, "block_length": block, "steps": steps, "latency": latency, "perplexity": perplexity,
        "tokens_per_forward": per_pass, "nfe": int(16 / per_pass), "question": "q", **more,
    }  # fmt: skip


CELLS = [
    cell("none", 16, 16, 8.0, 12.0, 1.0),
    cell("none", 4, 16, 8.0, 10.0, 1.0),  # the better of two with one token a pass
    cell("none", 4, 8, 4.0, 30.0, 2.0),
    cell("dual", 4, 16, 3.0, 10.19, 1.0),  # within 2%
    cell("dual", 4, 8, 1.5, 10.21, 2.0),  # not
    cell("c2f", 4, 16, 2.0, 9.0, 1.0),  # better, and others have no such method
    cell("c2f", 2, 8, 0.5, 2.0, 2.0, degenerate=True),  # does not count
]


def test_by_perplexity():
    found = equal_quality(Grid("g", CELLS, {}))
    assert [(one.method, one.latency) for one in (found.slow, found.fast, found.plain)] == [
        ("none", 8.0), ("c2f", 2.0), ("dual", 3.0),
    ]  # fmt: skip
    said = found.lines(16)
    assert "2 tokens/s (1.00x), perplexity 10" in said[0] and "8 tokens/s (4.00x)" in said[1]
    assert "--cells none:4:16 dual:4:16" in said[2]


def test_by_accuracy_more_is_better():
    cells = [one | {"accuracy": {8.0: 0.5, 3.0: 0.49, 1.5: 0.48}.get(one["latency"], 0.1)} for one in CELLS[1:5]]
    found = equal_quality(Grid("g", cells, {}))
    assert (found.slow.accuracy, found.fast.latency) == (0.5, 3.0)


def test_the_command(tmp_path, capsys):
    results: dict = {}
    for one in CELLS:
        answers = results.setdefault(one["method"], [{"question": "q", "result": {}}])
        answers[0]["result"].setdefault(str(one["block_length"]), {})[str(one["steps"])] = one
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(results))
    assert main(["bench", "speed", "--equal-quality", str(file)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("one token a pass: none, block 4, 16 steps: 8.00 s, 2 tok")


def test_refusals(tmp_path, capsys):
    with pytest.raises(ValueError, match="no judged cell of none with one token a pass"):
        equal_quality(Grid("g", CELLS[2:], {}))
    assert main(["bench", "speed", "--equal-quality", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err
