"""The grid: which cells there are, what is measured in each, the shape of the file."""

import itertools
import json
import math
import statistics

import pytest
import torch

import dlm
from dlm.benchmarking.grid import Cell, GridConfig, places_asked, plan, powers_of_two, reference_cell
from dlm.benchmarking.quality import FIELDS, assemble, aup_by_curve
from dlm.benchmarking.results import Setting
from dlm.evaluation.judge import open_judge
from dlm.evaluation.tasks import Question
from dlm.objectives.likelihood import LikelihoodConfig, answer, bound
from dlm.sampling.canvas import Canvas
from dlm.sampling.schedule import schedule
from dlm.tokenizer import decode
from dlm.utils.stats import proportion
from tests.helpers import grids
from tests.helpers.commandline import make_checkpoint
from tests.helpers.grids import METHODS, PROMPTS, cells, read
from tests.helpers.toys import Recorder

tokenizer, checkpoint, run = grids.tokenizer, grids.checkpoint, grids.run  # fixtures
twin, bench = grids.twin, grids.bench

WATCHED = {"ties", *(f"cache_{name}" for name in ("rms", "nats", "same", "places"))}  # of the first question alone

# A script as people write them for such files; it must run as it is.
SCRIPT = """
import json, sys
grid = json.load(open(sys.argv[1]))
rows = []
for method, questions in grid.items():
    for entry in questions:
        for block, row in entry["result"].items():
            for steps, cell in row.items():
                rows.append((method, entry["question"], int(block), int(steps), cell["latency"], cell["perplexity"]))
                assert isinstance(cell["answer"], str)
print(len(rows), sum(latency for *_, latency, _ in rows), max(perplexity for *_, perplexity in rows))
"""


def canvas(places, prompt=3):
    return Canvas.from_prompts([list(range(prompt))], places, mask_id=39)


def sweep_config(**changes):
    axes = {"methods": ("none",), "block_lengths": powers_of_two(8), "steps": powers_of_two(8)}
    return GridConfig(**(axes | changes))


# ---------------------------------------------------------------- which cells


def test_powers_of_two():
    assert powers_of_two(8) == (1, 2, 4, 8) and powers_of_two(12) == (1, 2, 4, 8) and powers_of_two(1) == (1,)


def test_cells_are_those_with_a_pass_for_every_block(tiny):
    found, left_out = plan(tiny, [canvas(8)], sweep_config())
    places = [(cell.block_length, cell.steps) for cell in found]
    assert places == [(1, 8), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8), (8, 1), (8, 2), (8, 4), (8, 8)]
    assert {(one["block_length"], one["steps"]) for one in left_out} == set(
        itertools.product((1, 2, 4, 8), repeat=2)
    ) - set(places)
    assert all("blocks, and each needs a pass" in one["reason"] for one in left_out)


def test_a_setting_is_measured_on_all_questions_or_on_none(tiny):
    """Eight places and four: blocks of 8 are one block for both, 8 passes are too many for the second."""
    found, [one] = plan(tiny, [canvas(8), canvas(4)], sweep_config(block_lengths=(8,), steps=(4, 8)))
    assert [(cell.question, cell.steps) for cell in found] == [(0, 4), (1, 4)]
    assert one["questions"] == [1] and "8 but there are 4 places to fill, and every pass fills one" in one["reason"]
    found, [one] = plan(tiny, [canvas(8), canvas(4)], sweep_config(block_lengths=(8, 16), steps=(4,)))
    assert {cell.block_length for cell in found} == {8} and "the same as 8" in one["reason"]


def test_methods_that_do_not_suit_the_model_are_left_out(tiny):
    found, left_out = plan(tiny, [canvas(8)], sweep_config(methods=("none", "block_causal"), steps=(8,)))
    assert {cell.method for cell in found} == {"none"} and len(left_out) == 4
    assert all("is for block-causal models" in one["reason"] for one in left_out)


