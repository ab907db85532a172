"""Offline batches: each text is what its prompt alone gives; a run that was killed goes on as if nothing was."""

import json
import multiprocessing
import random
import signal
import time

import pytest

from dlm.checkpoints.pretrained import load_pretrained
from dlm.cli.main import main
from dlm.data.prompts import PromptFile, iter_prompts
from dlm.sampling.config import SamplingConfig
from dlm.serving import offline
from dlm.serving.resume import Output, merge, meta_path, part_path
from tests.helpers.commandline import checkpoint, run, tokenizer  # noqa: F401

pytest.importorskip("fastapi", reason="dlm's extra serve is not installed")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "little", "fox", "walked", "along", "beach", "shells", "sea"]
OPTIONS = ("--gen-length", 6, "--block-length", 3, "--temperature", 1, "--seed", 5, "--batch-size", 3)


def some_prompts(count):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(count)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(some_prompts(11)) + "\n", encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the texts


def test_each_text_is_what_its_prompt_alone_gives(run, prompts, tmp_path):  # noqa: F811
    """Eleven ragged prompts, two texts each, three rows at a time: the same as one command a text."""
    out = tmp_path / "out.jsonl"
    code, _, error = run("generate", "--prompts", prompts, "--out", out, "--num-samples", 2, *OPTIONS)
    assert code == 0 and f"{out}: 22 texts, " in error and "texts: 22/22" in error
    found = lines(out)
    assert [record["index"] for record in found] == list(range(22))
    assert [record["seed"] for record in found] == list(range(5, 27))
    for record in found[::5]:
        words = (*OPTIONS[:6], "--seed", record["seed"])
        alone = json.loads(run("generate", record["prompt"], "--json", *words)[1])
        assert (alone["text"], alone["nfe"]) == (record["text"], record["nfe"])
        assert alone["token_ids"][: len(record["token_ids"])] == record["token_ids"]


def test_a_text_that_grows_begins_as_it_does_alone(run, prompts, tmp_path):  # noqa: F811
    """Fault: with --out a text that grows began with all its masks."""
    out, grow = tmp_path / "out.jsonl", ("--grow", "confidence", "--initial-length", 2, "--grow-by", 1)
    words = (*OPTIONS[:6], *grow, "--gen-length", 12)
    assert run("generate", "--prompts", prompts, "--out", out, *words, "--seed", 5)[0] == 0
    record = lines(out)[3]
    alone = json.loads(run("generate", record["prompt"], "--json", *words, "--seed", record["seed"])[1])
    assert (alone["text"], alone["nfe"]) == (record["text"], record["nfe"])


def test_a_prompt_that_does_not_fit_has_its_reason_in_its_line(run, tmp_path):  # noqa: F811
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["the cat", "a <|mdm_mask|> b", "the sea " * 300, "\ud800", "a fox"]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    code, _, error = run("generate", "--prompts", path, "--out", out, *OPTIONS)
    found = lines(out)
    assert code == 2 and "3 prompts did not fit" in error
    assert ["error" in record for record in found] == [False, True, True, True, False]
    assert "mask token" in found[1]["error"] and "128" in found[2]["error"] and "UTF-8" in found[3]["error"]


def test_an_error_of_the_first_prompt_stops_the_run(run, tmp_path):  # noqa: F811
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("the sea " * 300 + "\nthe cat\n")
    code, _, error = run("generate", "--prompts", path, "--out", out, *OPTIONS)
    assert code == 2 and "the first prompt: " in error and out.read_text() == ""
    assert "shorten the prompt or --gen-length" in error  # Fault: it named max_tokens, a field of the server
    path.write_text("the cat\n")
    assert run("generate", "--prompts", path, "--out", out, *OPTIONS)[0] == 0  # Fault: "begun with other settings"
    longer = ("--gen-length", 7, *OPTIONS[2:])
    code, _, error = run("generate", "--prompts", path, "--out", out, *longer)
    assert code == 2 and "other settings (gen_length was 6 and is 7)" in error


