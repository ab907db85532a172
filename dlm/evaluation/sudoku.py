"""Sudoku: puzzles with one solution, their solver and symmetries, and the text and tokens that a model sees.

Shapes: P puzzles. A grid is an array (81,) of int, row by row: 1 to 9, or 0 for an empty cell.

A puzzle is a task with a checkable answer whose order matters: each solved cell makes others certain, so that a model
that may choose where to write next does far better than one that writes anywhere (arXiv:2502.06768).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dlm.utils.progress import counted

EMPTY = "."
_ROW, _COLUMN = np.divmod(np.arange(81), 9)
_BOX = _ROW // 3 * 3 + _COLUMN // 3
_UNITS = [tuple(map(int, units)) for units in zip(_ROW, _COLUMN + 9, _BOX + 18, strict=True)]  # 27 units
PEERS = tuple(
    tuple(int(other) for other in range(81) if other != cell and set(_UNITS[other]) & set(_UNITS[cell]))
    for cell in range(81)
)
_ALL = 0b111111111  # bit d - 1 stands for digit d


# ---------------------------------------------------------------------------------------------------------- solving


def solutions(grid: Sequence[int], limit: int = 2, rng: np.random.Generator | None = None) -> list[list[int]]:
    """Up to `limit` solutions of a grid, the cell with the fewest candidates first. rng: try digits in random order."""
    cells, used = list(map(int, grid)), [0] * 27
    for cell, digit in enumerate(cells):
        if digit and not _place(used, cell, 1 << (digit - 1)):
            return []
    found: list[list[int]] = []
    _search(cells, used, [cell for cell in range(81) if not cells[cell]], found, limit, rng)
    return found


def _place(used: list[int], cell: int, bit: int) -> bool:
    units = _UNITS[cell]
    if any(used[unit] & bit for unit in units):
        return False
    for unit in units:
        used[unit] |= bit
    return True


def _search(cells, used, empty, found, limit, rng) -> None:
    if not empty:
        found.append(cells.copy())
        return
    best, fewest, free = 0, 10, 0
    for place, cell in enumerate(empty):
        row, column, box = _UNITS[cell]
        candidates = _ALL & ~(used[row] | used[column] | used[box])
        count = candidates.bit_count()
        if count < fewest:
            best, fewest, free = place, count, candidates
            if count < 2:
                break
    if fewest == 0:
        return
    cell = empty[best]
    rest = empty[:best] + empty[best + 1 :]
    bits = [1 << k for k in range(9) if free >> k & 1]
    if rng is not None and len(bits) > 1:
        rng.shuffle(bits)
    for bit in bits:
        for unit in _UNITS[cell]:
            used[unit] |= bit
        cells[cell] = bit.bit_length()
        _search(cells, used, rest, found, limit, rng)
        for unit in _UNITS[cell]:
            used[unit] ^= bit
        if len(found) >= limit:
            break
    cells[cell] = 0


def is_solution(grid: Sequence[int], puzzle: Sequence[int] | None = None) -> bool:
    """Whether every row, column and box of the grid holds 1 to 9, and the grid keeps the puzzle's givens."""
    cells = np.asarray(grid)
    if puzzle is not None and any(given and given != cell for given, cell in zip(puzzle, cells, strict=True)):
        return False
    whole = set(range(1, 10))
    return all(set(cells[unit == k].tolist()) == whole for unit in (_ROW, _COLUMN, _BOX) for k in range(9))


# ------------------------------------------------------------------------------------------------------- generation


