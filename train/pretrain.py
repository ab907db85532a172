"""Pretrain a masked diffusion language model (or its causal twin) on text. Settings: a YAML and the command line.

python -m train.pretrain --config train/configs/stories_1_autoregressive.yaml --data my.txt --output runs/mine
accelerate launch train/pretrain.py --config …        (any number of processes: the same loss curve)
dlm train pretrain …                                  (from an installed package)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dlm.utils.files import whole_folder

if __package__ in (None, ""):  # `accelerate launch train/pretrain.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from dlm.data.sources import parse_sources, read_documents
from dlm.training.config import RecipeConfig
from dlm.utils import settings

if TYPE_CHECKING:
    from dlm.data.examples import Examples
    from dlm.models.configuration import LLaDAConfig
    from dlm.training.recipe import Prepared


@dataclass(frozen=True)
class Recipe(RecipeConfig):
    """Everything that can be set: what all recipes share, the column of the text, the shape of a new model.

    chats: sources of requests and answers mixed in, as `train.sft` reads them; the answers carry loss.

    Without `model` a new one of the given shape is made, with `tokenizer` (a folder) or a tokenizer of `vocab_size`
    trained on `data`.
    """

    output: str = "runs/pretrain"
    text_column: str = "text"
    chats: str = ""
    vocab_size: int = 4096
    d_model: int = 320
    n_layers: int = 6
    n_heads: int = 5
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    weight_tying: bool = True
    attention_layer_norm: bool = False
    rope_theta: float = 10000.0
    max_sequence_length: int | None = None
    init_fn: str = "normal"
    init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.max_sequence_length is not None and self.max_sequence_length < self.sequence_length:
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}, below the rows of sequence_length "
                f"{self.sequence_length}: give at least as many, or leave it out"
            )
        if self.chats and self.streaming:
            raise ValueError("chats are read whole, and streaming reads while it trains: leave one of them out")


def prepare(settings: Recipe, accelerator) -> Prepared:
    """Model, tokenizer and examples; the first process trains and tokenizes, the others wait for it."""
    import torch

    from dlm.checkpoints.pretrained import check_fit
    from dlm.data.documents import load_documents
    from dlm.data.streaming import text_source
    from dlm.models.transformer import LLaDAModelLM
    from dlm.training.checks import check_new_model, check_rows
    from dlm.training.recipe import Prepared, load_examples, open_model, stream_examples

    if not settings.model:
        names = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "rope_theta", "init_std")
        shape = {name: getattr(settings, name) for name in names}
        check_new_model(shape, settings.vocab_size if not settings.tokenizer else 0)
    with accelerator.main_process_first():
        tokenizer = _tokenizer(settings, made=settings.resume or not accelerator.is_main_process)

        def load(path):
            return load_documents(path, tokenizer, column=settings.text_column, split=settings.split)

        if settings.streaming:
            source = partial(text_source, tokenizer=tokenizer, column=settings.text_column, split=settings.split)
            train = stream_examples(settings.data, settings.sequence_length, settings.shuffle_window, source)
        else:
            train = _examples(settings, tokenizer, load)
        valid = load_examples(settings.valid, settings.sequence_length, load) if settings.valid else None
    torch.manual_seed(settings.seed)  # the weights that a new model starts from
    model = open_model(settings) if settings.model else LLaDAModelLM(_config(settings, tokenizer))
    check_fit(model.config, tokenizer)
    check_rows(settings.sequence_length, model.config)
    return Prepared(model, tokenizer, train, valid)


def _examples(settings: Recipe, tokenizer, load) -> Examples:
    """The examples of `data` and of `chats`, mixed by the sources' weights."""
    from dlm.data.conversations import ChatFormat, load_chats
    from dlm.data.examples import Examples

    form = ChatFormat(bool(tokenizer.chat_template), settings.sequence_length, overlong="skip")

    def load_chat(path):
        return load_chats(path, tokenizer, form, split=settings.split)

    sources = [(source, load) for source in parse_sources(settings.data)]
    sources += [(source, load_chat) for source in parse_sources(settings.chats)]
    weights = [source.weight for source, _ in sources]
    if None in weights and set(weights) != {None}:
        raise ValueError("some sources of data and chats have weights and some have none: give path:weight for all")
    documents = [read(source.path) for source, read in sources]
    return Examples(documents, settings.sequence_length, None if None in weights else weights)


def _tokenizer(settings: Recipe, made: bool):
    """The tokenizer of a run. made: take the one that this run has made already, where there is one."""
    from dlm.checkpoints.pretrained import open_tokenizer
    from dlm.tokenizer import train_tokenizer

    kept = Path(settings.output) / "tokenizer"
    source = settings.tokenizer or settings.model or (kept if made and kept.is_dir() else None)
    if source is not None:
        return open_tokenizer(source)
    if settings.streaming:
        raise ValueError("streaming needs a tokenizer that exists: give one with --tokenizer, or a model with --model")
    paths = [source.path for source in parse_sources(settings.data)]
    texts = (text for path in paths for text in read_documents(path, settings.text_column, settings.split))
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    with whole_folder(kept) as temporary:
        tokenizer.save_pretrained(temporary)
    return open_tokenizer(kept)


def _config(settings: Recipe, tokenizer) -> LLaDAConfig:
    from dlm.models.configuration import LLaDAConfig

    return LLaDAConfig(
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        n_kv_heads=settings.n_kv_heads,
        # SwiGLU's usual 8/3 of the width, in whole 64s
        mlp_hidden_size=settings.mlp_hidden_size or -(-settings.d_model * 8 // 3 // 64) * 64,
        vocab_size=len(tokenizer),
        embedding_size=len(tokenizer),
        weight_tying=settings.weight_tying,
        attention_layer_norm=settings.attention_layer_norm,
        rope_theta=settings.rope_theta,
        max_sequence_length=settings.max_sequence_length or settings.sequence_length,
        init_fn=settings.init_fn,
        init_std=settings.init_std,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "pretrain", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="pretrain", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
