"""`dlm bench growth`: what it times is a later pass of a block and a pass of everything, and what it says of them."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import growth
from dlm.benchmarking import roofline
from dlm.benchmarking.roofline import Limits
from dlm.cli.main import main
from dlm.models.flops import pass_flops
from dlm.models.shapes import random_model


def test_growth_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(roofline, "bandwidth", lambda *_: 1e15)
    rows, plot = tmp_path / "rows.json", tmp_path / "growth.svg"
    words = ["--config", "small", "--block", "4", "--repeats", "2", "--json", str(rows), "--plot", str(plot)]
    assert growth.main([*words, "--canvas", "64", "16", "64"]) == 0
    short, long = json.loads(rows.read_text())["rows"]
    assert (short["canvas"], long["canvas"]) == (16, 64) and min(long["full_seconds"], short["block_seconds"]) > 0
    config = random_model("small").config
    for row in (short, long):  # the passes after the first ask about 3, 2 and 1 places
        slots = row["canvas"]
        assert row["block_floor"] == pytest.approx(pass_flops(config, 4, slots, 2) / 1e9)
        both = (pass_flops(config, slots, slots, 3) + pass_flops(config, slots, slots, 2)) / 2
        assert row["full_floor"] == pytest.approx(both / 1e9)
    out = capsys.readouterr().out
    assert "16 slots" in out
    assert f"block pass: 4x the slots, {long['block_seconds'] / short['block_seconds']:.1f}x the time" in out
    picture = plot.read_text()
    ElementTree.fromstring(picture)
    assert picture.count('stroke-dasharray="5 4"') == 4  # two floors, and both in the legend
    assert picture.count("<circle") == 2 * 2 + 2


def test_what_is_timed(monkeypatch):
    """dual: all slots, then the block with keys of all of them; none: all slots every time. A turn each."""
    model, asked = random_model("small"), []
    inner = model.forward

    def forward(*, call):
        cache = call.cache
        asked.append((call.tokens.shape[1], None if cache is None else cache.length, call.logits_to_keep.shape[1]))
        return inner(call=call)

    monkeypatch.setattr(model, "forward", forward)  # so that it is not packed either
    ticks = iter(range(100))
    times = growth.turns(model, 20, 4, "dual", 4, ticks.__next__, 0)
    assert asked == [(20, 20, 4), (4, 20, 3), (4, 20, 2), (4, 20, 1)] and times == [1, 1, 1, 1]
    asked.clear()
    growth.turns(model, 20, 4, "none", 3, ticks.__next__, 0)
    assert [(computed, places) for computed, _, places in asked] == [(20, 4), (20, 3), (20, 2)]


def test_the_first_pass_of_each_does_not_count(monkeypatch):
    """The one that fills the cache, and the one that meets cold memory; medians of the others."""
    told = {"dual": [100, 1, 2, 6], "none": [50, 7, 8]}

    def turns(model, slots, block, method, passes, clock, seed):
        assert passes == len(told[method])
        return told[method]

    monkeypatch.setattr(growth, "turns", turns)
    row = growth.measure(random_model("small"), 20, 4, 2, Limits("float32", 4, 1e9, 1e9), None)
    assert (row["block_seconds"], row["full_seconds"]) == (2, 7.5)


def test_a_straight_line_fits_a_block_and_not_everything():
    """Costs of 5 ms and 2 for every 1,000 slots; and of the square of the slots."""
    rows = [
        {"canvas": t, "block_seconds": 5e-3 + 2e-6 * t, "full_seconds": 1e-6 * t**2, "block_floor": 1, "full_floor": 2}
        for t in (250, 1000, 8000)
    ]
    assert growth.straight(rows, "block_seconds") == pytest.approx((5, 2, 0), abs=1e-9)
    assert growth.straight(rows, "full_seconds")[2] > 0.3
    block, full = growth.summary(rows).splitlines()
    assert block == (
        "block pass: 32x the slots, 3.8x the time (floor 1.0x); 5.00 ms and 2.00 ms for every 1,000 slots, within 0%"
    )
    assert "1024.0x the time" in full


@pytest.mark.parametrize(("words", "said"), [
    (["--config", "25"], "'25m'"),
    (["--canvas", "64", "32"], "canvas has 32"),
    (["--block", "2"], "block is 2: give 3 or more"),
    (["--repeats", "0"], "repeats is 0"),
    (["--canvas", "many"], "--canvas"),
])  # fmt: skip
def test_growth_refusals(words, said, capsys):
    assert main(["bench", "growth", *words]) == 2
    assert said in capsys.readouterr().err
