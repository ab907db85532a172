"""The memory and the time of a training run, from the model's shape, before any GPU is used."""

from __future__ import annotations

from dataclasses import dataclass

from dlm.models.flops import parameters, training_flops

LLADA_8B = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464}
MFU = 0.30  # of what is published for training at this scale, on the low side; LLaDA-8B's own cost comes to 0.26
SHARDING = {  # which of (weights, gradients, optimizer state) a process holds a share of, not all
    "none": (False, False, False),
    "zero2": (False, True, True),
    "fsdp": (True, True, True),
}
GB = 1e9
MEMORY = {  # of the devices of `models.flops.PEAKS`, in GB, from the makers' data sheets (the larger variant)
    "GB200": 186, "B200": 180, "H100 PCIe": 80, "H100": 80, "H200": 141, "H800": 80, "H20": 96, "A100": 80, "A800": 80,
    "A40": 48, "A10": 24, "L40S": 48, "L40": 48, "L4": 24, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "T4": 16,
}  # fmt: skip
USABLE = 0.9  # of the memory; the rest is the CUDA context, communication buffers and fragments


@dataclass(frozen=True)
class Work:
    """What a recipe computes for each row of its batch. trained, forward: passes with a gradient and without one;
    copies: whole frozen models beside the one that is trained (a reference, a teacher), which sharding does not divide;
    together: trained passes that are one forward pass of so many rows."""

    trained: float = 1.0
    forward: float = 0.0
    copies: int = 0
    together: float = 1.0


RECIPES = ("pretrain", "sft", "preference", "grpo", "distill")


def work_of(
    recipe: str, *, lora: bool = False, draws: int = 8, steps: int = 128, passes: int = 1, inner: int = 1,
    kl: bool = True, teacher_passes: int = 0,
) -> Work:  # fmt: skip
    """The work of a recipe. preference: `draws` of policy and reference. grpo: an answer is written in `steps` passes
    and learned from in `inner` times `passes` (1, or those of a trace); kl: against a reference. distill:
    `teacher_passes`, 0 for certainty-forcing. With adapters (lora) the model without them is the reference.
    """
    if recipe == "preference":
        return Work(draws, draws, int(not lora), draws)
    if recipe == "grpo":
        learned = inner * passes
        return Work(learned, steps + (learned if inner > 1 else 0) + learned * kl, int(kl and not lora))
    if recipe == "distill":
        return Work(1, teacher_passes, int(teacher_passes > 0))
    return Work()


def adapter_parameters(config, rank: int) -> int:
    """Weights of LoRA adapters of this rank on all linear layers of the blocks: rank x (in + out) each."""
    width, kv, mlp = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
    sides = 2 * (config.d_model + width) + 2 * (config.d_model + kv) + 3 * (config.d_model + mlp)
    return rank * sides * config.n_layers


@dataclass(frozen=True)
class Estimate:
    """Of one run. Memory in bytes on each GPU; time in seconds; tokens_per_second over all GPUs."""

    parameters: int
    flops: float
    weights: float
    gradients: float
    optimizer: float
    average: float
    copies: float
    activations: float
    tokens_per_second: float
    seconds: float
    gpu_hours: float

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average + self.copies + self.activations


def mlp_width(config) -> float:
    """Columns of the MLP that a token passes through, in the mean over the layers: of a mixture the experts chosen."""
    experts = config.experts
    if experts is None:
        return config.mlp_hidden_size
    chosen = experts.chosen * experts.width + experts.shared
    return sum(chosen if some else config.mlp_hidden_size for some in experts.layers) / config.n_layers


def activation_bytes(config, tokens: int, predicted: int, *, checkpointing: bool, chunk: int | None = None) -> float:
    """What a forward pass in bf16 keeps for the backward pass of `tokens` tokens, with logits at `predicted` of them.

    A layer keeps 30 bytes a column of the residual stream, 4 of the keys and values and 8 of the MLP (counted with
    saved-tensor hooks under autocast; fused attention); with checkpointing its fp32 input alone, and one layer at a
    time the rest. Logits: bf16, fp32 and their softmax; where the loss takes a chunk of places at a time, of that
    chunk, and the softmax in place of the fp32 ones.
    """
    layer = 30 * config.d_model + 4 * config.n_kv_heads * config.head_dim + 8 * mlp_width(config)
    kept = 4 * config.d_model * config.layers_applied + layer if checkpointing else layer * config.layers_applied
    logits = predicted * (2 + 4 + 4) if chunk is None else min(predicted, chunk) * (2 + 4)
    return tokens * kept + logits * config.embedding_size


def estimate(
    config, *, tokens: float, gpus: int, peak: float, mfu: float, width: int, rows: int, sharding: str = "none",
    checkpointing: bool = False, ema: bool = True, optimizer: str = "adamw", blocks: float = 0.0,
    predicted: float = 0.5, work: Work | None = None, lora: int = 0,
) -> Estimate:  # fmt: skip
    """Memory and time of training on `tokens` tokens.

    peak: operations a second of one GPU; mfu: the share of it that is reached. width, rows: of one micro-batch on one
    GPU. predicted: share of the tokens that logits are computed at (half of them are masked on average). blocks: share
    of the rows under block diffusion, which computes a row twice, noisy and clean ([x_t ; x_0]); a micro-batch takes
    them and the others one after another. work: what a recipe computes of each row, which `tokens` and `rows` count
    once; its trained passes are taken one after another but for those `together`. lora: rank of adapters, 0 where all
    is trained.
    """
    from dlm.models.head import loss_chunk

    work, total = work or Work(), 0.0
    chunk = loss_chunk(rows * width, config.embedding_size)
    forward = work.forward
    if work.together > 1 and chunk is not None:  # their weights in the loss are known after a pass without a gradient
        forward += work.trained
    for share, copies in ((blocks, 2), (1 - blocks, 1)):
        sizes = share * tokens * copies, width * copies, share * tokens * predicted
        total += work.trained * training_flops(config, *sizes, frozen=lora > 0)
        total += forward * training_flops(config, *sizes) / 3  # forward is two of the six operations
    rows_held = rows * work.together * max(2 * blocks, 1 - blocks)
    size = parameters(config)
    trained = adapter_parameters(config, lora) if lora else size
    weights, gradients, states = (gpus if share else 1 for share in SHARDING[sharding])
    seconds = total / (gpus * peak * mfu)
    held = 8 if optimizer == "adamw" else 4  # Muon has one moment for its matrices
    return Estimate(
        parameters=size,
        flops=total,
        weights=(size + (trained if lora else 0)) * (4 + 2) / weights,  # fp32, and the bf16 copies of autocast
        gradients=trained * 4 / gradients,
        optimizer=trained * held / states,
        average=trained * 4 / weights if ema else 0.0,
        copies=work.copies * size * (4 + 2),
        activations=activation_bytes(
            config,
            int(rows_held * width),
            int(rows * work.together * max(blocks, 1 - blocks) * width * predicted),
            checkpointing=checkpointing,
            chunk=chunk,
        ),
        tokens_per_second=tokens / seconds,
        seconds=seconds,
        gpu_hours=seconds * gpus / 3600,
    )
