"""The settings of a training run, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dlm.models.choices import float_name
from dlm.objectives.config import AS_MODEL, NoiseSettings
from dlm.training import options
from dlm.training.growth import block_at, read_growth
from dlm.utils.names import check_name

# How Accelerate calls a precision; here float32 and fp32 are the same name.
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run. Rates are per optimizer step; lengths are in optimizer steps; batch_size in packed rows.

    max_seconds: the run also ends when it has trained for so long (validation, samples and checkpoints do not count),
    and the learning rate decays by whichever of steps and seconds is further; 0 is no limit. The seconds are saved with
    a checkpoint, and a resumed run goes on from them.
    objective: of `losses.OBJECTIVES`, or `model`: with block_length and full_share what the model's configuration says
    (`as_trained`). estimator, noise_schedule, noise_exponent, diffusion_steps, lowest_rate, highest_rate, block_length,
    rate_alpha, rate_beta, complementary, decoding_share, decoding_block: what training noise is drawn with
    (`objectives.config.NoiseSettings`); validation always takes the whole bound by `count`. block_growth: block lengths
    before block_length, each with its share of max_steps (`growth.read_growth`). full_share: under objective
    block_diffusion the share of the rows that are trained under full attention, so that one network knows both
    visibilities; decoding_share is of those rows then. repeat_share: of a model whose layers are applied several times
    (`layer_repeats`), the share of the loss on what the earlier rounds put out, the same on each.
    random_length: share of the examples cut to a random length. packing: several examples may share a row.
    eos_padding: `longest` ends every example with end-of-text tokens, which carry loss, up to the longest of its
    optimizer step (LLaDA's rule for fine-tuning). dropout_prompt: share of the examples whose prompt is all masks.
    activation_checkpointing: keep only each layer's input and compute the rest again in the backward pass: less memory,
    a third more arithmetic, the same gradient. loss_chunk: places whose logits are held at a time, 0 for all of them;
    None: as many as `models.head.loss_chunk` says; the gradient is the same to rounding. workers: processes that make
    batches ahead of time; None: some on a GPU, none on a CPU; the batches are the same. tracker: beside metrics.jsonl;
    `auto` is TensorBoard, if it is installed.
    """

    output: str
    max_steps: int
    max_seconds: float = 0.0
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 2e-3
    muon_learning_rate: float | None = None
    optimizer: str = "muon"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    clip: float = 1.0
    schedule: str = "wsd"
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    final_factor: float = 0.0
    ema: float = 0.999
    objective: str = "diffusion"
    estimator: str = NoiseSettings.estimator
    noise_schedule: str = NoiseSettings.noise_schedule
    noise_exponent: float = NoiseSettings.noise_exponent
    diffusion_steps: int = NoiseSettings.diffusion_steps
    lowest_rate: float = NoiseSettings.lowest_rate
    highest_rate: float = NoiseSettings.highest_rate
    block_length: int | None = NoiseSettings.block_length
    block_growth: str = ""
    rate_alpha: float = NoiseSettings.rate_alpha
    rate_beta: float = NoiseSettings.rate_beta
    complementary: bool = NoiseSettings.complementary
    decoding_share: float = NoiseSettings.decoding_share
    decoding_block: int = NoiseSettings.decoding_block
    full_share: float = 0.0
    repeat_share: float = 0.0
    random_length: float = 0.0
    packing: bool = True
    eos_padding: str = "none"
    dropout_prompt: float = 0.0
    precision: str = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    loss_chunk: int | None = None
    workers: int | None = None
    seed: int = 0
    valid_every: int = 500
    valid_rows: int = 128
    checkpoint_every: int = 500
    keep_last: int = 2
    sample_every: int = 1000
    sample_prompts: tuple[str, ...] = ("Once upon a time",)
    sample_length: int = 96
    log_every: int = 10
    log_seconds: float = 10.0
    tracker: str = "none"

    def __post_init__(self):
        precision = float_name(self.precision)
        object.__setattr__(self, "precision", MIXED_PRECISION.get(precision, self.precision))
        if self.precision not in MIXED_PRECISION.values():
            check_name("precision", self.precision, options.CHOICES["precision"])
        for name in ("optimizer", "schedule", "objective", "estimator", "noise_schedule", "eos_padding", "tracker"):
            check_name(name, getattr(self, name), options.CHOICES[name])
        positive = ("max_steps", "batch_size", "accumulation", "learning_rate", "clip", "keep_last", "log_every",
                    "checkpoint_every", "valid_rows", "sample_length")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in (
            "ema",
            "decay_fraction",
            "final_factor",
            "momentum",
            "beta1",
            "beta2",
            "random_length",
            "dropout_prompt",
            "full_share",
            "repeat_share",
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")
        if self.decay_fraction == 0 and self.schedule == "wsd":
            raise ValueError(
                "decay_fraction is 0 under schedule wsd: give a share of the run, or use schedule constant"
            )
        for name in ("warmup_steps", "valid_every", "sample_every", "weight_decay", "seed", "max_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}: give a number below 2^63")
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} is {getattr(self, name)}: no gradient would ever count; give less than 1")
        for name in ("learning_rate", "muon_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}: give a number above 0, such as 1e-3")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulation {self.accumulation} equal parts"
            )
        if (self.objective == "block_diffusion") != (self.block_length is not None):
            raise ValueError(
                f"block_length is {self.block_length} under objective {self.objective}: give a block_length with "
                f"objective block_diffusion, and with no other"
            )
        if self.block_growth:
            self._check_growth()
        if self.full_share and (self.objective != "block_diffusion" or self.full_share == 1):
            raise ValueError(
                f"full_share is {self.full_share} under objective {self.objective}: it is the share, below 1, of "
                f"objective block_diffusion's rows that see everything; for full attention alone use diffusion"
            )
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give a number of processes, 0 for none")
        if self.eos_padding != "none" and self.packing:
            raise ValueError(
                f"eos_padding is {self.eos_padding!r} and packing is on: examples that share a row have no room for "
                f"it; use --no-packing, or eos_padding none"
            )
        if self.precision == "fp16" and self.optimizer == "muon":
            raise ValueError(
                "precision fp16 scales the loss, and Accelerate undoes that for one optimizer alone; muon is two with "
                "the AdamW beside it: use optimizer adamw, or precision bf16"
            )
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise ValueError(f"loss_chunk is {self.loss_chunk}: give a number of places, 0 for all of them, or none")
        if self.loss_chunk and self.precision == "fp16":
            raise ValueError(
                f"loss_chunk {self.loss_chunk} computes gradients before the loss is scaled, too small for precision "
                f"fp16: use bf16, or loss_chunk 0"
            )
        if self.dropout_prompt and self.objective == "autoregressive":
            raise ValueError("dropout_prompt puts masks in place of prompts, which an autoregressive model never meets")
        self.noise()
        if self.full_share:
            self.noise(full=True)

    def _check_growth(self) -> None:
        read_growth(self.block_growth)
        if self.objective != "block_diffusion":
            raise ValueError(
                f"block_growth is {self.block_growth!r} under objective {self.objective}: blocks grow under objective "
                "block_diffusion alone"
            )
        if self.max_seconds:
            raise ValueError(
                f"block_growth counts shares of max_steps, and max_seconds is {self.max_seconds:g}: leave one out"
            )

    def noise(self, full: bool = False, step: int | None = None) -> NoiseSettings:
        """How the training noise is drawn; full: of the rows that see everything, where `full_share` has both kinds;
        step: of this step (0-based), where blocks grow.

        Errors: settings that do not fit together.
        """
        blocks = self.objective == "block_diffusion" and not full
        length = self.block_length
        if self.block_growth and step is not None:
            length = block_at(self.block_growth, length, step, self.max_steps)
        given = {field.name: getattr(self, field.name) for field in fields(NoiseSettings)}
        share = 0.0 if blocks and self.full_share else self.decoding_share
        return NoiseSettings(**given | {"block_length": length if blocks else None, "decoding_share": share})

    def chunk(self, places: int, vocabulary: int) -> int | None:
        """Of how many places logits are held at a time in a micro-batch of `places`; None: of all that are asked."""
        if self.loss_chunk is None and self.precision != "fp16":
            from dlm.models.head import loss_chunk

            return loss_chunk(places, vocabulary)
        return self.loss_chunk or None


