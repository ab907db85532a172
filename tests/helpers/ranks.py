"""Two processes of one job (gloo, on a CPU), and what an optimizer step is in each: its gradient and its noise.

Run as a script, `ranks.py FOLDER`, once for each process: takes one step of every kind and keeps what it saw.
"""

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dlm.data.documents import Documents
from dlm.data.examples import Examples
from dlm.data.streaming import StreamedExamples, StreamedSource
from dlm.models.configuration import LLaDAConfig
from dlm.models.transformer import LLaDAModelLM
from dlm.objectives import losses
from dlm.training import trainer
from dlm.training.config import TrainingConfig
from dlm.utils.distributed import leave_processes

ROOT = Path(__file__).resolve().parents[2]
VOCAB, MASK = 24, 23
KINDS = {
    "count": {},
    "stratified, cosine": {"estimator": "stratified", "noise_schedule": "cosine"},
    "uniform, cropped": {"estimator": "uniform", "random_length": 0.5},
    "block diffusion": {"objective": "block_diffusion", "block_length": 4, "estimator": "stratified"},
    "d3pm": {"estimator": "d3pm", "diffusion_steps": 8},
    "autoregressive": {"objective": "autoregressive"},
    "streamed": {"streamed": True},
    "in chunks": {"loss_chunk": 5},
}


def tiny_model(tying=True):
    torch.manual_seed(0)
    return LLaDAModelLM(
        LLaDAConfig(
            d_model=16, n_heads=2, n_layers=2, mlp_hidden_size=32, vocab_size=VOCAB, max_sequence_length=64,
            weight_tying=tying, mask_token_id=MASK, eos_token_id=22, pad_token_id=22, init_fn="normal",
        )
    )  # fmt: skip


def tiny_data(documents=30, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 30, documents)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(0, 21, starts[-1]).astype(np.uint16)
    tokens[starts[:-1]] = 21
    return Examples([Documents(tokens, starts, None, 21, int(starts[-1]))], 16)


def settings(output, **changes):
    base = {
        "max_steps": 6, "batch_size": 4, "warmup_steps": 2, "valid_every": 0, "sample_every": 0, "log_every": 1,
        "precision": "no", "checkpoint_every": 2, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingConfig(output=str(output), **{**base, **changes})


def streamed_data(window=7):
    """The same documents, streamed."""
    [part] = tiny_data().documents
    rows = [part.tokens[a:b] for a, b in pairwise(part.starts)]

    def read(skip):
        return ((number, rows[number], rows[number] != 21) for number in range(skip, len(rows)))

    return StreamedExamples([StreamedSource("memory", read)], 16, window)


class Watched(Accelerator):
    """Keeps the gradient of the last step, before it is clipped."""

    def clip_grad_norm_(self, parameters, *rest):
        parameters = list(parameters)
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in parameters]).clone()
        return super().clip_grad_norm_(parameters, *rest)


def one_step(output, streamed=False, **changes) -> dict:
    """The gradient of a step of eight rows, its loss, and the noise in this process: what is masked, by example."""
    AcceleratorState._reset_state(reset_partial_state=True)
    seen, draw = {}, losses.draw_noise

    def watched(batch, *rest, **more):
        noise = draw(batch, *rest, **more)
        for number, key in enumerate(zip(batch.epoch.tolist(), batch.index.tolist(), strict=True)):
            own = batch.segments == number
            seen[key] = (noise.masked[own].tolist(), noise.weight[own].tolist())
        return noise

    accelerator = Watched()
    config = settings(output, max_steps=1, batch_size=8, optimizer="adamw", **changes)
    losses.draw_noise = watched
    data, quiet = streamed_data() if streamed else tiny_data(), lambda line: None
    try:
        trainer.fit(tiny_model(), None, data, None, config, mask_id=MASK, accelerator=accelerator, report=quiet)
    finally:
        losses.draw_noise = draw
    [record] = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return {"gradient": accelerator.gradient, "noise": seen, "loss": record["loss"]}


def two(command, timeout=240):
    """Run `python command ...` as two processes of one job; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    streams = {"cwd": ROOT, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, **streams
        )
        for r in range(2)
    ]
    try:
        told = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)[-3000:]


if __name__ == "__main__":
    made, place = {}, Path(sys.argv[1])
    for number, (name, kind) in enumerate(KINDS.items()):
        made[name] = one_step(place / str(number), **kind)
    torch.save(made, place / f"rank{os.environ['RANK']}.pt")
    leave_processes()
