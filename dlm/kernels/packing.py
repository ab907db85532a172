"""Which mask predictor a model gets: its packed copy where there can be one, else its own passes.

A copy is kept with its model and made again when the model has changed; a model that nobody else uses gives its
weights to the copy, so that they lie in memory once.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dlm.kernels.available import triton_kernels
from dlm.kernels.cuda_graphs import Graphs
from dlm.kernels.layers import FEW_BITS
from dlm.kernels.linear import kind_for
from dlm.kernels.packed import Packed
from dlm.models.head import Head
from dlm.models.moe import MoE, SwiGLU

if TYPE_CHECKING:  # generation from a file does without it, and its import takes seconds
    from dlm.models.transformer import LLaDAModelLM

__all__ = ["LARGEST", "Direct", "packed", "packed_alone"]

LARGEST = 4e9  # bytes of weights on a CPU; a copy of a larger model may not fit beside it
TOLD = 1e9  # bytes of weights on a CPU from which a second copy of them is worth a word
SPARE = 0.8  # of a GPU's free memory, which the copies may take
SAMPLED = 8  # numbers of a weight that are compared before every use
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COPIES: WeakKeyDictionary[LLaDAModelLM, tuple[_Seen, Packed | Graphs]] = WeakKeyDictionary()


class Direct:
    """A model's own passes as a mask predictor, with the signature of `Packed`."""

    def __init__(self, model):
        self.config, self.device, self.kernels = model.config, model.device, triton_kernels(model.device)
        self.passes = torch.no_grad()(getattr(model, "predict", model))

    def __call__(self, tokens: Tensor, positions: Tensor | None = None, **asked) -> Tensor:
        return self.passes(tokens, positions, **asked)


def packed(model):
    """The mask predictor for a model: its packed copy where there can be one, else its own passes (`Direct`).

    A copy is made of a plain `LLaDAModelLM` in evaluation mode with SDPA attention, on a CPU in float32 or (where the
    processor multiplies it) bfloat16, on a GPU where there is memory for it; linear layers may be of few bits.
    Adapters, hooks and others' layers keep the model as it is. With `model.cuda_graphs` set its passes are replayed
    (`Graphs`), with `model.compiled` their operations are compiled (`native`). The predictor is kept with the model and
    made again when the model has changed (`_Seen`). Anything else than a `LLaDAModelLM` is a predictor already, and
    comes back.
    """
    if "dlm.models.transformer" not in sys.modules:  # nobody can have made a model
        return model
    from dlm.models.transformer import LLaDAModelLM

    if not isinstance(model, LLaDAModelLM) or type(model).forward is not LLaDAModelLM.forward:
        return model
    kept = _COPIES.get(model)
    if kept is not None and kept[0].still(model):
        return kept[1]
    _COPIES.pop(model, None)  # the old copy goes first
    if not _can_pack(model):
        _say_plain(model)
        return Direct(model)
    size = sum(weight.nbytes for weight in model.parameters())
    if model.device.type == "cpu" and size > TOLD:
        warnings.warn(
            f"packing takes {size / 1e9:.1f} GB beside the {size / 1e9:.1f} GB of the model; "
            "dlm.load_pretrained(...).predictor keeps the packed weights alone",
            stacklevel=3,
        )
    predictor = _with_graphs(Packed(model), model)
    _COPIES[model] = _Seen(model), predictor
    return predictor


def packed_alone(model: LLaDAModelLM):
    """The mask predictor for a model that nobody else uses: it takes the model's weights over, so that they lie in
    memory once."""
    if not _can_pack(model, alone=True):
        _say_plain(model, alone=True)
        return Direct(model)
    return _with_graphs(Packed(model, release=True), model)


def _with_graphs(copy: Packed, model: LLaDAModelLM) -> Packed | Graphs:
    return Graphs(copy) if model.cuda_graphs and model.device.type == "cuda" else copy


def _kind(model: LLaDAModelLM) -> tuple:
    return model.config._attn_implementation, model.cuda_graphs, model.compiled


def _writes(weight: Tensor) -> int:
    """How often a weight was written; tensors that were made in inference mode are not counted."""
    return 0 if weight.is_inference() else weight._version


