"""Make a diffusion model good at several tokens a pass: a teacher writes texts, or says what its own passes give.

dlm train distill --model runs/both/export --teacher runs/twin/export --data stories.txt.xz \\
    --objective block_diffusion --block-length 8 --output runs/certain --export runs/certain/export

dlm train distill --teach sdtt --model my-model --data stories.txt.xz --steps 64 --rounds 3 --output runs/few-passes

Certainty-forcing (dParallel, arXiv:2509.26488): the bound on the texts plus the entropy of right predictions.
SDTT (arXiv:2410.21035): the student's pass at x_t against several passes of the teacher; each round halves the steps.
Consistency: the bound, and the student's prediction at x_t against a teacher's at a later x_s.
Texts of one model have fewer ways to go on than people's (sequence-level distillation, Kim and Rush, arXiv:1606.07947).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch train/distill.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dlm.objectives.config import TEACHING_NAMES
from dlm.training.config import RecipeConfig
from dlm.utils import settings
from dlm.utils.names import check_name

if TYPE_CHECKING:
    from dlm.data.documents import Documents
    from dlm.training.recipe import Prepared

FIRST, LAST = 4, 16  # tokens of a text that a beginning has


@dataclass(frozen=True)
class Recipe(RecipeConfig):
    """What all recipes share, who writes, and how much of what is learned is written.

    teach: `certainty`, `sdtt` or `consistency`. steps: passes for a text that the student learns to do with, in the
    first of `rounds`, each with half of those before and the student as its teacher; teacher_passes: the teacher's for
    one of the student's. consistency: weight of the divergence; teacher_ema: decay of a teacher that is the student's
    moving average, 0 for one that stays.
    teacher: folder or hub id of the model that writes or teaches; empty: `model` itself. texts: how many, none but for
    `certainty` where no number is given; each begins as a text of `data` does and has at most sequence_length tokens.
    temperature: of the writing. own: a file of texts that such a run wrote, in place of writing. Texts with a doubled
    word or many repeated 4-grams are left out. written: the share of the examples that are such texts; the rest is
    `data`, and `chats`, sources of requests and answers. certainty: what the entropy of right predictions weighs beside
    the bound, of written texts alone. ordered: share of these that are masked as their writing went.
    """

    output: str = "runs/distill"
    text_column: str = "text"
    objective: str = "diffusion"
    learning_rate: float = 5e-4
    sample_every: int = 0
    teacher: str = ""
    teach: str = "certainty"
    texts: int | None = None
    temperature: float = 0.7
    own: str = ""
    chats: str = ""
    written: float = 0.7
    ordered: float = 0.5
    certainty: float = 2.0
    steps: int = 64
    rounds: int = 1
    teacher_passes: int = 2
    consistency: float = 1.0
    teacher_ema: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_name("teach", self.teach, TEACHING_NAMES)
        if self.texts is None:
            object.__setattr__(self, "texts", 2000 if self.teach == "certainty" else 0)
        if self.objective == "autoregressive":
            raise ValueError("objective is autoregressive, which commits one token a pass: use a diffusion objective")
        if (
            self.texts < (self.teach == "certainty")
            or not self.temperature >= 0
            or not 0 < self.written <= 1
            or not self.certainty >= 0
            or not 0 <= self.ordered <= 1
        ):
            raise ValueError(
                f"texts {self.texts}, temperature {self.temperature}, written {self.written}, certainty "
                f"{self.certainty}, ordered {self.ordered}: give at least one text, shares from 0 to 1, `written` "
                f"above 0, and nothing negative"
            )
        if self.teach == "certainty" and self.ordered and (self.complementary or self.decoding_share):
            raise ValueError(
                f"ordered {self.ordered} masks what was written last, and complementary and decoding_share mask "
                f"otherwise: leave them out, or give --ordered 0"
            )
        if self.teach != "certainty" and (self.objective != "diffusion" or self.complementary or self.decoding_share):
            raise ValueError(f"teach {self.teach} needs objective diffusion, without complementary and decoding_share")
        if (
            min(self.steps, self.rounds, self.teacher_passes) < 1
            or not self.consistency >= 0
            or not 0 <= self.teacher_ema < 1
        ):
            raise ValueError(
                f"steps {self.steps}, rounds {self.rounds}, teacher_passes {self.teacher_passes}, consistency "
                f"{self.consistency}, teacher_ema {self.teacher_ema}: give 1 or more of the first three, a weight that "
                f"is not negative and a decay below 1"
            )
        if self.teach == "sdtt" and self.steps < 2 ** (self.rounds - 1):
            raise ValueError(f"steps {self.steps} cannot be halved {self.rounds - 1} times: give fewer rounds")
        if self.max_steps < self.rounds:
            raise ValueError(f"max_steps {self.max_steps} is below rounds {self.rounds}: a round has 1 step or more")
        if not self.model:
            raise ValueError("no model: name the diffusion model that learns with --model")
        if self.texts and not self.own and self.sequence_length <= LAST:
            raise ValueError(
                f"sequence_length is {self.sequence_length}, and a text begins with up to {LAST} tokens that are "
                f"given: give at least {LAST + 1}"
            )
        if self.streaming:
            raise ValueError("streaming reads data while it trains, and beginnings come from all of it: leave it out")


def prepare(settings: Recipe, accelerator) -> Prepared:
    """Model, tokenizer and examples; the first process writes the texts, the others wait for it."""
    from dlm.checkpoints.pretrained import check_fit, open_tokenizer
    from dlm.data.conversations import ChatFormat, load_chats
    from dlm.data.documents import load_documents
    from dlm.data.examples import Examples
    from dlm.data.sources import parse_sources
    from dlm.training.checks import check_rows
    from dlm.training.recipe import Prepared, load_examples, open_model

    sources, chats = parse_sources(settings.data), parse_sources(settings.chats)
    if len({source.weight is None for source in [*sources, *chats]}) > 1:
        raise ValueError(
            "some sources of data and chats have weights and some have none: give path:weight for all, or for none"
        )
    with accelerator.main_process_first():
        tokenizer = open_tokenizer(settings.tokenizer or settings.model)
        form = ChatFormat(bool(tokenizer.chat_template), settings.sequence_length, overlong="skip")

        def load(path):
            return load_documents(path, tokenizer, column=settings.text_column, split=settings.split)

        data = [load(source.path) for source in sources]
        data += [load_chats(source.path, tokenizer, form, split=settings.split) for source in chats]
        made, passes = written(settings, data[: len(sources)], tokenizer) if settings.texts else (None, None)
        valid = load_examples(settings.valid, settings.sequence_length, load) if settings.valid else None
    shares = [source.weight or len(part) for source, part in zip([*sources, *chats], data, strict=True)]
    share = settings.written if made is not None else 0.0
    weights = [share] + [(1 - share) * one / sum(shares) for one in shares]
    parts = [(part, weight) for part, weight in zip([made, *data], weights, strict=True) if weight > 0]
    train = Examples([part for part, _ in parts], settings.sequence_length, [weight for _, weight in parts])
    model = open_model(settings)
    check_fit(model.config, tokenizer)
    check_rows(settings.sequence_length, model.config)
    return Prepared(model, tokenizer, train, valid, objective=objective_of(settings, model, tokenizer, passes))


def objective_of(settings: Recipe, model, tokenizer, passes):
    """What is minimised. passes: of the written texts (`CertaintyForcing`).

    Errors: a teacher of another vocabulary, family or shape.
    """
    from dlm.objectives.distillation import CertaintyForcing
    from dlm.objectives.reference import check_same_shape, frozen
    from dlm.objectives.teacher import Consistency, StepDistillation
    from dlm.training.recipe import open_beside

    if settings.teach == "certainty":
        return CertaintyForcing(settings.certainty, passes, settings.ordered)
    teacher = model
    if settings.teacher:
        teacher = open_beside(settings.teacher, model, tokenizer, "teacher")
        check_same_shape(model, teacher, settings.teacher)
    if settings.teach == "consistency":
        return Consistency(frozen(teacher), weight=settings.consistency, decay=settings.teacher_ema)
    each = settings.max_steps // settings.rounds if settings.rounds > 1 else 0
    return StepDistillation(frozen(teacher), steps=settings.steps, passes=settings.teacher_passes, round_steps=each)


def written(settings: Recipe, data: list[Documents], tokenizer) -> tuple[Documents, list]:
    """The texts that are learned, each with its beginning, and the pass of each token; all tokens but begin-of-text
    carry loss.

    Errors: a teacher whose tokens are other ones; texts of which none reads well or is short enough.
    """
    import numpy as np

    from dlm.data.documents import join, token_type
    from train.texts import read_texts, reads_well

    found = read_texts(Path(settings.own)) if settings.own else _write(settings, data, tokenizer)
    texts = [text for text in found if len(text.ids) <= settings.sequence_length]
    texts = [text for text in texts if reads_well(text, tokenizer.decode(text.ids, skip_special_tokens=True))]
    print(f"{len(texts)} of {len(found)} texts have no doubled word and few 4-grams that repeat", flush=True)
    if not texts:
        raise ValueError(
            f"none of {len(found)} texts can be learned: each doubles a word, repeats itself or has more than "
            f"sequence_length {settings.sequence_length} tokens; write more --texts, or give a better --teacher"
        )
    if max(max(text.ids) for text in texts) >= len(tokenizer):
        raise ValueError(f"{settings.own} holds ids that {settings.model} does not have: they are another model's")
    size = sum(len(tokenizer.decode(text.ids).encode()) for text in texts)
    pieces = [np.array(text.ids, dtype=token_type(tokenizer)) for text in texts]
    passes = [np.array(text.passes, dtype=np.int64) for text in texts]
    return join(pieces, None, tokenizer.bos_token_id, size), passes


def _write(settings: Recipe, data: list[Documents], tokenizer):
    """What the teacher writes after beginnings of `data`; kept in the output, where a stopped run goes on."""
    import numpy as np

    from dlm.evaluation.generations import open_writer
    from dlm.sampling.config import SamplingConfig
    from train.texts import make_texts

    writer = open_writer(settings.teacher or settings.model)
    if writer.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the teacher {settings.teacher} has other tokens than {settings.model}: it cannot be learned")
    random = np.random.default_rng(settings.seed)
    beginnings = []
    ends = np.cumsum([len(part) for part in data])
    for number in random.integers(ends[-1], size=settings.texts):
        source = int(np.searchsorted(ends, number, side="right"))
        part, place = data[source], int(number - ends[source]) + len(data[source])
        start, end = part.starts[place], part.starts[place + 1]
        size = min(int(end - start), int(random.integers(FIRST, LAST)))
        beginnings.append(np.asarray(part.tokens[start : start + size]).astype(np.int64).tolist())
    config = SamplingConfig(
        gen_length=settings.sequence_length - LAST, temperature=settings.temperature, seed=settings.seed,
        stop_at_eos=bool(writer.end_ids), method="block_causal" if writer.block_length is not None else "none",
    )  # fmt: skip
    print(f"{settings.texts} texts by {writer.name} ...", flush=True)
    return make_texts(Path(settings.output) / "texts.jsonl", writer, beginnings, config)


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "distill", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="distill", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
