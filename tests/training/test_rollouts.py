"""Rollouts without a run: how groups are shared out, put together again for another number of processes, and kept."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dlm.objectives.policy import METHODS
from dlm.sampling.config import SamplingConfig
from dlm.training import rollouts
from dlm.training.rollouts import ROLLOUT_FILE, Plan, RolloutBatches, Round

GROUP, PROMPTS = 2, 4


def batches(rank, world, *, sharded=False, **sampling):
    plan = Plan(SamplingConfig(temperature=1.0, **sampling), (), GROUP, 3, "trace", 0.0, 1, 8)
    run = SimpleNamespace(step=1, sharded=sharded)
    data = SimpleNamespace(stream=lambda seed, position: SimpleNamespace(position=position or (0, 0)))
    config = SimpleNamespace(batch_size=GROUP * PROMPTS, seed=0, accumulation=1)
    ids = {"pad_id": 0, "end_id": None, "mask_id": 9}
    return RolloutBatches(run, plan, data, config, None, rank=rank, world=world, **ids)


def round_of(prompts, width):
    """The answers to these prompts; each token says prompt and member."""
    index = torch.tensor(prompts).repeat_interleave(GROUP)
    tokens = (10 * index + torch.arange(GROUP).repeat(len(prompts)))[:, None].expand(-1, width).contiguous()
    flags = torch.ones(len(index), width, dtype=torch.bool)
    old = tokens.float().repeat(3, 1, 1)
    return Round(tokens, tokens, flags, flags, flags, index, torch.zeros_like(index), index.float(), old)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 2), (4, 2), (2, 4)])
def test_a_round_goes_on_in_another_number_of_processes(tmp_path, before, now):
    prompts = [7, 3, 5, 1]  # as the stream gave them
    for rank in range(before):
        maker = batches(rank, before)
        maker.round = round_of(prompts[rank::before], 3 + rank)  # processes have canvases of their own widths
        save_file(maker.kept(), tmp_path / ROLLOUT_FILE.format(rank))
    for rank in range(now):
        maker = batches(rank, now)
        maker.go_to((0, 4), folder=tmp_path)
        mine = prompts[rank::now]
        assert maker.round.index.tolist() == [prompt for prompt in mine for _ in range(GROUP)]
        assert maker.round.tokens[:, 0].tolist() == [10 * prompt + member for prompt in mine for member in range(GROUP)]
        assert torch.equal(maker.round.old[2][:, 0], maker.round.tokens[:, 0].float())


def test_nothing_is_kept_between_rounds():
    maker = batches(0, 1)
    maker.round, maker.run.step = round_of([1, 2, 3, 4], 2), 3
    assert maker.kept() == {}


def test_processes_of_a_sharded_model_take_as_many_passes(monkeypatch):
    """An answer that ended early has fewer passes of a trace; alone or under DDP nothing is added."""
    maker = batches(0, 2, sharded=True)
    maker.run.accelerator = None
    monkeypatch.setattr(rollouts, "sum_over_processes", lambda accelerator, mine: [mine[0], 5.0])
    assert maker._idle(3) == 2 and maker._idle(5) == 0
    assert batches(0, 2)._idle(3) == 0
    maker.objective = SimpleNamespace(method=METHODS["trace"])
    maker.round = round_of([7, 5], 3)
    maker.plan = replace(maker.plan, shrink=100)  # all of an answer in one pass
    parts = maker.next(1).parts
    assert len(parts) == 5 and parts[0][1].weight.sum().item() == pytest.approx(4)
    assert all(not part.weight.any() and part.scored.any() for _, part in parts[1:])


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"is 4 groups of 2, which 3 processes cannot share.* a multiple of 6"):
        batches(0, 3)
    with pytest.raises(ValueError, match="needs as many passes in every process"):
        batches(0, 1, sharded=True, commit="threshold")
    batches(0, 1, sharded=True)
