"""Training steps of others beside the trainer's: a plain loop in torch, and dllm's trainer from a clone on this disk.

Shapes: N rows of L tokens. All start from weights of the same seed and see the same rows; the noise is their own.

Tried with dllm ca17675 (2026-04-14) on transformers 5.23 and torch 2.13. What its trainer needs there, and gets here
without a change of its files: its packages are entered without their __init__ (`benchmarks.peers`), its model class is
built on the device asked for, and its settings are transformers' own with the four that it reads, since its
`TrainingArguments` names options that transformers 5 has no more. It imports `torchmetrics` and `datasets`.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peers import _built, imports
from dlm.utils.hardware import synchronise
from dlm.utils.names import check_name

__all__ = ["OTHERS", "check_others", "other_steps"]

LEARNING_RATE = 1e-4
CLIP = 1.0  # largest norm of a gradient, as the trainer has it


def plain_loop(model, rows: Tensor, batch: int, steps: int, bf16: bool, path: Path | None) -> list[float]:
    """Seconds of each step of a loop as one writes it by hand: one mask rate a row, cross entropy of all logits,
    AdamW. rows (N, L) ids on the model's device."""
    del path
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    mask_id, device, times = model.config.mask_token_id, rows.device, []
    for step in range(steps):
        synchronise(device)
        began = time.perf_counter()
        tokens = rows[torch.arange(step * batch, (step + 1) * batch) % len(rows)]
        rate = torch.rand(batch, 1, device=device).clamp_min(1e-3)
        masked = torch.rand(tokens.shape, device=device) < rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens.masked_fill(masked, mask_id)).logits
            nats = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        loss = (nats * masked / rate).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return times


def dllm_trainer(model, rows: Tensor, batch: int, steps: int, bf16: bool, path: Path | None) -> list[float]:
    """Seconds of each step of dllm's MDLMTrainer on its own model class with our weights, from end to end."""
    import transformers

    packages = (
        "dllm",
        "dllm.core",
        "dllm.utils",
        "dllm.pipelines",
        "dllm.pipelines.llada",
        "dllm.pipelines.llada.models",
    )
    with imports(path, packages):
        configuration = importlib.import_module("dllm.pipelines.llada.models.configuration_llada").LLaDAConfig
        modelling = importlib.import_module("dllm.pipelines.llada.models.modeling_llada")
        theirs = _built(modelling, "LLaDAModelLM", configuration, model)
        trainer = importlib.import_module("dllm.core.trainers.mdlm").MDLMTrainer
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.last = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronise(rows.device)
            times.append(time.perf_counter() - self.last)
            self.last = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_grad_norm=CLIP, bf16=bf16, use_cpu=rows.device.type == "cpu",
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        settings.time_epsilon, settings.loss_weight_type = 1e-3, "scheduler"
        settings.loss_norm_type, settings.right_shift_logits = "token", False
        data = [{"input_ids": row, "labels": row} for row in rows.cpu()]
        tokenizer = SimpleNamespace(padding_side="right", mask_token_id=model.config.mask_token_id)
        run = trainer(settings, model=theirs, train_dataset=data, data_collator=transformers.default_data_collator)
        run.processing_class = tokenizer  # what it reads of a tokenizer
        run.remove_callback(transformers.PrinterCallback)
        run.add_callback(Clock())
        run.train()
    return times


OTHERS: dict[str, tuple[str | None, Callable[..., list[float]]]] = {  # name: (a file that its clone has, its steps)
    "plain": (None, plain_loop),
    "dllm": ("dllm/core/trainers/mdlm.py", dllm_trainer),
}


def check_others(words: Sequence[str]) -> dict[str, Path | None]:
    """{name: folder} of words NAME or NAME=PATH. Raises ValueError for a name or a folder that is not right."""
    found: dict[str, Path | None] = {}
    for word in words:
        name, _, path = word.partition("=")
        check_name("--beside", name, OTHERS)
        needed = OTHERS[name][0]
        if needed and not (Path(path) / needed).is_file():
            raise ValueError(
                f"--beside {word!r}: {path or 'no path'} has no {needed}; give {name}=PATH, the root of a clone"
            )
        if not needed and path:
            raise ValueError(f"--beside {word!r}: {name} takes no path")
        found[name] = Path(path).resolve() if needed else None
    return found


def other_steps(name: str, path: Path | None, model, rows: Tensor, batch: int, steps: int, bf16: bool) -> list[float]:
    """Seconds of each of `steps` steps of another trainer; rows (N, L) ids, of which a step takes `batch`."""
    return OTHERS[name][1](model, rows, batch, steps, bf16, path)
