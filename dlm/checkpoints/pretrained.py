"""`Pretrained`: a checkpoint that is open. The one door: every command, recipe and scorer gets its model from here.

What a checkpoint is (configuration, objective, sizes of its weights) is read and checked at once; its parts are made
when they are first asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dlm.checkpoints.adapters import base_of, with_adapter
from dlm.checkpoints.defaults import family_defaults
from dlm.checkpoints.files import SHIPPED, defaults_for, read_defaults, sampling_with
from dlm.checkpoints.folder import Tensors, check_names, check_sizes, fetch, read_tensors, weight_files
from dlm.checkpoints.load import Placing, is_own, open_model, read_config, read_fields
from dlm.checkpoints.quick import fits, packed_from
from dlm.kernels.linear import QUANTIZED
from dlm.kernels.native import library
from dlm.kernels.packing import packed, packed_alone
from dlm.models.fields import LLaDAFields
from dlm.sampling.config import SamplingConfig, as_ids
from dlm.tokenizer import Codec, load_tokenizer, mask_id, open_codec

if TYPE_CHECKING:  # opening a checkpoint to generate text does without it, and its import takes a second
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["Pretrained", "check_fit", "load", "load_pretrained", "number_type", "open_tokenizer"]

SLOW = 1e9  # bytes of weights from which packing takes seconds


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A checkpoint: its configuration, and its parts as they are asked for.

    path: a folder or a hub id, as it was given; folder: where its files lie; fields: what its config.json says, without
    transformers' class where that is enough, since its import takes a second; tensors: the headers of its weights;
    adapter: a folder of PEFT's that is merged into them; progress: is told in a word what takes long. Errors of a part
    come where it is first asked for, each in one line that names the checkpoint.
    """

    path: str
    folder: Path
    fields: LLaDAFields | PreTrainedConfig
    tensors: Tensors
    placing: Placing
    variant: str | None
    progress: Callable[[str], None]
    adapter: str | None = None

    def __repr__(self) -> str:
        return f"<Pretrained {self.path}: {self.family}, {self.objective}, {self.tensors.parameters:,} parameters>"

    # ------------------------------------------------------------ what it is

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Its configuration, of transformers' kind."""
        return read_config(self.folder) if type(self.fields) is LLaDAFields else self.fields

    @property
    def name(self) -> str:
        """The last part of its path: short, for people."""
        return Path(self.path).name or self.path

    @property
    def family(self) -> str:
        """The `model_type` of its config.json."""
        return self.fields.model_type

    @property
    def objective(self) -> str:
        """What it was trained for: diffusion, block_diffusion or autoregressive. It stands in config.json; a family
        that transformers reads is autoregressive."""
        return self.fields.objective if is_own(self.fields) else "autoregressive"

    @property
    def autoregressive(self) -> bool:
        """Whether it predicts the next token, and cannot fill in masks."""
        return self.objective == "autoregressive"

    @property
    def block_length(self) -> int | None:
        """Of a block-causal model the length of its blocks in slots, else None."""
        return getattr(self.fields, "block_length", None)

    @property
    def max_length(self) -> int | None:
        """Most tokens that it reads; None where its configuration does not say."""
        names = ("max_sequence_length", "max_position_embeddings", "n_positions")
        return next((value for name in names if (value := getattr(self.fields, name, None))), None)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return as_ids(self.fields.eos_token_id)

    @property
    def has_end(self) -> bool:
        """Whether it names an end-of-text token."""
        return bool(self.end_ids)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The sampling options that its family's authors use, and over them those that its generation_config.json asks
        for, perhaps "chat": False, or options for answers."""
        return family_defaults(self.fields) | read_defaults(self.folder / "generation_config.json")

    @property
    def chat_defaults(self) -> dict[str, Any]:
        """`defaults` for answers."""
        return defaults_for("answers", self.defaults, False)

    @property
    def chat_turns(self) -> int | None:
        """How many of the last requests of a conversation it reads; None for all of them."""
        chat = self.defaults.get("chat")
        return chat.get("turns") if isinstance(chat, dict) else None

    @property
    def blank_defaults(self) -> dict[str, Any]:
        """`defaults` for filling blanks."""
        return defaults_for("blanks", self.defaults, getattr(self.fields, "full_attention", False))

    def sampling(self, use: str = "text", **fields: Any) -> SamplingConfig:
        """Its sampling defaults for a use (`text`, `answers` or `blanks`), with `fields` over them.

        Raises ValueError as SamplingConfig.
        """
        return sampling_with(defaults_for(use, self.defaults, getattr(self.fields, "full_attention", False)), fields)

    @cached_property
    def digest(self) -> str:
        """Which weights these are: the hub's commit, or for a folder a digest of what is in it."""
        if self.adapter is None and str(self.folder) != self.path:
            return self.folder.name  # a snapshot is named by its commit
        digest = hashlib.sha256()
        folders = [self.folder] if self.adapter is None else [self.folder, Path(self.adapter)]
        for file in sorted(file for one in folders for file in [*one.glob("*.safetensors"), *one.glob("*.json")]):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as stream:  # of a large file its first 256 MiB
                while (piece := stream.read(1 << 20)) and stream.tell() <= 1 << 28:
                    digest.update(piece)
        return f"sha256:{digest.hexdigest()[:16]}"

    # ------------------------------------------------------------ text

    @cached_property
    def optional_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, None where the folder has none. Raises ValueError for one that does not fit the model."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer is not None and is_own(self.fields):
            check_fit(self.fields, tokenizer)
        return tokenizer

    @cached_property
    def codec(self) -> Codec | PreTrainedTokenizerBase:
        """What turns texts into ids and back: its tokenizer, or the core of it where that does the same without
        transformers. Raises ValueError where the folder has none, and for one that does not fit the model."""
        if "optional_tokenizer" in vars(self) or (codec := open_codec(self.folder)) is None:
            return self.tokenizer
        if is_own(self.fields):
            check_fit(self.fields, codec)
        return codec

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises ValueError where the folder has none."""
        self.check_tokenizer()
        return self.optional_tokenizer

    def check_tokenizer(self) -> None:
        """Raises ValueError where the folder has no tokenizer."""
        if self.optional_tokenizer is None:
            raise ValueError(
                f"{self.path} has no tokenizer, so it cannot read or write text: put its tokenizer files there, "
                "or give ids from Python (dlm.generate)"
            )

    @cached_property
    def mask_id(self) -> int:
        """The id of its mask token. Raises ValueError where it has none."""
        return mask_id(vars(self).get("codec") or self.optional_tokenizer, self.fields)

    @property
    def chat_template(self) -> str | None:
        """The template of its tokenizer, None where it has none."""
        return getattr(self.optional_tokenizer, "chat_template", None)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens removed."""
        return self.codec.decode(list(ids), skip_special_tokens=True)

    # ------------------------------------------------------------ numbers

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights, in evaluation mode. Raises ValueError as `load_pretrained`."""
        model = open_model(self.folder, self.config, self.tensors, self.placing, self.variant)
        return model if self.adapter is None else with_adapter(model, self.adapter)

    @property
    def predictor(self) -> Any:
        """The mask predictor for `denoise` and `generate`: the weights, packed for the processor at the first use.

        Where `model` was asked for before, the packed copy lies beside it; else the weights lie in memory once.
        Raises ValueError for an autoregressive model.
        """
        self.check_diffusion()
        if self.placing.compile:
            library(self.progress)
        if "model" in vars(self) or self.adapter is not None:
            return packed(self.model)
        return self._alone

    @cached_property
    def _alone(self) -> Any:
        quick = packed_from(self.folder, self.fields, self.tensors, self.placing) if self.variant is None else None
        if quick is not None:
            return quick
        model = open_model(self.folder, self.config, self.tensors, self.placing, self.variant)
        if sum(weight.nbytes for weight in model.parameters()) > SLOW:
            self.progress("packing the weights")
        return packed_alone(model)

    @property
    def device(self) -> torch.device:
        """Where the weights lie; they are read if they were not."""
        return self.model.device if "model" in vars(self) or self.autoregressive else self.predictor.device

    def ready(self, model: bool = False) -> None:
        """Makes all parts that denoising texts needs, now; model: the model too. Raises as each of them."""
        self.check_diffusion()
        _ = self.codec, self.mask_id, self.model if model else self.predictor  # a part is made when it is asked for

    @property
    def number_type(self) -> str:
        """The type of the model's layers, as --dtype names it."""
        return number_type(self.model)

    def check_diffusion(self) -> None:
        """Raises ValueError for a model that cannot fill in masks."""
        if self.autoregressive:
            raise ValueError(
                f"{self.name} predicts the next token, and cannot fill in masks: give a diffusion model "
                "(`dlm train convert` makes one to be trained, `dlm eval generative` writes text with either)"
            )


