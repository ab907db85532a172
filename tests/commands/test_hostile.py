"""550 damaged and hostile inputs: one line and exit code 2, never a traceback, a hang or gigabytes."""

import io
import json
import re
import resource
import signal

import pytest
from accelerate.state import AcceleratorState

from tests.helpers import commandline
from tests.helpers.hostile import ANSWERED, REFUSED, cases
from tests.helpers.hostile_more import more_cases

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures

CASES = [*cases(), *more_cases()]
SECONDS, GIGABYTES = 20, 4


class Hangs(BaseException):
    pass


@pytest.fixture(autouse=True)
def limits(monkeypatch, tmp_path):
    """A case that takes longer than `SECONDS` is stopped, whatever it catches."""
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))

    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (n % 8 > 0)) for n, case in enumerate(CASES)]
)
def test_hostile_input_is_one_line(case, run, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(case.stdin), encoding="utf-8"))
    AcceleratorState._reset_state(reset_partial_state=True)
    words = case.make(tmp_path, checkpoint)
    capsys.readouterr()
    code, out, error = run(*words, model=None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak < GIGABYTES, f"{peak:.1f} GB"
    assert "Traceback" not in error and "Traceback" not in out
    if code == 0:
        assert case.expected != REFUSED, f"passed in silence: {out[-200:]}"
        return
    assert case.expected != ANSWERED, error
    assert code == 2, (code, error)
    last = error.strip().splitlines()[-1]
    assert re.match(r"[\w ]+: ", last) and len(last) < 2000, error[-500:]
    assert not list(tmp_path.glob("out/checkpoints/*/state.json")), "trained on damaged input"
    assert not (tmp_path / "out" / "model").exists()


def test_there_are_more_than_three_hundred():
    assert len(CASES) == len({case.name for case in CASES}) >= 550
    json.dumps([case.name for case in CASES])
