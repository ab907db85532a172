"""Pictures, pages and sentences of a grid: what they say is what the numbers say."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from benchmarks import compare
from dlm.benchmarking import charts
from dlm.benchmarking.charts import Axis, Point, Series, Shade, Tile, about_one, heat_map, scatter, significant, ticks
from dlm.benchmarking.findings import LEAST_R2, front, pass_fit, quality, sentences, speedups
from dlm.benchmarking.report import METHOD_COLOURS, colour_of, front_chart, maps, pass_chart
from dlm.benchmarking.results import read_grid
from tests.helpers import commandline

tokenizer, checkpoint, run = commandline.tokenizer, commandline.checkpoint, commandline.run  # fixtures
CSV = """method,question,block_length,steps,latency_s,perplexity,humaneval_pass_at_1
none,Why?,8,4,4.0,3.0,0.25
none,Why?,8,8,8.0,2.0,0.5
dual,Why?,8,4,2.0,3.0,0.25
dual,Why?,8,8,3.0,2.0,
"""


def cell(latency, perplexity, words="a b c", **more):
    return {"latency": latency, "answer": words, "perplexity": perplexity, **more}


@pytest.fixture
def grid(tmp_path):
    """Two methods, two questions; dual is twice as fast; its fastest setting is degenerate."""
    known = {"nfe": 4, "positions_computed": 80, "degenerate": False}
    results = {
        "none": [
            {"question": "A <b>?", "result": {"8": {"4": cell(0.4, 4.0, **known), "8": cell(0.8, 2.0, **known)}}},
            {"question": "B?", "result": {"8": {"4": cell(0.4, 9.0, **known), "8": cell(0.8, 8.0, **known)}}},
        ],
        "dual": [
            {"question": q, "result": {"8": {
                "4": cell(0.2, 1.1, "the the </script>", **known | {"degenerate": True, "positions_computed": 20}),
                "8": cell(0.4, 6.0, **known)}}}
            for q in ("A <b>?", "B?")
        ],
    }  # fmt: skip
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(results))
    return path


def test_settings_take_questions_together(grid):
    settings = read_grid(grid).settings()
    found = {(s.method, *s.place): (s.latency, s.perplexity, s.degenerate) for s in settings}
    assert found["none", 8, 4] == (0.4, pytest.approx(6.0), False)  # the geometric mean of 4 and 9
    assert found["none", 8, 8] == (0.8, pytest.approx(4.0), False) and found["dual", 8, 4][2] is True
    assert speedups(settings) == {("dual", 8, 4): pytest.approx(2), ("dual", 8, 8): pytest.approx(2)}


def test_sentences_say_what_rounding_and_caches_decide(tmp_path):
    """Of the questions that were watched: ties over all settings, each method's error of the logits."""
    row = {"ties": 0.02, "cache_rms": None, "cache_same": None}
    cached = {"ties": 0.0, "cache_rms": 0.5, "cache_same": 0.75}
    exact = {"ties": 0.0, "cache_rms": 3e-9, "cache_same": 1.0}
    rows = {"none": row, "dual": cached, "block_causal": exact}
    results = {
        method: [
            {"question": "A?", "result": {"8": {"4": cell(0.4, 4.0, **more)}}},
            {"question": "B?", "result": {"8": {"4": cell(0.4, 4.0)}}},
        ]
        for method, more in rows.items()
    }
    (tmp_path / "grid.json").write_text(json.dumps(results))
    said = "\n".join(sentences(read_grid(tmp_path / "grid.json")))
    assert "0.67% of the commits lie within rounding of a tie (2.00% at most in a setting)" in said
    assert "dual 0.50 (75.0% the same first token), block_causal 0 (100.0% the same first token)" in said


def test_the_front_leaves_degenerate_settings_out(grid):
    found = read_grid(grid)
    assert [(s.method, s.steps) for s in front(found.settings(), quality(found))] == [("none", 4), ("none", 8)]


