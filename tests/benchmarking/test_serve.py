"""The load for the engine: arrivals, percentiles and rows by hand, and one short run of the command."""

import json

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="dlm's extra serve is not installed")

from benchmarks import serve
from dlm.benchmarking import load
from dlm.benchmarking.load import Lengths, Need
from tests.helpers.commandline import checkpoint, tokenizer  # noqa: F401


def test_lengths_by_hand():
    assert Lengths.parse("8:64", "--x") == Lengths(8, 64) and Lengths.parse("8", "--x") == Lengths(8, 8)
    assert Lengths(8, 64).middle == Lengths(36, 36)
    drawn = Lengths(2, 4).draw(np.random.default_rng(0), 3000)
    assert sorted(set(drawn)) == [2, 3, 4] and 2.9 < sum(drawn) / 3000 < 3.1
    for wrong in ("", "0", "8:", "8:4", "1:2:3", "a"):
        with pytest.raises(ValueError, match="--x is"):
            Lengths.parse(wrong, "--x")


def test_arrivals_are_a_poisson_process():
    """Gaps have the mean 1 / rate and, as exponential ones do, a standard deviation as large."""
    gaps = np.diff([0.0, *load.poisson(20_000, 4.0, seed=0)])
    assert (
        gaps.min() > 0 and gaps.mean() == pytest.approx(0.25, rel=0.03) and gaps.std() == pytest.approx(0.25, rel=0.03)
    )
    assert load.poisson(5, 4.0, seed=0) == load.poisson(5, 4.0, seed=0) != load.poisson(5, 4.0, seed=1)


def test_demands_are_seeded():
    needs = load.demands(50, Lengths(1, 5), Lengths(2, 3), 7, seed=3)
    assert needs == load.demands(50, Lengths(1, 5), Lengths(2, 3), 7, seed=3)
    assert {len(need.prompt) for need in needs} == {1, 2, 3, 4, 5} and {need.length for need in needs} == {2, 3}
    assert max(max(need.prompt) for need in needs) < 7 and [need.seed for need in needs] == list(range(3, 53))
    assert Need((1, 2), 3, 0).ids(9) == [1, 2, 9, 9, 9]


def test_percentiles_by_hand():
    """0, 1, ..., 100: the p-th percentile is p."""
    assert load.percentiles(list(range(101)), "x") == {"x_p50": 50, "x_p90": 90, "x_p99": 99}
    assert load.percentiles([], "x") == {"x_p50": None, "x_p90": None, "x_p99": None}


def test_a_row_and_the_table():
    row = load.row(
        "here", [Need((1,), 10, 0), Need((1,), 20, 0)], 2.0, {"latency_p50": 0.5, "latency_p90": 1, "latency_p99": 2}
    )
    assert (row["tokens_per_second"], row["requests_per_second"]) == (15.0, 1.0)
    head, line = load.table([row]).splitlines()
    assert line.split() == ["here", "2", "15", "500", "/", "1000", "/", "2000"] and "latency p50/p90/p99 (ms)" in head


def test_a_short_run_of_the_command(checkpoint, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "serve.json"
    words = ["--model", str(checkpoint), "--requests", "6", "--prompt-tokens", "2:4", "--output-tokens", "2:6"]
    words += [
        "--clock",
        "cpu",
        "--concurrency",
        "3",
        "--alone",
        "2",
        "--rates",
        "200",
        "--block-length",
        "2",
        "--json",
        str(file),
    ]
    assert serve.main(words) == 0
    found = json.loads(file.read_text())
    assert {"command", "commit", "hardware", "versions", "seed", "model"} <= set(found)
    loads = [row["load"] for row in found["rows"]]
    assert loads[0] == "plain loop, one at a time" and loads[-3:] == [
        "engine, one at a time", "engine, 3 at a time", "engine, 200 a second"]  # fmt: skip
    for row in found["rows"][-2:]:
        assert row["requests"] == 6 and row["refused"] == 0
        assert 0 < row["first_text_p50"] <= row["latency_p50"] <= row["latency_p99"] and 1 <= row["rows_per_pass"] <= 3
    out = capsys.readouterr().out
    assert "throughput: " in out and out.count("engine, ") >= 4


@pytest.mark.parametrize(
    "words", [("--rates", "0"), ("--requests", "0"), ("--output-tokens", "4:2"), ("--loads", "nan")]
)
def test_wrong_numbers_are_one_line(words, capsys):
    assert serve.main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words[0] in error
