"""Fine-tune a masked diffusion language model on prompts and answers, or on conversations. The prompt stays clean.

python -m train.sft --data chats.jsonl --output runs/sft --export my-model      (from the model that ships)
accelerate launch train/sft.py --config train/configs/sft.yaml                  (any number of processes)
dlm train sft …                                                                 (from an installed package)

Data: JSONL, Parquet or hf:NAME with a column of messages, or a prompt and a response; found by themselves, or named.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch train/sft.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from dlm.checkpoints.files import SHIPPED
from dlm.data.choices import ON_BAD_ROW, OVERLONG
from dlm.models.choices import float_name
from dlm.training.config import RecipeConfig
from dlm.training.lora import TARGETS, add_lora, merge_lora
from dlm.utils import settings
from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.training.recipe import Prepared


@dataclass(frozen=True)
class Recipe(RecipeConfig):
    """What all recipes share, how rows become examples, and adapters.

    format: `chat` (the tokenizer's chat template), `plain` (prompt, separator, response) or `auto` (chat where there is
    a template). sequence_length: most tokens of an example, 0 for the model's. overlong: `truncate` or `skip` longer
    ones. on_bad_row: `stop` at a row that cannot be used, or `skip` and count it. lora: rank of the adapters, 0 to
    train all weights; base_dtype: type of the frozen weights under adapters.
    """

    output: str = "runs/sft"
    model: str = str(SHIPPED)
    sequence_length: int = 0
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    warmup_steps: int = 50
    sample_every: int = 0
    format: str = "auto"
    messages_column: str = ""
    prompt_column: str = ""
    response_column: str = ""
    separator: str = "\n"
    overlong: str = "truncate"
    on_bad_row: str = "stop"
    lora: int = 0
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = TARGETS
    base_dtype: str = "float32"

    def __post_init__(self):
        from dlm.training.options import CHOICES

        super().__post_init__()
        check_name("format", self.format, CHOICES["format"])
        check_name("overlong", self.overlong, OVERLONG)
        check_name("on_bad_row", self.on_bad_row, ON_BAD_ROW)
        object.__setattr__(self, "base_dtype", float_name(self.base_dtype))
        check_name("base_dtype", self.base_dtype, CHOICES["base_dtype"])
        if self.lora < 0:
            raise ValueError(f"lora is {self.lora}: it is a rank, 0 or more")
        if self.base_dtype != "float32" and not self.lora:
            raise ValueError(
                f"base_dtype is {self.base_dtype}, but all weights are trained: train them in float32, or use --lora"
            )


def prepare(settings: Recipe, accelerator) -> Prepared:
    """Model, tokenizer and examples; the first process tokenizes, the others wait for it."""
    import torch

    from dlm.checkpoints.pretrained import check_fit, open_tokenizer
    from dlm.data.conversations import chat_source, load_chats
    from dlm.training.recipe import Prepared, chat_format, load_examples, open_model, stream_examples

    model = open_model(settings, getattr(torch, settings.base_dtype))
    tokenizer = open_tokenizer(settings.tokenizer or settings.model)
    check_fit(model.config, tokenizer)
    form = chat_format(settings, tokenizer, model.config.max_sequence_length)

    def load(path):
        return load_chats(path, tokenizer, form, split=settings.split)

    with accelerator.main_process_first():
        if settings.streaming:
            source = partial(chat_source, tokenizer=tokenizer, form=form, split=settings.split)
            train = stream_examples(settings.data, form.length, settings.shuffle_window, source)
        else:
            train = load_examples(settings.data, form.length, load)
        valid = load_examples(settings.valid, form.length, load) if settings.valid else None
    if not settings.lora:
        return Prepared(model, tokenizer, train, valid)
    adapted = add_lora(model, settings.lora, settings.lora_alpha, settings.lora_targets, settings.seed)

    def finish(trained, weights):
        return merge_lora(trained, weights), None

    return Prepared(adapted, tokenizer, train, valid, finish)


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "sft", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="sft", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
