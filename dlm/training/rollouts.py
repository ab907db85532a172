"""Rollouts: the answers that a run's own weights write, their rewards, and the parts of a step that learn from them.

Shapes: P prompts of a round, G answers of each, R = P G answers, T canvas, F reward functions, I inner iterations.

A round samples once and is learned from in I optimizer steps. An answer is a function of (weights, seed, visit, prompt,
its number in the group), whoever writes it: processes take whole groups in turn, so that one process and several have
the same answers, and need to tell each other nothing but sums for the log. A checkpoint inside of a round keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dlm.checkpoints.generation import denoise
from dlm.data.examples import PAD_SEGMENT, Batch
from dlm.data.questions import Questions
from dlm.objectives.policy import Answers, Policy, advantages_of, one_pass, trace_passes
from dlm.rewards.table import Reward, score, weighted
from dlm.sampling.canvas import Canvas
from dlm.sampling.config import SamplingConfig, as_ids
from dlm.training.accelerator import sum_over_processes
from dlm.training.batches import StepBatches
from dlm.training.sharding import make_buffers
from dlm.utils.random import PROMPT_MASK, ROLLOUT, example_generator
from dlm.utils.stats import mean_and_error

__all__ = ["ROLLOUT_FILE", "Plan", "RolloutBatches", "Round", "answer_text", "write"]

ROLLOUT_FILE = "rollouts-{}.safetensors"  # of a process
SHOWN_PROMPT, SHOWN_ANSWER = 300, 600  # characters in the log


@dataclass(frozen=True)
class Plan:
    """What rollouts are made of. group, inner: G and I. method: of `objectives.policy.METHODS`. prompt_mask: the share
    of the prompt's tokens that one-pass estimates mask. shrink: sampler passes that a trace's pass joins. rows: answers
    that are written at a time."""

    sampling: SamplingConfig
    rewards: tuple[Reward, ...]
    group: int
    inner: int
    method: str
    prompt_mask: float
    shrink: int
    rows: int


@dataclass
class Round:
    """A process's answers, group after group. tokens, order (R, T) int64; region, target, exists (R, T) bool: what the
    sampler may write, the answer to its end, places that are no padding; index, epoch, member (R,): the prompt, the
    visit and the number in the group; advantages (R,) fp32. old: of each inner iteration and pass the log probabilities
    (R, T) under the weights that sampled."""

    tokens: Tensor
    order: Tensor
    region: Tensor
    target: Tensor
    exists: Tensor
    index: Tensor
    epoch: Tensor
    advantages: Tensor
    old: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def rows(self, some: slice | Tensor) -> Round:
        """Some of the answers."""
        old = None if self.old is None else self.old[:, some]
        return Round(**{n: v[some] for n, v in self.tensors().items() if n != "old"}, old=old)

    @classmethod
    def joined(cls, parts: Sequence[dict[str, Tensor]]) -> Round:
        """The answers of several processes' files one after another; shorter rows get padding behind."""
        width = max(part["tokens"].shape[1] for part in parts)

        def padded(name: str, value: Tensor) -> Tensor:
            per_place = name in ("tokens", "order", "region", "target", "exists", "old")
            return torch.nn.functional.pad(value, (0, width - value.shape[-1])) if per_place else value

        names = parts[0].keys()
        joined = {n: torch.cat([padded(n, part[n]) for part in parts], dim=int(n == "old")) for n in names}
        return cls(**joined)


def write(model, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig, *, mask_id: int,
          vocab_size: int, ends: Sequence[int], rows: int, device=None) -> tuple[list[dict], int, int]:  # fmt: skip
    """The canvas of each prompt once it is filled: tokens, region, order, target, and the passes of all of them.

    Returns the rows, the forward passes of all rows, and the tokens that they committed. At most `rows` rows share a
    batch; what a row becomes does not depend on that. Raises ValueError for growth that moves tokens.
    """
    if sampling.grow not in ("none", "block"):
        raise ValueError(
            f"grow is {sampling.grow!r}, which moves tokens while they are written, and a reward's answer is followed "
            f"place by place: use grow block, or none"
        )
    made, passes, committed = [], 0, 0
    for start in range(0, len(prompts), rows):
        some = slice(start, start + rows)
        canvas = Canvas.from_prompts(prompts[some], sampling.gen_length, mask_id, device=device)
        config = replace(sampling, seed=tuple(seeds[some]))
        order, state = torch.zeros_like(canvas.tokens), None
        for state in denoise(model, canvas, config, vocab_size=vocab_size, eos_token_ids=ends):
            order[state.committed] = state.step
        passes, committed = passes + int(state.nfe.sum()), committed + int((order > 0).sum())
        final = state.canvas
        region = final.editable & final.valid
        ended = torch.isin(final.tokens, torch.tensor(list(config.eos_ids or ends), device=order.device)) & region
        target = region & (order > 0) & (ended.cumsum(dim=1) - ended.long() == 0)
        for row in range(len(canvas.tokens)):
            size = int(final.valid[row].sum())
            parts = {"tokens": final.tokens, "order": order, "region": region, "target": target, "ended": ended}
            made.append({name: value[row, :size].cpu() for name, value in parts.items()})
    return made, passes, committed


