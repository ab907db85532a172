"""Tuning: a search whose answer is known, the command on a tiny model, its journal, and what --write changes."""

import json
import shutil

import pytest

from dlm.benchmarking.tune import REVISIONS, Candidate, Search, candidates, chosen, curves, feasible, front, outcome
from dlm.checkpoints.defaults import write_defaults
from dlm.checkpoints.files import SHIPPED, read_defaults
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig
from tests.helpers import commandline, grids
from tests.helpers.toys import MASK, tiny_model

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures
twin = grids.twin


def candidate(name, steps):
    return Candidate((("method", name), ("block_length", 8), ("commit", "quota"), ("steps", steps)), 8 / steps)


def planted(seconds, right, calls=None):
    """measure(pairs) of candidates whose latency and share of right answers are known."""

    def measure(pairs):
        if calls is not None:
            calls.extend(pairs)
        return [
            {
                "latency": seconds[one],
                "spent": seconds[one],
                "tokens_per_forward": one.tokens,
                "token_ids": [1],
                "correct": (question * 7 + 3) % 100 < 100 * right[one],
            }
            for one, question in pairs
        ]

    return measure


REFERENCE, GOOD, FAST, SLOW = (candidate(*x) for x in (("none", 8), ("dual", 4), ("dual", 2), ("prefix", 8)))


def test_the_search_finds_the_fastest_that_is_as_good():
    seconds = {REFERENCE: 8.0, GOOD: 4.0, FAST: 2.0, SLOW: 9.0}
    right = {REFERENCE: 0.8, GOOD: 0.8, FAST: 0.2, SLOW: 0.9}
    calls = []
    search = Search(planted(seconds, right, calls), 32, 0.98, 1e9, prose=False)
    outcomes = search.run(REFERENCE, [GOOD, FAST, SLOW])
    assert chosen(outcomes, 0.98).candidate == GOOD
    assert chosen(outcomes, 0.2).candidate in (GOOD, FAST)
    assert sum(one == SLOW for one, _ in calls) == 4  # slower than the reference: no second rung
    assert sum(one == GOOD for one, _ in calls) == 32 and len(set(calls)) == len(calls)
    assert [one.candidate for one in front(outcomes)] == [GOOD]  # the others were measured on too few questions


def test_the_budget_ends_the_search():
    seconds, right = {REFERENCE: 8.0, GOOD: 4.0}, {REFERENCE: 1.0, GOOD: 1.0}
    search = Search(planted(seconds, right), 32, 0.98, 50.0, prose=False)
    outcomes = search.run(REFERENCE, [GOOD])
    assert search.stopped and 50 <= search.spent <= 50 + 8 * 8
    assert chosen(outcomes, 0.98).questions >= 4


def test_kept_is_of_the_same_questions_with_its_error():
    mine = [{"latency": 1, "tokens_per_forward": 2, "token_ids": [1, 2], "perplexity": p} for p in (2.0, 4.0)]
    theirs = [{"latency": 1, "tokens_per_forward": 1, "token_ids": [1, 1], "perplexity": p} for p in (1.0, 4.0)]
    one = outcome(GOOD, mine, theirs, prose=True)
    assert one.kept.value == pytest.approx(0.5**0.5)  # perplexity 2.83 for 2
    assert one.kept.error == pytest.approx(0.5**0.5 * 0.5 * 0.6931, rel=1e-3)  # of ln(1/2) and 0
    assert one.keeps(0.98, slack=2.0) and not one.keeps(0.98)
    flat = outcome(GOOD, theirs, mine, prose=True)  # one word over and over: less varied than the reference
    assert flat.varied == 0.0 and not flat.keeps(0.5)


def test_aup_of_a_curve():
    rows = [{"latency": 1, "tokens_per_forward": 1, "token_ids": [1], "correct": x} for x in (True, True)]
    fast = [{**row, "tokens_per_forward": 2} for row in rows]
    outcomes = [outcome(GOOD, rows, rows, False), outcome(FAST, fast, rows, False)]
    [curve] = curves(outcomes, accuracy=True)
    assert curve["points"] == 2 and curve["aup"] == pytest.approx(200.0)  # 100 up to 2 tokens a pass


