"""Damaged and hostile inputs for every command: a generator of cases, each a command line on files it has spoiled.

A case says what has to happen: `refused` is exit code 2 and one line; `answered` is exit code 0. Nothing may end in a
traceback, hang, take gigabytes, or pass in silence what is damaged.
"""
# ruff: noqa: E501

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

REFUSED, ANSWERED, EITHER = "refused", "answered", "either"
DEEP = "[" * 20_000 + "]" * 20_000
LONG_NUMBER = "9" * 5000

GENERATE = ("generate", "The cat", "--gen-length", "2", "--no-live")
BOUND = ("eval", "perplexity", "--estimator", "count", "--draws", "1")
TRAIN = ("--max-steps", "1", "--batch-size", "1", "--precision", "no", "--tracker", "none", "--sample-every", "0")


@dataclass(frozen=True)
class Case:
    """name; expected; make(folder, checkpoint) -> the words of the command line, after spoiling files in `folder`;
    stdin: what standard input holds."""

    name: str
    expected: str
    make: Callable[[Path, Path], list]
    stdin: bytes = b""


def copied(folder: Path, checkpoint: Path) -> Path:
    model = folder / "model"
    shutil.copytree(checkpoint, model)
    return model


def edited(file: Path, **fields) -> None:
    """Change fields of a JSON file; `...` removes one."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    for name, value in fields.items():
        if value is ...:
            values.pop(name, None)
        else:
            values[name] = value
    file.write_text(json.dumps(values))


# ----------------------------------------------------------------------------------------------- checkpoints

WRONG = ["x", -1, 10**9, [], {}, True]  # for a field that counts something
SIZES = ("d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size")


def config_cases() -> Iterator[Case]:
    def spoil(field, value):
        def make(folder, checkpoint):
            model = copied(folder, checkpoint)
            edited(model / "config.json", **{field: value})
            return [*GENERATE, "--model", model]

        return make

    for field in SIZES:
        for value in WRONG:
            yield Case(f"config.json {field}={value!r}", REFUSED, spoil(field, value))
    for field, values in {
        "max_sequence_length": ["x", -1, [], {}],
        "mask_token_id": ["x", -5, 10**9, [], {}, 1.5],
        "eos_token_id": ["x", 10**9, {}, -7],
        "rms_norm_eps": ["x", [], None],
        "rope_theta": ["x", [], 0],
        "block_length": ["x", -1, 0, [], 1.5],
        "objective": [7, "magic", []],
        "weight_tying": ["maybe", []],
        "model_type": ["bert", "t5", "qwen2_vl", 7, None],
        "activation_type": ["gelu", 3],
        "layer_norm_type": ["low_precision", []],
        "attention_dropout": ["x"],
        "dtype": ["float99", 7],
    }.items():
        for value in values:
            yield Case(f"config.json {field}={value!r}", REFUSED, spoil(field, value))


def whole_file_cases() -> Iterator[Case]:
    contents = {
        "empty": b"", "half": None, "not UTF-8": b"\xff\xfe\x00{", "an array": b"[1, 2]", "a number": b"7", "null": b"null",
        "nested": DEEP.encode(), "long number": b'{"d_model": ' + LONG_NUMBER.encode() + b"}",
        "binary": bytes(range(256)) * 4, "a folder": ...,
    }  # fmt: skip

    def spoil(name, kind, content, command):
        def make(folder, checkpoint):
            model = copied(folder, checkpoint)
            file = model / name
            whole = file.read_bytes() if file.is_file() else b'{"dlm": {"temperature": 0.7}}'
            file.unlink(missing_ok=True)
            if content is ...:
                file.mkdir()
            else:
                file.write_bytes(whole[: len(whole) // 2] if content is None else content)
            return [*command, "--model", model]

        return make

    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
    ):
        for kind, content in contents.items():
            if (name, kind) == ("model.safetensors", "long number"):
                continue
            optional = kind == "a folder" and name in ("tokenizer_config.json", "generation_config.json")
            yield Case(f"{name}: {kind}", EITHER if optional else REFUSED, spoil(name, kind, content, GENERATE))
    for value in ("x", [], {}):

        def limit(folder, checkpoint, value=value):
            model = copied(folder, checkpoint)
            edited(model / "tokenizer_config.json", model_max_length=value)
            return [*GENERATE, "--model", model]

        yield Case(f"tokenizer_config.json model_max_length={value!r}", REFUSED, limit)
    for kind, content in list(contents.items())[:6]:
        yield Case(f"info, config.json: {kind}", REFUSED, spoil("config.json", kind, content, ("info",)))


def sampling_default_cases() -> Iterator[Case]:
    values = [
        None, 7, [], "x", {"temperature": "hot"}, {"temperature": -1}, {"steps": 10**8}, {"method": "nome"},
        {"block_length": 0}, {"gen_length": 10**12}, {"temperture": 1}, {"top_p": 7}, {"seed": -1}, {"commit": []},
    ]  # fmt: skip

    def spoil(value):
        def make(folder, checkpoint):
            model = copied(folder, checkpoint)
            edited(model / "generation_config.json", dlm=value)
            return ["generate", "The cat", "--no-live", "--model", model]

        return make

    for value in values:
        yield Case(f'generation_config.json "dlm": {value!r}', REFUSED, spoil(value))


def weight_cases() -> Iterator[Case]:
    def tensors(folder, checkpoint):
        from safetensors.torch import load_file

        model = copied(folder, checkpoint)
        return model, load_file(model / "model.safetensors")

    def change(edit):
        def make(folder, checkpoint):
            from safetensors.torch import save_file

            model, state = tensors(folder, checkpoint)
            edit(state)
            save_file(state, model / "model.safetensors", metadata={"format": "pt"})
            return [*GENERATE, "--model", model]

        return make

    def first(state):
        return next(name for name in sorted(state) if "q_proj" in name)

    def nan(state):
        state[first(state)] = state[first(state)] * float("nan")

    def cut(state):
        state[first(state)] = state[first(state)][:-1].contiguous()

    edits = {
        "NaN": nan,
        "a tensor gone": lambda state: state.pop(first(state)),
        "a tensor more": lambda state: state.update(more=state[first(state)].clone()),
        "a tensor renamed": lambda state: state.update({"other": state.pop(first(state))}),
        "another shape": cut,
        "whole numbers": lambda state: state.update({first(state): state[first(state)].int()}),
        "no tensors": lambda state: state.clear(),
    }
    for name, edit in edits.items():
        yield Case(f"weights: {name}", REFUSED if name != "whole numbers" else EITHER, change(edit))

    def header(size, content):
        def make(folder, checkpoint):
            model = copied(folder, checkpoint)
            (model / "model.safetensors").write_bytes(struct.pack("<Q", size) + content)
            return [*GENERATE, "--model", model]

        return make

    yield Case("weights: a header of 2^60 bytes", REFUSED, header(2**60, b"{}"))
    yield Case("weights: a header that lies", REFUSED, header(2, b"{}"))
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    yield Case("weights: a tensor of terabytes", REFUSED, header(len(huge), huge))

    def index(value):
        def make(folder, checkpoint):
            model = copied(folder, checkpoint)
            (model / "model.safetensors").rename(model / "part.safetensors")
            (model / "model.safetensors.index.json").write_text(value if isinstance(value, str) else json.dumps(value))
            return [*GENERATE, "--model", model]

        return make

    outside = {"weight_map": {"model.transformer.wte.weight": "../../outside.safetensors"}}
    absolute = {"weight_map": {"model.transformer.wte.weight": "/etc/hostname"}}
    for name, value in {
        "a path outside": outside, "an absolute path": absolute, "a missing part": {"weight_map": {"a": "no.safetensors"}},
        "no map": {}, "a list": [], "a map of numbers": {"weight_map": {"a": 7}}, "nested": DEEP, "empty": "",
    }.items():  # fmt: skip
        yield Case(f"weights index: {name}", REFUSED, index(value))

    def pickled(folder, checkpoint):
        import torch

        model = copied(folder, checkpoint)
        (model / "model.safetensors").unlink()
        torch.save({"a": 1}, model / "pytorch_model.bin")
        return [*GENERATE, "--model", model]

    yield Case("weights: a pickle alone", REFUSED, pickled)


# ------------------------------------------------------------------------------------------------------ data

ROWS = {
    "not JSON": "{nope",
    "half": '{"prompt": "a", "resp',
    "nested": '{"prompt": "a", "response": "b", "x": ' + DEEP + "}",
    "long number": '{"prompt": "a", "response": "b", "n": ' + LONG_NUMBER + "}",
    "half of a character": '{"prompt": "a\\ud800", "response": "b", "text": "a\\ud800"}',
    "an array": "[1, 2]",
    "a number": "7",
    "no columns": "{}",
    "null texts": '{"prompt": null, "response": null, "text": null}',
    "numbers for texts": '{"prompt": 7, "response": 8, "text": 9}',
    "lists for texts": '{"prompt": [], "response": {}, "text": []}',
    "a special token": '{"prompt": "a <|mdm_mask|>", "response": "b"}',
    "messages of numbers": '{"messages": [1, 2]}',
    "messages of nulls": '{"messages": [null]}',
    "an answer first": '{"messages": [{"role": "assistant", "content": "a"}]}',
    "content null": '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
    "an image": '{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]}',
}


def data_cases() -> Iterator[Case]:
    def written(name, content, command, option="--data", more=()):
        def make(folder, checkpoint):
            file = folder / name
            file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
            words = [*command, option, file, "--model", checkpoint, *more]
            return words + (["--output", folder / "out"] if "train" in command else [])

        return make

    sft, pretrain = ("train", "sft", *TRAIN), ("train", "pretrain", *TRAIN, "--sequence-length", "32")
    for kind, row in ROWS.items():
        yield Case(f"sft: {kind}", REFUSED, written("a.jsonl", row + "\n", sft))
    for kind in list(ROWS)[:11]:
        yield Case(f"pretrain: {kind}", REFUSED, written("a.jsonl", ROWS[kind] + "\n", pretrain))
        yield Case(f"perplexity: {kind}", REFUSED, written("a.jsonl", ROWS[kind] + "\n", BOUND))
        yield Case(
            f"prompts: {kind}",
            REFUSED,
            written("a.jsonl", ROWS[kind] + "\n", GENERATE[:1], "--prompts", ("--gen-length", "2")),
        )
    files = {
        "empty.jsonl": b"", "spaces.txt": b" \n \n", "latin.txt": b"caf\xe9", "latin.jsonl": b'{"text": "caf\xe9"}',
        "cut.txt.xz": b"\xfd7zXZ\x00\x00", "not.parquet": b"nope", "file.csv": b"a,b", "zeros.txt": bytes(64),
    }  # fmt: skip
    for name, content in files.items():
        expected = EITHER if name == "zeros.txt" else REFUSED
        yield Case(f"pretrain: {name}", expected, written(name, content, pretrain))
        yield Case(f"perplexity: {name}", expected, written(name, content, BOUND))

    def missing(command, option):
        return lambda folder, checkpoint: (
            [*command, option, folder / "gone.jsonl", "--model", checkpoint]
            + (["--output", folder / "out"] if "train" in command else [])
        )

    for command, option in ((sft, "--data"), (pretrain, "--data"), (BOUND, "--data"), (GENERATE[:1], "--prompts")):
        yield Case(f"{' '.join(command[:2])}: a missing file", REFUSED, missing(command, option))


# --------------------------------------------------------------------------------------------------- options

NUMBERS = {
    "--gen-length": ["0", "-1", "1e3", "x", "1000000000000", LONG_NUMBER, "nan"],
    "--steps": ["0", "-1", "x", "1.5"],
    "--block-length": ["0", "-1", "x"],
    "--temperature": ["nan", "inf", "-1", "x", "1e39", "1e-46", "1e-300"],
    "--top-k": ["0", "-3", "x"],
    "--top-p": ["0", "2", "nan"],
    "--cfg-scale": ["nan", "inf", "-1"],
    "--seed": ["-1", "x", "99999999999999999999999"],
    "--num-samples": ["0", "1000000000000", "x"],
    "--batch-size": ["0", "-1", "x"],
    "--eos-token-id": ["-1", "x"],
    "--delay": ["nan", "-1", "x"],
    "--dtype": ["float8_e5m2", "int99", "complex64", ""],
    "--device": ["meta", "abacus", "cuda:99"],
    "--method": ["", "NONE", "../x"],
    "--commit": ["", "all"],
    "--attn-implementation": ["x"],
}


def option_cases() -> Iterator[Case]:
    def words(option, value):
        return lambda folder, checkpoint: ["generate", "The cat", "--no-live", option, value, "--model", checkpoint]

    for option, values in NUMBERS.items():
        for value in values:
            yield Case(f"generate {option} {value[:20]}", REFUSED, words(option, value))
    for option, value in {
        "--sequence-length": "1000000000000", "--max-steps": "-1", "--batch-size": "0", "--learning-rate": "nan",
        "--lora": "-1", "--ema": "2", "--precision": "fp99", "--export-dtype": "int8", "--seed": "-1",
        "--warmup-steps": "-1", "--accumulation": "0", "--optimizer": "sgdd", "--objective": "x", "--clip": "-1",
    }.items():  # fmt: skip

        def train(folder, checkpoint, option=option, value=value):
            (folder / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
            base = list(TRAIN)
            if option in base:
                at = base.index(option)
                del base[at : at + 2]
            data = ["--data", folder / "a.jsonl", "--model", checkpoint, "--output", folder / "out"]
            return ["train", "sft", *base, *data, option, value]

        yield Case(f"sft {option} {value}", REFUSED, train)


TEXTS = {
    "control characters": ("a\x1b]0;owned\x07\x1b[2Jb", ANSWERED),
    "a mask token": ("a <|mdm_mask|> b", REFUSED),
    "half of a character": ("a \ud800", REFUSED),
    "ten million characters": ("x " * 5_000_000, REFUSED),
    "nothing": ("", EITHER),
    "zeros": ("a\x00b", ANSWERED),
    "right to left": ("\u202eabc \u0301\u0301\u0301", ANSWERED),
}
BLANKS = ["no blank", "a ___{abc}", "a ___{0}", "a ___{-1}", "a ___{1000000000}", "a ___{" + LONG_NUMBER + "}"]


def text_cases() -> Iterator[Case]:
    for name, (text, expected) in TEXTS.items():
        yield Case(
            f"prompt: {name}", expected,
            lambda folder, checkpoint, text=text: ["generate", text, *GENERATE[2:], "--model", checkpoint],
        )  # fmt: skip
    for text in BLANKS:
        yield Case(
            f"infill: {text[:20]}", REFUSED,
            lambda folder, checkpoint, text=text: ["infill", text, "--no-live", "--model", checkpoint],
        )  # fmt: skip


TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "broken": "{% for m in messages %}",
    "undefined": "{{ nope.x }}",
    "escapes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "multiplies": "{{ 'x' * 10000000000 }}",
    "says nothing": "hello",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


def template_cases() -> Iterator[Case]:
    for name, template in TEMPLATES.items():

        def make(folder, checkpoint, template=template):
            model = copied(folder, checkpoint)
            (model / "chat_template.jinja").unlink(missing_ok=True)
            edited(model / "tokenizer_config.json", chat_template=template)
            return ["generate", "hi", "--chat", *GENERATE[2:], "--model", model]

        yield Case(f"template: {name}", REFUSED, make)


# ------------------------------------------------------------------------------------------ results and runs


def result_cases() -> Iterator[Case]:
    contents = {
        "empty": "", "an array": "[]", "a number": "7", "null": "null", "nested": DEEP, "not JSON": "{nope", "other": "{}",
        "cells of numbers": '{"cells": [1, 2], "settings": {}}', "no cells": '{"cells": [], "settings": {}}',
    }  # fmt: skip
    for kind, content in contents.items():
        for command in (("bench", "plot"), ("bench", "compare")):

            def make(folder, checkpoint, content=content, command=command):
                file = folder / "grid.json"
                file.write_text(content)
                return [*command, file] + ([file] if command[1] == "compare" else [])

            yield Case(f"{' '.join(command)}: {kind}", REFUSED, make)


def cases() -> list[Case]:
    """All of them, in a fixed order, each with a name of its own."""
    kinds = (
        config_cases, whole_file_cases, sampling_default_cases, weight_cases, data_cases, option_cases, text_cases,
        template_cases, result_cases,
    )  # fmt: skip
    made = [case for kind in kinds for case in kind()]
    assert len({case.name for case in made}) == len(made)
    return made