def test_sentences(grid):
    said = "\n".join(sentences(read_grid(grid)))
    assert "For quality use none, block 8, 8 steps: perplexity 4.00, 800 ms an answer (the best perplexity" in said
    assert "For speed use none, block 8, 4 steps: perplexity 6.00, 400 ms an answer (2.0 times as fast; nothing" in said
    assert "dual is 2.00 times as fast as none (geometric mean of 2 settings" in said and "from 2.00 to 2.00" in said
    assert (
        "1 of 4 settings are degenerate, among them the one with the lowest perplexity of all (dual, block 8, 4" in said
    )
    assert "is the number of steps in 4 of 8 cells" in said  # nfe is 4 in all of them


def test_the_line_of_a_pass(grid):
    """none: 20 positions a pass in 100 ms and in 200; dual: 5 in 50, 20 in 100. The means are at 5 and 20 positions."""
    line = pass_fit(read_grid(grid), "positions_computed")
    assert line.intercept + 5 * line.slopes[0] == pytest.approx(50)
    assert line.intercept + 20 * line.slopes[0] == pytest.approx((100 + 200 + 100) / 3)
    assert pass_fit(read_grid(grid), "places_asked") is None


def test_reference_csv(tmp_path):
    path = tmp_path / "reference.csv"
    path.write_text(CSV)
    grid = read_grid(path)
    best = grid.settings()[1]
    assert (best.method, best.accuracy, best.degenerate) == ("none", 0.5, None)
    assert grid.settings()[3].accuracy is None and pass_fit(grid, "positions_computed") is None
    assert "For quality use none, block 8, 8 steps: accuracy 50.0%, 8.00 s an answer" in sentences(grid)[0]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.indices, self.tables, self.sources = [], set(), 0, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        self.indices |= {int(attrs["data-i"])} if "data-i" in attrs else set()
        self.tables += tag == "table"


def test_plot_writes_one_page_that_holds_everything(run, grid, tmp_path):
    code, out, error = run("bench", "plot", grid, "--svg", tmp_path / "svg")
    assert (code, error) == (0, "") and "dual is 2.00 times as fast as none" in out
    page = (tmp_path / "grid.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.indices == {0, 1, 2, 3} and tags.tables == 1 and not tags.sources
    written = re.search(r"const DATA = (.*?);\n", page)[1]
    assert "<" not in written  # Fault: an answer with "<!--<script>" left the page's script open
    data = json.loads(written)
    assert data[2]["answers"][0] == {
        "question": "A <b>?",
        "answer": "the the </script>",
        "note": "perplexity 1.10, degenerate",
    }
    assert page.count("</script>") == 1  # an answer cannot end the script
    files = list((tmp_path / "svg").glob("*.svg"))
    assert len(files) == 1 + 2 + 2 + 1 + 1
    for file in files:
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
    assert "url(#hatch)" in (tmp_path / "svg" / "grid-perplexity-under-the-judge-dual.svg").read_text()


def test_a_grid_without_a_judge_has_a_page(run, tmp_path):
    """Fault: `bench plot` of a grid of --judge none, which names that command as the next one, ended in an error."""
    cells = {str(steps): cell(0.1 * steps, None, nfe=steps, positions_computed=80) for steps in (4, 8)}
    path = tmp_path / "unjudged.json"
    path.write_text(json.dumps({"none": [{"question": "A?", "result": {"8": cells}}]}))
    assert front_chart([read_grid(path)], "front", [0]) is None
    code, _, error = run("bench", "plot", path, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0, error
    assert "Latency against quality" not in page and "<svg" in page
    assert run("bench", "compare", path, path, "--out", tmp_path / "both.html")[0] == 0


def test_compare_two_grids_and_the_reference(run, grid, tmp_path):
    reference = tmp_path / "reference.csv"
    reference.write_text(CSV)
    code, out, _ = run("bench", "compare", grid, reference, "--out", tmp_path / "both.html")
    assert code == 0 and "reference takes 9.31 times the seconds of grid over 4 settings" in out
    assert "dual over none: 2.00 times as fast in grid, 2.31 times in reference" in out
    page = (tmp_path / "both.html").read_text()
    assert page.count("<svg") == 2 and "do not say which judge" in page
    asked = {"questions": ["A"], "judge": {"id": "x/twin", "revision": "r1"}}
    pairs = [({}, asked), (asked, asked | {"questions": ["B"]}), (asked, asked), (asked, asked | {"judge": None})]
    said = [compare.unlike([SimpleNamespace(meta={"settings": one}) for one in pair]) for pair in pairs]
    assert ["which judge" in said[0], "questions" in said[1], said[2]] == [True, True, ""]
    assert said[3].endswith("one judge: twin (r1) and none")
    longer = tmp_path / "longer.csv"
    longer.write_text(CSV.replace(",8,4,", ",16,4,"))
    assert "no setting is the same" in run("bench", "compare", grid, longer, "--out", tmp_path / "c.html")[1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '{"none": [{"question": "A", "resu', "not JSON"),
        ("a.md", "# A file that never was a grid", "so it is no grid: give the file that dlm bench grid wrote"),
        ("a.json", '{"d_model": 32}', "is no grid"),
        ("a.json", '{"none": [{"question": "A", "result": {"8": {"4": {"latency": 1, "nfe": "x"}}}}]}', "has nfe 'x'"),
        ("a.json", '{"none": [{"question": "A", "result": {"8": {"4": {"latency": 1, "perplexity": 0}}}}]}', "above 0"),
        ("a.json", "[1]", "is no grid"),
        ("a.json", '{"none": [{"question": "A"}]}', "is no grid"),
        ("a.json", "{}", "holds no cell"),
        ("a.json", '{"none": [{"question": "A", "result": {"8": {"4": {"latency": null}}}}]}', "latency None"),
        ("a.csv", "method,steps\nnone,4\n", "lacks the columns question, block_length, latency_s, perplexity"),
        ("a.csv", CSV.replace("4.0", "soon", 1), "line 2 does not parse"),
        ("absent.json", None, "No such file"),
    ],
)
def test_files_that_are_no_grid(run, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, out, error = run("bench", "plot", tmp_path / name)
    assert (code, out) == (2, "") and error.count("\n") == 1 and message in error


# ---------------------------------------------------------------- charts


def test_numbers_as_they_are_written():
    assert [significant(x) for x in (0.01234, 1.2, 45.12, 1234.5, 0)] == ["0.0123", "1.20", "45.1", "1234", "0"]
    assert ticks(0.05, 1.2, True) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1.0])
    assert ticks(0, 43, False) == [0, 10, 20, 30, 40]


