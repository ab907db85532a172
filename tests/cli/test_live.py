"""The live view: wrapping, colours, cleaning up; read back through a small terminal."""

import io
import re
from types import SimpleNamespace

import pytest
import torch

from dlm.cli import live
from dlm.cli.lines import RAMP, Glyphs, Piece, RowText, clusters, fit, paint, shade, share, window, wrap
from dlm.cli.live import LiveView
from dlm.sampling.canvas import Canvas

MASK = 99


class Screen:
    """What a terminal would show: the few control sequences that the view uses."""

    def __init__(self, text, rows=24):
        self.lines, self.row, self.column, self.hidden, self.rows = [""] * rows, 0, 0, False, rows
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
            self.feed(part)

    def feed(self, part):
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == self.rows:  # scroll
                self.lines, self.row = [*self.lines[1:], ""], self.rows - 1
        elif part.startswith("\x1b"):
            number = int(re.sub(r"\D", "", part.split(";")[0]) or 1)
            if part.endswith("A"):
                self.row -= number
                assert self.row >= 0, "the cursor was moved above the screen"
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part == "\x1b[J":
                self.lines[self.row] = self.lines[self.row][: self.column]
                self.lines[self.row + 1 :] = [""] * (self.rows - self.row - 1)
            elif part in (live.HIDE, live.SHOW):
                self.hidden = part == live.HIDE
            else:
                assert part.endswith("m") or part[2] == "?", part
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + part + line[self.column + len(part) :]
            self.column += len(part)

    @property
    def text(self):
        return "\n".join(self.lines).rstrip()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def size(monkeypatch):
    """The terminal's size, which a test may change."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    held = [40, 12]
    monkeypatch.setattr(live, "size_of", lambda stream: tuple(held))
    return held


def words(ids):
    """A tokenizer of one word a token; 50..53 are the four bytes of one character."""
    raw = b"".join({50: b"\xf0", 51: b"\x9f", 52: b"\xa6", 53: b"\x8a"}.get(i, f" w{i}".encode()) for i in ids)
    return raw.decode("utf-8", errors="replace")


def state(tokens, prompt=2, committed=(), confidence=0.5, step=1):
    tokens = torch.tensor(tokens)
    editable = (torch.arange(tokens.shape[1]) >= prompt).expand(tokens.shape)
    canvas = Canvas(tokens, editable, torch.ones_like(editable), MASK)
    new = torch.zeros_like(editable)
    for place in committed:
        new[:, place] = True
    return SimpleNamespace(
        canvas=canvas,
        committed=new,
        revised=torch.zeros_like(new),
        confidence=new * confidence,
        step=step,
        block=torch.zeros(len(tokens), dtype=torch.long),
        nfe=torch.tensor([step] * len(tokens)),
    )


def plain(lines):
    return ["".join(character for character, _ in line) for line in lines]


def test_wrap_breaks_at_spaces_and_newlines():
    lines, focus = wrap([Piece("one two three\n\nfour")], 8)
    assert plain(lines) == ["one two ", "three", "", "four"]
    assert focus is None


def test_wrap_drops_the_space_that_ends_a_full_line():
    assert plain(wrap([Piece("abcd efgh")], 4)[0]) == ["abcd", "efgh"]


def test_wrap_cuts_long_words_and_measures_wide_characters():
    assert plain(wrap([Piece("abcdefgh")], 3)[0]) == ["abc", "def", "gh"]
    assert plain(wrap([Piece("日本語")], 5)[0]) == ["日本", "語"]
    assert plain(wrap([Piece("e\u0301e\u0301e\u0301")], 3)[0]) == ["e\u0301e\u0301e\u0301"]  # accents take no column


@pytest.mark.parametrize("text", ["👍🏽", "👨\u200d👩\u200d👧", "❤\ufe0f", "1\ufe0f\u20e3"])
def test_an_emoji_of_several_code_points_is_one_character_of_two_columns(text):
    """Was: each code point counted alone, so that a line with a family of emoji was cut."""
    assert clusters(text) == ((text, 2),)
    assert plain(wrap([Piece(text * 3)], 4)[0]) == [text * 2, text]


def test_a_status_line_keeps_what_matters_most():
    parts = [(0, "pass 1/4"), (2, "block 1/2"), (4, "1.0 tok/pass"), (1, "41 tok/s"), (3, "12 more lines")]
    assert fit(parts, 80, "·") == "pass 1/4 · block 1/2 · 1.0 tok/pass · 41 tok/s · 12 more lines"
    assert fit(parts, 40, "·") == "pass 1/4 · block 1/2 · 41 tok/s"
    assert fit(parts, 12, "·") == "pass 1/4"
    assert fit(parts, 5, "·") == "pass "


def test_wrap_may_break_between_masks_and_finds_the_focus():
    lines, focus = wrap([Piece("word "), Piece("░" * 9, breakable=True, focus=True)], 6)
    assert plain(lines) == ["word ░", "░░░░░░", "░░"]
    assert focus == 0


def test_window_follows_the_focus():
    lines = list(range(20))
    assert window(lines[:5], 3, 6) == (0, lines[:5])
    assert window(lines, 0, 6) == (0, lines[:6])
    assert window(lines, 10, 6) == (8, lines[8:14])
    assert window(lines, None, 6) == (14, lines[14:])  # finished: the end


def test_share():
    assert share([3, 3], 10) == [3, 3]
    assert share([9, 1, 9], 7) == [3, 1, 3]


def test_tokens_that_share_a_character_stay_together():
    rows = RowText(words)
    assert list(rows.characters([1, 50, 51, 52, 53, 2])) == [(1, " w1"), (4, "🦊"), (1, " w2")]
    assert list(rows.characters([50, 51, 1])) == [(1, "�"), (1, "�"), (1, " w1")]  # the rest is still masked


def test_control_characters_cannot_steer_the_terminal():
    rows = RowText(lambda ids: "a\x1b[2Jb\x07\rc\td\n")
    [piece] = rows.pieces([1], [False], [False], [1.0], [False])
    assert piece.text == "a�[2Jb��c    d\n"


def test_colours_go_from_unsure_to_sure():
    assert shade(0.0, "probability") == RAMP[0]
    assert shade(1.0, "probability") == RAMP[-1]
    assert shade(0.0, "entropy") == RAMP[-1]  # negative entropy: 0 is certain
    assert shade(-9.0, "entropy") == RAMP[0]
    assert shade(0.3, "random") == ""
    assert shade(float("nan"), "probability") == ""


def test_no_color_keeps_bold_and_drops_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert not live.wants_colour(Terminal())
    assert paint("x", "38;5;160", "7", colour=False) == "\x1b[7mx\x1b[0m"
    assert paint("x", "38;5;160", colour=False) == "x"


def test_glyphs_fit_the_encoding():
    assert Glyphs.of(SimpleNamespace(encoding="utf-8")).mask == "░"
    assert Glyphs.of(SimpleNamespace(encoding="ascii")).mask == "_"


def test_view_shows_prompt_masks_newest_and_status():
    stream = Terminal()
    clock = iter(range(1000))
    with LiveView(stream, RowText(words), passes=4, blocks=2, clock=lambda: next(clock)) as view:
        view.show(state([[1, 2, MASK, 7, MASK]], committed=[3], confidence=0.95))
        shown = stream.getvalue()
        assert Screen(shown).text.splitlines()[0] == " w1 w2░ w7░"
        assert "pass 1/4 · block 1/2 · 0 tok/s" in Screen(shown).text  # tok/pass has no room in 40 columns
        assert f"\x1b[{RAMP[-1]};7m w7" in shown  # sure, and new
        view.show(state([[1, 2, 5, 7, MASK]], committed=[2], confidence=0.05, step=2))
        later = stream.getvalue()[len(shown) :]
        assert f"\x1b[{RAMP[-1]}m w7" in later  # no longer new
        assert f"\x1b[{RAMP[0]};7m w5" in later


def test_the_end_of_a_text_counts_as_the_tokens_that_were_committed():
    """End-of-text that fills what is left of a block was counted as committed: the last frame's tok/pass jumped."""
    stream, clock = Terminal(), iter(range(1000))
    with LiveView(stream, RowText(words), clock=lambda: next(clock)) as view:
        view.show(state([[1, 2, 5, MASK, MASK, MASK]], committed=[2]))
        view.show(state([[1, 2, 5, 7, 7, 7]], committed=[3], step=2))
        assert "pass 2 · 1.0 tok/pass" in Screen(stream.getvalue()).text


