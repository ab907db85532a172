"""Shared fixtures: one thread (results and times do not depend on the machine), tiny models, recorded checkpoints."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, whoever does it


# Tests that take 7 s or more on a quiet core, one or a file of them, start several processes or kill them.
SLOW = (
    "benchmarking/test_sweep.py::test_killed_ten", "benchmarking/test_sweep.py::test_two_processes",
    "cli/test_launch.py::test_two_real", "commands/test_bench_training", "commands/test_readme",
    "commands/test_train_grpo", "commands/test_wheel", "evaluation/test_perplexity.py::test_the_same_numbers",
    "evaluation/test_sudoku.py::test_recipe", "kernels/test_tensor_parallel", "kernels/test_triton",
    "models/test_surface_auto", "objectives/test_estimators", "objectives/test_likelihood.py::test_errors_are",
    "objectives/test_likelihood.py::test_estimators_agree", "objectives/test_likelihood.py::test_intervals",
    "properties/test_identities.py::test_a_batch_of_ragged",
    "properties/test_identities.py::test_cached_block_causal", "properties/test_identities.py::test_coarse",
    "properties/test_identities.py::test_dual_is_none", "properties/test_identities.py::test_infilling_keeps",
    "properties/test_identities.py::test_oracle", "properties/test_identities.py::test_prefix_is",
    "properties/test_identities.py::test_vicinity", "properties/test_invariants.py::test_random_settings",
    "sampling/test_propose.py::test_top", "sampling/test_end_of_text", "sampling/test_revise.py::test_random_settings",
    "sampling/test_revise.py::test_the_law", "serving/test_offline.py::test_sigkill",
    "serving/test_robust.py::test_a_process", "serving/test_soak", "training/test_kills", "training/test_processes",
    "training/test_steps.py::test_two_processes", "training/test_trainer.py::test_context", "training/test_zero",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks the tests of `SLOW`; `make test` leaves them out."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        if f"{file}::{item.name}".startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits deafness to Ctrl-C
    from transformers.utils import logging

    logging.disable_progress_bar()  # save_pretrained's would land in what the tests capture


@pytest.fixture(scope="session")
def fixtures():
    return FIXTURES


@pytest.fixture(scope="session", params=["mha", "gqa"])
def recorded(request):
    """A recorded checkpoint: (model, folder, its cases)."""
    import dlm

    folder = FIXTURES / request.param
    model, tokenizer = dlm.load(folder)
    assert tokenizer is None
    return model, folder, json.loads((folder / "expected.json").read_text())["cases"]


@pytest.fixture(scope="session")
def tiny():
    """One tiny double-precision model (V 40, mask 39, end of text 38)."""
    from tests.helpers.toys import tiny_model

    return tiny_model(0)


MEASURED = "measured: "


@pytest.fixture
def measured(record_property):
    """measured(what, value, at_most): a measured number that must not be greater; all are listed when the tests end."""

    def note(what, value, at_most=None):
        record_property(MEASURED + what, (float(value), at_most))
        assert at_most is None or value <= at_most, f"{what}: {float(value):.3g} is above {at_most:g}"

    return note


def pytest_terminal_summary(terminalreporter):
    """The table of what was measured, from all processes that ran tests."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [
        (name.removeprefix(MEASURED), *numbers)
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, numbers in report.user_properties
        if name.startswith(MEASURED)
    ]
    if rows:
        terminalreporter.section("measured")
        width = max(len(what) for what, _, _ in rows)
        for what, value, at_most in sorted(rows, key=lambda row: row[0]):
            limit = "" if at_most is None else f"  (at most {at_most:.3g})"
            terminalreporter.write_line(f"{what:<{width}}  {value:9.3g}{limit}")
