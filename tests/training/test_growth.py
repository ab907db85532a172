"""Blocks that grow: which block a step has, and that a run which stops inside of a stage goes on as if it had not."""

import pytest
import torch

from dlm.training import batches
from dlm.training.growth import block_at, plan, read_growth
from tests.helpers.ranks import settings, tiny_model
from tests.helpers.training import fresh_accelerate, train, weights

assert fresh_accelerate  # a fixture for every test here
GROWTH = "1:0.2,2:0.3"


def test_stages_by_hand():
    assert read_growth(" 1:0.2, 4:0.3 ") == [(1, 0.2), (4, 0.3)]
    assert [block_at(GROWTH, 8, step, 10) for step in range(10)] == [1, 1, 2, 2, 2, 8, 8, 8, 8, 8]
    assert [block_at(GROWTH, 8, step, 3) for step in range(3)] == [1, 2, 8]
    assert plan(GROWTH, 8, 10) == "blocks: of 1 to step 2, of 2 to step 5, then of 8"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_growth": "4"}, "'4' is no block length with its share"),
        ({"block_growth": "four:0.1"}, "'four:0.1' is no block length"),
        ({"block_growth": "0:0.1"}, "'0:0.1' is no block length"),
        ({"block_growth": "1:0.1,"}, "'' is no block length"),
        ({"block_growth": "1:1.5"}, "'1:1.5' is no block length"),
        ({"block_growth": "1:nan"}, "'1:nan' is no block length"),
        ({"block_growth": "1:0.5,2:0.5"}, "leave no step for block_length"),
        ({"block_growth": GROWTH, "objective": "diffusion", "block_length": None}, "under objective diffusion"),
        ({"block_growth": GROWTH, "max_seconds": 9.0}, "max_seconds is 9: leave one out"),
    ],
)
def test_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        settings(tmp_path, **{"objective": "block_diffusion", "block_length": 4, **changes})
    assert "\n" not in str(error.value)


def test_a_resumed_run_grows_as_one_that_never_stopped(tmp_path, monkeypatch):
    """Steps 1 and 2 have blocks of 1, steps 3 and 4 of 2, then 4; the stop is after step 2, and after step 3."""
    lengths, take = [], batches.Batches.next

    def watched(self, step):
        made = take(self, step)
        lengths.append((step, made.parts[0][1].block_length))
        return made

    monkeypatch.setattr(batches.Batches, "next", watched)
    options = {"objective": "block_diffusion", "block_length": 4, "block_growth": "1:0.34,2:0.33", "max_steps": 6}
    told = []
    whole, _ = train(tmp_path / "whole", report=told.append, **options)
    assert lengths == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4)]
    assert "blocks: of 1 to step 2, of 2 to step 4, then of 4" in told
    assert whole.config.block_length == 4 and whole.config.objective == "block_diffusion"
    stop = batches.Batches.next

    def failing(self, step):
        if step == 3:
            raise ValueError("stopped")
        return stop(self, step)

    with monkeypatch.context() as once, pytest.raises(ValueError, match="stopped"):
        once.setattr(batches.Batches, "next", failing)
        train(tmp_path / "cut", **options)
    again, _ = train(tmp_path / "cut", resume=True, model=tiny_model(), **options)
    assert lengths[-4:] == [(2, 2), (3, 2), (4, 4), (5, 4)]
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(ValueError, match=r"made with block_growth 1:0.34,2:0.33, now it is 1:0.5: an exact resume"):
        train(tmp_path / "cut", resume=True, model=tiny_model(), **{**options, "block_growth": "1:0.5"})
