"""No code of a checkpoint ever runs, whatever its files ask for and whatever stands on standard input."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest

import dlm
from dlm.cli.main import main
from tests.helpers import commandline, recipes
from tests.helpers.commandline import make_checkpoint

tokenizer, fresh = commandline.tokenizer, recipes.fresh  # fixtures
EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass Evil:\n    pass\n"
ASKS = {
    "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForMaskedLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}  # fmt: skip


def poison(folder, marker, *, family="llada", whole=True):
    """Files that ask for the folder's own Python; whole: the tokenizer needs none."""
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    for name, more in (("config.json", {"model_type": family}), ("tokenizer_config.json", {"tokenizer_class": "Evil"})):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | more | {"auto_map": ASKS}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(marker=str(marker)))
    if not whole:
        (folder / "tokenizer.json").rename(folder / "vocab.json")
    return folder


ONE_STEP = [
    "--max-steps",
    "1",
    "--batch-size",
    "1",
    "--precision",
    "no",
    "--tracker",
    "none",
    "--sample-every",
    "0",
    "--sequence-length",
    "32",
]
TINY = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--mlp-hidden-size", "16"]
COMMANDS = [
    ["generate", "x", "--gen-length", "2", "--model", "{model}"],
    ["infill", "a ___", "--model", "{model}"],
    ["chat", "--model", "{model}", "--gen-length", "2"],
    ["info", "{model}"],
    ["train", "sft", "--data", "{data}", "--output", "{out}", "--model", "{model}", *ONE_STEP],
    ["train", "pretrain", "--data", "{data}", "--output", "{out}", "--tokenizer", "{model}", *ONE_STEP, *TINY],
    ["eval", "perplexity", "--data", "{data}", "--draws", "2", "--model", "{model}"],
    ["eval", "generative", "--model", "{model}", "--judge", "{model}", "--num-samples", "1", "--gen-length", "2"],
    [
        "eval",
        "compare",
        "--data",
        "{data}",
        "--stories",
        "{data}",
        "--out",
        "{out}.json",
        "--model",
        "{model}",
        "--twin",
        "{model}",
    ],
    ["eval", "harness", "--tasks", "no_such_task", "--model_args", "pretrained={model}"],
    ["bench", "grid", "--model", "{model}", "--judge", "{model}", "--gen-length", "2", "--out", "{out}.json"],
    ["bench", "speed", "--model", "{model}", "--cells", "none:2:2", "--gen-length", "2", "--repeats", "1"],
]


@pytest.mark.parametrize("kind", ["known", "unknown family", "tokenizer of Python alone"])
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_no_code_of_a_checkpoint_runs(words, kind, tmp_path, tokenizer, monkeypatch, capsys):
    """transformers asked on the terminal, and "y" was taken from standard input: in `dlm chat` the first message."""
    if words[1] == "harness":
        pytest.importorskip("lm_eval")
    marker, data = tmp_path / "marker", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "The cat", "response": "sat.", "text": "The cat sat."}\n' * 4)
    options = {"known": {}, "unknown family": {"family": "evil"}, "tokenizer of Python alone": {"whole": False}}[kind]
    model = poison(make_checkpoint(tmp_path / "model", tokenizer), marker, **options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code = main([word.format(model=model, data=data, out=tmp_path / "out") for word in words])
    out, error = capsys.readouterr()
    assert not marker.exists() and "Do you wish to run" not in out + error
    assert code in (0, 2) and "Traceback" not in error and "trust_remote_code" not in error
    if kind == "unknown family":
        assert code == 2 or "--tokenizer" in words


READ_DATA_ALONE = {  # callers whose from_pretrained has no such argument, and cannot run code
    "GenerationConfig": "reads a JSON file of sampling defaults; the argument would become one of them",
    "PeftModel": "adds adapters to a model that is there; its files are JSON and safetensors",
}


def test_every_call_of_from_pretrained_says_so():
    """`trust_remote_code=False` stands in each call, as a keyword: without it transformers' auto classes ask."""
    root, calls = Path(dlm.__file__).parents[1], []
    for folder in ("dlm", "train", "eval", "benchmarks"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                    calls.append((file, node, ast.unparse(node.func.value)))
    assert len(calls) > 6
    for file, node, owner in calls:
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        fits = said.get("trust_remote_code") == "False" or owner in READ_DATA_ALONE
        assert fits, f"{file}, line {node.lineno}: {owner} without trust_remote_code=False"
