"""Start-up: help needs no torch, and the names it lists are the keys of the tables that do."""

import os
import resource
import subprocess
import sys

import pytest

from dlm.cli import scripts
from dlm.models import choices
from dlm.objectives import config as objectives
from dlm.sampling import config as sampling
from dlm.training import options as training


def test_names_without_torch_are_the_tables_keys():
    from dlm.kernels.linear import QUANTIZED
    from dlm.objectives.losses import OBJECTIVES
    from dlm.objectives.noise import NOISE_SCHEDULES
    from dlm.objectives.policy import METHODS as POLICIES
    from dlm.sampling.commit import COMMITS
    from dlm.sampling.methods import METHODS
    from dlm.sampling.propose import CONFIDENCES
    from dlm.sampling.remask import REMASKS
    from dlm.sampling.revise import REVISIONS
    from dlm.sampling.schedule import SPLITS
    from dlm.training.optim import SCHEDULES

    assert tuple(METHODS) == sampling.METHOD_NAMES
    assert tuple(COMMITS) == sampling.COMMIT_NAMES
    assert tuple(CONFIDENCES) == sampling.CONFIDENCE_NAMES
    assert tuple(REMASKS) == sampling.REMASK_NAMES
    assert tuple(NOISE_SCHEDULES) == sampling.NOISE_NAMES
    assert tuple(REVISIONS) == sampling.REVISION_NAMES
    assert tuple(SPLITS) == sampling.SPLIT_NAMES
    assert tuple(POLICIES) == objectives.POLICY_NAMES
    assert tuple(OBJECTIVES) == objectives.OBJECTIVE_NAMES
    assert tuple(NOISE_SCHEDULES) == objectives.NOISE_SCHEDULE_NAMES
    assert tuple(SCHEDULES) == training.LEARNING_RATE_SCHEDULES
    assert tuple(QUANTIZED) == choices.EIGHT_BITS


COMMANDS = [[], ["generate"], ["infill"], ["chat"], ["serve"], ["info"], ["train"], ["eval"], ["bench"]]
COMMANDS += [["train", "--estimate"]]
COMMANDS += [[command, name] for command in scripts.FOLDERS for name in scripts.scripts(command)]
COMMANDS = [words for words in COMMANDS if not {*words} & {"gpu", "gpu_parts"}]  # run by benchmarks/run_gpu.sh
SECONDS = 2.0  # of CPU; 0.1 to 0.4 on a quiet machine
HELP = """
import sys
class Refused:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "accelerate", "fastapi", "uvicorn"):
            raise RuntimeError(f"help imports {name}")
sys.meta_path.insert(0, Refused())
from dlm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_needs_no_torch_and_little_time(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = [sys.executable, "-c", HELP, *command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0 and done.stdout.startswith("usage: dlm") and not done.stderr, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < SECONDS


def test_generate_imports_nothing_of_transformers():
    """Was: the configuration's and the tokenizer's classes took a second of the time to the first frame."""
    code = """
import sys
from dlm.cli.main import main
assert main(["generate", "x", "--gen-length", "1"]) == 0
print({"transformers", "huggingface_hub", "dlm.models.transformer", "dlm.objectives.likelihood"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr
