"""What tests of the command line share: a tiny random checkpoint with a tokenizer, and `run`."""

import os
from pathlib import Path

import pytest
import torch

import dlm
from dlm.cli import main
from dlm.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
STORY = (
    "Once upon a time there was a little fox who lived by the sea. She walked along the beach and looked for "
    "shells. The cat sat on the mat, and then it slept. "
)
ENVIRONMENT = os.environ | {  # of new processes
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TERM": "xterm",
    "NO_COLOR": "",
}


def make_checkpoint(folder, tokenizer, **changes):
    """Save a model of random weights and the tokenizer; returns the folder."""
    torch.manual_seed(0)
    fields = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "mlp_hidden_size": 48,
        "vocab_size": len(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_sequence_length": 128,
    }
    model = dlm.LLaDAModelLM(dlm.LLaDAConfig(**(fields | changes)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([STORY] * 4, 340)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder with a tiny random model and its tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-fox", tokenizer)


@pytest.fixture
def run(checkpoint, capsys, monkeypatch):
    """run(*arguments) -> (exit code, standard output, standard error) of `dlm`, in this process."""
    monkeypatch.delenv("DLM_DEBUG", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments, model=checkpoint):
        words = [str(word) for word in arguments]
        if words[0] in ("generate", "infill", "chat") and model:
            words += ["--model", str(model)]
        code = main.main(words)
        out, error = capsys.readouterr()
        return code, out, error

    return run
