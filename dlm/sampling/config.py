"""SamplingConfig: every choice that a generation makes, checked when it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real

from dlm.sampling.contradictions import refuse_contradictions
from dlm.utils.names import check_name

__all__ = [
    "CHOICES",
    "COMMIT_NAMES",
    "CONFIDENCE_NAMES",
    "GROW_NAMES",
    "METHOD_NAMES",
    "NOISE_NAMES",
    "REMASK_NAMES",
    "REVISION_NAMES",
    "SEARCH_NAMES",
    "SPLIT_NAMES",
    "SamplingConfig",
    "as_config",
    "as_ids",
]

# Names of the choices. The functions are in tables that need torch; a test holds the names to their keys.
# methods.METHODS
METHOD_NAMES = ("none", "prefix", "dual", "vicinity", "c2f", "block_causal", "pipeline", "pipeline_causal")
# commit.COMMITS
COMMIT_NAMES = (
    "quota", "threshold", "factor", "entropy_bound", "ancestral", "sequential", "dynamic", "capped", "origin",
    "stable",
)  # fmt: skip
REMASK_NAMES = ("cap", "rescale", "confidence", "loop", "forward_backward")  # remask.REMASKS
NOISE_NAMES = ("linear", "cosine", "polynomial", "geometric")  # objectives.noise.NOISE_SCHEDULES
CONFIDENCE_NAMES = ("probability", "margin", "entropy", "random")  # propose.CONFIDENCES
REVISION_NAMES = ("none", "edit", "remask", "verify")  # revise.REVISIONS
GROW_NAMES = ("none", "block", "confidence", "expand")
MOVES = ("confidence", "expand")  # ways to grow that move what is written
SEARCH_NAMES = ("greedy", "viterbi")
SPLIT_NAMES = ("remainder_first", "rounded", "floored", "time")  # schedule.SPLITS
ALIGNMENTS = ("start", "prompt")
# Field of SamplingConfig: the names that it may have.
CHOICES: dict[str, tuple[str, ...]] = {
    "align": ALIGNMENTS,
    "method": METHOD_NAMES,
    "commit": COMMIT_NAMES,
    "revise": REVISION_NAMES,
    "remask": REMASK_NAMES,
    "noise_schedule": NOISE_NAMES,
    "split": SPLIT_NAMES,
    "confidence": CONFIDENCE_NAMES,
    "grow": GROW_NAMES,
    "constraint_search": SEARCH_NAMES,
}
SCHEDULED = ("quota", "sequential", "dynamic", "capped", "origin")  # commit rules that read a quota

LARGEST = 2**62  # of a count: sums of two are still whole numbers of 64 bits
COLDEST, HOTTEST = 1e-30, 1e30  # temperatures at which logits / T are numbers of 32 bits
COUNTS = ("gen_length", "initial_length", "grow_by", "tail_length", "kl_passes")
MAYBE = ("steps", "steps_per_block", "block_length", "sub_block_length", "top_k")  # counts, or None


@dataclass(frozen=True)
class SamplingConfig:
    """How to denoise. Immutable; a value that cannot work raises ValueError with the reason and the fix.

    gen_length: tokens to generate after each prompt (ignored where the canvas is given).
    steps: forward passes for the whole region under commit `quota`, `sequential`, `dynamic`, `capped`, `origin` and
        `ancestral`; None is one token a pass. The other rules decide themselves when a block is done. steps_per_block:
        passes for a block of block_length, in its place; quotas are those of a whole block where a part is given.
    block_length: tokens in a block; None is the model's own where it is block-causal, else 32. It need not divide
        gen_length: the last block is shorter.
    sub_block_length: a block is written sub-block by sub-block, while passes compute all of it; sub_block_cache: or a
        sub-block alone once its first place is written (Fast-dLLM v2). whole_blocks: where the region ends inside of a
        block, masks fill it up, and what stands there is cut. align: blocks of a block-causal model count from slot 0,
        `start`, or from the end of each row's prompt, `prompt` (dllm). commit_first: a block's first pass commits its
        first place alone, whose guess comes from the block before (Fast-dLLM, models with shifted logits).
    method: the order and what is recomputed at each pass, a row of `methods.METHODS`. window: vicinity's reach.
        open_share, force_share: how much of a block is written before `pipeline` opens the next one, and before that
        one commits at least one token in every pass.
    commit: which places are committed at a pass (`commit.COMMITS`), with threshold, factor or entropy_bound (nats, a
        sum without its largest); kl_bound and kl_passes for `stable`. spacing: slots that lie between two places that a
        pass commits, at least, but for places both at least as confident as spacing_threshold; under `quota` near ones
        are committed where the block has no others left, so that the number of passes stays.
    draft: states that a pass computes beside each row's own, guessed from the last predictions with the row's own noise
        (`draft`): the text stays the same, with fewer passes over more slots; 0 is none.
    revise: what is changed after the commit (`revise.REVISIONS`). edit_threshold and max_post_passes are for `edit`,
        and edit_shadow: it reads what a place would hold without its own token (for models trained on masks alone,
        which repeat a token that they see); remask (`remask.REMASKS`), remask_eta and noise_schedule for `remask`;
        verify_threshold for `verify`.
    split: how a block's tokens are shared over its passes (`schedule.SPLITS`); time_eps: where Dream's time ends.
    confidence: what orders them (`propose.CONFIDENCES`); None is `entropy` for commit `entropy_bound`, else
        `probability`. tempered_confidence: of the distribution sampled from (Dream), not the model's own (LLaDA).
    order_temperature: above 0 places are drawn without replacement by softmax(confidence / T) (Dream's alg_temp).
    temperature: 0 takes the most probable token, above 0 samples. top_k, top_p: which tokens may be sampled.
    cfg_scale: w of classifier-free guidance, l = u + (w + 1)(c - u); 0 is none, and costs nothing.
    grow: `block` shows the model one block more at a time and ends a row after the block that holds end-of-text.
        `confidence` begins with initial_length masks and adds grow_by at the end while end-of-text is less probable
        than tail_start over the last tail_length slots; later, while it is below tail_bound, a place of probability
        below grow_below becomes grow_by masks. `expand` begins with initial_length masks (a canvas: with its own), and
        a committed expand token becomes two. gen_length is the limit of them all.
    regex, json_schema (its text), choices: what the whole region must match, one of the three; end-of-text fills what
        is left. constraint_search: `greedy` proposes token by token, `viterbi` the most probable text that matches.
    seed: row i uses seed + i; a tuple gives one a row.
    stop_at_eos: a row ends at a committed end-of-text with nothing masked before it. eos_token_id: an id or several,
        in place of the checkpoint's. suppress_eos: never propose it (LLaDA's logits_eos_inf). delay_eos: commit it
        only where nothing else is left to commit (LLaDA's confidence_eos_eot_inf).
    """

    gen_length: int = 128
    steps: int | None = None
    steps_per_block: int | None = None
    block_length: int | None = None
    sub_block_length: int | None = None
    sub_block_cache: bool = False
    whole_blocks: bool = False
    align: str = "start"
    commit_first: bool = False
    method: str = "none"
    commit: str = "quota"
    threshold: float = 0.9
    kl_bound: float = 0.01
    kl_passes: int = 2
    spacing: int = 0
    spacing_threshold: float = 0.95
    draft: int = 0
    open_share: float = 0.5
    force_share: float = 0.95
    factor: float = 1.0
    entropy_bound: float = 0.1
    revise: str = "none"
    edit_threshold: float = 0.9
    edit_shadow: bool = False
    max_post_passes: int = 16
    remask: str = "cap"
    remask_eta: float | None = None
    verify_threshold: float = 1e-4
    noise_schedule: str = "linear"
    split: str = "remainder_first"
    time_eps: float = 1e-3
    confidence: str | None = None
    order_temperature: float = 0.0
    tempered_confidence: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 0.0
    window: int = 16
    grow: str = "none"
    initial_length: int = 64
    grow_by: int = 8
    grow_below: float = 0.1
    tail_length: int = 32
    tail_start: float = 0.5
    tail_bound: float = 0.9
    regex: str | None = None
    json_schema: str | None = None
    choices: tuple[str, ...] | None = None
    constraint_search: str = "greedy"
    seed: int | tuple[int, ...] = 0
    stop_at_eos: bool = False
    eos_token_id: int | tuple[int, ...] | None = None
    suppress_eos: bool = False
    delay_eos: bool = False

    def __post_init__(self):
        for name, names in CHOICES.items():
            if (value := getattr(self, name)) is not None or name != "confidence":
                check_name(name, value, names)
        for name in COUNTS + MAYBE:
            value = getattr(self, name)
            if (value is not None or name in COUNTS) and (not _whole(value) or value < 1):
                raise ValueError(f"{name} is {value!r}: it counts tokens or passes; give a whole number, 1 or more")
            self._check_size(name)
        counted = {"window": "slots", "max_post_passes": "passes", "draft": "states", "spacing": "slots"}
        for name, what in counted.items():
            value = getattr(self, name)
            if not _whole(value) or value < 0:
                raise ValueError(f"{name} is {value!r}: it counts {what}; give a whole number, 0 or more")
            self._check_size(name)
        switches = ("tempered_confidence", "stop_at_eos", "suppress_eos", "delay_eos")
        for name in (*switches, "sub_block_cache", "whole_blocks", "commit_first", "edit_shadow"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it is a switch; give True or False")
        self._check_numbers()
        for name in ("seed", "eos_token_id", "choices"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # lists, as JSON has them
        refuse_contradictions(self)
        if not all(_whole(token) and 0 <= token <= LARGEST for token in self.eos_ids):
            raise ValueError(f"eos_token_id is {self.eos_token_id!r}: give a token id, 0 or more, or several")
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        if not all(_whole(seed) and 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"seed is {self.seed!r}: give a whole number from 0 to 2**63 - 1, or one a row")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and value > LARGEST:
            raise ValueError(f"{name} is {value}: tensors count in 64 bits; give at most {LARGEST}")

    def _check_numbers(self) -> None:
        ranges = {
            "threshold": (lambda x: -1e9 < x <= 1, "a confidence, at most 1"),
            "spacing_threshold": (lambda x: -1e9 < x <= 1, "a confidence, at most 1"),
            "factor": (lambda x: x > 0, "above 0"),
            "entropy_bound": (lambda x: x >= 0, "nats, 0 or more"),
            "kl_bound": (lambda x: x >= 0, "nats, 0 or more"),
            "open_share": (lambda x: 0 <= x <= 1, "a part of a block, from 0 to 1"),
            "force_share": (lambda x: 0 <= x <= 1, "a part of a block, from 0 to 1"),
            "grow_below": (lambda x: 0 <= x <= 1, "a probability, from 0 to 1"),
            "tail_start": (lambda x: 0 <= x <= 1, "a probability, from 0 to 1"),
            "tail_bound": (lambda x: 0 <= x <= 1, "a probability, from 0 to 1"),
            "verify_threshold": (lambda x: 0 <= x <= 1, "a probability, from 0 to 1"),
            "remask_eta": (lambda x: 0 <= x <= 1, "a probability, from 0 to 1"),
            "edit_threshold": (lambda x: 0 <= x <= 1, "a probability, from 0 to 1"),
            "temperature": (
                lambda x: x == 0 or COLDEST <= x <= HOTTEST,
                f"0 or more, above 0 from {COLDEST:g} to {HOTTEST:g}",
            ),
            "order_temperature": (lambda x: 0 <= x < float("inf"), "0 or more"),
            "time_eps": (lambda x: 0 < x < 1, "above 0 and below 1"),
            "cfg_scale": (lambda x: 0 <= x < float("inf"), "0 or more"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        }
        for name, (holds, wanted) in ranges.items():
            value = getattr(self, name)
            optional = value is None and name in ("top_p", "remask_eta")
            if not optional and (not isinstance(value, Real) or isinstance(value, bool) or not holds(value)):
                raise ValueError(f"{name} is {value!r}: it must be {wanted}")
            if not optional and not isinstance(value, int | float):  # a fraction, a number of numpy
                object.__setattr__(self, name, float(value))

    @property
    def ordering(self) -> str:
        """The confidence in force, a name in `propose.CONFIDENCES`."""
        natural = {"entropy_bound": "entropy", "origin": "random"}
        return self.confidence or natural.get(self.commit, "probability")

    @cached_property
    def greedy(self) -> "SamplingConfig":
        """These settings, but the most probable token with its own probability at every place."""
        return replace(self, temperature=0.0, confidence="probability", tempered_confidence=False, commit="quota")

    @property
    def is_greedy(self) -> bool:
        """Whether every proposal is the most probable token, with its own probability as confidence."""
        return self.temperature == 0 and not self.tempered_confidence and self.ordering == "probability"

    @property
    def shadowed(self) -> bool:
        """Whether passes compute what each place would hold without its own token."""
        return self.revise == "verify" or (self.revise == "edit" and self.edit_shadow)

    @property
    def moves(self) -> bool:
        """Whether a row may put masks in or take slots out while it is written."""
        return self.grow in MOVES

    @property
    def start_length(self) -> int:
        """Masks behind a prompt before the first pass."""
        return min(self.initial_length, self.gen_length) if self.moves else self.gen_length

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-text ids given here, () where the checkpoint's hold."""
        return as_ids(self.eos_token_id)

    def row_seeds(self, rows: int) -> list[int]:
        """One seed a row; raises ValueError where a tuple of another length was given."""
        if not isinstance(self.seed, tuple):
            return [(self.seed + i) % 2**63 for i in range(rows)]
        if len(self.seed) != rows:
            raise ValueError(f"seed has {len(self.seed)} values for {rows} rows: give one a row, or a single number")
        return list(self.seed)


def as_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """One id, several or none, as configurations name their end-of-text, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_config(config: SamplingConfig | None) -> SamplingConfig:
    """The settings, the defaults for None. Raises TypeError for anything else."""
    if config is None:
        return SamplingConfig()
    if not isinstance(config, SamplingConfig):
        fix = "dlm.SamplingConfig(**config)" if isinstance(config, Mapping) else "a dlm.SamplingConfig, or None"
        raise TypeError(f"config is a {type(config).__name__}: give {fix}")
    return config
