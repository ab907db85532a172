"""Reward functions by hand, by name, and what is said of those that fail."""

import sys

import pytest

from dlm.rewards.answers import gsm8k_answer, gsm8k_format
from dlm.rewards.puzzles import countdown, sudoku4x4, sudoku9x9, sudoku_solved, value_of
from dlm.rewards.table import REWARDS, RewardError, open_rewards, score, weighted

PUZZLE, SOLVED = "3102200002100320", "3142243142131324"


def test_sudoku_counts_the_empty_cells_that_are_right():
    half = "3142243100000000"  # the four empty cells of the first two rows
    texts = [SOLVED, half, "", "x" + SOLVED[:3], "1111"]
    assert sudoku4x4([PUZZLE] * 5, texts, [SOLVED] * 5) == [1, 0.5, 0, 0.125, 0]
    assert sudoku4x4(["solve it"], [SOLVED], [SOLVED], puzzle=[PUZZLE.replace("0", ".")]) == [1]
    assert sudoku4x4(
        [[{"role": "user", "content": PUZZLE}]], [[{"role": "assistant", "content": SOLVED}]], [SOLVED]
    ) == [1]
    assert sudoku_solved([PUZZLE] * 5, texts, [SOLVED] * 5) == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"puzzle 0 has 16 cells and its solution 16: give columns .* of 81 digits"):
        sudoku9x9([PUZZLE], [SOLVED], [SOLVED])


def test_countdown():
    texts = ["30-100+93", "30+100+93", "93-70", "<answer>(93+30)-100 = 23</answer>", "so\n30-100+93=23", "2**9", ""]
    rows = len(texts)
    assert countdown(None, texts, ["30,100,93"] * rows, [23] * rows) == [1, 0.1, 0, 1, 1, 0, 0]
    assert countdown(None, ["30/4*2"], [[4, 30, 2]], ["15"]) == [1]
    assert value_of("1/0") is None and value_of("__import__('os')") is None and value_of("9" * 300) is None


def test_gsm8k():
    texts = ["3 + 4 = 7\n#### 7", "it is 7", "7 apples, then 8", "#### 7"]
    assert gsm8k_answer(None, texts, ["...\n#### 7"] * 4) == [1, 1, 0, 1]
    assert gsm8k_format(None, texts) == [1, 0, 0, 0]


def test_a_pattern_and_weights():
    rewards = open_rewards(["regex:[0-9]+", "sudoku4x4"], [0.5, 2])
    completions = ["12 ", SOLVED]
    scores = [score(r, [PUZZLE] * 2, completions, {"solution": [SOLVED] * 2}, ["a", "b"]) for r in rewards]
    assert scores == [[1, 1], [0, 1]] and weighted(rewards, scores) == [0.5, 2.5]
    assert weighted(rewards, [[None], [1.0]]) == [2.0]


def test_names_are_the_tables_keys():
    assert all(open_rewards([name])[0].function is REWARDS[name] for name in REWARDS)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    (tmp_path / "mine.py").write_text(
        "def length(completions):\n    return [len(text) for text in completions]\n"
        "def bad(prompts, completions, **columns):\n    return [1 / len(text) for text in completions]\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "def one(completions, **columns):\n    return 1.0\n"
        "async def later(completions, **columns):\n    return [1.0]\n"
        "def tensors(completions, **columns):\n    import torch\n\n    return list(torch.arange(len(completions)))\n"
        "def none(completions, **columns):\n    return [float('nan') if 'b' in t else None for t in completions]\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.chdir(tmp_path)
    yield
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def test_a_function_of_the_users_gets_what_it_takes(mine):
    [reward] = open_rewards(["mine:length"])
    assert score(reward, ["p", "q"], ["a", "bb"], {"extra": [1, 2]}, ["x", "y"]) == [1, 2]
    [reward] = open_rewards(["mine:tensors"])  # a list of tensors without a dimension is one of numbers
    assert score(reward, ["p", "q"], ["a", "bb"], {}, ["x", "y"]) == [0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:bad", "reward mine:bad raised ZeroDivisionError: .* at line 2, completion '': mend the function"),
        ("mine:short", "reward mine:short returned 1 values for 3 completions at line 1"),
        ("mine:one", "reward mine:one returned a float and not a list of numbers, at line 1"),
        ("mine:later", "reward mine:later returned a coroutine and not a list of numbers, at line 1"),
        ("mine:none", "reward mine:none returned nan, which is no finite number, at line 3, completion 'b'"),
    ],
)
def test_what_fails_is_named_with_its_row_and_text(mine, name, message):
    [reward] = open_rewards([name])
    with pytest.raises(RewardError, match=message):
        score(reward, ["p"] * 3, ["a", "", "b"], {}, ["line 1", "line 2", "line 3"])


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], [], "no reward: give --rewards"),
        (["countdwon"], [], "the nearest is 'countdown'"),
        (["mine:lenght"], [], "has no function 'lenght'; the nearest is 'length'"),
        (["mine:number"], [], "has no function 'number'"),
        (["nowhere_at_all:f"], [], "the module nowhere_at_all cannot be imported"),
        (["broken:f"], [], "broken fails at import .RuntimeError: no"),
        (["regex:["], [], "is no regular expression"),
        (["countdown", "countdown"], [], "name one twice"),
        (["countdown"], [1.0, 2.0], "1 rewards and 2 reward_weights"),
        (["countdown"], [0.0], "one of them not 0"),
    ],
)
def test_names_that_cannot_be(mine, names, weights, message):
    with pytest.raises(ValueError, match=message):
        open_rewards(names, weights)
