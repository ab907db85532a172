"""Steps that other processes make: the same ones, in order; two visibilities in one step; a limit in seconds."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from dlm.objectives.losses import OBJECTIVES
from dlm.training.ahead import Ahead
from dlm.training.batches import Batches, under_full_attention
from dlm.training.muon import Muon, orthogonalise, product_type
from dlm.training.optim import schedule_factor
from dlm.training.trainer import fit
from tests.helpers.ranks import MASK, settings, tiny_data, tiny_model

BOTH = {"objective": "block_diffusion", "block_length": 4, "full_share": 0.5, "batch_size": 8}


def batches(tmp_path, rank=0, world=1, **changes):
    config = settings(tmp_path, **changes)
    return Batches(
        tiny_data(), config, OBJECTIVES[config.objective], rank=rank, world=world, pad_id=22, end_id=22, mask_id=MASK
    )


def same(one, other):
    assert one.examples == other.examples and one.count == other.count and one.position == other.position
    for (batch, noise), (batch_2, noise_2) in zip(one.parts, other.parts, strict=True):
        assert torch.equal(batch.tokens, batch_2.tokens) and torch.equal(noise.weight, noise_2.weight)
        assert torch.equal(noise.masked, noise_2.masked) and noise.block_length == noise_2.block_length


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_same_steps(tmp_path, workers):
    here = batches(tmp_path, **BOTH)
    ahead = Ahead(batches(tmp_path, **BOTH), 0, workers)
    try:
        for step in range(2 * workers + 1):
            same(ahead.next(), here.next(step))
    finally:
        ahead.close()


def test_an_error_of_a_worker_is_raised_here(tmp_path):
    made = batches(tmp_path, batch_size=2, objective="block_diffusion", block_length=4, full_share=0.1)
    ahead = Ahead(made, 0, 1)
    try:
        with pytest.raises(ValueError, match="none is left for one of the two"):
            ahead.next()
    finally:
        ahead.close()


def test_a_worker_that_is_killed_is_named(tmp_path):
    ahead = Ahead(batches(tmp_path), 0, 1)
    try:
        os.kill(ahead._processes[0].pid, signal.SIGKILL)
        ahead._processes[0].join()
        with pytest.raises(RuntimeError, match="workers 0"):
            [ahead.next() for _ in range(100)]
    finally:
        ahead.close()


def test_rows_of_two_visibilities(tmp_path):
    """Every row of the step once, half of them in each part; a process's rows are of both kinds."""
    whole = batches(tmp_path, **BOTH).next(0)
    (blocks, with_blocks), (full, without) = whole.parts
    assert with_blocks.block_length == 4 and without.block_length is None
    assert len(blocks.tokens) + len(full.tokens) == 8 and abs(len(blocks.tokens) - len(full.tokens)) <= 2
    assert sorted({*blocks.index.tolist(), *full.index.tolist()}) == whole.examples
    parts = [batches(tmp_path, rank, 2, **BOTH).next(0) for rank in (0, 1)]
    assert sum(part.count for part in parts) == whole.count
    kinds = [{i for part in parts for i in part.parts[kind][0].index.tolist()} for kind in (0, 1)]
    assert kinds == [set(blocks.index.tolist()), set(full.index.tolist())]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_the_share_is_met_by_every_process(share):
    for world in (1, 2, 4):
        for rank in range(world):
            own = [under_full_attention(number, share) for number in range(rank, 256, world)]
            assert np.mean(own) == pytest.approx(share, abs=0.05)


def test_complementary_masks_are_a_pass_of_their_own(tmp_path):
    made = batches(tmp_path, complementary=True).next(0)
    (batch, one), (again, other) = made.parts
    assert batch is again and torch.equal(one.masked ^ other.masked, batch.target)
    assert made.count == 2 * int(batch.target.sum())


def test_both_visibilities_train_and_the_checkpoint_says_so(tmp_path):
    model = tiny_model()
    fit(model, None, tiny_data(), tiny_data(), settings(tmp_path, **BOTH, valid_every=6), mask_id=MASK, report=len)
    assert model.config.full_attention and model.config.block_length == 4
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_workers_train_to_the_same_weights(tmp_path):
    found = []
    for workers in (0, 2):
        model = tiny_model()
        config = settings(tmp_path / str(workers), workers=workers, **BOTH)
        fit(model, None, tiny_data(), None, config, mask_id=MASK, report=len)
        found.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*found)


def test_a_run_ends_in_time_and_its_rate_has_decayed(tmp_path):
    began = time.perf_counter()
    config = settings(tmp_path, max_steps=10**6, max_seconds=0.6, schedule="wsd", decay_fraction=1.0, warmup_steps=0)
    result = fit(tiny_model(), None, tiny_data(), None, config, mask_id=MASK, report=len)
    assert 1 < result.step < 10**6 and time.perf_counter() - began < 20
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.5 * rates[0]


def test_time_counts_where_it_is_further_than_the_steps():
    options = {"warmup_steps": 0, "decay_fraction": 1.0, "final_factor": 0.0}
    assert schedule_factor("wsd", 10, 100, **options) == pytest.approx(0.9)
    assert schedule_factor("wsd", 10, 100, **options, time_share=0.5) == pytest.approx(0.5)
    assert schedule_factor("wsd", 80, 100, **options, time_share=0.5) == pytest.approx(0.2)


def test_muon_is_torchs_muon():
    """The same update within what bf16 rounds, for tall, wide and square matrices, several steps."""
    found = []
    for kind in (torch.optim.Muon, Muon):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (8, 8), (24, 8), (8, 24)]]
        optimizer = kind(weights, lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        start = [weight.detach().clone() for weight in weights]
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        found.append([weight.detach() - before for weight, before in zip(weights, start, strict=True)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 0.1 * one.norm()  # 0.05 measured, of bf16 in torch


def test_newton_schulz_brings_singular_values_near_one():
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 20, dtype=torch.float64)
    made = orthogonalise(stack, (3.4445, -4.775, 2.0315), 5)
    for before, after in zip(stack, made, strict=True):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ v.T
        assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-9


def test_the_products_are_in_what_the_processor_is_fast_at():
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert product_type(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert product_type(torch.device("cuda")) == torch.bfloat16