def answer_text(row: dict, tokenizer) -> str:
    """The text of an answer that `write` made, up to its end."""
    answer = row["tokens"][row["region"] & (row["ended"].cumsum(0) == 0)]
    return tokenizer.decode(answer.tolist(), skip_special_tokens=True)


def prompt_sums(values: Sequence[float | None], group: int) -> tuple[float, float, int]:
    """Sum and sum of squares of the means of each prompt's answers, and the number of prompts: of what applies.

    values (P G,): a reward of each answer, None where it does not apply.
    """
    groups = ([v for v in values[start : start + group] if v is not None] for start in range(0, len(values), group))
    means = [sum(some) / len(some) for some in groups if some]
    return sum(means), sum(mean * mean for mean in means), len(means)


def _processes_of(folder) -> int:
    """How many processes' rollouts a checkpoint keeps."""
    return len(list(Path(folder).glob(ROLLOUT_FILE.format("*"))))


def _batch(some: Round) -> Batch:
    """Answers laid out, one a row."""
    count, width = some.tokens.shape
    segments = torch.where(some.exists, torch.arange(count)[:, None], PAD_SEGMENT)
    positions = torch.arange(width).repeat(count, 1) * some.exists
    return Batch(some.tokens, segments, some.target, positions, some.index, some.epoch, some.advantages)


