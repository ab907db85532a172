"""What help says of the settings of a training run: groups, choices, and which setting needs which other one.

No torch here: `dlm train RECIPE --help` lists these.
"""

from dlm.data.choices import ON_BAD_ROW, OVERLONG
from dlm.models.choices import ATTENTION, FLOATS
from dlm.objectives.config import ESTIMATORS, NOISE_SCHEDULE_NAMES, OBJECTIVE_NAMES, POLICY_NAMES

OPTIMIZERS = ("muon", "adamw")
LEARNING_RATE_SCHEDULES = ("wsd", "cosine", "constant")  # the keys of `optim.SCHEDULES`
PRECISIONS = ("fp32", "bf16", "fp16")
EOS_PADDING = ("none", "longest")
TRACKERS = ("none", "auto", "tensorboard", "wandb")
FORMATS = ("auto", "chat", "plain")

GROUPS = {  # title: {field: help}
    "data and model": {
        "data": "sources, comma separated: .txt .jsonl .parquet (.xz), hf:NAME",
        "valid": "sources held out for validation",
        "split": "split of data sets of the hub",
        "text_column": "column of the text",
        "chats": "sources of requests and answers mixed in; the answers carry loss",
        "format": "how rows become tokens",
        "messages_column": "column of the conversation; empty: found by its name",
        "prompt_column": "column of the prompt; empty: found by its name",
        "response_column": "column of the response; empty: found by its name",
        "separator": "between prompt and response in format plain",
        "sequence_length": "tokens of a row; 0: the model's own limit",
        "overlong": "examples longer than a row",
        "on_bad_row": "rows that cannot be used",
        "streaming": "read the data while training",
        "shuffle_window": "examples that streaming shuffles at a time",
        "model": "folder or hub id to start from",
        "tokenizer": "folder of a tokenizer in place of the model's",
        "attn_implementation": "attention kernel",
    },
    "shape of a new model": {
        "vocab_size": "tokens of a new tokenizer",
        "d_model": "width",
        "n_layers": "layers",
        "n_heads": "attention heads",
        "n_kv_heads": "heads of keys and values (as many as heads)",
        "mlp_hidden_size": "width of the MLP (8/3 of the width)",
        "weight_tying": "one table for input and output",
        "attention_layer_norm": "norms of queries and keys",
        "rope_theta": "base of the rotary positions",
        "max_sequence_length": "longest canvas (the row length)",
        "init_fn": "initialisation: normal or mitchell",
        "init_std": "standard deviation of the initial weights",
    },
    "run": {
        "output": "folder of checkpoints, logs and the model",
        "export": "also write the finished model there",
        "export_dtype": "number type of the exported weights",
        "name": "name in the model card",
        "max_steps": "optimizer steps in all",
        "epochs": "passes over the data, in place of max-steps",
        "max_seconds": "seconds of training in all; 0: no limit",
        "batch_size": "rows of an optimizer step",
        "accumulation": "micro-batches of an optimizer step",
        "seed": "of weights, order and noise",
        "resume": "go on from the last checkpoint in the output folder",
        "skip_damaged": "set damaged checkpoints aside, with --resume",
        "precision": "number type of the products",
        "activation_checkpointing": "less memory, a third more arithmetic",
        "compile": "torch.compile the layers",
        "loss_chunk": "slots whose logits are held at a time; 0: all (automatic)",
        "workers": "processes that make batches ahead of time (automatic)",
    },
    "optimizer": {
        "optimizer": "",
        "learning_rate": "of AdamW, and of what Muon leaves out",
        "muon_learning_rate": "of Muon's matrices (as learning-rate)",
        "schedule": "of the learning rate",
        "warmup_steps": "steps of linear warm-up",
        "decay_fraction": "share of the run in which wsd decays",
        "final_factor": "share of the learning rate at the end",
        "weight_decay": "decoupled weight decay",
        "beta1": "of AdamW",
        "beta2": "of AdamW",
        "momentum": "of Muon",
        "clip": "largest norm of the gradient",
        "ema": "decay of the moving average of the weights; 0: none",
    },
    "objective": {
        "objective": "",
        "block_length": "tokens of a block, for block_diffusion",
        "block_growth": "block lengths before it with shares of the steps: 1:0.1,4:0.2",
        "full_share": "share of block_diffusion's rows with full attention",
        "estimator": "how mask rates are drawn",
        "noise_schedule": "of the estimators that draw a time",
        "noise_exponent": "of the polynomial schedule",
        "diffusion_steps": "discrete times of estimator d3pm",
        "lowest_rate": "lowest mask rate",
        "highest_rate": "highest mask rate",
        "rate_alpha": "first parameter of the Beta law of mask rates",
        "rate_beta": "second parameter of the Beta law of mask rates",
        "complementary": "every step trains a mask and its complement",
        "decoding_share": "share of the examples masked as decoding masks them",
        "decoding_block": "tokens of the block that is partly masked then",
        "random_length": "share of the examples cut at a random length",
        "packing": "several examples in a row",
        "eos_padding": "end-of-text after each example, up to the longest",
        "dropout_prompt": "share of the examples with a masked prompt",
    },
    "preference": {
        "reference": "folder or hub id of the reference (the model as it begins)",
        "beta": "how strongly the policy may leave the reference",
        "draws": "noise draws of each answer",
        "sft_weight": "weight of the chosen answer's bound a token",
    },
    "policy gradient": {
        "rewards": "reward functions: names below, regex:EXPRESSION, or module:function",
        "reward_weights": "their weights (1 each)",
        "group_size": "answers of each prompt",
        "inner": "optimizer steps that learn from the same answers",
        "policy": "how an answer's probability is estimated, and the loss",
        "ratio_clip": "how far a token's probability may move before its gradient ends",
        "kl": "weight of the KL divergence to the reference",
        "prompt_mask": "share of the prompt's tokens masked in one-pass estimates",
        "shrink": "passes of the sampler that one pass of a trace joins",
        "sampling": "settings of the sampler, such as gen_length=128|temperature=1",
        "rollout_rows": "answers that are written at a time",
    },
    "adapters": {
        "lora": "rank of LoRA adapters; 0: train all weights",
        "lora_alpha": "scale of the adapters",
        "lora_targets": "linear layers that get adapters",
        "base_dtype": "number type of the frozen weights",
    },
    "validation, samples and logs": {
        "valid_every": "steps between validations; 0: never",
        "valid_rows": "rows of a validation",
        "checkpoint_every": "steps between checkpoints",
        "keep_last": "checkpoints that are kept",
        "sample_every": "steps between samples; 0: never",
        "sample_prompts": "prompts of the samples",
        "sample_length": "tokens of a sample",
        "log_every": "steps between lines of metrics.jsonl",
        "log_seconds": "seconds between lines on the screen",
        "tracker": "beside metrics.jsonl",
    },
}

