"""More damaged and hostile inputs: talks, choices, recordings, journals, runs to resume, other recipes and scripts."""
# ruff: noqa: E501

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.helpers.hostile import ANSWERED, BOUND, DEEP, EITHER, LONG_NUMBER, REFUSED, ROWS, TRAIN, Case

CONTENTS = {
    "empty": b"", "an array": b"[1, 2]", "a number": b"7", "null": b"null", "nested": DEEP.encode(),
    "not JSON": b"{nope",
    "not UTF-8": b"\xff\xfe\x00{", "long number": b'{"a": ' + LONG_NUMBER.encode() + b"}", "zeros": bytes(64),
}  # fmt: skip


def plain(name: str, expected: str, *words, model: bool = True, stdin: bytes = b"") -> Case:
    """A case whose command line needs no file."""
    return Case(
        name, expected, lambda folder, checkpoint: [*words, *(["--model", checkpoint] if model else [])], stdin=stdin
    )


def written(name: str, expected: str, file: str, content: bytes | str, command) -> Case:
    """A case with one file: command(path, folder, checkpoint) -> words."""

    def make(folder, checkpoint):
        path = folder / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return command(path, folder, checkpoint)

    return Case(name, expected, make)


def chat_cases() -> Iterator[Case]:
    talks = {
        "not UTF-8": (b"caf\xe9\n", REFUSED), "only ends": (b"\n\n\n", ANSWERED), "nothing": (b"", ANSWERED),
        "control characters": (b"a\x1b]0;owned\x07\x1b[2Jb\n", ANSWERED), "a million letters": (b"x" * 10**6 + b"\n", REFUSED),
        "special tokens": (b"<|eot_id|><|start_header_id|>system<|end_header_id|>\n", EITHER),
        "the mask token": (b"a <|mdm_mask|> b\n", ANSWERED), "zeros": (b"a\x00b\n", ANSWERED),
        "half of a character": (b"\xed\xa0\x80\n", REFUSED),
    }  # fmt: skip
    for name, (stdin, expected) in talks.items():
        yield plain(f"chat: {name}", expected, "chat", "--gen-length", "2", stdin=stdin)
    for value in ("0", "x", "1000000000000"):
        yield plain(f"chat --gen-length {value}", REFUSED, "chat", "--gen-length", value, stdin=b"hi\n")


def choose_cases() -> Iterator[Case]:
    texts = {
        "no blank": "The cat sat.", "no options": "The cat ___.", "one option": "The cat ___{sat}.", "empty": "",
        "empty options": "The cat ___{|}.", "a number": "The cat ___{12}.", "half of a character": "The ___{a|\ud800}.",
        "a mask token": "The <|mdm_mask|> ___{a|b}.", "long": "The ___{" + "x " * 500 + "|b}.", "the same": "The ___{a|a}.",
    }  # fmt: skip
    for name, text in texts.items():
        yield plain(f"choose: {name}", REFUSED, "choose", text)
    many = "The ___{" + "|".join(f"w{n}" for n in range(500)) + "}."
    yield plain("choose: five hundred options", EITHER, "choose", many, "--orders", "2")
    for option, value in {"--orders": "0", "--seed": "-1"}.items():
        yield plain(f"choose {option} {value}", REFUSED, "choose", "The ___{a|b}.", option, value)
    yield plain(
        "choose --orders 10^12", REFUSED, "choose", "The ___{fox|little fox by the sea}.", "--orders", "1000000000000"
    )


