"""`load`: a folder or hub id -> a mask predictor in evaluation mode, and its tokenizer."""

import json
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import logging as hf_logging

from dlm.checkpoints.files import SHIPPED, TWIN
from dlm.kernels.linear import QUANTIZED, quantize_
from dlm.kernels.tensor_parallel import shared_out
from dlm.models.choices import ATTENTION, float_name
from dlm.models.families import family_of, recognise
from dlm.utils.names import check_name

__all__ = ["SHIPPED", "TWIN", "load", "quiet", "read_config"]

WIDENED = 1_000_000_000  # parameters; above this, float32 would take too much of a machine's memory
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load(
    path: str | os.PathLike | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    device_map=None,
    revision: str | None = None,
    cuda_graphs: bool = False,
    tensor_parallel: bool = False,
):
    """(model, tokenizer) from a folder or a hub id; without one, the model that ships with dlm.

    dtype: "auto" is the checkpoint's, but float32 for half-precision weights of up to a billion numbers on a CPU:
    every processor is quick at that, and gives the same text; "int8" (CPUs) and "fp8" (GPUs) keep the layers' weights
    in eight bits, for speed, at a small cost in quality (`linear.QUANTIZED`). device: by default a GPU if there is one;
    device_map, as in transformers, instead of it. attn_implementation: eager, sdpa, flash_attention_2 or
    flex_attention. cuda_graphs: replay the passes of generation (`graphs`), on one GPU with sdpa. tensor_parallel:
    share every layer out over the processes that torchrun started, each with a GPU
    (`LLaDAConfig.base_model_tp_plan`); all must then make the same calls. No remote code is run. The tokenizer is None
    where the folder has none.
    Raises ValueError, in one line that names the folder and the reason, for a folder that is no checkpoint, another
    family, damaged weights, or tensors missing or left over; OSError where the hub cannot be reached.
    """
    from dlm.tokenizer import load_tokenizer

    path = os.fspath(SHIPPED if path is None else path)
    config = read_config(path, revision)
    family = family_of(config)
    dtype = float_name(dtype) if isinstance(dtype, str) else dtype
    bits = str(dtype).removeprefix("torch.")
    if bits in QUANTIZED:
        dtype = QUANTIZED[bits].base
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}: give auto, float32, bfloat16, float16, {' or '.join(QUANTIZED)}")
        dtype = getattr(torch, dtype)
    options = {"config": config, "dtype": dtype, "revision": revision or "main"}
    if tensor_parallel:
        place, more = "several", shared_out(config, bits)
    elif device_map is not None:
        place, more = "a device_map", {"device_map": device_map}
    else:
        place = _usable(device)
        more = {"device_map": {"": place}}  # a device as a device_map: the weights go straight there
    if cuda_graphs and getattr(place, "type", None) != "cuda":
        raise ValueError(f"cuda_graphs need one GPU, and the model goes to {place}: leave them out")
    options |= more
    if attn_implementation is not None:
        check_name("attn_implementation", attn_implementation, ATTENTION)
        options["attn_implementation"] = attn_implementation
    try:
        with quiet() if os.path.isdir(path) else nullcontext():  # a download shows its progress
            model = family.model.from_pretrained(path, **options).eval()
            tokenizer = load_tokenizer(path, revision)
    except (SafetensorError, EOFError) as error:
        raise ValueError(f"the weights in {path} are damaged or cut short ({error}): copy the file again") from None
    small = model.device.type == "cpu" and model.dtype.itemsize < 4 and model.num_parameters() <= WIDENED
    if dtype == "auto" and small:
        model = model.float()
    if bits in QUANTIZED:
        quantize_(model, bits)
    model.cuda_graphs = cuda_graphs
    return model, tokenizer


def _usable(device: str | torch.device | None) -> torch.device:
    """The device, by default a GPU where there is one; raises ValueError for one that this machine does not have."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device} cannot be used here ({reason}): leave it out, or give cpu") from None
    return torch.device(device)


@contextmanager
def quiet():
    """No progress bar and no report from transformers meanwhile: what matters is raised."""
    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


def read_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration in a folder or at a hub id; raises ValueError where there is none that `load` reads."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: give the folder of a checkpoint")
        try:
            fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / 'config.json'} is not JSON ({error}): copy the file again") from None
        if not any((folder / name).is_file() for name in _WEIGHTS):
            raise ValueError(f"{path} has a config.json but no weights ({_WEIGHTS[0]}): copy them there")
    elif folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{path} is not a folder: give the folder of a checkpoint, or a hub id such as name/model")
    else:
        fields, _ = PretrainedConfig.get_config_dict(path, revision=revision or "main")
    return recognise(fields, path).config.from_dict(fields)