class _Seen:
    """What a model was when it was packed: modules, hooks, where its weights lie, how often each was written.

    `weight.data` leaves the count of writes as it was, so a few numbers of every weight are compared too: what
    changes all of a weight (merged adapters, a step of an optimizer) is noticed, a single number written that way is
    not.
    """

    def __init__(self, model: LLaDAModelLM):
        self.kind = _kind(model)
        self.modules = []
        for module in model.modules():
            fields = vars(module)
            weights = [
                (held, name, weight, weight.data_ptr(), _writes(weight))
                for held in (fields["_parameters"], fields["_buffers"])
                for name, weight in held.items()
                if weight is not None
            ]
            self.modules.append((fields, [*fields["_modules"].values()], weights))
        weights = [*model.parameters(), *model.buffers()]
        picked = [weight.detach().view(-1)[:: max(1, weight.numel() // SAMPLED)] for weight in weights]
        kinds = {weight.dtype for weight in weights}
        self.groups = [[part for part in picked if part.dtype == kind] for kind in kinds]
        on_host = model.device.type == "cpu"
        self.memory = [part.view(INTEGERS[part.itemsize]).numpy().data for part in picked] if on_host else []
        self.numbers = self._numbers()

    def _numbers(self) -> list:
        if self.memory:  # memoryviews take a tenth of the time that small tensors do
            return [part.tobytes() for part in self.memory]
        return [torch.cat(parts) for parts in self.groups]

    def still(self, model: LLaDAModelLM) -> bool:
        """Whether the model is what it was; in 0.1 ms for 25M parameters."""
        if self.kind != _kind(model):
            return False
        for fields, children, weights in self.modules:
            if fields["training"] or fields["_forward_hooks"] or fields["_forward_pre_hooks"] or "forward" in fields:
                return False
            if children and children != [*fields["_modules"].values()]:
                return False
            for held, name, weight, place, writes in weights:
                if held.get(name) is not weight or weight.data_ptr() != place or _writes(weight) != writes:
                    return False
        now = self._numbers()
        return now == self.numbers if self.memory else all(map(torch.equal, now, self.numbers))


def _say_plain(model: LLaDAModelLM, alone: bool = False) -> None:
    """Warns where a model that is to write text runs unpacked for what it or the machine is, and says why. Raises
    ValueError where `model.compiled` asks for what only packed passes have."""
    config, device, dtype = model.config, model.device, model.dtype
    if model.compiled:
        raise ValueError(
            "compile is for packed passes, and this model runs unpacked: leave it out, or use sdpa attention"
        )
    if model.training or config._attn_implementation in (None, "eager"):
        return  # as it was asked for
    why = None
    if config.rotary.scaling == "dynamic":
        why = "its rope scaling is dynamic"
    elif config.head_dim % 2:
        why = f"its head size {config.head_dim} is odd"
    elif config.layer_repeats > 1 or config.grid_width is not None:
        why = "its layers are applied several times, or its heads see a grid"
    elif dtype in (torch.bfloat16, torch.float16) and kind_for(device, dtype) is None:
        why = f"this processor has no fast product for {str(dtype).removeprefix('torch.')}: float32 is quicker"
    elif not _room(model, device, alone):
        why = "a packed copy does not fit beside it"
    if why is not None:
        warnings.warn(f"the model runs unpacked, with the same text and more slowly: {why}", stacklevel=4)


def _can_pack(model: LLaDAModelLM, alone: bool = False) -> bool:
    from dlm.models.transformer import LLaDABlock, RMSNorm

    if model.training or model.config._attn_implementation in (None, "eager"):
        return False
    if model.config.rotary.scaling == "dynamic":  # its angles depend on the row's length, and the table here does not
        return False
    if model.config.head_dim % 2 or model.config.layer_repeats > 1 or model.config.grid_width is not None:
        return False
    weights = list(model.parameters())
    dtype, device = weights[0].dtype, weights[0].device
    plain = all(type(w) is nn.Parameter and w.device == device and w.dtype == dtype for w in weights)
    if not plain or kind_for(device, dtype) is None or not _room(model, device, alone):
        return False
    if dtype != torch.float32 and not model.config.rope_full_precision:
        return False
    known = (nn.Linear, Head, *FEW_BITS, nn.Embedding, RMSNorm, LLaDABlock, MoE, SwiGLU, nn.ModuleDict, nn.ModuleList)
    return all(
        (type(module) in known or name in ("", "model"))
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        for name, module in model.named_modules()
    )


def _room(model, device: torch.device, alone: bool) -> bool:
    """Whether the copies fit beside the model, or beside one layer of it; on a GPU those are the joined weights."""
    if device.type == "cpu":
        return alone or sum(w.nbytes for w in model.parameters()) <= LARGEST
    if model.config._attn_implementation != "sdpa":
        return False
    blocks = model.model.transformer.blocks
    names = ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj")  # a mixture of experts is not copied
    joined = sum(getattr(block, name).weight.nbytes for block in blocks for name in names if hasattr(block, name))
    return joined / (len(blocks) if alone else 1) <= SPARE * torch.cuda.mem_get_info(device)[0]
