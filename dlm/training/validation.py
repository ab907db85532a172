"""The bound on held-out text, with its standard error and the loss by mask rate, on noise that never changes.

Shapes: D documents, E examples of a batch, N predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dlm.data.examples import Examples, fetch, pack_rows
from dlm.objectives.losses import OBJECTIVES
from dlm.objectives.noise import NoiseSettings, draw_noise
from dlm.utils.random import VALIDATION
from dlm.utils.stats import ratio

BUCKETS = 10


@dataclass(frozen=True)
class Validation:
    """bound: nats per token; error: its standard error; tokens: how many; buckets: mean CE at mask rates
    (0, 0.1], … (0.9, 1.0] (None where nothing fell); examples: number of evaluations."""

    bound: float
    error: float
    tokens: int
    examples: int
    buckets: tuple[float | None, ...]


@torch.no_grad()
def validate(
    model, data: Examples, accelerator, *, objective: str, estimator: str | NoiseSettings,
    mask_id: int, pad_id: int, seed: int, micro_batch: int, rows: int | None = None, passes: int = 1,
    chunk: int | None = None,
) -> Validation:  # fmt: skip
    """Evaluate the bound on the first `rows` packed rows (None: all), `passes` draws of noise for each example.

    chunk: places whose logits are held at a time (None: all of a batch).
    The noise is a function of (seed, pass, example), so that two models, or one model at two times, meet the same.
    The error is that of a ratio of sums over documents (pieces of a document are not independent).
    """
    packed = pack_rows(data.lengths, range(len(data)), data.length)[:rows]
    numbered = [[(turn, index) for index in row] for turn in range(passes) for row in packed]
    documents = int(data.owners.max()) + 1
    sums = torch.zeros(documents, 2, dtype=torch.float64)
    counts = torch.zeros(BUCKETS, 2, dtype=torch.float64)
    examples = 0
    parts = [numbered[i : i + micro_batch] for i in range(0, len(numbered), micro_batch)]
    world = accelerator.num_processes
    parts += [[]] * (-len(parts) % world)  # sharded models need every process in every forward
    for part in parts[accelerator.process_index :: world]:
        part = part + [[]] * (micro_batch - len(part))  # same shape every time: nothing is compiled again
        batch = fetch(data, part, pad_id)
        noise = draw_noise(batch, estimator, seed, stream=VALIDATION)
        owners = torch.from_numpy(data.owners[batch.index.numpy()])
        on_device = batch.to(accelerator.device), noise.to(accelerator.device)
        loss = OBJECTIVES[objective].loss(model, *on_device, mask_id, chunk)
        sums[:, 0].index_add_(0, owners, loss.examples.double().cpu())
        sums[:, 1].index_add_(0, owners, loss.lengths.double().cpu())
        bucket = (loss.rate.double().cpu() * BUCKETS).ceil().long().clamp(1, BUCKETS) - 1
        counts[:, 0].index_add_(0, bucket, loss.ce.double().cpu())
        counts[:, 1] += torch.bincount(bucket, minlength=BUCKETS)
        examples += len(batch.index)
    seen = torch.cat([sums.flatten(), counts.flatten(), torch.tensor([float(examples)], dtype=torch.float64)])
    if accelerator.num_processes > 1:
        seen = accelerator.reduce(seen.to(accelerator.device), reduction="sum").cpu()
    sums, counts = seen[: 2 * documents].view(-1, 2), seen[2 * documents : -1].view(-1, 2)
    bound, error = ratio(sums[:, 0], sums[:, 1])
    buckets = tuple(float(a / n) if n else None for a, n in counts.tolist())
    return Validation(bound, error, int(sums[:, 1].sum()), int(seen[-1]), buckets)


def check_in(run, rows: int | None) -> Validation:
    """Validate a run's raw weights and their average on the same noise, and log both; returns the average's.

    rows: packed rows to look at; None: all.
    """
    config = run.config
    settings = {
        "objective": config.objective,
        "estimator": NoiseSettings(block_length=config.block_length),  # the whole bound, whatever trains it
        "mask_id": run.mask_id,
        "pad_id": run.batches.pad_id,
        "seed": 0,
        "micro_batch": run.micro_batch,
        "rows": rows,
        "chunk": run.chunk,
    }
    run.model.eval()
    raw = averaged = validate(run.model, run.valid, run.accelerator, **settings)
    if run.ema is not None:
        with run.ema.in_place_of(run.plain):
            averaged = validate(run.model, run.valid, run.accelerator, **settings)
    rate = " ".join("-" if b is None else f"{b:.2f}" for b in averaged.buckets)
    run.report(
        f"step {run.step}  validation {averaged.bound:.4f} ± {averaged.error:.4f} nats/token"
        + (f" (average of weights; raw {raw.bound:.4f})" if run.ema is not None else "")
        + f", {averaged.tokens} tokens; CE by mask rate 0.1…1: {rate}"
    )
    entry = {"kind": "valid", "bound": averaged.bound, "error": averaged.error, "raw_bound": raw.bound}
    run.metrics.add({**entry, "step": run.step, "tokens": averaged.tokens, "buckets": averaged.buckets})
    return averaged
