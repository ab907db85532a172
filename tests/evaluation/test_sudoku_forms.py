"""The mean over forms of a puzzle: exact for a predictor with the rules' symmetries, by hand for one without."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dlm import SamplingConfig
from dlm.evaluation import sudoku
from dlm.evaluation.sudoku_forms import MeanOverForms

CONFIG = SimpleNamespace(mask_token_id=0, embedding_size=19, max_sequence_length=sudoku.LENGTH)


class Candidates:
    """A predictor that knows the rules, and has their symmetries: each peer with a digit makes it less probable."""

    config = CONFIG

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, positions=None, logits_to_keep=None, **asked):
        self.calls.append(len(tokens))
        logits = torch.full((*tokens.shape, 19), -30.0)
        for row, ids in enumerate(tokens.numpy()):
            grid = ids[sudoku.CELLS]
            for cell, place in enumerate(sudoku.CELLS):
                for digit in range(1, 10):
                    often = sum(grid[peer] == digit for peer in sudoku.PEERS[cell])
                    logits[row, place, digit] = -4.0 * often
        return logits if logits_to_keep is None else logits[torch.arange(len(tokens))[:, None], logits_to_keep]


class Places:
    """A predictor of a fixed table of logits (T, V), whatever the grid: it respects nothing."""

    config = CONFIG

    def __init__(self):
        self.table = torch.randn(sudoku.LENGTH, 19, generator=torch.Generator().manual_seed(1))

    def __call__(self, tokens, positions=None, **asked):
        return self.table.expand(len(tokens), -1, -1)


@pytest.fixture(scope="module")
def puzzles():
    return np.stack([p for p, _ in sudoku.random_puzzles(2, 5)])


def test_forms_change_nothing_for_a_predictor_that_respects_the_symmetries(puzzles):
    tokens, inner = torch.from_numpy(sudoku.to_ids(puzzles)).long(), Candidates()
    plain = inner(tokens).log_softmax(dim=-1)
    mean = MeanOverForms(inner, 5)
    torch.testing.assert_close(mean(tokens)[:, sudoku.CELLS], plain[:, sudoku.CELLS])
    assert inner.calls == [2, 10]
    kept = torch.tensor([[1, 17], [5, 88]])
    torch.testing.assert_close(mean(tokens, logits_to_keep=kept)[1, 1], plain[1, 88])


def test_the_mean_is_that_of_the_forms_one_by_one(puzzles):
    inner, forms = Places(), 4
    cells, digits = sudoku.random_symmetries(forms, np.random.default_rng([3, forms]))
    cells[0], digits[0] = np.arange(81), np.arange(10)
    table = inner.table[sudoku.CELLS].softmax(dim=-1).numpy()
    expected = np.zeros((81, 10))
    for k in range(forms):
        for here in range(81):  # cell `here` of the form is cell cells[k, here] of the puzzle
            for digit in range(1, 10):
                expected[cells[k, here], digit] += table[here, digits[k, digit]] / forms
    found = MeanOverForms(inner, forms, seed=3)(torch.from_numpy(sudoku.to_ids(puzzles)).long())
    np.testing.assert_allclose(found[1, sudoku.CELLS, 1:10].exp().numpy(), expected[:, 1:], rtol=1e-5)


def test_a_puzzle_is_solved_with_it_and_passes_count_all_forms(puzzles):
    from eval.sudoku import solve

    config = SamplingConfig(block_length=81, steps=7)
    plain, passes, positions = solve(Candidates(), puzzles, config, 2)
    answers, all_passes, all_positions = solve(MeanOverForms(Candidates(), 3), puzzles, config, 2)
    assert (
        (answers == plain).mean() > 0.98 and (all_passes == 3 * passes).all() and (all_positions == 3 * positions).all()
    )


def test_a_cache_is_refused(puzzles):
    tokens = torch.from_numpy(sudoku.to_ids(puzzles)).long()
    with pytest.raises(ValueError, match="method none"):
        MeanOverForms(Candidates(), 2)(tokens, cache=object())