CHOICES = {
    "optimizer": OPTIMIZERS,
    "schedule": LEARNING_RATE_SCHEDULES,
    "objective": OBJECTIVE_NAMES,
    "estimator": ESTIMATORS,
    "noise_schedule": NOISE_SCHEDULE_NAMES,
    "precision": PRECISIONS,
    "eos_padding": EOS_PADDING,
    "tracker": TRACKERS,
    "attn_implementation": ATTENTION,
    "export_dtype": FLOATS,
    "base_dtype": FLOATS,
    "format": FORMATS,
    "overlong": OVERLONG,
    "on_bad_row": ON_BAD_ROW,
    "policy": POLICY_NAMES,
}

_NEW = ("model", ("",), "leave out --model, which brings its own shape")
_VALID = ("valid", None, "name held-out data with --valid")
_LORA = ("lora", None, "give a rank with --lora")
_MUON = ("optimizer", ("muon",), "add --optimizer muon")
NEEDS = {  # field: (other field, values with which it has an effect (None: any but 0 and nothing), advice)
    "valid_every": _VALID,
    "valid_rows": _VALID,
    "shuffle_window": ("streaming", None, "add --streaming"),
    "export_dtype": ("export", None, "name a folder with --export"),
    "decay_fraction": ("schedule", ("wsd",), "add --schedule wsd"),
    "noise_exponent": ("noise_schedule", ("polynomial",), "add --noise-schedule polynomial"),
    "diffusion_steps": ("estimator", ("d3pm",), "add --estimator d3pm"),
    "decoding_block": ("decoding_share", None, "give a share with --decoding-share"),
    "momentum": _MUON,
    "muon_learning_rate": _MUON,
    "sample_prompts": ("sample_every", None, "give --sample-every"),
    "sample_length": ("sample_every", None, "give --sample-every"),
    "lora_alpha": _LORA,
    "lora_targets": _LORA,
    "base_dtype": _LORA,
    "shrink": ("policy", ("trace",), "add --policy trace"),
    "prompt_mask": ("policy", ("diffu_grpo", "wd1"), "take another --policy"),
    "ratio_clip": ("policy", ("diffu_grpo", "trace"), "take another --policy"),
    **dict.fromkeys(GROUPS["shape of a new model"], _NEW),
}
