"""Teach a masked diffusion language model by rewards: it answers prompts, and learns from what was better (GRPO).

dlm train grpo --data problems.jsonl --rewards countdown --sampling "gen_length=64|steps=32|temperature=1" ...
accelerate launch train/grpo.py --config grpo.yaml --lora 16                    (any number of processes)
dlm train grpo --data chats.jsonl --rewards "mine:polite|gsm8k_format" --reward-weights "1|0.2"

Data: JSONL, Parquet or hf:NAME with a prompt (text or messages) and the columns that the reward functions read. These
have TRL's signature, `(prompts, completions, **columns) -> list of float`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch train/grpo.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.objectives.config import POLICY_NAMES
from dlm.rewards.table import check_columns, open_rewards
from dlm.sampling.config import SamplingConfig
from dlm.sampling.settings import sampling_of
from dlm.training.tuning import TuningConfig, adapted
from dlm.utils import settings
from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.training.recipe import Prepared

NOT_OF_ROLLOUTS = (
    "random_length", "dropout_prompt", "complementary", "decoding_share", "streaming", "block_growth",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe(TuningConfig):
    """What tuning recipes share (TuningConfig), and the policy gradient.

    batch_size is in answers: batch_size / group_size prompts a step. policy: `diffu_grpo` (d1), `trace` (TraceRL) or
    `wd1`. reference: a folder or hub id, by default the model as it begins (with `lora` the model without its
    adapters); it is loaded only where `kl` is above 0. sampling: fields of `SamplingConfig` as name=value. What the
    sampler sees (blocks, or everything) is what is learned under; the objective is what the export says it knows.
    Prompts that leave no room for gen_length are left out and counted.
    """

    output: str = "runs/grpo"
    reference: str = ""
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[str, ...] = ()
    group_size: int = 8
    inner: int = 1
    policy: str = "diffu_grpo"
    ratio_clip: float = 0.2
    kl: float = 0.0
    prompt_mask: float = 0.15
    shrink: int = 1
    sampling: tuple[str, ...] = ("gen_length=128", "temperature=1")
    rollout_rows: int = 64
    batch_size: int = 64
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 10
    ema: float = 0.0
    valid_every: int = 0
    checkpoint_every: int = 50
    prompt_column: str = ""

    def __post_init__(self):
        super().__post_init__()
        check_name("policy", self.policy, POLICY_NAMES)
        if self.group_size < 2 or self.inner < 1 or self.shrink < 1 or self.rollout_rows < 1:
            raise ValueError(
                f"group_size is {self.group_size}, inner {self.inner}, shrink {self.shrink}, rollout_rows "
                f"{self.rollout_rows}: a group has 2 answers or more, and the others are 1 or more"
            )
        if not 0 <= self.prompt_mask < 1 or not self.kl >= 0 or not self.ratio_clip > 0:
            raise ValueError(
                f"prompt_mask is {self.prompt_mask}, kl {self.kl}, ratio_clip {self.ratio_clip}: give a share below 1, "
                f"a kl that is not negative and a ratio_clip above 0"
            )
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}: a step learns from "
                f"whole groups"
            )
        self.refuse(NOT_OF_ROLLOUTS, "answers are learned from whole")
        if self.objective == "autoregressive" or self.estimator == "stratified" or self.eos_padding != "none":
            raise ValueError("rewards need a diffusion objective, eos_padding none, estimator count, uniform or d3pm")
        if self.valid:
            raise ValueError("valid is of texts: compare rewards on held-out prompts with dlm eval rewards")
        if sampling_of(self.sampling).align != "start":
            raise ValueError(
                "sampling has align=prompt, and answers are learned from in blocks of the row: leave it out"
            )
        if sampling_of(self.sampling).seed != SamplingConfig.seed:
            raise ValueError("sampling has a seed, and each answer has one of its own: leave it out, or give --seed")
        if not sampling_of(self.sampling).temperature > 0:
            raise ValueError(
                "sampling has temperature 0, so that the answers to a prompt are all the same and nothing can be "
                "learned from their rewards: add temperature=1"
            )


def weights_of(recipe: Recipe) -> list[float]:
    """The weights as numbers. Errors: one that is none."""
    try:
        return [float(weight) for weight in recipe.reward_weights]
    except ValueError:
        raise ValueError(f"reward_weights are {'|'.join(recipe.reward_weights)}: give numbers, such as 1|0.2") from None


def beside_the_policy(settings: Recipe) -> str:
    """A line on settings that change what is drawn, and not the probabilities that are learned from; "" without any."""
    sampling = sampling_of(settings.sampling)
    names = [name for name in ("top_k", "top_p", "cfg_scale") if getattr(sampling, name)]
    names += ["revise"] if sampling.revise != "none" else []
    if not names:
        return ""
    given = ", ".join(f"{name}={getattr(sampling, name)}" for name in names)
    return (
        f"warning: sampling has {given}, which changes what is drawn and not the probabilities that are learned from, "
        f"so that the gradient is biased: temperature alone is part of both"
    )


def prepare(settings: Recipe, accelerator) -> Prepared:
    """Model, tokenizer, prompts, rewards and the reference."""
    from dlm.checkpoints.pretrained import check_fit, open_tokenizer
    from dlm.data.questions import load_questions
    from dlm.data.sources import plain_paths
    from dlm.objectives.policy import Policy
    from dlm.objectives.reference import frozen
    from dlm.sampling.methods import visibility
    from dlm.tokenizer import mask_id
    from dlm.training.recipe import Prepared, chat_format, open_beside, open_model
    from dlm.training.rollouts import Plan

    if (line := beside_the_policy(settings)) and accelerator.is_main_process:
        print(line, flush=True)
    rewards = open_rewards(settings.rewards, weights_of(settings))
    sampling = sampling_of(settings.sampling)
    model = open_model(settings)
    tokenizer = open_tokenizer(settings.tokenizer or settings.model)
    check_fit(model.config, tokenizer)
    form = chat_format(settings, tokenizer, model.config.max_sequence_length)
    questions = load_questions(
        plain_paths(settings.data, "prompts"), tokenizer, form,
        mask=mask_id(tokenizer, model.config), region=sampling.gen_length,
        answers=settings.group_size * settings.inner, split=settings.split,
    )  # fmt: skip
    check_columns(rewards, tuple(questions.columns))
    reference = None
    if settings.kl and settings.reference:
        reference = frozen(open_beside(settings.reference, model, tokenizer, "reference"))
    elif settings.kl and not settings.lora:
        reference = frozen(model)
    plan = Plan(
        sampling, rewards, settings.group_size, settings.inner, settings.policy, settings.prompt_mask, settings.shrink,
        settings.rollout_rows,
    )  # fmt: skip
    objective = Policy(
        settings.policy, reference=reference, ratio_clip=settings.ratio_clip, kl=settings.kl,
        temperature=sampling.temperature, forbidden=tuple(range(len(tokenizer), model.config.embedding_size)),
        columns=questions.columns_digest, visible=visibility(model, sampling.method, sampling.block_length)[1],
    )  # fmt: skip
    made, finish = adapted(model, settings)
    return Prepared(made, tokenizer, questions, None, finish, objective=objective, rollouts=plan)


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "grpo", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="grpo", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
