"""dlm bench sudoku: settings in turns over each puzzle, the fastest that is as good, and another's sampler."""

import json

import numpy as np
import pytest
import torch

import dlm
from benchmarks import sudoku as bench
from dlm.cli.main import main
from dlm.evaluation import sudoku
from tests.helpers import toys

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
# Fills the masks in one after the other, with the most probable token of each.
SAMPLER = """
class MDLMSamplerConfig:
    pass

class MDLMSampler:
    def __init__(self, model, tokenizer):
        self.model, self.mask = model, tokenizer.mask_token_id

    def infill(self, inputs, config, steps):
        import torch
        x = torch.tensor(inputs)
        assert steps == int((x == self.mask).sum())
        for place in (x[0] == self.mask).nonzero()[:, 0].tolist():
            x[0, place] = self.model(x).logits[0, place].argmax()
        return x
"""


def cells(text):
    return np.array([int(c) if c.isdigit() else 0 for c in text], np.int8)


@pytest.fixture(scope="module")
def model():
    changes = {
        "vocab_size": 19,
        "mask_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
        "max_sequence_length": 90,
    }
    return toys.tiny_model(3, dtype=torch.float32, **changes).eval()


def test_settings_take_turns_over_the_puzzles_and_the_fastest_that_is_as_good_is_found():
    """By hand: a clock that each call moves on; the third setting is faster still, and wrong."""
    now, order = [0.0], []

    def solver(name, seconds, right):
        def solve(puzzle):
            order.append(name)
            now[0] += seconds
            return cells(ANSWER) if right else puzzle, 51

        return solve

    found = {bench.ONE: solver("one", 8.0, True), "b": solver("b", 2.0, True), "c": solver("c", 1.0, False)}
    records = bench.compare(found, np.stack([cells(PUZZLE)] * 2), lambda: now[0])
    assert order == ["one", "b", "c"] * 2
    assert [record["seconds"] for record in records] == [8, 2, 1]
    assert [record["times_faster"] for record in records] == [1, 4, 8]
    assert [record["solved"] for record in records] == [1, 1, 0] and records[0]["passes"] == 51
    assert bench.fastest(records)["setting"] == "b"


def test_each_setting_is_what_its_name_says(model):
    puzzle = cells(PUZZLE)
    found = bench.solvers(model, [0.0001], [3])
    assert list(found) == [bench.ONE, "all above 0.0001", "3 passes"]
    assert [solve(puzzle)[1] for solve in found.values()] == [51, 1, 3]


def test_another_sampler_fills_in_the_same_canvas(model, tmp_path):
    folder = tmp_path / "dllm" / "core" / "samplers"
    folder.mkdir(parents=True)
    (folder / "mdlm.py").write_text(SAMPLER)
    answer, passes = bench.peer(tmp_path, model)(cells(PUZZLE))
    given = cells(PUZZLE) > 0
    assert passes == 51 and (answer[given] == cells(PUZZLE)[given]).all()
    tokens = torch.from_numpy(sudoku.to_ids(cells(PUZZLE)[None])).long()
    first = int((tokens[0] == 0).nonzero()[0])
    with torch.inference_mode():
        assert answer[int(np.flatnonzero(first == sudoku.CELLS)[0])] == int(model.predict(tokens)[0, first].argmax())


def test_the_command(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sudoku, "test_puzzles", lambda count, clues, seed: np.stack([cells(PUZZLE)] * count))
    monkeypatch.setattr(dlm, "load", lambda path: (model, sudoku.make_tokenizer()))
    words = [
        "bench",
        "sudoku",
        "--model",
        "m",
        "--puzzles",
        "2",
        "--thresholds",
        "0.0001",
        "--json",
        str(tmp_path / "t"),
    ]
    assert main(words) == 0
    records = json.loads((tmp_path / "t").read_text())
    assert [(record["setting"], record["passes"]) for record in records] == [(bench.ONE, 51), ("all above 0.0001", 1)]
    assert "fastest within 2% of one cell a pass: all above 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    ([], "no model"),
    (["--model", "x", "--clues", "9-20"], "--clues is A-B"),
    (["--model", "x", "--thresholds", "y"], "are numbers"),
    (["--model", "x", "--puzzles", "0"], "--puzzles"),
])  # fmt: skip
def test_refusals(words, said, capsys):
    assert main(["bench", "sudoku", *words]) == 2
    assert said in capsys.readouterr().err
