"""An autoregressive checkpoint becomes a diffusion one: its weights under another attention, and a mask token.

Shapes: V embedding_size, D d_model.

What changes stands in config.json: the family (`a2d-*`, or dlm's own), `mask_token_id`, `block_length`,
`shift_logits`, `objective`, and `converted_from`. Weights keep their names and their number type.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dlm.checkpoints.folder import DTYPES
from dlm.checkpoints.load import Placing, is_own, quiet
from dlm.checkpoints.pretrained import Pretrained, load_pretrained
from dlm.models.families import FAMILIES
from dlm.utils.files import check_replaceable, whole_folder
from dlm.utils.jsonio import read_object

__all__ = ["CONVERTED", "Conversion", "MaskToken", "convert"]

# Family of an autoregressive checkpoint -> the family that it becomes. dlm's own keeps its name.
CONVERTED = {
    "llama": "a2d-llama", "qwen2": "a2d-qwen2", "qwen3": "a2d-qwen3", "smollm3": "a2d-smollm3", "llada": "llada",
}  # fmt: skip
MASK_WORD = "<|mask|>"  # of a token that is added: the one that dllm asks for
RESERVED = re.compile(r"reserved|unused|placeholder", re.IGNORECASE)  # names of tokens that texts never hold
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of generation_config.json: what stays
LEFT_OUT = ("auto_map", "architectures", "objective")  # of the old config.json


@dataclass(frozen=True)
class MaskToken:
    """The mask token of a converted checkpoint.

    number: its id. word: its text, None without a tokenizer. origin: `own` (the tokenizer had it), `taken` (a reserved
    token), `free` (a row of the embeddings that no token used) or `grown` (one row more).
    """

    number: int
    word: str | None
    origin: str


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote. family: its `model_type`; attention: `full` or `block_causal`."""

    folder: Path
    family: str
    attention: str
    mask: MaskToken
    parameters: int


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    block_length: int | None = None,
    shift: bool = False,
    mask_token: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write the autoregressive checkpoint `source`, a folder or hub id, to the folder `out` as a diffusion one.

    block_length: attention is block-causal with blocks of so many slots; None: full. shift: the guess for a slot stays
    at the slot before, where the autoregressive model had it. mask_token: the text of the mask token, one that the
    tokenizer reserves or a new one; None: the tokenizer's own, or else a free row of the embeddings, a reserved token,
    or one row more. A new row is the mean of the others: of embeddings, and of an untied head.

    Raises ValueError for a checkpoint that is not autoregressive or of no family in `CONVERTED`, for options that do
    not fit it, and for an `out` that holds what dlm did not write.
    """
    opened = load_pretrained(source, causal=True, revision=revision)
    _check(opened, out, block_length)
    tokenizer = opened.optional_tokenizer
    mask = _mask_token(opened, tokenizer, mask_token)
    placing = Placing(_stored_type(opened), "cpu")
    model = _model(replace(opened, placing=placing), mask, block_length, shift)
    if mask.origin != "own":
        _mean_rows(model, mask.number, opened.config.vocab_size if tokenizer is None else len(tokenizer) - 1)
    with whole_folder(out) as folder, quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    size = sum(weight.numel() for weight in model.parameters())
    return Conversion(Path(out), model.config.model_type, model.config.attention, mask, size)


def _check(opened: Pretrained, out: str | os.PathLike, block_length: int | None) -> None:
    if not opened.autoregressive:
        raise ValueError(
            f"{opened.path} is a diffusion model already ({opened.family}, objective {opened.objective}): train it as "
            "it is, or give an autoregressive one"
        )
    if not is_own(opened.config) or opened.family not in CONVERTED:
        raise ValueError(
            f"{opened.path} is of family {opened.family!r}, which dlm does not convert: it converts llama (SmolLM "
            "too), qwen2, qwen3, smollm3, and its own autoregressive models"
        )
    if block_length is not None and not 1 <= block_length <= (opened.max_length or block_length):
        raise ValueError(
            f"block_length is {block_length}, and {opened.path} reads at most {opened.max_length} tokens: give 1 or "
            "more up to that, or leave it out for full attention"
        )
    if Path(out).exists() and Path(out).resolve() == opened.folder.resolve():
        raise ValueError(f"{out} is the checkpoint that is converted: give another folder")
    check_replaceable(out)


def _stored_type(opened: Pretrained) -> str:
    """The number type of the files; of several the widest."""
    kinds = {DTYPES[name] for name in opened.tensors.dtypes}
    return max(kinds, key=lambda name: (getattr(torch, name).itemsize, name))


# ---------------------------------------------------------------- the mask token


def _mask_token(opened: Pretrained, tokenizer: PreTrainedTokenizerBase | None, word: str | None) -> MaskToken:
    """Chooses the mask token, and makes it the tokenizer's."""
    if tokenizer is None:
        if word is not None:
            raise ValueError(f"{opened.path} has no tokenizer, so {word!r} names no token: leave --mask-token out")
        own = opened.config.mask_token_id
        return MaskToken(opened.config.vocab_size, None, "grown") if own is None else MaskToken(own, None, "own")
    vocabulary, before = tokenizer.get_vocab(), tokenizer.mask_token_id
    if before is not None and word in (None, tokenizer.mask_token):
        return MaskToken(before, tokenizer.mask_token, "own")
    rows, free = opened.config.embedding_size, len(tokenizer) < opened.config.embedding_size
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    reserved = sorted((number, name) for name, number in special.items() if RESERVED.search(name))
    if word is None:
        word = reserved[0][1] if reserved and not free else MASK_WORD
    if word in vocabulary:
        _check_unused(tokenizer, word, special)
    tokenizer.add_special_tokens({"mask_token": word})
    number = tokenizer.mask_token_id
    if word in vocabulary:
        return MaskToken(number, word, "taken")
    if number in vocabulary.values() or number > rows:
        raise ValueError(
            f"the tokenizer of {opened.path} leaves ids out, so a new token gets id {number}, which does not fit its "
            f"{rows} embeddings: name one of its own special tokens with --mask-token"
        )
    return MaskToken(number, word, "free" if number < rows else "grown")


