"""Counter-based random streams, one per example."""

from __future__ import annotations

import numpy as np

# Streams of randomness that never meet.
TRAINING, VALIDATION, CROP, PROMPT, STRATA, WINDOW, ROLLOUT, PROMPT_MASK, TEACHER, ORDER = range(10)


def example_generator(seed: int, epoch: int, index: int, stream: int = TRAINING) -> np.random.Generator:
    """A generator for one example: Philox with key (seed, stream) and counter (0, 0, epoch, index).

    Two examples are 2^128 draws apart, so that their streams never overlap.
    Errors: a negative seed, epoch or index.
    """
    if min(seed, epoch, index) < 0:
        raise ValueError(f"seed, epoch and index must not be negative: got {seed}, {epoch}, {index}")
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, epoch, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
