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


from dlm.data.choices import OVERLONG
from dlm.models.choices import float_name
from dlm.training.tuning import TuningConfig, adapted
from dlm.utils import settings
from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.training.recipe import Prepared


@dataclass(frozen=True)
class Recipe(TuningConfig):
    """What tuning recipes share (TuningConfig), and how rows become examples.

    preface: a text before the first request of every example, such as d1's "Respond in the following format: ...".
    overlong: `truncate` or `skip` longer ones. base_dtype: type of the frozen weights under adapters.
    """

    output: str = "runs/sft"
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    messages_column: str = ""
    prompt_column: str = ""
    response_column: str = ""
    preface: str = ""
    overlong: str = "truncate"
    base_dtype: str = "float32"

    def __post_init__(self):
        from dlm.training.options import CHOICES

        super().__post_init__()
        check_name("overlong", self.overlong, OVERLONG)
        object.__setattr__(self, "base_dtype", float_name(self.base_dtype))
        check_name("base_dtype", self.base_dtype, CHOICES["base_dtype"])
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
    made, finish = adapted(model, settings)
    return Prepared(made, tokenizer, train, valid, finish)


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "sft", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="sft", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