def test_no_cell_at_all_is_an_error(tiny):
    with pytest.raises(ValueError, match="none of the 1 settings can be measured; the first: steps is 1"):
        plan(tiny, [canvas(8)], sweep_config(block_lengths=(2,), steps=(1,)))
    with pytest.raises(ValueError, match="max_sequence_length 256"):
        plan(tiny, [canvas(300)], sweep_config())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ("dul",)}, "did you mean 'dual'"),
        ({"steps": (4, 4)}, "give each value once"),
        ({"block_lengths": (0,)}, "1 or more"),
        ({"commits": ("threshhold:0.9",)}, "did you mean 'threshold'"),
        ({"commits": ("threshold:high",)}, "'high' is no number"),
        ({"commits": ("quota:3",)}, "quota takes no number"),
        ({"commits": ("ancestral:0.5",)}, "ancestral takes no number"),
        ({"repeats": 0}, "at least once"),
    ],
)
def test_wrong_axes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sweep_config(**changes)


def test_a_number_behind_a_commit_rule_sets_what_the_rule_reads():
    """`stable:0.8` once asked SamplingConfig for a field of the rule's own name."""
    for commit, field in (("stable:0.8", "threshold"), ("capped:0.8", "threshold"), ("factor:0.8", "factor")):
        config = sweep_config(commits=(commit,))
        sampling = config.sampling_of(Cell("none", commit, 0, 4, None))
        assert sampling.commit == commit[:-4] and getattr(sampling, field) == 0.8


def test_the_reference_is_one_of_the_cells():
    some = [Cell(method, "quota", 0, block, steps) for method in METHODS for block in (8, 64) for steps in (4, 16, 64)]
    assert reference_cell(some) == Cell("none", "quota", 0, 64, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [4, 6, 16])
def test_places_asked_are_those_that_the_model_is_asked_about(tiny, method, steps):
    config = dlm.SamplingConfig(gen_length=16, steps=steps, block_length=4, method=method)
    seen = Recorder(tiny)
    list(dlm.denoise(seen, canvas(16), config))
    asked = sum(options["logits_to_keep"].shape[1] for _, _, options in seen.calls)
    assert places_asked([4] * 4, schedule(steps, [4] * 4), method == "c2f") == asked


# ---------------------------------------------------------------- what is measured


