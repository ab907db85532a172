"""Sudoku: the solver and generator against known facts, what the model sees, and the recipe and its evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm.data.examples import pack
from dlm.evaluation import sudoku
from dlm.objectives.noise import draw_noise
from tests.helpers import commandline
from train import sudoku as recipe

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures

WIKIPEDIA = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def cells(text):
    return np.array([int(c) if c.isdigit() else 0 for c in text], np.int8)


def test_the_solver_finds_the_only_answer_of_a_known_puzzle():
    assert ["".join(map(str, found)) for found in sudoku.solutions(cells(WIKIPEDIA))] == [ANSWER]


def test_the_solver_counts_several_and_none():
    two_rows = cells(ANSWER)
    two_rows[:18] = 0  # two whole rows of a band: their order is free at least
    assert len(sudoku.solutions(two_rows, limit=5)) >= 2
    wrong = cells(WIKIPEDIA)
    wrong[2] = 5  # a second 5 in the first row
    assert sudoku.solutions(wrong) == []


def test_is_solution():
    right = cells(ANSWER)
    assert sudoku.is_solution(right) and sudoku.is_solution(right, cells(WIKIPEDIA))
    swapped = right.copy()
    swapped[[0, 1]] = right[[1, 0]]  # the row still holds 1 to 9, two columns do not
    assert not sudoku.is_solution(swapped)
    assert not sudoku.is_solution(right % 9 + 1, cells(WIKIPEDIA))  # a good grid, but of another puzzle
    assert not sudoku.is_solution(cells(WIKIPEDIA))


def test_generated_puzzles_have_one_solution_and_no_given_too_many():
    for puzzle, grid in sudoku.random_puzzles(3, seed=5):
        assert sudoku.solutions(puzzle) == [grid.tolist()] and sudoku.is_solution(grid, puzzle)
        for cell in np.flatnonzero(puzzle):
            fewer = puzzle.copy()
            fewer[cell] = 0
            assert len(sudoku.solutions(fewer)) == 2
    again = [puzzle.tolist() for puzzle, _ in sudoku.random_puzzles(3, seed=5)]
    assert puzzle.tolist() == again[2] != again[1]
    assert [p.tolist() for p, _ in sudoku.random_puzzles(1, seed=6)] != again[:1]


def test_a_form_is_turned_back():
    rng = np.random.default_rng(4)
    grids, symmetry = rng.integers(0, 10, (30, 81)).astype(np.int8), sudoku.random_symmetries(30, rng)
    turned = sudoku.transform(grids, symmetry)
    assert (turned != grids).any() and (sudoku.restore(turned, symmetry) == grids).all()


def test_symmetries_keep_the_rules_and_the_answer():
    rng = np.random.default_rng(0)
    symmetry = sudoku.random_symmetries(40, rng)
    puzzles = sudoku.transform(np.tile(cells(WIKIPEDIA), (40, 1)), symmetry)
    grids = sudoku.transform(np.tile(cells(ANSWER), (40, 1)), symmetry)
    assert len({tuple(grid) for grid in grids.tolist()}) == 40
    for puzzle, grid in zip(puzzles, grids, strict=True):
        assert sudoku.is_solution(grid, puzzle) and sudoku.solutions(puzzle) == [grid.tolist()]


def test_more_givens_come_from_the_answer():
    puzzles, grids = np.tile(cells(WIKIPEDIA), (20, 1)), np.tile(cells(ANSWER), (20, 1))
    clues = np.arange(26, 46)
    more = sudoku.add_givens(puzzles, grids, clues, np.random.default_rng(0))
    assert ((more > 0).sum(axis=1) == np.maximum(clues, 30)).all()  # it has 30 givens
    assert (more[puzzles > 0] == puzzles[puzzles > 0]).all() and (more[more > 0] == grids[more > 0]).all()


def test_text_and_tokens():
    tokenizer = sudoku.make_tokenizer()
    text = sudoku.to_text(cells(WIKIPEDIA))
    assert text.startswith("a53..7....b6..195...") and len(text) == sudoku.LENGTH
    assert tokenizer(text)["input_ids"] == sudoku.to_ids(cells(WIKIPEDIA)[None])[0].tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (sudoku.from_text(text) == cells(WIKIPEDIA)).all()
    assert (sudoku.from_text(sudoku.pretty(cells(WIKIPEDIA))) == cells(WIKIPEDIA)).all()
    with pytest.raises(ValueError, match="has 80 cells"):
        sudoku.from_text(WIKIPEDIA[1:])
    with pytest.raises(ValueError, match=r"character '\?'"):
        sudoku.from_text("?" + WIKIPEDIA[1:])


def test_examples_carry_loss_on_the_empty_cells_alone():
    settings = recipe.parse(["--examples", "30", "--fewest-clues", "35", "--most-clues", "36"])
    puzzles, grids = np.tile(cells(WIKIPEDIA), (2, 1)), np.tile(cells(ANSWER), (2, 1))
    examples = recipe.forms(puzzles, grids, 30, settings, [0])
    batch = pack([[(0, examples[i])] for i in range(30)], sudoku.LENGTH, 0)
    where = batch.target[:, sudoku.CELLS]
    assert set((~where).sum(dim=1).tolist()) == {35, 36} and batch.target.sum() == where.sum()
    assert all(sudoku.is_solution(row) for row in batch.tokens[:, sudoku.CELLS].numpy())
    noise = draw_noise(batch, "count", 0)
    assert (noise.masked & ~batch.target).sum() == 0


def test_recipe_trains_and_evaluation_counts(run, tmp_path):
    options = "--bases 3 --examples 40 --valid-examples 4 --max-steps 3 --batch-size 4 --precision no"
    options += " --d-model 16 --n-layers 1 --n-heads 2"
    code, out, error = run(
        "train", "sudoku", *options.split(), "--output", tmp_path / "run", "--export", tmp_path / "m"
    )
    assert code == 0, error
    kept = tmp_path / "run" / "puzzles-0-3.npz"
    assert kept.is_file() and "step 3" in out
    code, out, error = run(
        "eval", "sudoku", "--model", tmp_path / "m", "--puzzles", "4", "--steps", "2", "--thresholds", "0.9",
        "--output", tmp_path / "t.json",
    )  # fmt: skip
    assert code == 0, error
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["order"] for row in rows] == [
        "margin", "margin", "probability", "probability", "entropy", "entropy", "random", "random", "row by row",
        "row by row", "row by row", "row by row", "left to right", "probability",
    ]  # fmt: skip
    positions = {row["rule"]: row["positions"] for row in rows if row["order"] == "row by row"}
    assert positions["c2f"] == positions["dual"] < positions["prefix"] < positions["one cell a pass"]
    assert rows[1]["passes"] == 2 and rows[0]["passes"] == rows[2]["passes"] > 30 and rows[0]["solved"] == 0
    code, out, _ = run("eval", "sudoku", "--model", tmp_path / "m", "--puzzle", WIKIPEDIA)
    assert code == 1 and "not a solution, 51 passes" in out and out.startswith("5 3 ")


def test_rules_beside_the_orders():
    from eval import sudoku as evaluation

    rules = ["none", "verify:0.01", "cap", "stable:0.8", "pipeline:0.7"]
    rows = evaluation.settings([], [6], [], (), rules)
    assert [(row.order, row.rule) for row in rows] == [
        *((rule, passes) for rule in rules[:3] for passes in ("one cell a pass", "6 passes")),
        ("stable:0.8", "by its threshold"), ("pipeline:0.7", "by its threshold"),
    ]  # fmt: skip
    assert [row.config.steps for row in rows] == [None, 6, None, 6, None, 6, None, None]
    assert rows[2].config.verify_threshold == 0.01 and rows[4].config.remask == "cap"
    assert rows[6].config.threshold == 0.8 and rows[7].config.block_length == 9


def test_an_answer_that_is_right_counts(monkeypatch):
    from eval import sudoku as evaluation

    puzzles = np.stack([cells(WIKIPEDIA)] * 3)
    good, bad = cells(ANSWER), cells(ANSWER)[::-1].copy()
    monkeypatch.setattr(
        evaluation, "solve", lambda *a: (np.stack([good, bad, good]), np.array([51, 51, 48]), np.array([9, 9, 9]))
    )
    [record] = evaluation.table(None, puzzles, evaluation.settings(["margin"], [], []), 8, lambda record: None)
    assert record["solved"] == pytest.approx(2 / 3) and record["passes"] == 50
    assert record["positions"] == 9 and record["27-31 givens"] == "66.7 ± 27.2" and record["17-26 givens"] == "-"


def test_a_grid_model_with_repeated_layers_is_trained_and_tried_several_times(run, tmp_path):
    options = "--bases 3 --examples 40 --valid-examples 4 --max-steps 2 --batch-size 4 --precision no --clue-power 2"
    options += " --d-model 16 --n-layers 1 --n-heads 4 --layer-repeats 2 --grid"
    code, _, error = run("train", "sudoku", *options.split(), "--output", tmp_path / "r", "--export", tmp_path / "m")
    assert code == 0, error
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["layer_repeats"] == 2 and config["grid_width"] == 10
    more = "--bases 3 --examples 40 --valid-examples 4 --max-steps 1 --batch-size 4 --precision no --layer-repeats 3"
    deep = ["--output", tmp_path / "deeper", "--export", tmp_path / "d", "--model", tmp_path / "m"]
    assert run("train", "sudoku", *more.split(), *deep)[0] == 0  # the same weights, applied once more
    deeper = json.loads((tmp_path / "d" / "config.json").read_text())
    assert deeper["layer_repeats"] == 3 and deeper["grid_width"] == 10
    code, _, error = run(
        "eval", "sudoku", "--model", tmp_path / "m", "--puzzles", "2", "--steps", "2", "--thresholds", "", "--tries",
        "2", "--orders", "margin", "--rules", "verify", "--output", tmp_path / "t", "--judge", "rules", "--forms",
        "--repeats", "1",
    )  # fmt: skip
    assert code == 0, error
    rows = json.loads((tmp_path / "t").read_text())["rows"]
    assert [row["rule"] for row in rows] == ["one cell a pass", "2 passes"] * 2 and rows[1]["passes"] == 4


def test_doubtful_answers_are_tried_again_and_the_likelier_one_stays(monkeypatch):
    """A model that knows the answer to all: the wrong answer of the first try is doubted, the right one is not."""
    from dlm import SamplingConfig
    from eval import sudoku as evaluation

    class Knows:
        config = SimpleNamespace(mask_token_id=0)

        def predict(self, tokens):
            truth = torch.from_numpy(sudoku.to_ids(cells(ANSWER)[None])).long().expand_as(tokens)
            return 5.0 * torch.nn.functional.one_hot(truth, 19).float()

    wrong, calls = cells(ANSWER), []
    wrong[[2, 3]] = wrong[[3, 2]]

    def solved(model, puzzles, config, batch):
        calls.append((len(puzzles), config.temperature, config.seed))
        first = [wrong, cells(ANSWER)] if len(calls) == 1 else [cells(ANSWER)]
        return np.stack(first), np.full(len(puzzles), 51), np.full(len(puzzles), 9)

    monkeypatch.setattr(evaluation, "solve", solved)
    puzzles = np.stack([cells(WIKIPEDIA)] * 2)
    tries = evaluation.Tries(5, 0.7, 0.5)
    answers, passes, _ = evaluation.solve_often(Knows(), puzzles, SamplingConfig(block_length=81), 8, tries)
    assert all(sudoku.is_solution(answer) for answer in answers) and passes.tolist() == [102, 51]
    assert calls == [(2, 0.0, 0), (1, 0.7, 1_000_003)]


def test_by_the_rules_tries_end_with_a_right_answer_and_meet_other_forms(monkeypatch):
    """The first try of one puzzle is wrong; the second is shown in another form, and its answer is turned back."""
    from dlm import SamplingConfig
    from eval import sudoku as evaluation

    wrong, shown = cells(ANSWER), []
    wrong[[2, 3]] = wrong[[3, 2]]

    def solved(model, puzzles, config, batch):
        shown.append(puzzles)
        found = [sudoku.solutions(puzzle)[0] for puzzle in puzzles]
        first = [wrong, *found[1:]] if len(shown) == 1 else found
        return np.array(first, np.int8), np.full(len(puzzles), 7), np.full(len(puzzles), 9)

    monkeypatch.setattr(evaluation, "solve", solved)
    monkeypatch.setattr(evaluation, "doubt", None)  # the model is not asked
    puzzles = np.stack([cells(WIKIPEDIA)] * 2)
    tries = evaluation.Tries(5, 0.0, judge="rules", forms=True)
    answers, passes, _ = evaluation.solve_often("model", puzzles, SamplingConfig(block_length=81), 8, tries)
    assert all(sudoku.is_solution(answer, puzzles[0]) for answer in answers) and passes.tolist() == [14, 7]
    assert len(shown) == 2 and len(shown[1]) == 1 and (shown[1][0] != puzzles[0]).any()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "sudoku", "--data", "x.txt"], "generates its puzzles"),
        (["train", "sudoku", "--fewest-clues", "12"], "17 to 80"),
        (["eval", "sudoku"], "no model"),
        (["eval", "sudoku", "--model", "x", "--clues", "90"], "--clues is A-B"),
        (["eval", "sudoku", "--model", "x", "--puzzles", "0"], "--puzzles is 0"),
        (["eval", "sudoku", "--model", "x", "--orders", "margni"], "margin"),
        (["eval", "sudoku", "--model", "x", "--methods", "duel"], "dual"),
        (["eval", "sudoku", "--model", "x", "--rules", "verfy"], "verify"),
        (["eval", "sudoku", "--model", "x", "--rules", "none:2"], "takes no number"),
        (["eval", "sudoku", "--model", "x", "--orders", "", "--thresholds", ""], "all empty"),
        (["eval", "sudoku", "--model", "x", "--tries", "0"], "--tries is 0"),
        (["eval", "sudoku", "--model", "x", "--mean-over", "0"], "--mean-over is 0"),
        (["eval", "sudoku", "--model", "x", "--repeats", "0"], "--repeats is 0"),
        (["eval", "sudoku", "--model", "x", "--try-temperature", "0"], "or 0 with --forms"),
        (["eval", "sudoku", "--model", "x", "--accept", "2"], "--accept 2"),
        (["train", "sudoku", "--clue-power", "0"], "clue_power is 0"),
        (["train", "sudoku", "--grid", "--model", "x"], "--model brings its own heads"),
        (["train", "sudoku", "--grid", "--n-heads", "2"], "n_heads=2: heads see row"),
    ],
)
def test_bad_input(run, words, says):
    code, _, error = run(*words)
    assert code == 2 and says in error and error.count("\n") == 1


def test_thresholds_alone_are_a_table():
    """Was: refused as a table without rows."""
    from eval.sudoku import parse, settings

    args = parse(["--model", "x", "--orders", "", "--thresholds", "0.9,0.5"])
    rows = settings(args.orders, args.steps, args.thresholds, args.methods, args.rules)
    assert [row.rule for row in rows] == ["all above 0.9", "all above 0.5"]


def test_a_model_of_text_is_refused(run, checkpoint):
    code, _, error = run("eval", "sudoku", "--model", checkpoint)
    assert code == 2 and "does not read Sudokus" in error
