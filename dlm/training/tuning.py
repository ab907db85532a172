"""What recipes share that tune a model on prompts and answers: how rows become tokens, and adapters. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dlm.checkpoints.files import SHIPPED
from dlm.data.choices import ON_BAD_ROW
from dlm.objectives.config import AS_MODEL
from dlm.training.config import RecipeConfig
from dlm.training.lora import TARGETS, add_lora, merged
from dlm.training.options import FORMATS
from dlm.utils.names import check_name

__all__ = ["TuningConfig", "adapted"]


@dataclass(frozen=True)
class TuningConfig(RecipeConfig):
    """What all recipes share, how rows become tokens, and adapters.

    objective: that of the model, so that it keeps the visibilities that it knows. format: `chat` (the tokenizer's chat
    template), `plain` (prompt, separator, response) or `auto` (chat where there is a template). sequence_length: most
    tokens of an example, 0 for the model's. on_bad_row: `stop` at a row that cannot be used, or `skip` and count it.
    lora: rank of the adapters, 0 to train all weights.
    """

    model: str = str(SHIPPED)
    objective: str = AS_MODEL
    sequence_length: int = 0
    optimizer: str = "adamw"
    sample_every: int = 0
    format: str = "auto"
    separator: str = "\n"
    on_bad_row: str = "stop"
    lora: int = 0
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        super().__post_init__()
        check_name("format", self.format, FORMATS)
        check_name("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        if self.lora < 0:
            raise ValueError(f"lora is {self.lora}: it is a rank, 0 or more")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha is {self.lora_alpha}: it scales the adapters, a number above 0")

    def refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raises ValueError for the first of these settings that is on. why: what it cannot go with."""
        for name in names:
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, and {why}: leave it out")


def adapted(model, settings: TuningConfig) -> tuple[object, Callable]:
    """(the model with adapters where the settings ask for them, what is exported of it in the end)."""
    if not settings.lora:
        return model, lambda trained, state, weights: (trained, state, weights)
    made = add_lora(model, settings.lora, settings.lora_alpha, settings.lora_targets, settings.seed)
    return made, lambda trained, state, weights: (trained.get_base_model(), merged(trained, state, weights), None)
