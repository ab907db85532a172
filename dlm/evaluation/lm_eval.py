"""A diffusion model for EleutherAI's lm_eval: log-likelihoods of continuations and texts, and generation.

lm_eval finds models by import alone, so that its own command does not know this one: `register` makes it known.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

import dlm
from dlm.checkpoints.pretrained import load_pretrained
from dlm.data.examples import Example
from dlm.data.windows import cut
from dlm.models.flops import parameters
from dlm.objectives.exact import greedy
from dlm.objectives.likelihood import LikelihoodConfig, answer, bound
from dlm.sampling.config import SamplingConfig
from dlm.tokenizer import decode, encode_prompt
from dlm.utils.distributed import leave_processes
from dlm.utils.names import nearest

log = logging.getLogger(__name__)

SAMPLING = {field.name for field in dataclasses.fields(SamplingConfig)}
BOUNDS = {field.name for field in dataclasses.fields(LikelihoodConfig)} - {"batch_size"}
GEN_LENGTH = 256  # tokens of an answer where neither the task nor model_args say: lm_eval's own default
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the names tasks give it


class Answers:
    """The three kinds of request, on text: log-likelihoods of continuations and of whole texts, and generation.

    Requests have `args` as lm_eval's Instance does. What a request gets depends on itself alone: its noise and its
    seed come from its text.
    """

    def __init__(
        self, pretrained: str | None = None, *, revision: str | None = None, dtype: str = "auto", device=None,
        batch_size: int | str | None = None, max_batch_size=None, max_length: int | None = None,
        greedy: bool = True, **options,
    ):  # fmt: skip
        super().__init__()
        from accelerate import PartialState

        self.state = PartialState(cpu=str(device) == "cpu")
        atexit.register(leave_processes)
        if (
            device is None
            or self.state.num_processes > 1
            or (str(device) == "cuda:0" and not torch.cuda.is_available())
        ):
            device = self.state.device  # lm_eval asks for cuda:0 where the user names nothing
        self.opened = opened = load_pretrained(pretrained, revision=revision, dtype=dtype, device=device)
        opened.check_diffusion()
        self.batch_size = int(batch_size) if str(batch_size or "").isdigit() else 16  # "auto" is no number
        self._sampling, self._bounds = split(options, opened.defaults, self.batch_size)
        self.model, self.tokenizer = opened.model, opened.tokenizer
        limit = self.model.config.max_sequence_length
        self.max_length = limit if max_length is None else max_length
        if not 2 <= self.max_length <= limit:
            raise ValueError(f"max_length is {max_length}: this model reads 2 to {limit} tokens")
        self.mask, self.name, self._greedy = opened.mask_id, opened.path, greedy
        self.truncated: dict[str, int] = defaultdict(int)

    # ------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-likelihood of the continuation (minus the bound), and whether
        greedy decoding would write it. The options of a question share their noise: it is named by the context."""
        examples = [self._example(*request.args) for request in requests]
        results = []
        for start in self._chunks(len(examples), "loglikelihood", disable_tqdm):
            chunk = examples[start : start + self.batch_size]
            bounds = bound(self.model, chunk, self._bounds, mask_id=self.mask)
            if self._greedy:
                options = {"cfg_scale": self._bounds.cfg_scale, "batch_size": self.batch_size}
                wrote = greedy(self.model, chunk, mask_id=self.mask, **options)
            else:
                wrote = [False] * len(chunk)
            answers = [(-one.nats, same) for one, same in zip(bounds, wrote, strict=True)]
            for request, got in zip(requests[start:], answers, strict=False):
                self._remember("loglikelihood", request.args, got)
            results += answers
        return results

    def _example(self, context: str, continuation: str) -> Example:
        """A continuation to score. Spaces at the end of the context belong to what follows, as words have them."""
        bare = context.rstrip()
        before, after = (bare, context[len(bare) :] + continuation) if bare else (context, continuation)
        alone = encode_prompt(self.tokenizer, before, self.mask)
        whole = encode_prompt(self.tokenizer, before + after, self.mask)
        # A continuation may merge into the last token of the context ("a" + "nswer"): what both share is given.
        shared = next((i for i, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other), None)
        shared = min(len(alone), len(whole)) if shared is None else shared
        return self._fit(whole[:shared], whole[shared:], number_of(alone), "options")

    def _fit(self, given: Sequence[int], target: Sequence[int], index: int, what: str) -> Example:
        """The example, cut from the left to what the model reads, and counted where it was."""
        left = len(given) + len(target) - self.max_length
        if left > 0:
            self.truncated[what] += 1
            given, target = given[left:], target[max(0, left - len(given)) :]
        return answer(given, target, index)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """For each (text,) its log-likelihood, minus the sum of the bounds of windows of the model's length."""
        jobs, examples = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            head = encode_prompt(self.tokenizer, "", self.mask)
            ids = torch.tensor(encode_prompt(self.tokenizer, text, self.mask), dtype=torch.int64).numpy()
            scored = torch.arange(len(ids)).numpy() >= len(head)
            first = number_of(ids.tolist())
            for turn, (tokens, target) in enumerate(cut(ids, scored, self.max_length)):
                examples.append(Example(tokens, target, (first + turn) % 2**48))
                jobs.append(number)
        totals = [0.0] * len(requests)
        for start in self._chunks(len(examples), "loglikelihood_rolling", disable_tqdm):
            chunk = examples[start : start + self.batch_size]
            for number, one in zip(
                jobs[start:], bound(self.model, chunk, self._bounds, mask_id=self.mask), strict=False
            ):
                totals[number] -= one.nats
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    # -------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings) the text up to the first stop string; like settings share batches."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        prompts, settings, repeats, times = [], [], [], Counter()
        for number, request in enumerate(requests):
            context, asked = request.args
            ids = encode_prompt(self.tokenizer, context, self.mask)
            config, stops = self._settings(asked, len(ids))
            prompts.append(self._cut(ids, self.max_length - config.gen_length))
            settings.append((config, stops))
            key = (config, tuple(stops))
            repeats.append(times[key, context])  # lm_eval's `repeats` gives the same request several times
            times[key, context] += 1
            groups[key].append(number)
        texts = [""] * len(requests)
        plan = [
            numbers[start : start + self.batch_size]
            for numbers in groups.values()
            for start in range(0, len(numbers), self.batch_size)
        ]
        for turn in self._chunks(len(plan), "generate_until", disable_tqdm, step=1):
            config, stops = settings[plan[turn][0]]
            rows = [prompts[number] for number in plan[turn]]
            seeds = tuple(
                (config.seed + number_of(row) + number_of([repeats[number]]) * (repeats[number] > 0)) % 2**63
                for number, row in zip(plan[turn], rows, strict=True)
            )
            out = dlm.generate(self.model, rows, replace(config, seed=seeds), tokenizer=self.tokenizer)
            for number, row in zip(plan[turn], out.sequences.tolist(), strict=True):
                texts[number] = until(decode(self.tokenizer, row), stops)
                self._remember("generate_until", requests[number].args, texts[number])
        return texts

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The end of a prompt that is longer than `room`, behind its begin-of-text where it has one."""
        if len(ids) <= room:
            return ids
        self.truncated["prompts"] += 1
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(ids) - (room - len(begin)) :]

    def _settings(self, asked: dict, prompt_length: int) -> tuple[SamplingConfig, list[str]]:
        """The sampling of a request and its stop strings. What model_args say of the length of an answer is the
        default; a task's own limit counts, as far as the prompt leaves room, and up to half of the model's length
        even where it does not."""
        asked = {key: value for key, value in asked.items() if value is not None}
        stops = asked.pop("until", [])
        lengths = [asked.pop(name) for name in LIMITS if name in asked]
        wanted = int(lengths[0]) if lengths else self._sampling.gen_length
        length = min(wanted, max(self.max_length - prompt_length, self.max_length // 2))
        if length < wanted:
            self.truncated["answers"] += 1
        sampled = asked.pop("do_sample", None)
        temperature = asked.pop("temperature", None)
        changes = {key: asked.pop(key) for key in ("top_k", "top_p") if key in asked}
        if sampled is False or temperature == 0:
            changes["temperature"] = 0.0
        elif temperature is not None:
            changes["temperature"] = float(temperature)
        elif sampled:
            changes["temperature"] = 1.0  # what transformers takes where a task says do_sample alone
        if asked:
            log.warning("generation settings that dlm does not have: %s", ", ".join(sorted(asked)))
        steps = self._sampling.steps
        changes |= {"gen_length": length, "steps": None if steps is None else min(steps, length)}
        return replace(self._sampling, **changes), [stops] if isinstance(stops, str) else list(stops)

    # ------------------------------------------------------------------------------- what lm_eval asks beside

    def _chunks(self, count: int, what: str, quiet: bool, step: int | None = None):
        from tqdm import tqdm

        starts = range(0, count, step or self.batch_size)
        yield from tqdm(starts, desc=f"{what} (dlm)", disable=quiet or self.rank != 0 or not sys.stderr.isatty())
        if any(self.truncated.values()):
            counts = ", ".join(f"{number} {what}" for what, number in self.truncated.items())
            log.warning("longer than max_length %d, so cut from the left: %s", self.max_length, counts)

    def _remember(self, kind: str, args, result) -> None:
        hook = getattr(self, "cache_hook", None)
        if hook is not None:
            hook.add_partial(kind, args, result)

    @property
    def rank(self) -> int:
        return self.state.process_index

    @property
    def world_size(self) -> int:
        return self.state.num_processes

    @property
    def device(self):
        return self.model.device

    def all_gather(self, tensor):
        from accelerate.utils import gather

        return gather(tensor.reshape(1)) if self.world_size > 1 else tensor

    def gather_object(self, obj, dst: int = 0):
        from accelerate.utils import gather_object

        gathered = gather_object([obj]) if self.world_size > 1 else [obj]
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        self.state.wait_for_everyone()

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template: leave --apply_chat_template out")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def get_model_info(self) -> dict:
        """What lm_eval writes beside the results."""
        return {
            "model_num_parameters": parameters(self.model.config),
            "model_dtype": self.opened.number_type,
            "sampling": dataclasses.asdict(self._sampling),
            "bounds": dataclasses.asdict(self._bounds),
            "truncated": dict(self.truncated),
        }


def split(options: dict, defaults: dict, batch_size: int) -> tuple[SamplingConfig, LikelihoodConfig]:
    """The settings of sampling and of bounds among model_args; a name of both (block_length, seed) is for both.

    defaults: the checkpoint's own sampling; tasks ask for greedy decoding, so its temperature does not count.
    Errors: a name that is neither.
    """
    for name in options:
        if name not in SAMPLING | BOUNDS:
            known = [*SAMPLING, *BOUNDS, "pretrained", "revision", "dtype", "max_length", "greedy"]
            raise ValueError(f"model_args has no {name!r}: did you mean {nearest(name, known)!r}?")
    own = {key: value for key, value in defaults.items() if key in SAMPLING and key not in ("temperature", "steps")}
    sampling = {"gen_length": GEN_LENGTH} | own | {key: value for key, value in options.items() if key in SAMPLING}
    bounds = {key: value for key, value in options.items() if key in BOUNDS}
    return SamplingConfig(**sampling), LikelihoodConfig(**bounds, batch_size=batch_size)


def number_of(ids: Sequence[int]) -> int:
    """A number that names these ids, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(list(ids)).encode()).digest()[:6], "big")


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min([len(text), *(text.index(stop) for stop in stops if stop and stop in text)])]


def register() -> type:
    """Make the model known to lm_eval as `dlm`; returns its class. Errors: lm_eval is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import model_registry, register_model
    except ImportError as error:
        raise ImportError(f"lm_eval cannot be imported ({error}): pip install 'dlm[eval]'") from error
    if "dlm" in model_registry:
        return model_registry.get("dlm")
    return register_model("dlm")(type("DLM", (Answers, LM), {"__doc__": Answers.__doc__}))