def test_candidates_go_together():
    config = SamplingConfig(gen_length=16)
    reference, others = candidates(config, ["none", "dual"], lambda method: [8, 16])
    assert reference.fields == {"method": "none", "block_length": 16, "commit": "quota", "steps": 16}
    assert reference not in others and len(set(others)) == len(others)
    assert {one.fields.get("revise") for one in others} == {None, "edit", "verify"}
    _, without = candidates(config, ["none", "dual"], lambda method: [8, 16], [{}, REVISIONS["edit"]])
    assert {one.fields.get("revise") for one in without} == {None, "edit"}
    guided = SamplingConfig(gen_length=16, cfg_scale=1.0)
    _, guided_others = candidates(guided, ["none"], lambda method: [8])
    assert all(one.fields.get("revise") != "verify" for one in guided_others)  # settings that do not go together
    assert all(one.fields.get("steps", 2) >= -(-16 // one.fields["block_length"]) for one in others)


def test_a_block_more_than_the_length_says_needs_a_pass():
    """Blocks of 4 count from slot 0: 8 masks after 3 tokens lie in three of them, and two steps are too few."""
    model, canvas = tiny_model(3, block_length=4), Canvas.from_prompts([[1, 2, 3]], 8, MASK)
    config = SamplingConfig(gen_length=8)
    few, enough = (
        Candidate((("method", "block_causal"), ("block_length", 4), ("commit", "quota"), ("steps", steps)))
        for steps in (2, 3)
    )
    assert not feasible(model, [canvas], config, few) and feasible(model, [canvas], config, enough)


# ---------------------------------------------------------------- the command


def tune(run, checkpoint, twin, folder, *options, **changes):
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"Once upon a time {n}" for n in range(6)))
    settings = {
        "out": folder / "tune.json", "model": checkpoint, "judge": twin, "prompts": prompts, "gen_length": 4,
        "methods": "dual", "block_lengths": "8", "budget": 60, "confirm": 2, "device": "cpu", **changes,
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    return run("bench", "tune", *words, *options, model=None)


def test_the_command_goes_on_and_writes(run, checkpoint, twin, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(checkpoint, folder)
    code, out, error = tune(run, folder, twin, tmp_path, keep=0.01)
    assert code == 0 and "the choice" in out and "on 2 fresh questions" in out, error
    results, meta = grids.read(tmp_path, "tune")
    assert results["outcomes"][0]["settings"]["steps"] == 4 and results["choice"]["questions"] == 4
    assert results["confirmation"]["questions"] == 2 and results["aup"] and results["telemetry"]
    assert meta["command"].startswith("dlm bench tune") and len(meta["settings"]["questions"]) == 6
    lines = (tmp_path / "tune.journal-0.jsonl").read_text().splitlines()
    code, out, error = tune(run, folder, twin, tmp_path, "--write", keep=0.01)
    assert code == 0 and f"wrote the sampling defaults of {folder}" in out, error
    assert (tmp_path / "tune.journal-0.jsonl").read_text().splitlines() == lines  # nothing was measured again
    written = json.loads((folder / "generation_config.json").read_text())["dlm"]
    assert written == {"gen_length": 4, **results["choice"]["settings"]}


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"budget": 0}, (), "--budget is 0"),
        ({"budget": "nan"}, (), "--budget is nan"),
        ({"keep": 1.5}, (), "--keep is 1.5"),
        ({"judge": "none"}, (), "--judge is none"),
        ({"confirm": 5}, (), "1 of 6 questions are left"),
        ({"methods": "dul"}, (), "dul"),
        ({"block_lengths": "a"}, (), "--block-lengths is 'a'"),
        ({"revisions": "edti"}, (), "edit"),
        ({"model": None, "judge": None}, ("--write",), "give --write FOLDER"),
        ({"model": SHIPPED, "judge": None}, ("--write",), "ships with dlm"),
    ],
)
def test_bad_input_is_one_line(run, checkpoint, twin, tmp_path, changes, options, said):
    code, _, error = tune(run, checkpoint, twin, tmp_path, *options, **changes)
    assert code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "tune.json").exists()


def test_written_defaults_replace_what_was_tuned_and_keep_the_rest(checkpoint, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    shutil.copytree(checkpoint, source)
    before = {"temperature": 0.5, "method": "none", "steps": 4}
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "dlm": before}))
    write_defaults(source, copy, {"method": "dual", "commit": "threshold", "threshold": 0.9})
    assert read_defaults(copy / "generation_config.json") == {
        "temperature": 0.5, "method": "dual", "commit": "threshold", "threshold": 0.9,
    }  # fmt: skip
    assert json.loads((copy / "generation_config.json").read_text())["eos_token_id"] == 3
    assert read_defaults(source / "generation_config.json") == before
    write_defaults(copy, copy, {"method": "none"})  # in place, and still a folder that dlm may replace
    write_defaults(source, copy, {"method": "none"})
    (copy / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds what dlm did not write"):
        write_defaults(source, copy, {})
    for target, hub in ((SHIPPED, False), (source, True)):
        with pytest.raises(ValueError, match="is not changed"):
            write_defaults(target, target, {}, hub=hub)