def _check_unused(tokenizer: PreTrainedTokenizerBase, word: str, special: dict[str, int]) -> None:
    """Raises ValueError for a token that texts may hold."""
    use = None
    if word not in special:
        use = "an ordinary token of its vocabulary"
    elif special[word] in {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}:
        use = "the token that begins, ends or pads its texts"
    elif word in str(tokenizer.chat_template or ""):
        use = "a token of its chat template"
    if use is not None:
        raise ValueError(f"--mask-token is {word!r}, {use}: name a token that no text holds, or leave it out")


# ---------------------------------------------------------------- the model


def _model(opened: Pretrained, mask: MaskToken, block_length: int | None, shift: bool) -> nn.Module:
    """The weights of the autoregressive model in a model of the new family."""
    source = opened.model
    if mask.number >= opened.config.embedding_size:
        source.resize_token_embeddings(mask.number + 1, mean_resizing=False)
    family = FAMILIES[CONVERTED[opened.family]]
    fields = {name: value for name, value in _fields(opened).items() if name not in LEFT_OUT}
    fields |= {
        "model_type": family.name,
        "mask_token_id": mask.number,
        "vocab_size": max(opened.config.vocab_size, mask.number + 1),
        "converted_from": {"name": opened.name, "family": opened.family},
    }
    if "embedding_size" in fields:
        fields["embedding_size"] = source.get_input_embeddings().num_embeddings
    if block_length is not None:
        fields["block_length"] = block_length
    if shift:
        fields["shift_logits"] = True
    config = family.config.from_dict(fields)
    with torch.device("meta"):
        model = family.model(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.config.dtype = source.dtype
    ids = {name: getattr(source.generation_config, name, None) for name in TOKENS}
    model.generation_config = GenerationConfig(**ids)
    if block_length is not None:  # the exact cache of its attention
        model.generation_config.dlm = {"method": "block_causal"}
    return model.eval()


def _fields(opened: Pretrained) -> dict[str, Any]:
    return read_object(opened.folder / "config.json")


@torch.no_grad()
def _mean_rows(model: nn.Module, number: int, used: int) -> None:
    """Set the row of token `number` to the mean of the first `used` rows, in the embeddings and in an untied head."""
    tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    for weight in [table.weight for table in tables]:
        others = torch.arange(len(weight))[: max(used, 1)]
        others = others[others != number]
        weight[number] = weight[others].mean(0, dtype=torch.float32).to(weight.dtype)
