"""The cost model: its operations are those that `flops` counts, its passes those that the sampler makes."""

from collections import Counter
from dataclasses import replace

import pytest

import dlm
from dlm import SamplingConfig
from dlm.benchmarking.cost import MACHINES, Machine, Shape, fitted, generation, memory, pass_seconds, passes
from dlm.cli.main import main
from dlm.models.flops import parameters, pass_bytes, pass_flops
from dlm.models.shapes import shape_config
from tests.helpers.toys import Table

INF = float("inf")
QUICK = Machine("quick", {"float32": INF}, INF, 0.0, INF)


@pytest.mark.parametrize("shape", ["small", "llada-1b"])
def test_operations_are_those_that_are_counted(shape):
    config = shape_config(shape)
    slow = replace(QUICK, rate={"float32": 1.0})
    for rows, computed, keys, asked in ((1, 32, 544, 32), (3, 64, 64, 16)):
        assert pass_seconds(config, slow, "float32", rows, computed, keys, asked) == pytest.approx(
            rows * pass_flops(config, computed, keys, asked)
        )


def test_bytes_are_those_of_weights_and_cache_and_some_more():
    config = shape_config("llada-8b")
    narrow = Machine("narrow", {"bfloat16": INF}, 1.0, 0.0, INF)
    read = pass_seconds(config, narrow, "bfloat16", 1, 32, 544, 32)
    assert 1.0 < read / pass_bytes(config, 1, 544, 2) < 1.05


def test_beginning_and_the_constant():
    """4 layers of 9 operations, a second each, and a constant of 2."""
    machine = Machine("late", {"float32": INF}, INF, 1.0, INF, factor=2.0)
    assert pass_seconds(shape_config("small"), machine, "float32", 1, 8, 8, 8) == 2 * 4 * 9


def test_measured_products_and_attention_take_the_place_of_the_floor():
    """Seconds for a weight and row of 1 at one row, 0.25 at 16 and more: 0.5 at 4, half-way in logarithms."""
    config = shape_config("small")
    weights = sum(count for count in _weights(config))
    measured = replace(QUICK, products=((1, 1.0), (16, 0.25)), attention=((1, 0.0), (2, 0.0)))
    for rows, each in ((1, 1.0), (4, 0.5), (16, 0.25), (64, 0.25)):
        found = pass_seconds(config, measured, "float32", 1, rows, 64, rows)
        assert found == pytest.approx(rows * each * weights)
    attention = replace(QUICK, products=((1, 0.0),), attention=((1, 3.0),))
    width = config.n_heads * config.head_dim
    assert pass_seconds(config, attention, "float32", 2, 8, 64, 8) == pytest.approx(
        config.n_layers * 3.0 * 2 * 8 * 64 * width
    )


def _weights(config):
    """Of all products: a layer's, and the head's."""
    d, width, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = d * (width + 2 * kv) + width * d + 3 * d * config.mlp_hidden_size
    return [layer] * config.n_layers + [d * config.embedding_size]


@pytest.mark.parametrize("method", ["none", "dual", "c2f"])
@pytest.mark.parametrize(("block", "steps"), [(4, 16), (8, 4), (16, 1)])
def test_passes_are_the_samplers(method, block, steps):
    predictor = Table([[float(i % 7) for i in range(40)]] * 20)
    config = SamplingConfig(gen_length=16, block_length=block, steps=steps, method=method)
    list(dlm.denoise(predictor, dlm.Canvas.from_prompts([[1, 2, 3, 4]], 16, 39), config))
    made = Counter(computed for _, computed in predictor.calls)
    told = Counter()
    for computed, _, count in passes(Shape(1, 4, 16, block, steps, method)):
        told[computed] += count
    assert +told == made


def test_a_generation_adds_up_its_passes():
    config, machine = shape_config("small"), replace(QUICK, rate={"float32": 1.0})
    shape = Shape(2, 32, 64, 32, 8, "dual")
    first, later = (pass_seconds(config, machine, "float32", 2, slots, 96, 32) for slots in (96, 32))
    assert generation(config, machine, "float32", shape) == pytest.approx(2 * first + 6 * later)


def test_memory_of_the_8b_shape():
    """What was allocated on a GPU with the model and its packed copy: 26.6 GB."""
    config = shape_config("llada-8b")
    assert memory(config, "bfloat16", Shape(1, 32, 512, 32, 512, "dual"), parameters(config)) == pytest.approx(
        26.6e9, rel=0.05
    )


def test_a_constant_for_all():
    constant, left = fitted([(1.0, 2.0), (2.0, 8.0)])
    assert constant == pytest.approx(8**0.5) and left == pytest.approx([0.5**0.5, 2**0.5])


def test_the_command(capsys):
    assert main(["bench", "estimate", "--machine", "h100", "h200", "--cells", "none:32:512", "--batch", "1", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "tokens/s" in lines[0] and "H100 times data sheets" in lines[3]
    assert main(["bench", "estimate", "--config", "llada-8b", "--batch", "4096", "--cells", "dual:32:512"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_passes_that_were_measured_on_a_gpu_are_within_15_percent(capsys):
    assert main(["bench", "estimate", "--check", "benchmarks/results/llada_8b_h100.jsonl"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert int(last.rpartition("at most ")[2].partition("%")[0]) <= 15
    assert f"constant {MACHINES['h100'].factor:.2f}" in last


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--machine", "h1000"], "h1000"),
        (["--dtype", "int4"], "int4"),
        (["--dtype", "int8"], "--dtype int8 has no rate on h100"),
        (["--cells", "dual"], "METHOD:BLOCK:STEPS"),
        (["--check", "README.md"], "README.md"),
    ],
)
def test_refusals(words, said, capsys):
    assert main(["bench", "estimate", *words]) == 2
    assert said in capsys.readouterr().err