# ---------------------------------------------------------------- opening one


def load_pretrained(
    path: str | os.PathLike | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    variant: str | None = None,
    cuda_graphs: bool = False,
    tensor_parallel: bool = False,
    compile: bool = False,
    causal: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Pretrained:
    """The checkpoint in a folder or at a hub id; without one, the model that ships with dlm.

    dtype: "auto" is the checkpoint's, but float32 for half-precision weights of up to a billion numbers on a CPU:
    every processor is quick at that, and gives the same text; "int8" (CPUs) and "fp8" (GPUs) keep the layers' weights
    in eight bits, for speed, at a small cost in quality (`linear.QUANTIZED`). device: by default a GPU if there is one;
    device_map, as in transformers, instead of it. attn_implementation: eager, sdpa, flash_attention_2 or
    flex_attention. variant: `fp16` reads model.fp16.safetensors. cuda_graphs: replay the passes of generation
    (`cuda_graphs`), on one GPU with sdpa. tensor_parallel: share every layer out over the processes that torchrun
    started, each with a GPU (`LLaDAConfig.base_model_tp_plan`); all must then make the same calls. compile: in float32
    on a CPU generation uses operations that a C compiler makes, once for a machine (`kernels.native`). causal:
    also open autoregressive models of the families that transformers reads, which score texts. progress: is told in a
    word what takes long.

    No code of a checkpoint runs, and no pickle is opened. Raises ValueError, in one line that names the folder and the
    reason, for a folder that is no checkpoint, another family, wrong fields, damaged weights, or tensors missing or
    left over; OSError where the hub does not give it.
    """
    placing = Placing(dtype, device, attn_implementation, device_map, cuda_graphs, tensor_parallel, compile)
    path = os.fspath(SHIPPED if path is None else path)
    if (base := base_of(path)) is not None:
        if placing.bits:
            raise ValueError(f"{path} holds adapters, and {placing.bits} layers take none: save the merged model first")
        opened = load_pretrained(
            base, dtype=dtype, device=device, attn_implementation=attn_implementation, device_map=device_map,
            variant=variant, cuda_graphs=cuda_graphs, compile=compile, causal=causal, progress=progress,
        )  # fmt: skip
        return dataclasses.replace(opened, path=path, adapter=path)
    folder = fetch(path, revision, variant=variant)
    fields = read_fields(folder) or read_config(folder, causal=causal)
    tensors = read_tensors(weight_files(folder, variant))
    if type(fields) is not LLaDAFields or not fits(fields, tensors):
        fields = read_config(folder, causal=causal)
        check_sizes(folder, fields, tensors)
        if not isinstance(fields, LLaDAFields) and is_own(fields):  # the table of families takes seconds to import
            from dlm.models.families import expected_tensors, family_of

            check_names(folder, expected_tensors(family_of(fields).model, fields), tensors)
    return Pretrained(path, folder, fields, tensors, placing, variant, progress or (lambda word: None))


def load(path: str | os.PathLike | None = None, **options: Any) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """(model, tokenizer) of a checkpoint, with the options and the errors of `load_pretrained`.

    The tokenizer is None where the folder has none.
    """
    opened = load_pretrained(path, **options)
    return opened.model, opened.optional_tokenizer


def open_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or at a hub id, without a model. Raises ValueError where there is none."""
    path = os.fspath(path)
    tokenizer = load_tokenizer(fetch(path, weights=False))
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer: give a folder with one")
    return tokenizer


def check_fit(config: LLaDAFields | PreTrainedConfig, tokenizer: Codec | PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a tokenizer with more tokens than the model has embeddings, or with another mask token."""
    if len(tokenizer) > config.embedding_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.embedding_size} embeddings: "
            f"use the tokenizer that belongs to the model"
        )
    own, theirs = config.mask_token_id, tokenizer.mask_token_id
    if own is not None and theirs is not None and own != theirs:
        raise ValueError(
            f"the tokenizer's mask token {tokenizer.mask_token} has id {theirs}, and the model was trained with "
            f"mask_token_id {own}: use the tokenizer that belongs to the model, or correct mask_token_id in config.json"
        )


def number_type(model: nn.Module) -> str:
    """The type of a model's layers, as --dtype names it: float32, bfloat16, ... or one of `QUANTIZED`."""
    layers = {type(module) for module in model.modules()}
    few = next((name for name, kind in QUANTIZED.items() if kind.layer in layers), None)
    return few or str(model.dtype).removeprefix("torch.")