class RolloutBatches:
    """Makes a run's steps from rollouts, in the place of `training.batches.Batches`."""

    ahead = False  # a step needs the weights that the step before made

    def __init__(
        self, run, plan: Plan, data: Questions, config, objective: Policy, *, rank: int, world: int, pad_id: int,
        end_id: int | None, mask_id: int,
    ):  # fmt: skip
        self.run, self.plan, self.data, self.config, self.objective = run, plan, data, config, objective
        self.rank, self.world, self.pad_id, self.end_id, self.mask_id = rank, world, pad_id, end_id, mask_id
        self.prompts = config.batch_size // plan.group
        if self.prompts % world:
            raise ValueError(
                f"batch_size {config.batch_size} is {self.prompts} groups of {plan.group}, which {world} processes "
                f"cannot share: a group stays in one process; give a batch_size that is a multiple of "
                f"{world * plan.group}"
            )
        asked = plan.sampling
        if run.sharded and (asked.commit != "quota" or asked.stop_at_eos or asked.grow != "none"):
            raise ValueError(
                f"commit is {asked.commit!r}, stop_at_eos {asked.stop_at_eos}, grow {asked.grow!r}, and a sharded "
                f"model needs as many passes in every process: use commit quota alone, or --lora under DDP"
            )
        self.round: Round | None = None
        self.buffers = not run.sharded  # whether the model can be sampled from: see `sharding.make_buffers`
        self.go_to(None)

    def go_to(self, position, window: str = "", folder=None) -> None:
        """Go on from what a checkpoint in `folder` kept; position None: from the beginning."""
        self.stream, self.round = self.data.stream(self.config.seed, position=position), None
        files = [Path(folder) / ROLLOUT_FILE.format(rank) for rank in range(_processes_of(folder))] if folder else []
        if len(files) == self.world:
            self.round = Round.joined([load_file(files[self.rank])])
        elif files:  # group j of process r was group j * (their number) + r of all
            count, group = len(files), self.plan.group
            whole = Round.joined([load_file(file) for file in files])
            each = len(whole.index) // group // count
            numbers = torch.arange(self.prompts)[self.rank :: self.world]
            first = (numbers % count * each + numbers // count) * group
            self.round = whole.rows((first[:, None] + torch.arange(group)).view(-1))

    @property
    def position(self) -> list:
        """Where the next round's prompts begin."""
        return list(self.stream.position)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this process: its answers, inside of a round."""
        inside = self.round is not None and self.run.step % self.plan.inner
        return {name: value.clone() for name, value in self.round.tensors().items()} if inside else {}

    def skip(self) -> None:
        raise AssertionError("rollouts are made where they are used")

    def next(self, step: int) -> StepBatches:
        """The parts of optimizer step `step` (0-based) in this process; the first of a round samples."""
        turn = step % self.plan.inner
        if turn == 0 or self.round is None:
            assert turn == 0, "a checkpoint inside of a round has its answers"
            self.round = self._roll(step)
        rows, parts = len(self.round.index), []
        size = rows // self.config.accumulation
        for start in range(0, rows, size):
            parts += [part for _, *part in self._passes(self.round.rows(slice(start, start + size)), turn)]
        batch, answers = parts[-1]
        parts += [[batch, replace(answers, weight=torch.zeros_like(answers.weight))]] * self._idle(len(parts))
        numbers = sorted(set(self.round.index.tolist()))
        return StepBatches(parts, rows, numbers, self.position, "")

    def _idle(self, passes: int) -> int:
        """How many passes this process must take beside its own, so that the processes of a sharded model, each of
        which holds a part of every layer, take as many: answers that end early have fewer passes of a trace."""
        if not self.run.sharded:
            return 0
        mine = [float(passes) if rank == self.rank else 0.0 for rank in range(self.world)]
        return int(max(sum_over_processes(self.run.accelerator, mine))) - passes

    # --------------------------------------------------------------------------------------------- a round

    def _roll(self, step: int) -> Round:
        """Sample, reward and weigh the answers of a round; log it."""
        plan, run = self.plan, self.run
        keys = [row[0] for row in self.stream.take(self.prompts)][self.rank :: self.world]
        prompts, seeds = [], []
        for epoch, index in keys:
            prompts += [self.data.ids(index)] * plan.group
            generator = example_generator(self.config.seed, epoch, index, ROLLOUT)
            seeds += generator.integers(2**62, size=plan.group).tolist()
        run.model.eval()
        if not self.buffers:
            make_buffers(run.model)
            self.buffers = True
        size = len(run.tokenizer)
        ends = as_ids(getattr(run.plain.config, "eos_token_id", None))
        with torch.compiler.set_stance("force_eager"):
            made, passes, committed = write(
                run.plain, prompts, seeds, plan.sampling, mask_id=self.mask_id,
                vocab_size=size, ends=ends, rows=plan.rows, device=run.accelerator.device,
            )  # fmt: skip
        texts = [answer_text(row, run.tokenizer) for row in made]
        scores = self._scores(keys, texts)
        totals = torch.tensor(weighted(plan.rewards, scores), dtype=torch.float64)
        width = max(len(row["tokens"]) for row in made)

        def stacked(name: str, fill: int = 0) -> Tensor:
            rows = [torch.nn.functional.pad(row[name], (0, width - len(row[name])), value=fill) for row in made]
            return torch.stack(rows)

        whole = Round(
            tokens=stacked("tokens", self.pad_id), order=stacked("order"), region=stacked("region"),
            target=stacked("target"),
            exists=torch.stack([torch.arange(width) < len(row["tokens"]) for row in made]),
            index=torch.tensor([index for _, index in keys]).repeat_interleave(plan.group),
            epoch=torch.tensor([epoch for epoch, _ in keys]).repeat_interleave(plan.group),
            advantages=advantages_of(plan.method, totals, plan.group).float(),
        )  # fmt: skip
        if plan.inner > 1 and self.objective.method.ratio:
            whole.old = self._old(whole)
        self._log(step + 1, keys, made, texts, scores, totals, passes, committed)
        return whole

    def _scores(self, keys, texts: list[str]) -> list[list[float | None]]:
        """(F, R) what each reward function says."""
        numbers = [index for _, index in keys for _ in range(self.plan.group)]
        prompts = [self.data.prompts[index] for index in numbers]
        columns = {name: [values[index] for index in numbers] for name, values in self.data.columns.items()}
        talks = isinstance(prompts[0], list)
        completions = [[{"role": "assistant", "content": text}] for text in texts] if talks else texts
        places = [self.data.places[index] for index in numbers]
        return [score(reward, prompts, completions, columns, places) for reward in self.plan.rewards]

    @torch.no_grad()
    def _old(self, whole: Round) -> Tensor:
        """(I, R, T) log probabilities of the answers as each inner iteration looks at them, under the weights now."""
        run, size = self.run, self.run.micro_batch
        old = torch.zeros(self.plan.inner, *whole.tokens.shape)
        alike = self.objective.method.traced or not self.plan.prompt_mask  # all iterations have the same passes
        taken = 0
        for turn in range(1 if alike else self.plan.inner):
            for start in range(0, len(whole.index), size):
                rows = torch.arange(start, min(start + size, len(whole.index)))
                for here, batch, answers in self._passes(whole.rows(rows), turn):
                    on_device = batch.to(run.accelerator.device), answers.to(run.accelerator.device)
                    found, _ = self.objective.log_probs(run.model, *on_device, self.mask_id)
                    row, place = answers.scored.nonzero(as_tuple=True)
                    old[turn, rows[here][row], place] = found.cpu()
                    taken += 1
        for _ in range(self._idle(taken)):
            self.objective.log_probs(run.model, *on_device, self.mask_id)
        if alike:
            old[1:] = old[0]
        return old

    # --------------------------------------------------------------------------------------------- parts

    def _passes(self, some: Round, turn: int) -> list[tuple[Tensor, Batch, Answers]]:
        """The forward passes over some answers (R,) in an inner iteration, each with which of them (R,) it is about."""
        if self.objective.method.traced:
            passes = trace_passes(some.target, some.region, some.order, self.plan.shrink)
        else:
            passes = one_pass(some.target, some.region, self._masked_prompts(some, turn))
        parts = []
        for answers in passes:
            here = answers.scored.any(dim=1)  # an answer that ended has no more passes
            old = None if some.old is None else some.old[turn][here]
            asked = Answers(answers.hidden[here], answers.scored[here], answers.weight[here], old)
            parts.append((here, _batch(some.rows(here)), asked))
        return parts

    def _masked_prompts(self, some: Round, turn: int) -> Tensor:
        """(R, T) bool: the places of the prompts that an inner iteration masks, the same in all of a group."""
        prompt, hidden = some.exists & ~some.region, torch.zeros_like(some.region)
        if not self.plan.prompt_mask:
            return hidden
        for row, (epoch, index) in enumerate(zip(some.epoch.tolist(), some.index.tolist(), strict=True)):
            generator = example_generator(self.config.seed, epoch * self.plan.inner + turn, index, PROMPT_MASK)
            drawn = torch.from_numpy(generator.random(int(prompt[row].sum())) < self.plan.prompt_mask)
            hidden[row, prompt[row]] = drawn
        return hidden

    # --------------------------------------------------------------------------------------------- log

    def _log(self, step: int, keys, made, texts, scores, totals: Tensor, passes: int, committed: int) -> None:
        """A record of the round over all processes, with an answer to look at."""
        plan, run = self.plan, self.run
        groups = totals.view(-1, plan.group)
        equal = (groups.amax(1) - groups.amin(1) < 1e-12).sum()
        sums = [x for values in [totals.tolist(), *scores] for x in prompt_sums(values, plan.group)]
        lengths = sum(int(row["target"].sum()) for row in made)
        ended = sum(bool(row["ended"].any()) for row in made)
        more = [len(groups), int(equal), lengths, ended, passes, committed]
        *sums, count, equal, lengths, ended, passes, committed = sum_over_processes(
            run.accelerator, [*sums, *map(float, more)]
        )
        answers, record = count * plan.group, {"kind": "rollouts", "step": step}
        for number, name in enumerate(["reward", *(f"reward {reward.name}" for reward in plan.rewards)]):
            total, squares, applied = sums[3 * number : 3 * number + 3]
            mean, error = mean_and_error(total, squares, applied) if applied else (None, None)
            record |= {name: mean, f"{name} error": error}
        record |= {
            "equal_groups": equal / count, "length": lengths / answers, "ended": ended / answers,
            "tokens_per_pass": committed / max(passes, 1.0), "answers": answers,
            "prompt": str(self.data.prompts[keys[0][1]])[:SHOWN_PROMPT], "completion": texts[0][:SHOWN_ANSWER],
            "its_reward": float(totals[0]),
        }  # fmt: skip
        run.metrics.add(record)
        if equal == count:
            run.report(
                f"step {step}: the {plan.group} answers of every prompt have equal rewards ({record['reward']:.3g} on "
                f"average): nothing is learned from them; other prompts or a higher temperature would tell them apart"
            )
        if (step - 1) // plan.inner % max(1, self.config.log_every // plan.inner) == 0:
            error = record["reward error"]  # of one prompt alone there is none
            run.report(
                f"step {step}  reward {record['reward']:.3f}{'' if error is None else f' ± {error:.3f}'}  length "
                f"{record['length']:.1f}  equal groups {record['equal_groups']:.0%}  {record['tokens_per_pass']:.2f} "
                f"tokens a pass"
            )