def test_view_leaves_the_terminal_as_it_was():
    stream = Terminal()
    stream.write("before\r\n")
    with LiveView(stream, RowText(words)) as view:
        view.show(state([[1, 2] + [MASK] * 300]))
        view.show(state([[1, 2] + [3] * 300]))
        assert len(Screen(stream.getvalue()).text.splitlines()) == 12  # the line before is still there
    screen = Screen(stream.getvalue())
    assert screen.text == "before"
    assert (screen.row, screen.column, screen.hidden) == (1, 0, False)
    assert stream.getvalue().endswith(live.WRAP + live.SHOW)


def test_view_cleans_up_after_an_interruption():
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), LiveView(stream, RowText(words)) as view:
        view.show(state([[1, 2, MASK]]))
        raise KeyboardInterrupt
    assert Screen(stream.getvalue()).text == ""
    assert stream.getvalue().endswith(live.SHOW)


def test_long_canvas_shows_the_part_being_written(size):
    stream = Terminal()
    clock = iter(range(1000))
    with LiveView(stream, RowText(words), clock=lambda: next(clock)) as view:
        view.show(state([[1, 2] + [11] * 150 + [MASK] * 20 + [12] * 150]))
        text = Screen(stream.getvalue()).text
    assert "░░░" in text and "w12" in text and " w1 w2" not in text
    assert re.search(r"· \d+ more lines$", text.splitlines()[-1]) or len(text.splitlines()[-1]) == size[0]


