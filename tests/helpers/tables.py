"""Predictors whose probabilities are written down, one row a slot, so that each pass follows by hand.

One prompt token (slot 0), then the region. V = 5 with the mask 4, so tokens are 0 to 3.
"""

import dlm
from tests.helpers.toys import Probabilities, trace

MASK = 4


def best(*confidences, token=0):
    """A table where slot i+1 proposes `token` with this probability and the rest goes to the next token."""
    rows = [[0.2] * 5]
    for c in confidences:
        row = [0.0] * 5
        row[token], row[token + 1] = c, 1 - c
        rows.append(row)
    return Probabilities(rows)


def table(*rows):
    """A table of these rows, the probabilities of tokens 0 to 3 at slot i+1."""
    return Probabilities([[0.2] * 5, *[[*row, 0.0] for row in rows]])


def run(model, length, **options):
    """(the states, the pass of each slot of the region, its tokens) of one block, or as the options say."""
    config = dlm.SamplingConfig(gen_length=length, **({"block_length": length} | options))
    canvas = dlm.Canvas.from_prompts([[0]], length, MASK)
    states, steps = trace(model, canvas, config)
    return states, steps[0, 1:].tolist(), states[-1].canvas.tokens[0, 1:].tolist()


def steps(model, length, **options):
    """The pass of each slot of the region."""
    return run(model, length, **options)[1]
