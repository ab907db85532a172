"""A checkpoint's folder -> its configuration, and its model with the weights where they are wanted.

Shapes: d_model, embedding_size ... as in config.json.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from dlm.checkpoints.folder import Tensors
from dlm.kernels.linear import QUANTIZED, quantize_
from dlm.kernels.tensor_parallel import shared_out
from dlm.models.choices import ATTENTION, DTYPES, FLOATS, float_name
from dlm.models.fields import LLaDAFields
from dlm.utils.jsonio import read_object
from dlm.utils.names import check_name

if TYPE_CHECKING:  # its import takes a second
    from transformers import PreTrainedConfig

__all__ = ["Placing", "is_own", "open_model", "quiet", "read_config", "read_fields"]

WIDENED = 1_000_000_000  # parameters; above this, float32 would take too much of a machine's memory
LONGEST = 2**31  # slots; no model reads more
_GENERAL = {"architectures": list[str] | None, "dtype": str | None, "torch_dtype": str | None}  # of every family
_FIELDS = {field.name for field in dataclasses.fields(LLaDAFields)}
# Fields of transformers' that say nothing of the network.
_BESIDE = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "bos_token_id"}
SAVED = (*FLOATS, "float64")  # number types that weights may have on disk and in memory


@dataclass(frozen=True)
class Placing:
    """How a model is put on a machine; `load_pretrained` says what each means."""

    dtype: str | torch.dtype = "auto"
    device: str | torch.device | None = None
    attn_implementation: str | None = None
    device_map: Any = None
    cuda_graphs: bool = False
    tensor_parallel: bool = False
    compile: bool = False

    def __post_init__(self):
        if self._name not in (*DTYPES, *SAVED):
            raise ValueError(f"dtype is {self._name!r}: give {', '.join(DTYPES)}")
        if self.attn_implementation is not None:
            check_name("attn_implementation", self.attn_implementation, ATTENTION)

    @property
    def _name(self) -> str:
        return float_name(str(self.dtype).removeprefix("torch."))

    @property
    def bits(self) -> str | None:
        """The name of the few bits that the layers get, None where they are whole."""
        return self._name if self._name in QUANTIZED else None

    @property
    def whole(self) -> torch.dtype | str:
        """The type of whole weights: a torch.dtype or "auto"."""
        name = QUANTIZED[self.bits].base if self.bits else self._name
        return name if name == "auto" else getattr(torch, name)


# ---------------------------------------------------------------- configuration


def read_fields(folder: Path) -> LLaDAFields | None:
    """The configuration in a folder without transformers; None where `read_config` has to read it or to say why not."""
    try:
        content = read_object(folder / "config.json")
        if content.get("model_type") != LLaDAFields.model_type or content.keys() - _FIELDS - _BESIDE:
            return None
        check_types(content, LLaDAFields, folder / "config.json")
        fields = LLaDAFields(**{name: value for name, value in content.items() if name in _FIELDS})
        fields.bos_token_id = content.get("bos_token_id")
        _check_ids(fields, folder / "config.json")
    except (OSError, ValueError, TypeError):
        return None
    return fields


def is_own(config: PreTrainedConfig | LLaDAFields) -> bool:
    """Whether dlm's own transformer reads this configuration (transformers reads the others)."""
    return type(config).__module__.startswith("dlm.")


def read_config(folder: Path, *, causal: bool = False) -> PreTrainedConfig:
    """The configuration in a folder.

    causal: also of autoregressive families that transformers alone reads: they score texts, and cannot fill in masks.
    Raises ValueError where there is none, where a field has a wrong type or value, and for other families.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a checkpoint")
    content = read_object(file)
    try:
        return _own_config(content, folder)
    except ValueError:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if not causal or str(content.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever transformers raises for a field
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}): copy the file again") from error


def _own_config(content: dict[str, Any], folder: Path) -> PreTrainedConfig:
    file = folder / "config.json"
    if not isinstance(content.get("model_type"), str):
        raise ValueError(f"{file}: model_type is {content.get('model_type')!r}, and must be the name of a family")
    kind = _kind(content, folder)
    check_types(content, kind, file)
    try:
        config = kind.from_dict(content)
    except (TypeError, AttributeError, KeyError) as error:  # of a field that transformers knows
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}): copy the file again") from error
    _check_ids(config, file)
    return config


def _kind(content: dict[str, Any], folder: Path) -> type[PreTrainedConfig]:
    """The class of the configuration; LLaDA's without the table of all families, whose import takes seconds."""
    parts = [name for name in content if name.endswith(("_config", "_tower", "_decoder", "projector_type"))]
    if content.get("model_type") == LLaDAFields.model_type and content.get("num_experts") is None and not parts:
        from dlm.models.configuration import LLaDAConfig

        return LLaDAConfig
    from dlm.models.families import recognise

    return recognise(content, str(folder)).config