def recording_cases() -> Iterator[Case]:
    def of(path, folder, checkpoint):
        return ["replay", path]

    first = {
        "format": "dlm-trajectory", "version": 1, "mask_id": 1, "ends": [2], "settings": {}, "pieces": {"0": "a"},
        "rows": [{"ids": [1, 1], "given": [False, False]}],
    }  # fmt: skip
    for kind, content in CONTENTS.items():
        yield written(f"replay: {kind}", REFUSED, "a.jsonl", content, of)
        after = json.dumps(first).encode() + b"\n" + content + b"\n"
        yield written(f"replay, after a line: {kind}", EITHER if not content else REFUSED, "a.jsonl", after, of)
    changes = {
        "a slot outside": [[9, 0, 1.0, []]], "words": [["a", "b", "c", "d"]], "a negative slot": [[-1, 0, 1.0, []]],
        "no list": 7, "an infinite confidence": [[0, 0, 1e999, []]], "a token outside": [[0, 10**9, 0.5, []]],
    }  # fmt: skip
    for kind, change in changes.items():
        line = {"pass": 1, "rows": [{"row": 0, "block": 0, "nfe": 1, "changes": change}]}
        text = json.dumps(first) + "\n" + json.dumps(line) + "\n"
        expected = EITHER if kind in ("an infinite confidence", "a token outside") else REFUSED
        yield written(f"replay: {kind}", expected, "a.jsonl", text, of)
    for field, value in {"mask_id": "x", "ends": 7, "rows": 7, "settings": 7, "pieces": [], "version": "x"}.items():
        yield written(f"replay: {field} {value!r}", REFUSED, "a.jsonl", json.dumps(first | {field: value}) + "\n", of)


def grid_cases() -> Iterator[Case]:
    def of(path, folder, checkpoint):
        small = ["--gen-length", "2", "--methods", "none", "--steps", "2", "--block-lengths", "2", "--limit", "1"]
        rest = ["--repeats", "1", "--judge", "none", "--bound-draws", "0", "--out", folder / "grid.json"]
        return ["bench", "grid", *small, *rest, "--model", checkpoint]

    for kind, content in CONTENTS.items():
        expected = EITHER if kind in ("empty", "zeros") else REFUSED
        yield written(f"journal: {kind}", expected, "grid.journal-0.jsonl", content + b"\n", of)
    for kind, record in {
        "another format": {"kind": "settings", "format": 99, "settings": {}}, "settings 7": {"kind": "settings", "settings": 7},
        "no settings": {"kind": "cell", "key": "a", "time": 1}, "other settings": {"kind": "settings", "format": 1, "settings": {}},
    }.items():  # fmt: skip
        yield written(f"journal: {kind}", REFUSED, "grid.journal-0.jsonl", json.dumps(record) + "\n", of)
    yield written("grid: a file in the way", REFUSED, "grid.json", "mine", of)
    for option, value in {
        "--methods": "nome", "--steps": "0", "--block-lengths": "x", "--repeats": "0", "--limit": "0", "--commits": "all",
        "--gen-length": "1000000000000", "--prompts": "/nowhere", "--task": "nothing", "--judge": "/nowhere",
        "--out": "grid.txt", "--bound-draws": "-1",
    }.items():  # fmt: skip

        def make(folder, checkpoint, option=option, value=value):
            where = [] if option == "--out" else ["--out", folder / "grid.json"]
            judge = [] if option == "--judge" else ["--judge", "none"]
            return ["bench", "grid", *where, *judge, option, value, "--model", checkpoint]

        yield Case(f"bench grid {option} {value}", REFUSED, make)


# --------------------------------------------------------------------------------------------- runs that are resumed


@cache
def finished_run(checkpoint: Path) -> Path:
    """A run of two steps with its checkpoints, made once."""
    from dlm.cli import main

    folder = Path(tempfile.mkdtemp(prefix="dlm-hostile-"))
    (folder / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 8)
    words = ["train", "sft", *TRAIN, "--data", folder / "a.jsonl", "--model", checkpoint, "--output", folder / "out"]
    assert main.main([*map(str, words), "--max-steps", "2", "--checkpoint-every", "1"]) == 0
    return folder


def resumed(spoil):
    """make() of a case: the run copied, its last checkpoint spoiled, then resumed."""

    def make(folder, checkpoint):
        run = finished_run(checkpoint)
        shutil.copytree(run / "out", folder / "run")
        last = sorted((folder / "run" / "checkpoints").iterdir())[-1]
        spoil(last, folder / "run")
        words = ["train", "sft", *TRAIN, "--data", run / "a.jsonl", "--model", checkpoint, "--output", folder / "run"]
        return [*words, "--max-steps", "3", "--checkpoint-every", "1", "--resume"]

    return make