BOTH_SHARE = 0.5  # of the rows of a model that knows both visibilities, those under full attention


def as_trained(config: TrainingConfig, checkpoint) -> TrainingConfig:
    """The settings, and where their objective is `model` that of a checkpoint: full attention, blocks, or both.

    checkpoint: a model's configuration. A model that knows both visibilities trains half of the rows under each.
    An autoregressive model has no such objective here: it is `diffusion` then, and opening the model refuses it.
    """
    if config.objective != AS_MODEL:
        return config
    length = getattr(checkpoint, "block_length", None)
    if length is None:
        return replace(config, objective="diffusion")
    share = BOTH_SHARE if getattr(checkpoint, "full_attention", False) else 0.0
    return replace(config, objective="block_diffusion", block_length=length, full_share=share)


def lost_visibility(config: TrainingConfig, checkpoint) -> str:
    """What a run with blocks of its own, or none, makes a checkpoint forget, in words; "" for nothing."""
    length, full = getattr(checkpoint, "block_length", None), getattr(checkpoint, "full_attention", False)
    if length is None:
        return ""
    if config.block_length != length:
        return f"blocks of {length}"
    return "full attention" if full and not config.full_share else ""


@dataclass(frozen=True)
class RecipeConfig(TrainingConfig):
    """The settings that all recipes share: the run (TrainingConfig), the data, the model to begin with, the export.

    data, valid: comma separated sources (`data.sources`), those of data with weights or without; split: of data sets
    of the hub. streaming: read `data` while training, shuffled in windows of shuffle_window examples.
    model: a folder or hub id to go on from; tokenizer: in place of the model's own. attn_implementation: the attention
    kernel; flex_attention on a GPU skips what packing and blocks hide. epochs: passes over the data, in place of
    max_steps. resume: go on from the newest checkpoint in
    `output`; skip_damaged: set damaged ones aside, and go on from the newest that is whole.
    """

    GROUPS, CHOICES, NEEDS = options.GROUPS, options.CHOICES, options.NEEDS

    output: str = "runs/recipe"
    max_steps: int = 1000
    tracker: str = "auto"
    data: str = ""
    valid: str = ""
    split: str = "train"
    sequence_length: int = 256
    streaming: bool = False
    shuffle_window: int = 1000
    model: str = ""
    tokenizer: str = ""
    attn_implementation: str = "sdpa"
    name: str = ""
    export: str = ""
    export_dtype: str = "bfloat16"
    epochs: float | None = None
    resume: bool = False
    skip_damaged: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs is {self.epochs}: give a number above 0")
        if self.objective == AS_MODEL and not self.model:
            raise ValueError("objective is model, and there is none to take it from: name one with --model")
        if self.skip_damaged and not self.resume:
            raise ValueError("skip_damaged says which checkpoint --resume goes on from: give --resume with it")
        object.__setattr__(self, "export_dtype", float_name(self.export_dtype))
        for name in ("attn_implementation", "export_dtype"):
            check_name(name, getattr(self, name), options.CHOICES[name])