def random_puzzle(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(puzzle, solution), each (81,) int8: one solution, and no given could be taken away without a second one."""
    [solution] = solutions([0] * 81, limit=1, rng=rng)
    cells = solution.copy()
    for cell in map(int, rng.permutation(81)):
        digit, cells[cell] = cells[cell], 0
        taken = {cells[peer] for peer in PEERS[cell]}
        if len(taken) == 9 or _only_place(cells, cell, digit):  # of eight digits and the empty cell's 0
            continue
        for other in range(1, 10):  # a second solution would have another digit here
            if other != digit and other not in taken:
                cells[cell] = other
                if solutions(cells, limit=1):
                    cells[cell] = digit
                    break
                cells[cell] = 0
    return np.array(cells, np.int8), np.array(solution, np.int8)


def _only_place(cells: list[int], cell: int, digit: int) -> bool:
    """Whether a row, column or box of an empty cell has no other empty cell that could take the digit."""
    for unit in _UNITS[cell]:
        others = (other for other in PEERS[cell] if not cells[other] and unit in _UNITS[other])
        if all(any(cells[peer] == digit for peer in PEERS[other]) for other in others):
            return True
    return False


def random_puzzles(count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`count` minimal puzzles and solutions; puzzle number i is a function of (seed, i) alone."""
    for index in range(count):
        yield random_puzzle(np.random.default_rng([seed, index]))


def add_givens(puzzles: np.ndarray, grids: np.ndarray, clues: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Puzzles (P, 81) with random cells of their solutions `grids` (P, 81) given, up to clues (P,) in all.

    More givens never take the uniqueness away. A puzzle that has as many already is left as it is.
    """
    draw = rng.random(puzzles.shape)
    draw[puzzles > 0] = -1.0  # the givens there are come first
    rank = draw.argsort(axis=1).argsort(axis=1)
    return np.where((rank < clues[:, None]) | (puzzles > 0), grids, 0).astype(np.int8)


def random_symmetries(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Symmetries of the rules: cells (P, 81), which cell stands where; digits (P, 10), what each digit becomes.

    Bands, rows within bands, stacks, columns within stacks, the transpose, the digits: 1.2e12 forms of one puzzle.
    """

    def lines():
        bands = rng.random((count, 3)).argsort(axis=1)
        within = rng.random((count, 3, 3)).argsort(axis=2)
        return (bands[:, :, None] * 3 + within).reshape(count, 9)

    rows, columns = lines(), lines()
    cells = rows[:, :, None] * 9 + columns[:, None, :]
    turned = rng.random(count) < 0.5
    cells[turned] = cells[turned].transpose(0, 2, 1)
    digits = np.concatenate([np.zeros((count, 1), int), rng.random((count, 9)).argsort(axis=1) + 1], axis=1)
    return cells.reshape(count, 81), digits


def transform(grids: np.ndarray, symmetry: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Grids (P, 81) under symmetries of `random_symmetries`."""
    cells, digits = symmetry
    return np.take_along_axis(digits, np.take_along_axis(grids, cells, axis=1).astype(int), axis=1).astype(np.int8)


def restore(grids: np.ndarray, symmetry: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Grids (P, 81) that `transform` gave, as they were before."""
    cells, digits = symmetry
    return np.take_along_axis(digits.argsort(axis=1), grids.astype(int), axis=1)[
        np.arange(len(grids))[:, None], cells.argsort(axis=1)
    ].astype(np.int8)


# -------------------------------------------------------------------------------------------------- text and tokens


ROWS = "abcdefghi"  # each row begins with a label: rotary positions are relative, so a cell needs a landmark
ROW_LENGTH = 10
LENGTH = 90  # tokens of a grid
CELLS = np.array([row * 10 + 1 + column for row in range(9) for column in range(9)])  # where its cells stand


def to_text(grid: Sequence[int]) -> str:
    """`a53..7....b6..195...…`: each row its label and nine cells, an empty one a dot."""
    cells = "".join(str(cell) if cell else EMPTY for cell in map(int, grid))
    return "".join(label + cells[row * 9 : row * 9 + 9] for row, label in enumerate(ROWS))


def from_text(text: str) -> np.ndarray:
    """The grid (81,) of a text of 81 cells; 0, dot, underscore and x are empty, white space and row labels are dropped.

    Errors: another character, another number of cells.
    """
    cells = [character for character in text.lower() if not character.isspace() and character not in ROWS + "|-+"]
    for character in cells:
        if character not in "0123456789._x":
            raise ValueError(f"the puzzle has the character {character!r}: write digits, and dots for empty cells")
    if len(cells) != 81:
        raise ValueError(f"the puzzle has {len(cells)} cells: a 9 by 9 grid has 81")
    return np.array([int(character) if character.isdigit() else 0 for character in cells], np.int8)


def pretty(grid: Sequence[int]) -> str:
    """The grid as nine lines with its boxes apart."""
    lines = []
    for row in range(9):
        if row in (3, 6):
            lines.append("------+-------+------")
        cells = [str(cell) if cell else EMPTY for cell in map(int, grid[row * 9 : row * 9 + 9])]
        lines.append(" | ".join(" ".join(cells[k : k + 3]) for k in (0, 3, 6)))
    return "\n".join(lines)


def make_tokenizer():
    """A tokenizer of one token a character; the empty cell is the mask token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(EMPTY + "123456789" + ROWS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=EMPTY))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token=EMPTY, clean_up_tokenization_spaces=False)


def to_ids(grids: np.ndarray) -> np.ndarray:
    """Token ids (P, 90) of grids (P, 81) under `make_tokenizer`: a digit's id is the digit, an empty cell's is 0."""
    ids = np.tile(np.repeat(np.arange(10, 19), 10), (len(grids), 1))
    ids[:, CELLS] = grids
    return ids


# ------------------------------------------------------------------------------------------------ what a model is asked


def check_model(name: str, tokenizer) -> None:
    """Raises ValueError where the model of this name does not read Sudokus; tokenizer: its own, or None."""
    if tokenizer is None or tokenizer.get_vocab() != make_tokenizer().get_vocab():
        raise ValueError(f"{name} does not read Sudokus: give a model that dlm train sudoku wrote")


def parse_clues(text: str) -> tuple[int, int]:
    """`17-26` -> (17, 26): numbers of givens. Raises ValueError for anything else."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 17 <= int(first) <= int(last) <= 80):
        raise ValueError(f"--clues is A-B with 17 <= A <= B <= 80, not {text!r}")
    return int(first), int(last)


def test_puzzles(count: int, clues: tuple[int, int], seed: int) -> np.ndarray:
    """Puzzles (P, 81) with one solution and a number of givens even over `clues`, both ends included."""
    made = list(counted(random_puzzles(count, seed), count, "puzzles"))
    puzzles, grids = np.array([p for p, _ in made]), np.array([g for _, g in made])
    rng = np.random.default_rng([seed, 1])
    return add_givens(puzzles, grids, rng.integers(clues[0], clues[1] + 1, size=count), rng)