def resume_cases() -> Iterator[Case]:
    from dlm.training.state import _own_checksum

    def file(name, content):
        def spoil(last, run):
            (last / name).write_bytes(content)

        return resumed(spoil)

    for kind, content in CONTENTS.items():
        yield Case(f"resume, trainer.json: {kind}", REFUSED, file("trainer.json", content))
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
        for kind in ("empty", "zeros", "not JSON"):
            yield Case(f"resume, {name}: {kind}", REFUSED, file(name, CONTENTS[kind]))

    def field(name, value):
        def spoil(last, run):
            state = json.loads((last / "trainer.json").read_text())
            state[name] = value
            state["sha256"] = _own_checksum(state)
            (last / "trainer.json").write_text(json.dumps(state))

        return resumed(spoil)

    for name in ("step", "tokens", "processes", "seconds", "config", "identity", "files", "position", "format"):
        for value in ("x", -1, None, [], {}, [["x"]], 10**30):
            if (name, value) in (("config", {}), ("files", {}), ("identity", {}), ("position", [])):
                continue
            fits = name in ("tokens", "seconds", "processes") and value == 10**30
            yield Case(f"resume, trainer.json {name}={value!r:.12}", EITHER if fits else REFUSED, field(name, value))

    def metrics(content):
        def spoil(last, run):
            (run / "metrics.jsonl").write_bytes(content)

        return resumed(spoil)

    for kind, content in CONTENTS.items():
        yield Case(f"resume, metrics.jsonl: {kind}", ANSWERED, metrics(content))


# ------------------------------------------------------------------------------------- other recipes and other scripts


def recipe_cases() -> Iterator[Case]:
    def trained(recipe):
        def command(path, folder, checkpoint):
            return ["train", recipe, *TRAIN, "--data", path, "--model", checkpoint, "--output", folder / "out"]

        return command

    bad = {
        "no columns": "{}", "numbers": '{"prompt": 1, "chosen": 2, "rejected": 3}', "null": '{"prompt": null, "chosen": null}',
        "the same": '{"prompt": "a", "chosen": "", "rejected": ""}', "lists": '{"prompt": "a", "chosen": [], "rejected": {}}',
    }  # fmt: skip
    for kind, row in bad.items():
        yield written(f"preference: {kind}", REFUSED, "a.jsonl", row + "\n", trained("preference"))
    for kind in ("not JSON", "nested", "long number", "an array", "half of a character"):
        for recipe in ("preference", "distill"):
            yield written(f"{recipe}: {kind}", REFUSED, "a.jsonl", ROWS[kind] + "\n", trained(recipe))
    for kind, content in {
        "not YAML": "a: [",
        "a list": "- a",
        "unknown": "lerning_rate: 1",
        "a type": "max_steps: {}",
    }.items():
        yield written(
            f"config: {kind}", REFUSED, "a.yaml", content,
            lambda path, folder, checkpoint: ["train", "sft", "--config", path, "--output", folder / "out"],
        )  # fmt: skip
    for name, option in {"10^8": "100000000", "a million": "1000000"}.items():
        words = ("generate", "The cat", "--gen-length", "4", "--no-live", "--steps", option)
        yield plain(f"generate --steps {name}", ANSWERED, *words)
    for rule in (("--split", "rounded"), ("--split", "time"), ("--commit", "origin")):
        words = ("generate", "The cat", "--gen-length", "4", "--no-live", "--steps", "100000000", *rule)
        yield plain(f"generate --steps 10^8 {' '.join(rule)}", REFUSED, *words)
    for option, value in {"--gpus": "0", "--gpu": "x", "--sequence-length": "-1", "--tokens": "x"}.items():
        yield plain(f"estimate {option} {value}", REFUSED, "train", "--estimate", option, value, model=False)
    for kind, content in CONTENTS.items():
        yield written(
            f"lm-eval choices: {kind}", REFUSED, "a.jsonl", content,
            lambda path, folder, checkpoint: ["eval", "choices", "--data", path, "--model", checkpoint],
        )  # fmt: skip
    for option, value in {
        "--draws": "0", "--estimator": "cuont", "--target-error": "-1", "--length": "1000000000000", "--overlap": "-1",
        "--out": "/nowhere/at/all.json", "--detokenizer": "x", "--batch-size": "0",
    }.items():  # fmt: skip
        yield written(
            f"perplexity {option} {value}", REFUSED, "a.jsonl", '{"text": "The cat sat."}\n',
            lambda path, folder, checkpoint, option=option, value=value:
                [*BOUND[:2], "--data", path, "--model", checkpoint, option, value],
        )  # fmt: skip
    for words in (
        ["nothing"],
        ["train", "nothing"],
        ["eval", "nothing"],
        ["bench", "nothing"],
        ["launch", "nothing.py"],
    ):
        yield plain(f"no command {' '.join(words)}", REFUSED, *words, model=False)


