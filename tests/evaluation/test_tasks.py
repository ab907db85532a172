"""Questions and the checks of their answers."""

import json
import sys
from decimal import Decimal

import pytest

from dlm.evaluation.tasks import (
    Question,
    by_program,
    exact,
    from_rows,
    open_task,
    same_number,
    tell_apart,
)
from dlm.rewards.texts import final_number
from tests.helpers import commandline

tokenizer = commandline.tokenizer  # a fixture


def rows(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_exact_match_takes_white_space_as_it_comes():
    check = exact("two  cats", "2 cats")
    assert check(" two cats\n") and check("2 cats") and not check("two cats.") and not check("")


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $12.50 each, as 3 did", "12.5"),
        ("first #### 3, but no: #### -4", -4),
        ("There are 5 of them, and he eats 2, so 3.", 3),
        ("it costs $1,000.", 1000),
        ("#### none", None),
        ("no number", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_the_same_number_however_it_is_written():
    check = same_number("two dozen\n#### 24")
    assert check("#### 24.0") and check("The answer is 24") and not check("24, or 25") and not check("")
    with pytest.raises(ValueError, match="no number"):
        same_number("nothing")


def test_gsm8k_from_a_file(tmp_path):
    path = rows(tmp_path / "test.jsonl", *({"question": f"What is {n}?", "answer": f"#### {n}"} for n in (3, 4, 5)))
    questions = open_task(f"gsm8k:{path}", limit=2)
    assert [question.prompt for question in questions] == [f"Question: What is {n}?\nAnswer:" for n in (3, 4)]
    assert questions[1].check("#### 4") and not questions[1].check("#### 3")
    with pytest.raises(ValueError, match="question and answer"):
        open_task(f"gsm8k:{rows(tmp_path / 'other.jsonl', {'prompt': 'x'})}")


def test_a_task_of_ones_own(tmp_path, tokenizer):
    path = rows(
        tmp_path / "task.jsonl",
        {"prompt": "The cat", "answer": ["sat", "slept"]},
        {"prompt": "The ___{2} sat on the mat", "answer": "The cat sat on the mat"},
    )
    plain, blank = open_task(path)
    assert plain.check(" slept ") and not plain.check("ran") and not plain.infill
    canvas = blank.canvas(tokenizer, 99, tokenizer.mask_token_id)
    assert blank.infill and int(canvas.masked.sum()) == 2
    ids = tokenizer(" cat", add_special_tokens=False)["input_ids"][:2]
    filled = canvas.tokens.masked_scatter(canvas.masked, canvas.tokens.new_tensor((ids * 2)[:2]))
    canvas = type(canvas)(filled, canvas.editable, canvas.valid, canvas.mask_id)
    assert blank.written(canvas, {ids[0]}) == (ids * 2)[:2]  # what stands in a blank is not cut at end-of-text
    text = blank.answer(tokenizer, canvas, set())
    assert text.startswith("The") and text.endswith("sat on the mat") and "mask" not in text


def test_an_answer_ends_at_its_end_of_text(tokenizer):
    question = Question("Once", "Once")
    canvas = question.canvas(tokenizer, 4, tokenizer.mask_token_id)
    [word, *_], end = tokenizer(" the", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    filled = canvas.tokens.masked_scatter(canvas.masked, canvas.tokens.new_tensor([word, end, word, end]))
    canvas = type(canvas)(filled, canvas.editable, canvas.valid, canvas.mask_id)
    assert question.written(canvas, {end}) == [word]
    assert question.answer(tokenizer, canvas, {end}) == tokenizer.decode([word])


def test_sudoku(tmp_path):
    rules = pytest.importorskip("dlm.evaluation.sudoku")
    first, second = open_task("sudoku", limit=2)
    assert [question.text for question in open_task("sudoku", limit=1)] == [first.text] != [second.text]
    tokenizer = rules.make_tokenizer()
    canvas = first.canvas(tokenizer, 1, tokenizer.mask_token_id)
    puzzle = rules.from_text(first.text)
    [solution] = rules.solutions(puzzle)
    assert int(canvas.masked.sum()) == int((puzzle == 0).sum()) and not first.prose
    digits = canvas.tokens.new_tensor([digit for digit, given in zip(solution, puzzle, strict=True) if not given])
    filled = type(canvas)(
        canvas.tokens.masked_scatter(canvas.masked, digits), canvas.editable, canvas.valid, canvas.mask_id
    )
    answer = first.answer(tokenizer, filled, set())
    assert first.check(answer) and not second.check(answer) and not first.check(first.text) and not first.check("1")
    (tmp_path / "puzzles.txt").write_text(first.text + "\n" + "." * 81 + "\n")
    assert [question.text for question in open_task(f"sudoku:{tmp_path / 'puzzles.txt'}", limit=1)] == [first.text]
    with pytest.raises(ValueError, match="puzzle 2 has several solutions"):
        open_task(f"sudoku:{tmp_path / 'puzzles.txt'}")


def test_a_checker_program(tmp_path):
    program = tmp_path / "check.py"
    program.write_text(
        "import json, sys\n"
        "record = json.load(sys.stdin)\n"
        "assert record['output'] != 'crash'\n"
        "print('looked at', record['n'], record['output'] == record['n'] * 'a')\n"
    )
    check = by_program([sys.executable, str(program)], {"prompt": "x", "n": 2})
    assert check("aa") is True and check("a") is False
    with pytest.raises(ValueError, match=r"ended with code 1 and said neither.*AssertionError"):
        check("crash")
    [question] = from_rows(rows(tmp_path / "t.jsonl", {"prompt": "x", "n": 2}), [sys.executable, str(program)])
    assert question.check("aa")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"answer": "x"}, 'line 1: no text "prompt"'),
        ({"prompt": "x"}, 'no "answer"'),
        ({"prompt": "x", "answer": []}, "no"),
    ],
)
def test_rows_that_make_no_question(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        open_task(rows(tmp_path / "task.jsonl", record))


def test_questions_with_the_same_text_are_told_apart():
    texts = [question.text for question in tell_apart([Question(text, text) for text in ("A", "B", "A", "A")])]
    assert texts == ["A", "B", "A (2)", "A (3)"]
