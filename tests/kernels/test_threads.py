"""Threads by measuring: the quickest number that changes no bit, and torch's own where it is not to be chosen."""

import pytest
import torch

from dlm.kernels import threads
from dlm.kernels.linear import has_kernels
from dlm.kernels.packing import packed
from tests.helpers.toys import tiny_model

pytestmark = pytest.mark.skipif(not has_kernels(torch.float32), reason="oneDNN is not in this torch")


@pytest.fixture
def eight(monkeypatch):
    """torch as on a machine of eight cores, without their work; no number in the environment."""
    state = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: state[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: state.__setitem__(0, count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return state


def timed(monkeypatch, seconds, logits=None):
    given = {}

    def measure(predictor, clock):
        count = torch.get_num_threads()
        given[count] = True
        return [torch.tensor(0 if logits is None else logits[count])], seconds[count]

    monkeypatch.setattr(threads, "_timed", measure)
    return given


@pytest.mark.parametrize(("seconds", "chosen"), [
    ({8: 1.0, 4: 2.0, 1: 3.0}, 8), ({8: 3.0, 4: 2.0, 1: 1.0}, 1), ({8: 3.0, 4: 1.0, 1: 2.0}, 4),
    ({8: 1.0, 4: 0.95, 1: 0.95}, 8),
])  # fmt: skip
def test_the_quickest_number_is_chosen(eight, monkeypatch, seconds, chosen):
    """By hand; a tenth quicker at least, or torch's own stays."""
    timed(monkeypatch, seconds)
    assert threads.settle_threads(packed(tiny_model(1, dtype=torch.float32).eval())) == chosen == eight[0]


def test_a_number_that_changes_a_bit_is_not_chosen(eight, monkeypatch):
    timed(monkeypatch, {8: 3.0, 4: 2.0, 1: 1.0}, {8: 5, 4: 5, 1: 6})
    assert threads.settle_threads(packed(tiny_model(1, dtype=torch.float32).eval())) == 4


def test_torchs_own_number_stays(eight, monkeypatch):
    given = timed(monkeypatch, {8: 3.0, 4: 2.0, 1: 1.0})
    copy = packed(tiny_model(1, dtype=torch.float32).eval())
    assert threads.settle_threads(lambda tokens: None) == 8
    monkeypatch.setattr(threads, "SMALL", 10)
    assert threads.settle_threads(copy) == 8
    monkeypatch.setattr(threads, "SMALL", 10**9)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads.settle_threads(copy) == 8 and not given


def test_what_is_timed_are_passes_of_the_model():
    copy = packed(tiny_model(1, dtype=torch.float32).eval())
    logits, seconds = threads._timed(copy, iter(range(100)).__next__)
    assert [x.shape[1] for x in logits] == [8, min(64, copy.limit)] and seconds == 1
    weights = sum(weight.numel() for weight in tiny_model(1).parameters() if weight.dim() > 1)
    assert threads._numbers(copy) == weights - copy.embedding.numel()
    assert torch.equal(logits[0], copy(torch.arange(8)[None] % len(copy.embedding)))
