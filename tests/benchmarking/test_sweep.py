"""A sweep that is stopped, killed, shared out or asked for something else: nothing lost, nothing twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from dlm.benchmarking import sweep
from dlm.benchmarking.grid import Runner
from dlm.benchmarking.journal import Journal, journal_path, read_journal
from dlm.cli import main
from tests.helpers import grids
from tests.helpers.commandline import ROOT, make_checkpoint
from tests.helpers.grids import PROMPTS, arguments, cells, read

tokenizer, checkpoint, run = grids.tokenizer, grids.checkpoint, grids.run  # fixtures
twin, bench = grids.twin, grids.bench

SAME = ("answer", "nfe", "positions_computed", "perplexity", "bound_per_token", "degenerate", "unigram_entropy")


def same(one, other):
    """Whether two results files say the same, but for what a clock and the memory say."""
    first, second = cells(one), cells(other)
    assert first.keys() == second.keys()
    for key, cell in first.items():
        for name in SAME:
            assert cell[name] == (
                pytest.approx(second[key][name], rel=1e-4) if name in SAME[3:5] else second[key][name]
            )


def keys(folder, name="grid"):
    """The keys of all cells in a grid's journals, in order; what a kill left half written does not count."""
    files = sorted(folder.glob(f"{name}.journal-*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record["key"] for record in map(json.loads, lines) if record["kind"] == "cell"]


def test_killed_ten_times_it_loses_nothing_and_does_nothing_twice(bench, checkpoint, twin, tmp_path):
    assert bench(out=tmp_path / "whole.json")[0] == 0
    options = ["bench", "grid", *arguments(tmp_path, checkpoint, twin)]
    dice, counts = random.Random(4), [0]
    for _ in range(10):
        if (child := os.fork()) == 0:  # torch is loaded already, so that a process is quick to begin
            os.setsid()
            os.close(2)
            os._exit(main.main(options))
        wanted, limit = counts[-1] + dice.randint(0, 4), time.monotonic() + 60
        while len(keys(tmp_path)) < wanted and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(dice.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts.append(len(keys(tmp_path)))
    assert counts == sorted(counts) and any(0 < count < 30 for count in counts), counts
    before = (tmp_path / "grid.journal-0.jsonl").read_text()
    assert bench()[0] == 0
    whole = [line for line in before.splitlines(keepends=True) if line.endswith("\n")]
    assert (tmp_path / "grid.journal-0.jsonl").read_text().startswith("".join(whole))  # what was measured stays
    found = read(tmp_path)[0]
    same(found, read(tmp_path, "whole")[0])
    assert len(keys(tmp_path)) == len(set(keys(tmp_path))) == len(cells(found)) == 30


def test_a_journal_cut_anywhere_is_read_and_gone_on_with(tmp_path):
    path = tmp_path / "grid.journal-0.jsonl"
    journal = Journal(path, {"seed": 1})
    for number in range(3):
        journal.append({"kind": "cell", "key": f"é{number}", "time": float(number)})
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert len(read_journal(path)) == lines
        again = Journal(path, {"seed": 1})
        again.append({"kind": "cell", "key": "last", "time": 9.0})
        again.close()
        assert len(read_journal(path)) == max(lines, 1) + 1


def test_two_processes_share_the_cells_and_say_the_same(bench, checkpoint, twin, tmp_path):
    assert bench(out=tmp_path / "one.json", steps="4,16")[0] == 0
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(21000 + os.getpid() % 20000), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    command = [sys.executable, ROOT / "benchmarks" / "grid.py", *arguments(tmp_path, checkpoint, twin, steps="4,16")]
    ranks = [
        subprocess.Popen(
            list(map(str, command)), env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)[-3000:]
    found, meta = read(tmp_path)
    same(found, read(tmp_path, "one")[0])
    assert [launch["processes"] for launch in meta["launches"]] == [2, 2]
    assert {record["rank"] for record in meta["reference"]} == {0, 1}
    shares = [read_journal(journal_path(tmp_path / "grid.json", rank)) for rank in range(2)]
    counts = [sum(record["kind"] == "cell" for record in share) for share in shares]
    assert counts == [12, 12]
    code, out, error = bench(steps="4,16")  # one process goes on where two were, and has nothing to do
    assert code == 0 and "24 cells" in out and len(read(tmp_path)[1]["launches"]) == 2, error


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(bench, tmp_path, monkeypatch):
    measure, count = Runner.measure, []

    def interrupted(self, cell):
        count.append(cell)
        if len(count) == 20:
            raise KeyboardInterrupt
        return measure(self, cell)

    monkeypatch.setattr(Runner, "measure", interrupted)
    code, _, error = bench()
    assert (
        code == 130
        and "stopped: 19 of 30 cells are measured and kept, 16 of them judged" in error
        and "dlm bench grid --out" in error
    )
    assert len(keys(tmp_path)) == 19 and len(cells(read(tmp_path)[0])) == 16  # three wait for the judge
    monkeypatch.setattr(Runner, "measure", measure)
    code, out, _ = bench()
    assert code == 0 and "30 cells" in out and len(set(keys(tmp_path))) == len(keys(tmp_path)) == 30


def test_another_judge_reads_the_answers_that_are_there(bench, tokenizer, tmp_path, monkeypatch):
    assert bench(steps="4")[0] == 0
    first = read(tmp_path)[0]
    monkeypatch.setattr(Runner, "measure", lambda self, cell: pytest.fail("a cell was measured again"))
    other = make_checkpoint(tmp_path / "other", tokenizer, d_model=16, objective="autoregressive")
    assert bench(steps="4", judge=other)[0] == 0
    second, meta = read(tmp_path)
    assert meta["settings"]["judge"]["id"] == str(other)
    for key, cell in cells(second).items():
        before = cells(first)[key]
        assert cell["latency"] == before["latency"] and cell["perplexity"] != before["perplexity"]
    assert bench(steps="4")[0] == 0
    assert read(tmp_path)[0] == first


def test_progress_says_cells_time_and_numbers(bench, monkeypatch):
    monkeypatch.setattr(sweep, "SAID_SECONDS", 0.0)
    lines = bench(methods="none", steps="4")[2].splitlines()
    assert len(lines) == 4 and lines[-1].startswith("4/4 cells · left 0:00:00 · none block ")
    assert all(" steps 4: 0." in line and "tokens/s" in line for line in lines)


# ---------------------------------------------------------------- bad input


def fails(bench, *words, **changes):
    """The one line of an error."""
    code, out, error = bench(**changes)
    assert (code, out) == (2, "") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def test_changed_settings_are_refused_unless_fresh(bench, tmp_path):
    assert bench(methods="none", steps="4")[0] == 0
    before = (tmp_path / "grid.journal-0.jsonl").read_bytes()
    fails(bench, "other settings", "repeats was 1 and is 2", "--fresh", methods="none", steps="4", repeats=2)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    fails(bench, "other settings", "questions was", methods="none", steps="4")
    assert (tmp_path / "grid.journal-0.jsonl").read_bytes() == before
    assert bench("--fresh", methods="none", steps="4", repeats=2)[0] == 0
    assert len(cells(read(tmp_path)[0])) == 6 and len(keys(tmp_path)) == 6


def test_files_that_cannot_be_gone_on_with(bench, tmp_path):
    journal = tmp_path / "grid.journal-0.jsonl"
    (tmp_path / "grid.json").write_text("{}")
    fails(bench, "without its journal", "--fresh")
    journal.write_text('{"kind": "settings", "format": 0, "settings": {}}\n')
    fails(bench, "format 0", "this version of dlm writes 1")
    journal.write_text('{"kind": "settings", "form\n{"kind": "cell"}\n')
    fails(bench, "line 1 is damaged and not the last")
    assert bench("--fresh", methods="none", steps="4")[0] == 0


def test_outputs_that_cannot_be_written(bench, tmp_path):
    (tmp_path / "file").write_text("")
    fails(bench, "file", out=tmp_path / "file" / "grid.json")
    fails(bench, "ends in .json", out=tmp_path / "grid.txt")
    held = Journal(tmp_path / "grid.journal-0.jsonl", {})
    fails(bench, "other settings")
    held.close()


def test_two_runs_into_one_file_are_refused(tmp_path):
    first = Journal(tmp_path / "grid.journal-0.jsonl", {})
    with pytest.raises(ValueError, match="being written by another run"):
        Journal(tmp_path / "grid.journal-0.jsonl", {})
    first.close()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_fresh_grid_does_not_touch_one_that_runs(bench, tmp_path, rank):
    """Fault: --fresh removed the journal of a running grid, then asked for its lock."""
    journal = Journal(tmp_path / f"grid.journal-{rank}.jsonl", {})
    journal.append({"kind": "cell", "key": "measured", "time": 1.0})
    (tmp_path / "grid.json").write_text("{}")
    code, out, error = bench("--fresh")
    assert (code, out) == (2, "") and "being written by another run" in error
    assert [record["kind"] for record in read_journal(journal.path)] == ["settings", "cell"]
    assert (tmp_path / "grid.json").read_text() == "{}"
    journal.close()


@pytest.mark.parametrize("line", ["[]", "3", '{"kind": []}', '{"kind": "cell", "time": "x", "key": "a"}', "[" * 9000])
def test_a_record_of_another_type_is_named(tmp_path, line):
    """Fault: a line that is JSON and no record was a traceback."""
    path = tmp_path / "grid.journal-0.jsonl"
    path.write_text('{"kind": "settings", "format": 1, "settings": {}}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"grid.journal-0.jsonl, line 2 is damaged"):
        read_journal(path)


def test_input_that_makes_no_grid(bench, checkpoint, tmp_path):
    fails(bench, "none of the", "each needs a pass", block_lengths="1", steps="2")
    fails(bench, "did you mean 'dual'", methods="dula")
    fails(bench, "whole numbers", steps="4,many")
    fails(bench, "no judge of its own", "--judge none", judge=None)
    fails(bench, "no task 'gsm8'", "'gsm8k'", prompts=None, task="gsm8")
    fails(bench, "give one of them", task="gsm8k")
    fails(bench, "--checker checks the answers of a task", checker="true")
    fails(bench, "--limit is 0", limit=0)
    (tmp_path / "prompts.txt").write_text("\n\n")
    fails(bench, "holds no prompt")


def test_without_a_judge_there_is_no_perplexity(bench, tmp_path):
    assert bench(judge="none", methods="none", steps="4", bound_draws=0)[0] == 0
    for cell in cells(read(tmp_path)[0]).values():
        assert cell["perplexity"] is None and "bound_per_token" not in cell