# ---------------------------------------------------------------- after a stop


def test_a_run_goes_on_from_any_place_and_mends_a_torn_line(run, prompts, tmp_path):  # noqa: F811
    """Whatever number of bytes of the file a kill left, the same command makes the same file of it."""
    out = tmp_path / "out.jsonl"
    words = ("generate", "--prompts", prompts, "--out", out, *OPTIONS)
    assert run(*words)[0] == 0
    whole = out.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for size in (0, 1, second - 1, second, second + 7, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:size])
        code, _, error = run(*words)
        assert code == 0 and out.read_bytes() == whole
        assert (f"{whole[:size].count(10)} of 11 texts are there" in error) == (size >= second - 1 > 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--seed", 6), "was begun with other settings (seed was 5 and is 6)"),
        (("--num-samples", 2), "num_samples was 1 and is 2"),
        ("prompts", "prompts was "),
        ("damage", "line 2 is not the text 1 of these prompts"),
        ("double", "line 3 is not the text 2 of these prompts"),
        ("foreign", "this command did not begin it"),
        ("locked", "is being written by another run"),
    ],
)
def test_what_is_not_the_same_run_is_refused_in_one_line(change, reason, run, prompts, tmp_path):  # noqa: F811
    out = tmp_path / "out.jsonl"
    words = ["generate", "--prompts", prompts, "--out", out, *OPTIONS]
    assert run(*words)[0] == 0
    rows, held = out.read_bytes().splitlines(keepends=True), None
    match change:
        case "prompts":
            prompts.write_text("another\n")
        case "damage":
            out.write_bytes(rows[0] + b"{}\n" + b"".join(rows[2:]))
        case "double":
            out.write_bytes(rows[0] + rows[1] + rows[1])
        case "foreign":
            meta_path(out).unlink()
        case "locked":
            held = Output(out, json.loads(meta_path(out).read_text()), 11)
        case _:
            words += change
    before = out.read_bytes()
    code, _, error = run(*words)
    assert code == 2 and reason in error and error.count("\n") == 1 + ("texts are there" in error)
    assert out.read_bytes() == before
    if held is not None:
        held.file.close()


@pytest.mark.parametrize("words", [("x",), ("--prompts", "-"), ("--prompts", "{file}", "--record", "r")])
def test_options_that_do_not_go_with_out(words, run, prompts, tmp_path):  # noqa: F811
    words = [word.format(file=prompts) for word in words]
    code, _, error = run("generate", *words, "--out", tmp_path / "out.jsonl", *OPTIONS)
    assert code == 2 and error.count("\n") == 1 and "--out" in error


@pytest.mark.slow
def test_sigkill_at_ten_moments(checkpoint, prompts, tmp_path):  # noqa: F811
    """Killed again and again while it works, the file is at the end byte for byte that of one run."""
    start = multiprocessing.get_context("forkserver")  # which imports once, not once a run
    start.set_forkserver_preload(
        ["dlm.cli.main", "dlm.cli.offline", "dlm.serving.engine", "dlm.checkpoints.pretrained"]
    )
    prompts.write_text("\n".join(some_prompts(60)) + "\n", encoding="utf-8")
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    words = ["generate", "--model", checkpoint, "--prompts", prompts, *OPTIONS, "--gen-length", 24]
    kills, draw = [], random.Random(1)

    def begin(path):
        process = start.Process(target=main, args=([str(word) for word in (*words, "--out", path)],))
        process.start()
        return process

    begin(whole).join(120)
    for _ in range(30):
        before = out.stat().st_size if out.exists() else 0
        process = begin(out)
        while process.is_alive() and (not out.exists() or out.stat().st_size <= before):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join(120)
        if process.exitcode != -signal.SIGKILL or len(kills) == 10:
            break
        kills.append(out.read_bytes().count(b"\n"))
    begin(out).join(120)
    print(f"lines after each kill: {kills}")
    assert len(kills) >= 5, "it was too fast to be killed"
    assert out.read_bytes() == whole.read_bytes() and whole.read_bytes().count(b"\n") == 60


