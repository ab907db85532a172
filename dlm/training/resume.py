"""Going on from a checkpoint: what must be the same, what may change, and how a run takes the state over."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dlm.data.examples import Examples
from dlm.training.config import TrainingConfig
from dlm.training.sharding import check_processes, shard_like
from dlm.training.state import OBJECTIVE_FILE, Damaged, checkpoints, load_state, set_aside, verify

# Every setting must be the same but for these.
FREE = {  # the weights do not depend on them; `data`, `model` and `tokenizer` may move: what they hold is compared
    "output", "name", "export", "export_dtype", "resume", "skip_damaged", "tracker", "epochs", "workers",
    "log_every", "log_seconds", "checkpoint_every", "keep_last", "sample_every", "sample_prompts", "sample_length",
    "valid", "valid_every", "valid_rows", "data", "model", "tokenizer", "rollout_rows",
}  # fmt: skip
# these change the last digits of a sum
ROUNDING = {"accumulation", "activation_checkpointing", "compile", "loss_chunk", "attn_implementation"}
FROM_HERE_ON = {  # what is given anew holds from the next step on, and the run says so
    "max_steps", "max_seconds", "learning_rate", "muon_learning_rate", "schedule", "warmup_steps", "decay_fraction",
    "final_factor",
}  # fmt: skip
NOT_OF_THE_MODEL = {  # of a model's config.json: what does not change its answers once there are weights
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "init_fn", "init_std",
    "init_device", "init_cutoff_factor",
}  # fmt: skip
PIECE = 1 << 24  # tokens hashed at a time


# ----------------------------------------------------------------------------------------------------- identity


def digest_of(data) -> str:
    """SHA-256 of the tokens, targets, boundaries and order of all documents; of streamed data "": see `Batches`."""
    if not isinstance(data, Examples):
        return ""
    digest = hashlib.sha256(repr((data.length, None if data.weights is None else list(data.weights))).encode())
    for part in data.documents:
        digest.update(repr((part.tokens.dtype.str, part.bos_id if part.target is None else "targets")).encode())
        digest.update(np.ascontiguousarray(part.starts, dtype=np.int64).tobytes())
        for array in (part.tokens, part.target):
            for start in range(0, 0 if array is None else len(array), PIECE):
                digest.update(np.ascontiguousarray(array[start : start + PIECE]).tobytes())
    return digest.hexdigest()


def model_fields(model) -> dict:
    """The entries of a model's configuration that decide what it answers."""
    config = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {k: v for k, v in fields.items() if k not in NOT_OF_THE_MODEL and not k.startswith("_")}
    return json.loads(json.dumps(kept, default=str))


def identify(run) -> dict:
    """What a run is made of, beside its settings."""
    batches = run.batches
    return {
        "data": batches.data.signature,
        "digest": digest_of(batches.data),
        "mask_id": run.mask_id,
        "pad_id": batches.pad_id,
        "end_id": batches.end_id,
        "objective": run.objective.identity,
        "model": model_fields(run.plain),
    }


def plain_settings(config: TrainingConfig) -> dict:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(asdict(config)))


def check_same(folder: Path, state: dict, config: TrainingConfig, now: dict) -> list[str]:
    """What changed and holds from here on, in words. Errors: settings, model or data that must be the same, by name."""
    before, settings = state["config"], plain_settings(config)
    defaults = {name: getattr(type(config), name, None) for name in settings}
    changed = {
        name: (before.get(name, defaults[name]), value)
        for name, value in settings.items()
        if before.get(name, defaults[name]) != value
    }
    for part, what in ((state["identity"], "the run"), (state["identity"].get("model"), "the model")):
        if not isinstance(part, dict):
            raise ValueError(f"{folder} does not say what {what} was made of: begin with a new --output")
    told = [f"{name} {was}, now it is {value}" for name, (was, value) in changed.items() if _fixed(name)]
    was, model = state["identity"], state["identity"]["model"]
    told += [f"{name} {was.get(name)}, now it is {now[name]}" for name in ("mask_id", "pad_id", "end_id", "objective")
             if was.get(name) != now[name]]  # fmt: skip
    told += [
        f"a model of {name} {model.get(name)}, now it is {now['model'].get(name)}"
        for name in sorted({**model, **now["model"]})
        if model.get(name) != now["model"].get(name)
    ]
    if told:
        raise ValueError(
            f"{folder} was made with {'; '.join(told)}: an exact resume needs the same; start a new output folder to "
            f"change it (these may change: {', '.join(sorted(FROM_HERE_ON))}, and what the weights do not depend on)"
        )
    if was.get("data") != now["data"]:
        raise ValueError(
            f"{folder} was made on {was.get('data')}, the data now gives {now['data']}: "
            f"an exact resume needs the same data and sequence length"
        )
    if was.get("digest") != now["digest"]:
        raise ValueError(
            f"{folder} was made on other data: there are again {now['data']}, but their tokens, targets or order "
            f"differ. An exact resume needs the same data and tokenizer; start a new output folder to change them"
        )
    return [f"{name} is {value} (was {old})" for name, (old, value) in changed.items() if name in FROM_HERE_ON]


