"""A folder of adapters (PEFT) -> the checkpoint that they were made for, and its model with them added."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dlm.utils.jsonio import read_object

__all__ = ["base_of", "with_adapter"]


def base_of(path: str) -> str | None:
    """The folder or hub id of the checkpoint that the adapters in a folder were made for; None: it holds none.

    Raises ValueError where they do not say it, and for weights that are no safetensors.
    """
    folder = Path(path)
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    base = read_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{file} does not say base_model_name_or_path: write there which checkpoint they were made for"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{path} holds no adapter_model.safetensors: save the adapters again with PEFT")
    return base


def with_adapter(model: nn.Module, folder: str) -> nn.Module:
    """The model with the adapters merged into its weights. Raises ValueError where PEFT is not installed."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{folder} holds adapters, which need PEFT: pip install 'dlm[lora]'") from error
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