def test_a_grid(bench, checkpoint, twin, tokenizer, tmp_path):
    code, out, error = bench(methods=",".join(METHODS), repeats=2, steps="4,16")
    assert code == 0 and "wrote" in out and "left" in error, error
    results, meta = read(tmp_path)
    assert list(results) == list(METHODS) and [entry["question"] for entry in results["none"]] == list(PROMPTS[:2])
    found = cells(results)
    assert len(found) == len(METHODS) * 2 * 4 == meta["cells"] == meta["measured"]
    model, _ = dlm.load(checkpoint, device="cpu")
    judge = open_judge(str(twin), device="cpu")
    for (method, question, block, steps), cell in found.items():
        number = PROMPTS.index(question)
        config = dlm.SamplingConfig(gen_length=16, steps=steps, block_length=block, method=method, seed=number)
        out = dlm.generate(model, [question], config, tokenizer=tokenizer)
        ids = out.sequences[0].tolist()
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        assert cell["answer"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert cell["nfe"] == steps == int(out.nfe[0]) and cell["tokens_per_forward"] == 16 / steps
        assert cell["positions_computed"] == positions(method, len(tokenizer(question)["input_ids"]), block, steps)
        assert cell["latency_min"] <= cell["latency"] == cell["latency_median"] <= cell["latency_max"]
        assert cell["generated_tokens"] == len(ids)
        assert cell["tokens_per_s"] == pytest.approx(len(ids) / cell["latency"])
        [score] = judge.score([(question, cell["answer"])])
        assert cell["perplexity"] == pytest.approx(score.perplexity, rel=1e-5) and cell["repeatable"]
        if ids:
            example = answer(tokenizer(question)["input_ids"], ids, index=number)
            [nats] = bound(model, [example], LikelihoodConfig(draws=2), mask_id=tokenizer.mask_token_id)
            assert cell["bound_per_token"] == pytest.approx(nats.nats / nats.tokens, rel=1e-4)
        watched = set() if question == PROMPTS[0] else WATCHED
        assert set(cell) == set(FIELDS) - {"correct", "accuracy", "accuracy_error"} - watched


def positions(method, prompt, block, steps):
    """DESIGN, section 5: what the passes of 16 tokens after a prompt compute, block dividing 16."""
    total, blocks = prompt + 16, 16 // block
    later = {
        "none": lambda k: total,
        "prefix": lambda k: total - prompt - k * block,
        "dual": lambda k: block,
        "c2f": lambda k: block,
        "vicinity": lambda k: min(total, prompt + (k + 1) * block + 16) - max(0, prompt + k * block - 16),
    }[method]
    return sum(total + (steps // blocks - 1) * later(k) for k in range(blocks))


def test_what_stands_beside_the_file(bench, tmp_path):
    assert bench(commits="quota,threshold:0.5", temperature=0.5, seed=7)[0] == 0
    results, meta = read(tmp_path)
    assert list(results) == ["none", "none threshold:0.5", "dual", "dual threshold:0.5", "c2f", "c2f threshold:0.5"]
    for (method, *_, steps), cell in cells(results).items():
        assert "threshold" not in method or cell["nfe"] == steps  # the passes that it took are its steps
    assert sorted(meta["order"]) != meta["order"] and len(set(meta["order"])) == meta["cells"]
    assert meta["settings"]["sampling"]["temperature"] == 0.5 and meta["settings"]["sampling"]["seed"] == 7
    assert meta["settings"]["questions"] == list(PROMPTS[:2])
    [launch] = meta["launches"]
    assert launch["command"].startswith("dlm bench grid") and launch["versions"]["torch"] == torch.__version__
    assert {"commit", "hardware", "processes"} <= launch.keys() and len(meta["reference"]) >= 2
    assert meta["infeasible"] == [
        {
            "method": method,
            "block_length": 4,
            "steps": 2,
            "questions": [0, 1],
            "reason": meta["infeasible"][0]["reason"],
        }
        for method in ("none", "dual", "c2f")
    ]
    assert set(meta["fields"]) == set(FIELDS) and "4-grams" in meta["degenerate_rule"]


def test_a_script_for_such_files_runs_unchanged(bench, tmp_path, capsys, monkeypatch):
    assert bench()[0] == 0
    for name in ("grid.json", "grid.meta.json"):  # NaN and Infinity are no JSON
        json.loads((tmp_path / name).read_text(), parse_constant=lambda word: pytest.fail(word))
    monkeypatch.setattr("sys.argv", ["script.py", str(tmp_path / "grid.json")])
    exec(compile(SCRIPT, "script.py", "exec"), {})
    count, seconds, worst = capsys.readouterr().out.split()
    assert count == "30" and float(seconds) > 0 and math.isfinite(float(worst))


def test_latency_follows_the_reference():
    """A machine that becomes twice as slow: the relative latency does not change."""
    every = [Cell("none", "quota", 0, 4, steps) for steps in (4, 8, 16)]
    records = [{"kind": "reference", "launch": "a", "time": time, "latency": 1 + time / 10} for time in (0.0, 10.0)]
    for time, cell in zip((0.0, 5.0, 10.0), every, strict=True):
        values = {"latency": cell.steps * (1 + time / 10), "question": 0, "nfe": cell.steps, "token_ids": [1, 2, 3]}
        records.append({"kind": "cell", "key": cell.key, "launch": "a", "time": time, **values})
        records.append(
            {"kind": "judgement", "key": cell.key, "time": time, "judging": {}, "fields": {"perplexity": 2.0}}
        )
    row = assemble(records, every, [Question("Q", "Q")], {})["none"][0]["result"]["4"]
    assert {steps: cell["latency_relative"] for steps, cell in row.items()} == {"4": 4.0, "8": 8.0, "16": 16.0}


def test_one_word_three_hundred_times_is_degenerate():
    """The reference's kind of answer: a judge finds it very probable, and the cell says so."""
    cell = Cell("none", "quota", 0, 4, 4)
    for ids, degenerate in (([17] * 300, True), (list(range(300)), False)):
        record = {"kind": "cell", "key": cell.key, "launch": "a", "time": 1.0, "question": 0, "latency": 1.0, "nfe": 4}
        records = [
            {"kind": "reference", "launch": "a", "time": 0.0, "latency": 1.0},
            record | {"token_ids": ids},
            {"kind": "judgement", "key": cell.key, "time": 2.0, "judging": {}, "fields": {"perplexity": 1.18}},
        ]
        found = assemble(records, [cell], [Question("Q", "Q")], {})["none"][0]["result"]["4"]["4"]
        assert found["degenerate"] is degenerate and found["perplexity"] == 1.18
        assert (found["unigram_entropy"] == 0.0) is degenerate


def test_aup_of_curves():
    def setting(method, accuracy, tokens):
        return Setting(method, 4, 1, 1.0, None, accuracy, None, False, [{"tokens_per_forward": tokens}])

    found = aup_by_curve([setting("none", 0.8, 1.0), setting("none", 0.78, 2.0), setting("dual", 0.5, 1.0)])
    assert [one["method"] for one in found] == ["none", "dual"]
    assert found[0]["aup"] == pytest.approx(80 + (80 + 78 * math.exp(-3 * (1 - 78 / 80))) / 2)
    assert found[1]["aup"] == 50


def test_repeats_take_the_median(bench, tmp_path, monkeypatch):
    """The clock of the timed generations says 1, 5, 2 seconds, however long they took."""
    from dlm.benchmarking import grid

    ticks = itertools.cycle([0.0, 1.0, 0.0, 5.0, 0.0, 2.0])
    monkeypatch.setattr(grid.time, "perf_counter", lambda: next(ticks))
    assert bench(methods="none", steps="4", repeats=3)[0] == 0
    for cell in cells(read(tmp_path)[0]).values():
        assert (cell["latency_min"], cell["latency"], cell["latency_max"]) == (1.0, statistics.median([1, 5, 2]), 5.0)


def test_a_task_adds_accuracy_and_its_error(bench, checkpoint, tokenizer, tmp_path):
    """One question whose accepted answer is what the model writes, two that it does not get right."""
    config = dlm.SamplingConfig(gen_length=16, steps=4, block_length=16, seed=0)
    ids = dlm.generate(dlm.load(checkpoint, device="cpu")[0], ["The cat"], config, tokenizer=tokenizer).sequences[0]
    written = decode(tokenizer, ids.tolist())
    records = [("The cat", written), ("Once upon", "never"), ("She ___{4} the sea", "never")]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": prompt, "answer": text}) for prompt, text in records))
    assert bench(task=task, prompts=None, methods="none", steps="4", block_lengths="4,16")[0] == 0
    results, meta = read(tmp_path)
    found = cells(results)
    assert [found["none", prompt, 16, 4]["correct"] for prompt, _ in records[:2]] == [True, False]
    for block in (4, 16):
        right = [found["none", text, block, 4]["correct"] for text, _ in records]
        cell = found["none", "The cat", block, 4]
        assert (cell["accuracy"], cell["accuracy_error"]) == (pytest.approx(sum(right) / 3), proportion(right)[1])
    blank = found["none", "She ___{4} the sea", 16, 4]  # four places are one block
    assert blank["answer"].startswith("She") and blank["answer"].endswith("the sea") and blank["judge_tokens"] > 4
    assert meta["aup"] and {one["method"] for one in meta["aup"]} == {"none"}


def test_a_block_causal_model(bench, tokenizer, tmp_path):
    model = make_checkpoint(tmp_path / "blocks", tokenizer, block_length=4)
    assert bench(model=model, methods=None, block_lengths=None, steps="8,16")[0] == 0
    found = cells(read(tmp_path)[0])
    assert {key[0] for key in found} == {"none", "block_causal"} and {key[2] for key in found} == {4}
    assert all(cell["nfe"] == key[3] and cell["bound_per_token"] for key, cell in found.items())
