"""Random settings over all rules together: methods, commits, revisions, growth, constraints, infilling, guidance, rows.

3,000 of them were run by hand (docs/proofs.md); these are 150.
"""

import random

import pytest

from tests.helpers.settings import run

pytest.importorskip("outlines_core")


@pytest.mark.parametrize("part", range(3))
def test_random_settings_of_all_rules(part):
    found = {}
    refused = run(random.Random(part), 50, found)
    assert refused < 200
    did = {what for _, what in found}
    assert {"ran", "revised", "several", "grown", "matched"} <= did


def test_every_rule_took_part():
    """What the generator draws is every name of every table."""
    from dlm.sampling.config import COMMIT_NAMES, GROW_NAMES, METHOD_NAMES, REVISION_NAMES
    from tests.helpers.settings import models, settings

    rng, seen = random.Random(0), {name: set() for name in ("method", "commit", "revise", "grow")}
    every = models()
    for _ in range(400):
        options = settings(rng, rng.choice(every))
        for name, values in seen.items():
            values.add(options[name])
    want = {"method": METHOD_NAMES, "commit": COMMIT_NAMES, "revise": REVISION_NAMES, "grow": GROW_NAMES}
    assert seen == {name: set(values) for name, values in want.items()}
