"""What tests of `fit` share: a tiny run, and the weights that it ends with."""

import pytest
import torch
from accelerate.state import AcceleratorState

from dlm.training.trainer import fit
from tests.helpers.ranks import MASK, settings, tiny_data, tiny_model


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one precision for a process; each test starts without."""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(output, *, resume=False, report=lambda line: None, valid=None, model=None, **changes):
    model = model or tiny_model()
    config = settings(output, **changes)
    result = fit(model, None, tiny_data(), valid, config, mask_id=MASK, resume=resume, report=report)
    return model, result


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