# ---------------------------------------------------------------- several processes


def test_processes_share_the_texts_and_the_last_one_merges_them(run, prompts, tmp_path, monkeypatch):  # noqa: F811
    out, parts = tmp_path / "out.jsonl", tmp_path / "parts.jsonl"
    words = ("generate", "--prompts", prompts, *OPTIONS)
    assert run(*words, "--out", out)[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        assert not parts.exists()
        monkeypatch.setenv("RANK", str(rank))
        assert run(*words, "--out", parts)[0] == 0
    assert parts.read_bytes() == out.read_bytes()
    assert [file.name for file in sorted(tmp_path.glob("parts*"))] == ["parts.jsonl", "parts.meta.json"]
    assert run(*words, "--out", parts)[0] == 0 and parts.read_bytes() == out.read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = run(*words, "--out", parts)
    assert code == 2 and "processes was 3 and is 2" in error


def test_merging_waits_for_parts_that_are_not_whole(tmp_path):
    out = tmp_path / "out.jsonl"
    for rank, indices in ((0, (0, 2, 4)), (1, (1,))):
        text = "".join(f'{{"index": {index}}}\n' for index in indices)
        part_path(out, rank, 2).write_text(text)
    assert not merge(out, 5, 2) and not out.exists()
    with part_path(out, 1, 2).open("a") as file:
        file.write('{"index": 3}\n')
    assert merge(out, 5, 2)
    assert [record["index"] for record in lines(out)] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- many prompts


class Echo:
    """An engine that answers at once, and knows how many answers were out at a time."""

    class settings:
        max_rows, max_waiting = 4, 12

    def __init__(self, opened):
        import threading

        self.pretrained, self.text_lock, self.out, self.most = opened, threading.RLock(), 0, 0

    def wait_until_loaded(self):
        pass

    def submit(self, request):
        self.out += 1
        self.most = max(self.most, self.out)
        return self

    def result(self):
        from dlm.serving.requests import Result

        self.out -= 1
        return Result("x", (1,), "length", 1, 1, 1, 1, 0.0, 0.0)


def test_any_number_of_prompts_passes_through_a_window(tmp_path):
    import tracemalloc

    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(2000)))

    class Opened:
        mask_id = 0

    engine = Echo(Opened)
    tracemalloc.start()
    seen = PromptFile.of(str(path))
    wanted = offline.texts(iter_prompts(str(path)), 1, 0)
    found = offline.records(engine, wanted, SamplingConfig(gen_length=2), lambda text: [1])
    count = sum(record["index"] == number for number, record in enumerate(found))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.count == count == 2000
    assert engine.most == 16 and peak < 5e5, peak


def test_prompts_are_read_as_they_were_before(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo")
    assert list(iter_prompts(str(path))) == ["one", "two"]
    path.write_bytes(b"\xef\xbb\xbfab\nc\xff")
    with pytest.raises(ValueError, match=r"byte 7"):
        PromptFile.of(str(path))
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        PromptFile.of(str(path))


def test_the_engine_itself_is_used(checkpoint):  # noqa: F811
    """A real engine, more texts than its window: none lost, in order."""
    from dlm.serving.engine import Engine, EngineSettings
    from dlm.tokenizer import encode_prompt

    opened = load_pretrained(checkpoint)
    engine = Engine(opened, EngineSettings(max_rows=2, max_waiting=2, timeout=None))
    try:
        wanted = offline.texts(some_prompts(9), 1, 0)
        config = SamplingConfig(gen_length=2, block_length=2)
        found = list(offline.records(engine, wanted, config, lambda text: encode_prompt(opened.tokenizer, text)))
    finally:
        engine.close()
    assert [record["index"] for record in found] == list(range(9)) and not any("error" in one for one in found)
