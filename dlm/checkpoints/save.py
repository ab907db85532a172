"""Folders on disk: a model as other tools load it, and the state of a training run. Both appear whole or not at all.

Everything is written to a hidden folder beside the final one and renamed, so a kill during a write loses nothing.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dlm.checkpoints.load import quiet
from dlm.sampling.methods import methods_for
from dlm.utils.files import whole_folder
from dlm.utils.jsonio import to_json


def save_model(
    model: nn.Module,
    folder: str | os.PathLike,
    tokenizer=None,
    *,
    state: dict[str, Tensor] | None = None,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    notes: dict | None = None,
) -> Path:
    """Write a model folder: config, safetensors, tokenizer, sampling defaults, and `training.json` where `notes` are
    given.

    state: the model's state, where the model holds a part of it alone (`whole_state`). weights: parameters by name to
    write in place of the model's own (its moving average). dtype: the type on disk.
    The model itself is not touched. Errors: those of `whole_folder`.
    """
    fresh = type(model)(copy.deepcopy(model.config))
    fresh.load_state_dict(model.state_dict() if state is None else state)
    if weights is not None:
        copy_weights(weights, fresh)
    if dtype is not None:
        fresh = fresh.to(dtype)
    fresh.config.dtype = next(fresh.parameters()).dtype
    defaults = getattr(getattr(model, "generation_config", None), "dlm", None)
    if defaults and defaults.get("method", "none") in methods_for(fresh.config):  # training may have changed its blocks
        fresh.generation_config.dlm = defaults
    with whole_folder(folder) as temporary, quiet():
        fresh.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if notes is not None:
            (temporary / "training.json").write_text(to_json(notes, indent=2) + "\n")
    return Path(folder)


@torch.no_grad()
def copy_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Copy parameters by name into a model. Errors: a name or a shape that does not fit."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ValueError(f"the weights are of another model: {', '.join(odd[:4])} on one side only")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(weights[name].shape)} in the checkpoint and "
                f"{tuple(parameter.shape)} in the model: use the settings of the first run"
            )
        parameter.copy_(weights[name])
