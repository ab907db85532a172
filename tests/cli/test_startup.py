"""Start-up: help needs no torch, and the names it lists are the keys of the tables that do."""

from dlm.models import choices
from dlm.objectives import config as objectives
from dlm.sampling import config as sampling
from dlm.training import config as training


def test_names_without_torch_are_the_tables_keys():
    from dlm.kernels.linear import QUANTIZED
    from dlm.objectives.losses import OBJECTIVES
    from dlm.objectives.noise import NOISE_SCHEDULES
    from dlm.sampling.commit import COMMITS
    from dlm.sampling.methods import METHODS
    from dlm.sampling.propose import CONFIDENCES
    from dlm.sampling.revise import REVISIONS
    from dlm.sampling.schedule import SPLITS
    from dlm.training.optim import SCHEDULES

    assert tuple(METHODS) == sampling.METHOD_NAMES
    assert tuple(COMMITS) == sampling.COMMIT_NAMES
    assert tuple(CONFIDENCES) == sampling.CONFIDENCE_NAMES
    assert tuple(REVISIONS) == sampling.REVISION_NAMES
    assert tuple(SPLITS) == sampling.SPLIT_NAMES
    assert tuple(OBJECTIVES) == objectives.OBJECTIVE_NAMES
    assert tuple(NOISE_SCHEDULES) == objectives.NOISE_SCHEDULE_NAMES
    assert tuple(SCHEDULES) == training.LEARNING_RATE_SCHEDULES
    assert tuple(QUANTIZED) == choices.EIGHT_BITS