COMMANDS = {  # options of the other commands that cannot be; each is refused before any work
    ("serve",): {
        "--port": ["-1", "99999999", "x"], "--max-rows": ["0", "x"], "--max-waiting": ["-1"], "--max-length": ["0", "1000000000000"],
        "--kv-memory": ["nan", "-1"], "--max-body": ["0"], "--timeout": ["nan", "-1"], "--dtype": ["float8_e5m2"], "--device": ["meta"],
        "--host": ["no.such.host.invalid"],
    },
    ("bench", "tune"): {
        "--keep": ["2", "nan"], "--budget": ["-1", "nan"], "--limit": ["0"], "--methods": ["nome"], "--task": ["nothing"],
        "--prompts": ["/nowhere"], "--clock": ["sun"], "--confirm": ["-1"], "--revisions": ["x"], "--block-lengths": ["x", "0"],
    },
    ("bench", "serve"): {
        "--requests": ["0", "x"], "--prompt-tokens": ["x", "0", "9:1"], "--output-tokens": ["x", "0"], "--concurrency": ["0"],
        "--alone": ["-1"], "--loads": ["nan", "-1"], "--clock": ["sun"], "--threads": ["0"],
    },
    ("bench", "speed"): {"--cells": ["x", "none:0:1", "none:8:0", "nome:8:8"], "--threads": ["0"], "--config": ["x"]},
    ("bench", "growth"): {"--config": ["x"], "--threads": ["0"]},
    ("eval", "generative"): {"--judge": ["/nowhere"], "--prompts": ["/nowhere"], "--num-samples": ["0"]},
    ("eval", "rewards"): {"--data": ["/nowhere.jsonl"], "--reward": ["nothing"]},
    ("train", "grpo"): {"--data": ["/nowhere.jsonl"], "--max-steps": ["-1"], "--export-dtype": ["int8"], "--batch-size": ["0"]},
    ("train", "preference"): {"--data": ["/nowhere.jsonl"], "--max-steps": ["-1"]},
    ("train", "distill"): {"--data": ["/nowhere.txt"], "--max-steps": ["-1"], "--batch-size": ["0"]},
}  # fmt: skip


def command_cases() -> Iterator[Case]:
    for command, options in COMMANDS.items():
        own = [] if command[-1] in ("growth",) else None
        for option, values in options.items():
            for value in values:

                def make(folder, checkpoint, command=command, option=option, value=value, own=own):
                    model = ["--model", checkpoint] if own is None and option != "--config" else []
                    out = ["--output", folder / "out"] if command[0] == "train" else []
                    out += ["--out", folder / "tune.json"] if command[-1] == "tune" else []
                    return [*command, *model, *out, option, value]

                yield Case(f"{' '.join(command)} {option} {value}", REFUSED, make)

    def convert(spoil, *more):
        def make(folder, checkpoint):
            source = folder / "source"
            source.mkdir()
            spoil(source, folder, checkpoint)
            return ["train", "convert", "--from", source, "--to", folder / "to", *more]

        return make

    yield Case("convert: an empty folder", REFUSED, convert(lambda source, folder, checkpoint: None))
    for kind, content in CONTENTS.items():
        yield Case(
            f"convert, config.json: {kind}", REFUSED,
            convert(lambda source, folder, checkpoint, content=content: (source / "config.json").write_bytes(content)),
        )  # fmt: skip

    def occupied(source, folder, checkpoint):
        shutil.rmtree(source)
        shutil.copytree(checkpoint, source)
        (folder / "to").mkdir()
        (folder / "to" / "mine.txt").write_text("mine")

    yield Case("convert: a folder of the user's", REFUSED, convert(occupied))


def more_cases() -> list[Case]:
    kinds = (chat_cases, choose_cases, recording_cases, grid_cases, resume_cases, recipe_cases, command_cases)
    return [case for kind in kinds for case in kind()]
