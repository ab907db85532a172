"""What tests of the grid share: a small grid's command line, and what it writes."""

import json

import pytest

from tests.helpers import commandline
from tests.helpers.commandline import make_checkpoint

PROMPTS = ("Once upon a time", "The cat sat", "She walked along the beach and")
METHODS = ("none", "prefix", "dual", "vicinity", "c2f")


@pytest.fixture(scope="session")
def twin(tmp_path_factory, tokenizer):
    """A tiny autoregressive checkpoint: the judge."""
    folder = tmp_path_factory.mktemp("judge") / "tiny-judge"
    return make_checkpoint(folder, tokenizer, n_layers=1, objective="autoregressive")


@pytest.fixture
def bench(run, checkpoint, twin, tmp_path):
    """bench(*options) -> (exit code, output, errors) of a small grid into tmp_path/grid.json."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))

    def bench(*options, model=checkpoint, **changes):
        return run("bench", "grid", *arguments(tmp_path, model, twin, **changes), *options, model=None)

    return bench


def arguments(folder, model, twin, **changes):
    """The options of a small grid: 16 tokens, two prompts, three methods."""
    settings = {
        "out": folder / "grid.json", "model": model, "judge": twin, "prompts": folder / "prompts.txt",
        "gen_length": 16, "methods": "none,dual,c2f", "block_lengths": "4,16", "steps": "2,4,16", "repeats": 1,
        "bound_draws": 2, "device": "cpu", **changes,
    }  # fmt: skip
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


def read(folder, name="grid"):
    """(results, meta) of a grid."""
    return tuple(json.loads((folder / f"{name}{end}").read_text()) for end in (".json", ".meta.json"))


def cells(results):
    """Every cell of a results file by (method, question, block, steps)."""
    return {
        (method, entry["question"], int(block), int(steps)): cell
        for method, entries in results.items()
        for entry in entries
        for block, row in entry["result"].items()
        for steps, cell in row.items()
    }


tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run
