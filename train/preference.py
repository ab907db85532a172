"""Align a masked diffusion language model to preferences: DPO on bounds with little variance (VRPO).

python -m train.preference --data pairs.jsonl --output runs/preference --export my-model    (from the model that ships)
accelerate launch train/preference.py --data pairs.jsonl ...                    (any number of processes)
dlm train preference ...                                                        (from an installed package)

Data: JSONL, Parquet or hf:NAME with prompt, chosen and rejected, as text or as messages (TRL's formats).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch train/preference.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.training.tuning import TuningConfig, adapted
from dlm.utils import settings

if TYPE_CHECKING:
    from dlm.training.recipe import Prepared

NOT_OF_PAIRS = ("random_length", "dropout_prompt", "complementary", "decoding_share", "block_growth", "streaming")


@dataclass(frozen=True)
class Recipe(TuningConfig):
    """What tuning recipes share (TuningConfig), and the preference.

    batch_size is in pairs. reference: a folder or hub id, by default the model itself as it begins (with `lora` the
    model without its adapters). beta: how strongly the policy may leave the reference; draws: noise draws of each
    answer; sft_weight: weight of the chosen answer's bound a token. Pairs longer than sequence_length are left out and
    counted. The bounds are those of the model's own visibility: full attention, blocks, or each for half of the pairs
    of a step.
    """

    output: str = "runs/preference"
    reference: str = ""
    beta: float = 0.1
    draws: int = 8
    sft_weight: float = 0.0
    batch_size: int = 8
    learning_rate: float = 2e-5
    warmup_steps: int = 20
    valid_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < float("inf") or self.draws < 1 or not self.sft_weight >= 0:
            raise ValueError(
                f"beta is {self.beta}, draws {self.draws}, sft_weight {self.sft_weight}: give a beta above 0, 1 or "
                f"more draws, and a weight that is not negative"
            )
        self.refuse(NOT_OF_PAIRS, "pairs are compared whole")
        if self.objective == "autoregressive" or self.estimator == "stratified" or self.eos_padding != "none":
            raise ValueError(
                "preferences need a diffusion objective, eos_padding none, estimator count, uniform or d3pm"
            )
        if self.valid:
            raise ValueError("valid is of texts, and this recipe logs the pairs' accuracy: leave it out")


def prepare(settings: Recipe, accelerator) -> Prepared:
    """Model, tokenizer, pairs and the reference; the first process tokenizes, the others wait for it."""
    from dlm.checkpoints.pretrained import check_fit, open_tokenizer
    from dlm.data.pairs import Pairs, load_pairs
    from dlm.data.sources import plain_paths
    from dlm.objectives.preference import Preference
    from dlm.objectives.reference import frozen
    from dlm.training.recipe import Prepared, chat_format, open_beside, open_model

    model = open_model(settings)
    tokenizer = open_tokenizer(settings.tokenizer or settings.model)
    check_fit(model.config, tokenizer)
    form = chat_format(settings, tokenizer, model.config.max_sequence_length)
    with accelerator.main_process_first():
        paths = plain_paths(settings.data, "pairs")
        pairs = Pairs([load_pairs(path, tokenizer, form, split=settings.split) for path in paths])
    options = {"beta": settings.beta, "draws": settings.draws, "sft": settings.sft_weight}
    if settings.reference:
        reference = frozen(open_beside(settings.reference, model, tokenizer, "reference"))
    else:
        reference = None if settings.lora else frozen(model)
    made, finish = adapted(model, settings)
    return Prepared(made, tokenizer, pairs, None, finish, objective=Preference(reference, **options))


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "preference", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="preference", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
