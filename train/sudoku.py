"""Train a small model to solve Sudoku by infilling: the givens stay clean, the empty cells are masked.

python -m train.sudoku --config train/configs/sudoku.yaml --output runs/sudoku --export my-sudoku
dlm eval sudoku --model my-sudoku            (accuracy by order, steps and method; --puzzle solves one)

The puzzles are generated: each has one solution, and every example is another form of one of `bases` minimal puzzles
under the symmetries of the rules, with a random number of givens more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # `accelerate launch train/sudoku.py` from a clone: find dlm/ beside train/
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dlm.evaluation import sudoku
from dlm.models.choices import check_grid
from dlm.training.config import RecipeConfig
from dlm.utils import settings
from dlm.utils.progress import counted

if TYPE_CHECKING:
    from dlm.data.examples import Examples
    from dlm.models.configuration import LLaDAConfig
    from dlm.training.recipe import Prepared


@dataclass(frozen=True)
class Recipe(RecipeConfig):
    """What all recipes share, the puzzles, and the shape of a new model.

    bases: minimal puzzles that are generated, puzzle i from (puzzle_seed, i); examples: forms of them, drawn anew from
    `seed`; fewest_clues, most_clues: givens of a form, even over the range, or with clue_power above 1 more often near
    the fewest: fewest + range u^clue_power of an even u. valid_examples: forms of other puzzles, for validation.
    layer_repeats: how often the layers are applied (0: once, or as `model` has it; weights learned with few repeats are
    a start for more); grid: heads see rows, columns and boxes (`LLaDAConfig`).
    """

    output: str = "runs/sudoku"
    data: str = "generated"
    sequence_length: int = sudoku.LENGTH
    sample_every: int = 0
    bases: int = 4000
    puzzle_seed: int = 0
    examples: int = 400_000
    valid_examples: int = 512
    fewest_clues: int = 24
    most_clues: int = 60
    clue_power: float = 1.0
    d_model: int = 128
    n_layers: int = 8
    n_heads: int = 4
    mlp_hidden_size: int = 384
    rope_theta: float = 1000.0
    layer_repeats: int = 0
    grid: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.data != "generated" or self.valid:
            raise ValueError("this recipe generates its puzzles: leave data and valid out")
        if not 17 <= self.fewest_clues <= self.most_clues <= 80:
            raise ValueError(
                f"givens from {self.fewest_clues} to {self.most_clues}: give 17 to 80, the fewest first (no puzzle "
                f"with fewer than 17 has one solution)"
            )
        if self.grid:
            check_grid(sudoku.ROW_LENGTH, self.n_heads)
        if self.grid and self.model:
            raise ValueError("grid is of a new model, and --model brings its own heads: leave one of them out")
        if self.layer_repeats < 0:
            raise ValueError(f"layer_repeats is {self.layer_repeats}: give 1 or more, or 0 for the model's own")
        if not self.clue_power > 0:
            raise ValueError(f"clue_power is {self.clue_power}: give a number above 0, 1 for clues even over the range")
        for name in ("bases", "examples", "valid_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")


def prepare(settings: Recipe, accelerator) -> Prepared:
    """Model, tokenizer and puzzles; the first process generates them, the others wait for it."""
    import torch

    from dlm.models.transformer import LLaDAModelLM
    from dlm.training.checks import check_memory, check_new_model
    from dlm.training.recipe import Prepared, open_model

    tokenizer = sudoku.make_tokenizer()
    if not settings.model:
        names = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta")
        shape = {name: getattr(settings, name) for name in names}
        check_new_model(shape, len(tokenizer))
    count = settings.examples + settings.valid_examples
    check_memory(8.0 * sudoku.LENGTH * count, f"{count:,} examples take at least", "give fewer")
    check_memory(200.0 * settings.bases, f"{settings.bases:,} bases take at least", "give fewer")
    with accelerator.main_process_first():
        train, held_out = _bases(settings, accelerator.is_main_process)
    torch.manual_seed(settings.seed)
    model = open_model(settings) if settings.model else LLaDAModelLM(_config(settings, tokenizer))
    if settings.layer_repeats:
        model.config.layer_repeats = settings.layer_repeats
    return Prepared(
        model,
        tokenizer,
        forms(*train, settings.examples, settings, [settings.seed, 0]),
        forms(*held_out, settings.valid_examples, settings, [settings.seed, 1]),
    )


def _bases(settings: Recipe, show: bool):
    """Minimal puzzles for training and for validation, kept in the output folder."""
    file = Path(settings.output) / f"puzzles-{settings.puzzle_seed}-{settings.bases}.npz"
    held_out = max(16, settings.bases // 20)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = sudoku.random_puzzles(settings.bases + held_out, settings.puzzle_seed)
        made = list(counted(made, settings.bases + held_out, "puzzles", show))
        temporary = file.with_suffix(".tmp.npz")
        np.savez_compressed(temporary, puzzles=[p for p, _ in made], grids=[g for _, g in made])
        temporary.rename(file)
    with np.load(file) as read:
        puzzles, grids = read["puzzles"], read["grids"]
    split = settings.bases
    return (puzzles[:split], grids[:split]), (puzzles[split:], grids[split:])


def forms(puzzles: np.ndarray, grids: np.ndarray, count: int, settings: Recipe, key: list[int]) -> Examples:
    """`count` examples: the whole grid, with loss on the cells that the puzzle leaves empty."""
    from dlm.data.documents import Documents
    from dlm.data.examples import Examples

    rng = np.random.default_rng(key)
    base = rng.integers(len(puzzles), size=count)
    symmetry = sudoku.random_symmetries(count, rng)
    some, whole = sudoku.transform(puzzles[base], symmetry), sudoku.transform(grids[base], symmetry)
    span = settings.most_clues + 1 - settings.fewest_clues
    clues = settings.fewest_clues + (span * rng.random(count) ** settings.clue_power).astype(int)
    some = sudoku.add_givens(some, whole, clues, rng)
    target = np.zeros((count, sudoku.LENGTH), bool)
    target[:, sudoku.CELLS] = some == 0
    tokens = sudoku.to_ids(whole).astype(np.uint16)
    starts = np.arange(count + 1) * sudoku.LENGTH
    return Examples([Documents(tokens.reshape(-1), starts, target.reshape(-1), None, int(target.sum()))], sudoku.LENGTH)


def _config(settings: Recipe, tokenizer) -> LLaDAConfig:
    from dlm.models.configuration import LLaDAConfig

    return LLaDAConfig(
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        mlp_hidden_size=settings.mlp_hidden_size,
        vocab_size=len(tokenizer),
        embedding_size=len(tokenizer),
        weight_tying=False,
        rope_theta=settings.rope_theta,
        layer_repeats=settings.layer_repeats or 1,
        grid_width=sudoku.ROW_LENGTH if settings.grid else None,
        max_sequence_length=sudoku.LENGTH,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=None,
        pad_token_id=None,
        bos_token_id=None,
    )


def parse(argv: list[str]) -> Recipe:
    """The settings of a command line."""
    return settings.parse(Recipe, argv, "sudoku", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; a user's mistake is one line and exit code 2."""
    from dlm.training import command

    return command.main(Recipe, prepare, argv, prog="sudoku", text=__doc__)


if __name__ == "__main__":
    sys.exit(main())