def check_types(content: Mapping[str, Any], kind: type, file: Path) -> None:
    """Raises ValueError for a value in config.json whose type is not that of the field of the configuration `kind`."""
    hints: dict[str, Any] = dict(_GENERAL)
    for one in reversed(kind.__mro__):
        if one.__module__.startswith("dlm."):  # transformers checks its own fields
            hints |= inspect.get_annotations(one, eval_str=True)
    for name, hint in hints.items():
        if name in content and not _fits(content[name], hint):
            shown = repr(content[name])
            shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
            raise ValueError(f"{file}: {name} is {shown}, and must be {_words(hint)}")
    for name in ("dtype", "torch_dtype"):
        if content.get(name) is not None and str(content[name]).removeprefix("torch.") not in SAVED:
            raise ValueError(f"{file}: {name} is {content[name]!r}: dlm computes with {', '.join(SAVED)}")


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, typing.get_args(hint)[0]) for one in value)
    if not isinstance(hint, type):
        return True
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is int and abs(value) < 2**63 if hint is int else isinstance(value, hint)


def _words(hint: Any) -> str:
    names = {
        int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null",
        list[int]: "a list of whole numbers", list[str]: "a list of texts",
    }  # fmt: skip
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return " or ".join(names.get(part, str(part)) for part in parts)


def _check_ids(config: PreTrainedConfig | LLaDAFields, file: Path) -> None:
    """Raises ValueError for an id without an embedding, and for a length that is none."""
    named = {"mask_token_id": config.mask_token_id, "eos_token_id": config.eos_token_id}
    for field, value in named.items():
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < config.embedding_size:
                raise ValueError(
                    f"{file}: {field} is {token}, and the model's {config.embedding_size} embeddings go from id 0 to "
                    f"{config.embedding_size - 1}: give the id that the checkpoint was trained with"
                )
    if config.max_sequence_length > LONGEST:
        raise ValueError(f"{file}: max_sequence_length is {config.max_sequence_length}: no model reads so many tokens")
    for field in ("rope_theta", "rms_norm_eps"):
        if not getattr(config, field) > 0:
            raise ValueError(f"{file}: {field} is {getattr(config, field)}: it must be above 0")


# ---------------------------------------------------------------- model


def open_model(
    folder: Path, config: PreTrainedConfig, tensors: Tensors, placing: Placing, variant: str | None = None
) -> nn.Module:
    """The model with its weights, in evaluation mode. tensors: what `check_sizes` has seen.

    Raises ValueError, in one line that names the folder and the reason, for damaged weights, tensors missing, left
    over or of another shape, numbers that are none, and a device or a type that cannot be used.
    """
    if not is_own(config) and (placing.bits or placing.tensor_parallel or placing.cuda_graphs or placing.compile):
        raise ValueError(
            f"{folder} is of a family that transformers reads: leave int8, fp8, cuda_graphs, compile and "
            "tensor_parallel out"
        )
    options = {"config": config, "dtype": placing.whole, "use_safetensors": True}
    if placing.attn_implementation is not None:
        options["attn_implementation"] = placing.attn_implementation
    if variant is not None:
        options["variant"] = variant
    if is_own(config):
        from dlm.models.families import family_of

        kind = family_of(config).model
    else:
        from transformers import AutoModelForCausalLM as kind
    try:
        with quiet():
            place = _place(config, placing)
            model = kind.from_pretrained(str(folder), trust_remote_code=False, **options, **place).eval()
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"the weights in {folder} are damaged or cut short ({error}): copy the file again") from None
    _check_numbers(model, folder)
    small = model.device.type == "cpu" and model.dtype.itemsize < 4 and tensors.parameters <= WIDENED
    if placing.whole == "auto" and small and is_own(config):
        model = model.float()
    if placing.bits:
        quantize_(model, placing.bits)
    if is_own(config):
        model.cuda_graphs, model.compiled = placing.cuda_graphs, placing.compile
    return model


def _place(config: PreTrainedConfig, placing: Placing) -> dict[str, Any]:
    """The options of `from_pretrained` that say where the weights go."""
    if placing.tensor_parallel:
        place, options = "several", shared_out(config, placing.bits or str(placing.whole))
    elif placing.device_map is not None:
        place, options = "a device_map", {"device_map": placing.device_map}
    else:
        place = _usable(placing.device)
        options = {"device_map": {"": place}}  # a device as a device_map: the weights go straight there
    if placing.cuda_graphs and getattr(place, "type", None) != "cuda":
        raise ValueError(f"cuda_graphs need one GPU, and the model goes to {place}: leave them out")
    return options


def _usable(device: str | torch.device | None) -> torch.device:
    """The device, by default a GPU where there is one; raises ValueError for one that this machine does not have."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(1, device=device).is_meta:
            raise NotImplementedError("it holds shapes and no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device} cannot be used here ({reason}): leave it out, or give cpu") from None
    return torch.device(device)


@torch.no_grad()
def _check_numbers(model: nn.Module, folder: Path) -> None:
    """Raises ValueError where a weight holds NaN or infinity, which shows in its sum."""
    named = list(model.named_parameters())
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    sums = [weight.sum(dtype=wide).to(model.device) for _, weight in named if weight.is_floating_point()]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return
    bad = next((name for name, weight in named if not bool(weight.isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"the weights in {folder} hold NaN or infinity ({bad}): the file is damaged; copy it again")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report from transformers meanwhile: what matters is raised."""
    from transformers.utils import logging as hf_logging

    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