def test_colours():
    shade = Shade.over(charts.BLUES, [1.0, 100.0])
    assert (shade.colour(1.0), shade.colour(100.0), shade.colour(10.0)) == (*charts.BLUES[::4], charts.BLUES[2])
    assert about_one([2.0, 0.8]).colour(1.0) == charts.DIVERGING[2] == about_one([1.0]).colour(1.0)
    assert charts.ink_on("#ffffff") == charts.INK and charts.ink_on("#0b4f8a") == "#ffffff"


def test_heat_map_has_a_tile_for_each_value():
    drawn = heat_map(
        "t", [4, 8], [1, 2, 4], {(8, 1): Tile(0.5, True, 7), (4, 4): Tile(2.0)}, about_one([2.0]), "{:.1f}".format
    )
    root = ElementTree.fromstring(drawn)
    groups = [node for node in root.iter() if node.tag.endswith("}g")]
    assert [node.get("data-i") for node in groups] == ["7", None] and drawn.count("url(#hatch)") == 1
    assert drawn.count("stroke-dasharray") == 4  # places without a value


def test_scatter_places_points_on_their_axes():
    series = [Series("a", [Point(1, 10), Point(100, 1000, True, 3)], path=[(1, 10), (100, 10)], stairs=True)]
    root = ElementTree.fromstring(scatter("t", series, Axis("x"), Axis("y")))
    dots = [node for node in root.iter() if node.tag.endswith("circle") and node.get("fill") == charts.SERIES[0]]
    assert (
        len(dots) == 2 and float(dots[0].get("cx")) < 200 and float(dots[0].get("cy")) > 300
    )  # low at the left; legend
    assert "degenerate" in "".join(root.itertext())


def test_accuracy_under_parallelism_is_told(run, grid, tmp_path):
    meta = {
        "aup": [{"method": "dual", "block_length": 8, "aup": 71.25}, {"method": "none", "block_length": 8, "aup": 60.0}]
    }
    (tmp_path / "grid.meta.json").write_text(json.dumps(meta))
    assert (
        "Largest accuracy under parallelism (AUP, arXiv:2601.07568): 71.2 (dual, block 8)."
        in run("bench", "plot", grid)[1]
    )
    assert "<li>60.0: none, block 8</li>" in (tmp_path / "grid.html").read_text()