def test_frame_shrinks_without_leaving_lines_behind():
    stream = Terminal()
    with LiveView(stream, RowText(words)) as view:
        view._draw(["a", "b", "c", "d"])
        view._draw(["x", "y"])
        assert Screen(stream.getvalue()).text == "x\ny"
        view._draw(["1", "2", "3"])
        assert Screen(stream.getvalue()).text == "1\n2\n3"


def test_a_narrower_terminal_is_redrawn_from_the_top(size):
    stream = Terminal()
    with LiveView(stream, RowText(words)) as view:
        view._draw(["a" * 30, "b" * 30])
        size[0] = 20
        before = len(stream.getvalue())
        view._draw(["c"])
        assert "\x1b[3A" in stream.getvalue()[before:]  # two lines had become four


def test_batch_rows_are_labelled_and_share_the_screen(size):
    size[0] = 60
    stream = Terminal()
    with LiveView(stream, RowText(words)) as view:
        view.show(state([[1, 2, MASK, 3]] * 3))
        text = Screen(stream.getvalue()).text
        assert text.splitlines()[:3] == ["1   w1 w2░ w3", "2   w1 w2░ w3", "3   w1 w2░ w3"]
    with LiveView(stream, RowText(words)) as view:
        view.show(state([[1, 2] + [MASK] * 100] * 30))
    assert "20 more rows" in stream.getvalue()


def test_quick_passes_are_joined_into_one_frame():
    stream = Terminal()
    times = iter([0.0, 1.0, 1.0, 1.0, 1.001, 1.002, 9.0, 9.0, 9.0])
    with LiveView(stream, RowText(words), clock=lambda: next(times)) as view:
        view.show(state([[1, 2, MASK, MASK, MASK]]))
        drawn = stream.getvalue()
        view.show(state([[1, 2, 5, MASK, MASK]], committed=[2], step=2))
        assert stream.getvalue() == drawn
        view.show(state([[1, 2, 5, 6, 7]], committed=[3, 4], step=3))  # the last is always drawn
        last = stream.getvalue()[len(drawn) :]
        assert ";7m w5 w6 w7" in last  # nothing new was lost


def test_given_text_can_be_left_out():
    rows = RowText(words, show_given=False)
    pieces = rows.pieces([1, 2, 3], [True, False, False], [False, False, True], [1.0] * 3, [False] * 3)
    assert [piece.text for piece in pieces] == [" w2", "░"]


def test_end_of_text_is_a_glyph():
    rows = RowText(words, frozenset({7}))
    [piece] = rows.pieces([7], [False], [False], [1.0], [False])
    assert piece.text == "∎"
