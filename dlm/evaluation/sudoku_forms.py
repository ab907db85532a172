"""A mask predictor of Sudokus that asks a model about several forms of a puzzle, and takes the mean of its answers.

Shapes: B puzzles, N forms, T = 90 tokens of a grid (`sudoku.to_ids`), V vocabulary.

The rules of the game are the same under 1.2e12 symmetries (digits, rows, columns, bands and stacks exchanged, the
transpose), and a trained network is not: of each form it makes other mistakes. The mean over forms is sure where all
agree, so that what one form gets wrong and surely is not the most certain cell any more.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dlm.evaluation import sudoku

__all__ = ["MeanOverForms"]


class MeanOverForms:
    """The mean of the probabilities that `predictor` gives to N forms of each puzzle, the first the puzzle itself.

    A pass is N passes of the predictor, as one batch of N * B rows. seed: of the other forms, the same for all puzzles.
    It has the signature of `LLaDAModelLM.predict`, for whole grids without a cache.
    """

    def __init__(self, predictor, forms: int, seed: int = 0):
        self.predictor, self.config, self.forms = predictor, predictor.config, forms
        cells, digits = sudoku.random_symmetries(forms, np.random.default_rng([seed, forms]))
        cells[0], digits[0] = np.arange(81), np.arange(10)
        vocabulary = predictor.config.embedding_size
        places, ids = np.tile(np.arange(sudoku.LENGTH), (forms, 1)), np.tile(np.arange(vocabulary), (forms, 1))
        places[:, sudoku.CELLS] = sudoku.CELLS[cells]  # labels of rows stay where they are
        ids[:, :10] = digits  # so does the mask, 0, and every other token
        self._places, self._ids = torch.from_numpy(places), torch.from_numpy(ids)  # (N, T), (N, V)
        self._back = self._places.argsort(dim=1)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        visible=None,
        cache=None,
        valid: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> Tensor:
        """Logs of the mean probabilities; tokens (B, T), logits_to_keep (B, M) of int64 or None for all T."""
        if cache is not None or positions is not None:
            raise ValueError("the mean over forms is of whole grids: use method none")
        rows, length, forms = *tokens.shape, self.forms
        turned = tokens[:, self._places].permute(1, 0, 2)  # (N, B, T): which token stands where
        turned = self._ids[torch.arange(forms)[:, None, None], turned].reshape(forms * rows, length)
        logits = self.predictor(turned, visible=visible, valid=valid)
        p = logits.reshape(forms, rows, length, -1).float().softmax(dim=-1)
        p = p.gather(2, self._back[:, None, :, None].expand_as(p))
        p = p.gather(3, self._ids[:, None, None, :].expand_as(p))  # at token v what the form says of its name for v
        mean = p.mean(dim=0).log()
        if logits_to_keep is None:
            return mean
        return mean.gather(1, logits_to_keep[..., None].expand(-1, -1, mean.shape[-1]))

    predict = __call__