def _fixed(name: str) -> bool:
    return name not in FREE | ROUNDING | FROM_HERE_ON


# -------------------------------------------------------------------------------------------------------- loading


def load_newest(run, skip_damaged: bool = False) -> None:
    """Have a run take over its newest checkpoint; one without starts from the beginning.

    skip_damaged: set damaged ones aside, and take the newest that is whole.
    Errors: a damaged checkpoint; settings, model or data that must be the same.
    """
    state, folder = _newest_whole(run, skip_damaged)
    if folder is None:
        run.metrics.forget_after(0)
        run.report(f"no checkpoint in {run.output} yet: starting from the beginning")
        return
    changes = check_same(folder, state, run.config, run.identity)
    check_processes(run.accelerator, state["processes"], folder)
    weights = load_state(run.accelerator, folder)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:  # a rate given anew holds from here on; the state keeps the old one
            group["base_lr"] = _base_rate(optimizer, run.config)
    if run.ema is not None:
        _take_average(run, weights, folder)
    if (folder / OBJECTIVE_FILE).is_file():
        run.objective.load_state(load_file(folder / OBJECTIVE_FILE))
    run.step, run.tokens = state["step"], state["tokens"]
    run.spend(state["seconds"])
    run.position = state["position"]
    run.batches.go_to(run.position, state.get("window", ""), folder)
    run.last_checkpoint = folder
    dropped = run.metrics.forget_after(run.step)
    if dropped:
        run.report(f"{run.metrics.path}: {dropped} damaged lines are left out; the weights do not depend on them")
    more = f"; from here on {', '.join(changes)}" if changes else ""
    run.report(f"resumed from {folder} at step {run.step}{more}")


def _newest_whole(run, skip_damaged: bool) -> tuple[dict, Path | None]:
    """(state, folder) of the newest checkpoint. The first process reads them; all go on or stop together."""
    told: list = [None, None, None]  # state, folder, error
    if run.accelerator.is_main_process:
        for _, folder in reversed(checkpoints(run.output)):
            try:
                told = [verify(folder), folder, None]
                break
            except Damaged as error:
                if not skip_damaged:
                    told = [None, None, error]
                    break
                run.report(f"{str(error).partition(': --resume')[0]}; it is now {set_aside(folder)}")
            except (ValueError, OSError) as error:
                told = [None, None, error]
                break
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(told)
    state, folder, error = told
    if error is not None:
        raise error
    return state, folder


@torch.no_grad()
def _take_average(run, weights, folder: Path) -> None:
    """Copy the moving average of a checkpoint. Errors: names, shapes or numbers that cannot be."""
    names = {name for name, _ in run.plain.named_parameters() if name in run.ema.weights}
    odd = sorted(names ^ (weights or {}).keys())
    if odd:
        raise ValueError(f"the moving average in {folder} is of another model: {', '.join(odd[:4])} on one side only")
    for name, parameter in run.plain.named_parameters():
        if name not in names:
            continue
        whole = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's are empty between uses
        if tuple(weights[name].shape) != tuple(whole):
            raise ValueError(
                f"the moving average in {folder} has {name} of shape {tuple(weights[name].shape)}, and the model "
                f"{tuple(whole)}: resume with the settings of the first run"
            )
        if not weights[name].isfinite().all():
            raise ValueError(f"the moving average in {folder} holds numbers in {name} that are not finite")
        run.ema.weights[name].copy_(shard_like(weights[name], parameter))


def _base_rate(optimizer, config: TrainingConfig) -> float:
    inner = getattr(optimizer, "optimizer", optimizer)
    muon = isinstance(inner, torch.optim.Muon) and config.muon_learning_rate is not None
    return config.muon_learning_rate if muon else config.learning_rate