# ---------------------------------------------------------------- one look, and what is no finding


def test_a_method_has_one_colour_in_every_picture(run, grid, tmp_path):
    """Fault: a colour came from the place in the list of methods, so that a grid without `prefix` had others."""
    found = read_grid(grid)
    both = front_chart([found, replace(found, name="other")], "t", [0, 4])
    assert pass_chart(found).count(f'fill="{colour_of("dual")}"') == 4 + 1  # cells, and the legend
    assert both.count(f'fill="{colour_of("dual")}"') == 1 + 1 and both.count(f'stroke="{colour_of("dual")}"') == 2 + 2
    assert all(
        f'fill="{colour_of("dual")}"' in drawn for _, _, maps_ in maps(found) for name, drawn in maps_ if name == "dual"
    )
    shades = {colour_of(name) for name in (*METHOD_COLOURS, "dual threshold:0.9", "dual factor:1.0")}
    assert len(shades) == len(METHOD_COLOURS) + 2


def test_a_legend_is_not_clipped():
    """Fault: the names of a comparison ran out of the picture at its right."""
    names = [f"{method} · a_grid_with_a_very_long_name_{'x' * 90}" for method in ("none", "dual")] + ["front"]
    root = ElementTree.fromstring(
        scatter("t", [Series(name, [Point(1, 1), Point(2, 2)]) for name in names], Axis("x"), Axis("y"), note="w " * 99)
    )
    width, height = float(root.get("width")), float(root.get("height"))
    for node in root.iter():
        if node.tag.endswith("}text") and node.get("text-anchor") == "start":
            assert float(node.get("x")) + 6.6 * len(node.text) <= width and float(node.get("y")) < height, node.text
    titles = [node.text for node in root.iter() if node.tag.endswith("}title")]
    assert titles == names  # the whole name, under the mouse


def test_a_fit_that_explains_little_is_no_finding(grid, tmp_path):
    """Fault: the line of a fit with R² 0.1 was drawn, and its slope stated."""
    results = json.loads(grid.read_text())
    for number, row in enumerate(results["none"][0]["result"]["8"].values()):
        row["latency"] = (5.0, 0.01)[number]
    grid.write_text(json.dumps(results))
    found = read_grid(grid)
    assert pass_fit(found, "positions_computed").r2 < LEAST_R2
    said = "\n".join(sentences(found))
    assert "does not follow from the positions" in said and "A pass takes" not in said and "µs" not in said
    assert "least squares" not in pass_chart(found) and "No line" in pass_chart(found)


@pytest.mark.parametrize(("latencies", "noisy"), [((1.0, 1.05, 1.02), False), ((1.0, 1.4, 1.6), True)])
def test_a_noisy_run_is_marked(grid, latencies, noisy):
    """By its reference generation, which is measured again and again while a run lasts."""
    records = [{"launch": "a", "rank": 0, "latency": latency} for latency in latencies]
    found = replace(read_grid(grid), meta={"reference": records})
    said = sentences(found)
    assert said[0].startswith("This run is noisy: its reference generation took") is noisy


def test_repeats_that_differ_mark_a_run(grid):
    found = read_grid(grid)
    cells = [cell | {"latency_min": 1.0, "latency_max": 1.3} for cell in found.cells]
    assert "the repeats of a cell differ by 30% (median)" in sentences(replace(found, cells=cells))[0]


@pytest.mark.parametrize(
    "meta",
    [
        [], 7, {"settings": 7}, {"settings": {}}, {"launches": [7]}, {"launches": {}}, {"aup": [{}]},
        {"reference": [{"latency": "x"}]}, {"infeasible": [3]}, {"cells": "x"}, {"degenerate_rule": []},
    ],
)  # fmt: skip
def test_what_stands_beside_a_grid_may_be_damaged(run, grid, tmp_path, meta):
    """Fault: a traceback."""
    (tmp_path / "grid.meta.json").write_text(json.dumps(meta))
    code, out, error = run("bench", "plot", grid)
    assert (code, out) == (2, "") and error.count("\n") == 1 and "grid.meta.json: " in error and "damaged" in error
