"""`dlm train grpo`: kill and resume inside of a round, several processes, rewards that fail, refusals of one line."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from tqdm import tqdm

from dlm.training.state import checkpoints
from tests.helpers.commandline import make_checkpoint, tokenizer  # noqa: F401
from tests.helpers.ranks import ROOT, two
from tests.helpers.recipes import fresh, records, weights
from train import grpo

assert fresh  # a fixture for every test here
KILLS = 3
SAMPLING = "gen_length=6|block_length=6|steps=3|temperature=1"
MINE = """
def vowels(prompts, completions, bonus, **columns):
    if {broken} and any("the sea" in prompt for prompt in prompts):
        raise KeyError("sea")
    return [sum(letter in "aeiou" for letter in text) / 10 + more for text, more in zip(completions, bonus)]
"""


@pytest.fixture
def start(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    """start(output, *options) -> exit code of a tiny run on eight prompts whose answers are better with vowels."""
    make_checkpoint(tmp_path / "model", tokenizer)
    rows = [{"prompt": f"Fox {n}" + " the sea" * (n == 5), "bonus": n / 10} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "vowelled.py").write_text(MINE.format(broken=False))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)

    def start(output, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules.pop("vowelled", None)
        return grpo.main([*argv(tmp_path, output), *more])

    yield start
    sys.path[:] = before
    sys.modules.pop("vowelled", None)


def argv(folder, output):
    options = {
        "model": folder / "model", "data": folder / "prompts.jsonl", "output": folder / output, "format": "plain",
        "rewards": "vowelled:vowels", "sampling": SAMPLING, "max-steps": 6, "batch-size": 8, "group-size": 4,
        "inner": 2, "precision": "no", "checkpoint-every": 3, "warmup-steps": 1, "learning-rate": "3e-3",
        "log-every": 1, "tracker": "none", "kl": 0.01,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def away(tmp_path, one, other):
    return float((weights(tmp_path / one / "model") - weights(tmp_path / other / "model")).abs().max())


@pytest.mark.parametrize("policy", ["diffu_grpo", "trace"])
def test_a_run_resumed_inside_of_a_round_is_the_same(tmp_path, start, policy, measured):
    more = [f"--policy={policy}"]
    assert start("whole", *more) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model")
    [(_, third), (_, last)] = checkpoints(tmp_path / "parts")
    assert (third / "rollouts-0.safetensors").is_file() and not (last / "rollouts-0.safetensors").is_file()
    shutil.rmtree(last)  # as if killed after step 3, the first of two with the same answers
    assert start("parts", *more, "--resume") == 0
    assert away(tmp_path, "whole", "parts") == 0
    log = records(tmp_path / "whole")
    assert [{k: v for k, v in r.items() if "second" not in k and "_per_s" not in k} for r in log] == [
        {k: v for k, v in r.items() if "second" not in k and "_per_s" not in k} for r in records(tmp_path / "parts")
    ]
    rounds = [r for r in log if r["kind"] == "rollouts"]
    assert [r["step"] for r in rounds] == [1, 3, 5] and rounds[0]["answers"] == 8
    assert rounds[0]["tokens_per_pass"] == 2 and rounds[0]["reward error"] > 0 and "completion" in rounds[0]
    steps = [r for r in log if r["kind"] == "train"]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-6 and steps[0]["clip_share"] == 0
    assert 0 < steps[0]["entropy"] < 6
    assert start("cut", *more, "--accumulation=2", "--rollout-rows=3") == 0
    measured(f"weights, accumulation 1 and 2, {policy}", away(tmp_path, "whole", "cut"), 1e-4)


def test_rewards_teach(tmp_path, start):
    more = ["--inner=1", "--max-steps=30", "--batch-size=32", "--kl=0", "--learning-rate=1e-2", "--prompt-mask=0"]
    assert start("run", *more) == 0
    rounds = [r["reward vowelled:vowels"] for r in records(tmp_path / "run") if r["kind"] == "rollouts"]
    assert sum(rounds[-5:]) / 5 > sum(rounds[:5]) / 5 + 0.1, rounds


def test_two_processes_have_the_same_run(tmp_path, start, measured):
    """DDP; whole groups stay in one process. A round that two processes kept goes on in one."""
    script = ROOT / "train" / "grpo.py"
    assert start("one", "--max-steps=3") == 0
    two([script, *argv(tmp_path, "two"), "--max-steps=3", "--rewards=regex:.*[aeiou].*"])
    assert start("one_too", "--max-steps=3", "--rewards=regex:.*[aeiou].*") == 0
    measured("weights, 1 process and 2, rollouts", away(tmp_path, "one_too", "two"), 1e-4)
    [(_, third)] = checkpoints(tmp_path / "two")
    assert {file.name for file in third.glob("rollouts-*")} == {"rollouts-0.safetensors", "rollouts-1.safetensors"}
    for name in ("two", "one_too"):
        assert start(name, "--max-steps=4", "--rewards=regex:.*[aeiou].*", "--resume") == 0
    measured("weights, 2 processes and then 1, rollouts", away(tmp_path, "one_too", "two"), 1e-4)


@pytest.mark.parametrize("policy", ["diffu_grpo", "trace"])
def test_two_sharded_processes_have_the_same_run(tmp_path, start, measured, policy):
    """FSDP2 by gloo. Answers that end early have fewer passes of a trace: the processes must take as many."""
    more = [f"--policy={policy}", "--rewards=regex:.*[aeiou].*", "--optimizer=adamw"]
    two([ROOT / "tests" / "helpers" / "sharded.py", "grpo", *argv(tmp_path, "two"), *more])
    assert start("one", *more) == 0
    measured(f"weights, 1 process and 2 under FSDP2, rollouts, {policy}", away(tmp_path, "one", "two"), 1e-4)
    steps = [[r for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("one", "two")]
    for mine, theirs in zip(*steps, strict=True):
        for name in ("loss", "kl", "entropy", "clip_share"):
            assert theirs[name] == pytest.approx(mine[name], abs=2e-4), (name, mine, theirs)


@pytest.mark.parametrize("both", [True, False])
def test_the_model_keeps_its_visibilities(tmp_path, start, tokenizer, both):  # noqa: F811
    """A regression test: answers written in blocks were learned from under full attention, and the blocks were lost."""
    shape = {"block_length": 3, **({"full_attention": True} if both else {})}
    make_checkpoint(tmp_path / "model", tokenizer, **shape)
    blocks = ["--sampling=gen_length=6|temperature=1|method=block_causal", "--policy=trace", "--max-steps=2"]
    assert start("run", *blocks) == 0
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("model", "run/model"))
    assert {**after, "torch_dtype": 0, "dtype": 0} == {**before, "torch_dtype": 0, "dtype": 0}
    ready = grpo.prepare(grpo.parse([*argv(tmp_path, "seen"), *blocks]), SimpleNamespace())
    assert ready.objective.visible.block_length == 3


def test_adapters_are_their_own_reference(tmp_path, start):
    assert start("lora", "--lora=2") == 0
    first = next(r for r in records(tmp_path / "lora") if r["kind"] == "train")
    assert first["kl"] == pytest.approx(0, abs=1e-6)


def test_a_reward_that_fails_is_named_and_the_run_goes_on(tmp_path, start, capsys):
    assert start("whole") == 0
    (tmp_path / "vowelled.py").write_text(MINE.format(broken=True))
    capsys.readouterr()
    assert start("parts") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "reward vowelled:vowels raised KeyError: 'sea'" in told, told
    assert "prompts.jsonl, line 6, completion" in told and "go on with --resume from" in told
    (tmp_path / "vowelled.py").write_text(MINE.format(broken=False))
    assert start("parts", "--resume") == 0 and away(tmp_path, "whole", "parts") == 0


def test_equal_rewards_are_counted_and_said(tmp_path, start, capsys):
    assert start("run", "--rewards=regex:.*", "--max-steps=2", "--kl=0") == 0
    assert "the 4 answers of every prompt have equal rewards (1 on average)" in capsys.readouterr().out
    [record] = [r for r in records(tmp_path / "run") if r["kind"] == "rollouts"]
    assert record["equal_groups"] == 1 and record["reward"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rewards=countdwon"], "the nearest is 'countdown'"),
        (["--rewards=sudoku4x4"], "reads the column 'solution', and the data have 'bonus'"),
        (["--rewards="], "no reward: give --rewards"),
        (["--reward-weights=a"], "reward_weights are a: give numbers"),
        (["--group-size=1"], "a group has 2 answers or more"),
        (["--batch-size=6"], "is not a multiple of group_size 4"),
        (["--sampling=gen_length=6"], "sampling has temperature 0"),
        (["--sampling=gen_length=6|temperature=1|align=prompt"], "in blocks of the row: leave it out"),
        (
            ["--sampling=gen_length=6|temperature=1|seed=4"],
            "each answer has one of its own: leave it out, or give --seed",
        ),
        (["--sampling=gen_lenght=6|temperature=1"], "the nearest name is 'gen_length'"),
        (["--sampling=gen_length=six"], "gen_length=six: it must be a whole number"),
        (["--sampling=temperature=1|gen_length=400"], "8 leave no room for 400 tokens in 128"),
        (["--shrink=2"], "--shrink has no effect where --policy is diffu_grpo"),
        (["--policy=ppo"], "diffu_grpo"),
        (["--streaming"], "streaming is True, and answers are learned from whole"),
        (["--valid=x.jsonl"], "with dlm eval rewards"),
        (["--prompt-column=question"], "no text or messages for the prompt in column 'question'"),
    ],
)
def test_bad_input_is_one_line(start, capsys, more, message):
    assert start("run", *more) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked, so that imports are paid once")
@pytest.mark.parametrize("kills", [KILLS, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, start, kills):
    """SIGKILL in a rollout, a step or the writing of a checkpoint."""
    tqdm.set_lock(threading.RLock())  # its own is shared with forked children
    more, moments = ["--max-steps=12", "--checkpoint-every=1", "--inner=3"], random.Random(0)
    began = time.perf_counter()
    assert start("whole", *more) == 0
    took = time.perf_counter() - began
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as sys.stdout:
                os._exit(start("parts", *more, "--resume"))
        time.sleep(moments.uniform(0.05, 2 * took / kills))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert start("parts", *more, "--resume") == 0
    assert away(tmp_path, "whole", "parts") == 0


def test_one_prompt_a_step_and_rewards_that_do_not_apply(tmp_path, start, capsys):
    """Regression tests: a mean of one prompt has no error, which ended the run in a traceback; answers to which a
    reward does not apply (None) counted as 0 in its mean."""
    (tmp_path / "some.py").write_text(
        "def some(prompts, completions, bonus, **columns):\n"
        "    return [0.5 if more < 0.4 else None for more in bonus]\n"
    )
    assert start("run", "--batch-size=4", "--max-steps=2", "--inner=1") == 0
    assert "±" not in (out := capsys.readouterr().out) and "step 1  reward" in out
    assert start("some", "--rewards=some:some|regex:.*", "--batch-size=32", "--max-steps=1", "--inner=1") == 0
    [record] = [r for r in records(tmp_path / "some") if r["kind"] == "rollouts"]
    assert record["reward some:some"] == 0.5 and record["reward some:some error"] == 0
    assert start("none", "--rewards=some:some|regex:.*", "--batch-size=4", "--max-steps=8", "--inner=1") == 0
    means = {r["reward some:some"] for r in records(tmp_path / "none") if r["kind"] == "rollouts"}
    assert means == {0.5, None}  # a round without a prompt to which it applies has no mean


def test_what_the_policy_does_not_know_of_is_said():
    common = ["--rewards=countdown", "--data=a.jsonl"]
    assert grpo.beside_the_policy(grpo.parse(common)) == ""
    told = grpo.beside_the_policy(grpo.parse([*common, "--sampling=gen_length=8|temperature=1|top_p=0.9|cfg_scale=1"]))
    assert told.startswith("warning: sampling has top_p=0.9, cfg_scale=1.0, which changes what is drawn")


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path, start, capsys):
    """A regression test: --on-bad-row skip stopped at a line that does not parse. Weights of prompts are refused."""
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "a", \n')
    assert start("run", "--max-steps=1") == 2
    assert "line 9: not JSON" in (told := capsys.readouterr().err) and "--on-bad-row skip" in told
    assert start("run", "--on-bad-row=skip", "--max-steps=4") == 0
    assert "1 bad rows" in capsys.readouterr().out
    notes = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert (notes["answers_seen"], notes["epochs"]) == (32, 0.5)  # eight prompts, of which a step with two took two
    assert start("bad", f"--data={tmp_path / 'prompts.jsonl'}:2") == 2
    assert "has weight 2, and prompts are taken once each" in capsys.readouterr().err
