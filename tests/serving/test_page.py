"""The server's page in headless Chromium: text denoises, blanks are filled, passes are seen again, errors are words."""

import json
import re
import shutil
import socket
import threading
import time

import pytest

from dlm.checkpoints.pretrained import load_pretrained
from tests.helpers.commandline import checkpoint, tokenizer  # noqa: F401

pytest.importorskip("fastapi", reason="dlm's extra serve is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def served(checkpoint):  # noqa: F811
    """(address, engine) of a server with a tiny model of random weights, in this process."""
    import uvicorn

    from dlm.serving.engine import Engine, EngineSettings
    from dlm.serving.server import ServerSettings, build_app

    engine = Engine(load_pretrained(checkpoint), EngineSettings(max_rows=4))
    engine.wait_until_loaded(60)
    listening = socket.create_server(("127.0.0.1", 0))
    app = build_app(engine, ServerSettings())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", engine
    server.should_exit = True
    thread.join(20)
    engine.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # tests may run as root
        yield found
        found.close()


@pytest.fixture(scope="module")
def tab(browser):
    """(a tab, errors of scripts in it, addresses that it asked)."""
    context = browser.new_context(viewport={"width": 1180, "height": 820})
    context.set_default_timeout(20_000)
    found, wrong, asked = context.new_page(), [], []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
    found.on("request", lambda request: asked.append(request.url))
    return found, wrong, asked


@pytest.fixture
def page(served, tab):
    """The page, open; at the end no script may have failed, and nothing may have been asked of another server."""
    address, (found, wrong, asked) = served[0], tab
    wrong.clear(), asked.clear()
    found.goto(address)
    found.locator("#model", has_text="tiny-fox").wait_for()
    yield found
    found.unroute_all()
    assert not wrong
    assert all(url.startswith(address) for url in asked), asked


def finished(page):
    page.locator("#stop:disabled").wait_for()
    page.locator("#said", has_text=re.compile("^(Finished|Stopped|Not finished)")).wait_for()


def given(page):
    return page.locator("#canvas .given").all_text_contents()


# ---------------------------------------------------------------- writing


def test_a_text_denoises_and_every_pass_can_be_seen_again(page, served):
    """Six tokens, one a pass; from the keyboard; what is read out at the end is what the API answers."""
    page.evaluate("""() => { window.spoken = []; new MutationObserver(() => spoken.push(said.textContent))
        .observe(said, { childList: true, characterData: true, subtree: true }); }""")
    for field, value in (("text", "The cat"), ("length", "6"), ("seed", "5"), ("temperature", "1"), ("block", "3")):
        page.fill(f"#{field}", value)
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    finished(page)
    body = {"prompt": "The cat", "max_tokens": 6, "seed": 5, "temperature": 1, "block_length": 3}
    answer = page.request.post(f"{served[0]}v1/completions", data=body).json()
    spoken = page.evaluate("spoken")
    assert spoken == ["Writing.", f"Finished after 6 passes: The cat{answer['choices'][0]['text']}"]
    assert re.search(r"6 passes · \d tokens · 1\.0 tokens a pass · \d+ tokens a second · .* · seed 5$",
                     page.inner_text("#stats"))  # fmt: skip
    assert page.inner_text("#count") == "pass 6 of 6" and given(page) == ["The cat", ""]
    page.focus("#pass")
    for number in range(5, -1, -1):
        page.keyboard.press("ArrowLeft")
        assert page.locator("#canvas .masked").count() == 6 - number
        assert page.locator("#canvas .new").count() == (1 if number else 0)
        assert page.get_attribute("#pass", "aria-valuetext") == f"pass {number} of 6"
    page.click("#play")
    page.locator("#count", has_text="pass 6 of 6").wait_for()
    assert page.locator("#canvas .masked").count() == 0


def test_the_colour_and_the_words_of_a_token_are_its_confidence(page):
    """hsl(8 + 122 p) as in the pages of dlm replay: 130 degrees where p is 1."""
    page.fill("#length", "4")
    page.click("#write")
    finished(page)
    page.focus("#canvas")
    page.keyboard.press("End")
    words = page.inner_text("#tip")
    sure = float(re.search(r"pass \d, confidence ([0-9.]+)$", words)[1])
    colour = page.evaluate("document.activeElement.style.background")
    assert float(re.match(r"hsl\(([0-9.]+) 65% var\(--l\)", colour)[1]) == pytest.approx(8 + 122 * sure, abs=0.1)
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"


def test_stop_frees_the_row(page, served, monkeypatch):
    from dlm.serving import engine as module

    real, stopped, turns = module.turn, threading.Event(), []

    def held(batch):  # after five passes, until the button is pressed
        turns.append(time.sleep(0.03))
        if len(turns) > 5:
            stopped.wait(30)
        return real(batch)

    monkeypatch.setattr(module, "turn", held)
    page.fill("#length", "100")
    page.click("#write")
    page.locator("#canvas .t").nth(2).wait_for()
    assert page.locator("#write").is_disabled() and served[1].running == 1
    page.click("#stop")
    finished(page)
    stopped.set()
    for _ in range(100):
        if served[1].running == 0:
            break
        time.sleep(0.02)
    assert served[1].running == 0
    assert page.inner_text("#said").startswith("Stopped after ") and page.locator("#canvas .masked").count() > 50
    assert page.locator("#problem").is_hidden() and page.locator("#write").is_enabled()


def test_a_text_is_answered_where_the_model_can(page, served):
    page.locator("#settings").evaluate("box => { box.open = true; }")
    for field, value in (("text", "The cat?"), ("length", "6"), ("seed", "5"), ("temperature", "1"), ("block", "3")):
        page.fill(f"#{field}", value)
    page.check("#chat")
    page.click("#write")
    finished(page)
    body = {"messages": [{"role": "user", "content": "The cat?"}]}
    body |= {"max_tokens": 6, "seed": 5, "temperature": 1, "block_length": 3}
    answer = page.request.post(f"{served[0]}v1/chat/completions", data=body).json()
    said = page.locator("#said").text_content()
    assert said.split(": ", 1)[1] == "The cat?\n\n" + answer["choices"][0]["message"]["content"]


# ---------------------------------------------------------------- infilling


def test_a_selected_part_is_written_anew_and_the_rest_stays(page):
    text = "She walked along the beach and looked for shells."
    page.fill("#text", text)
    page.evaluate("""() => { const box = document.getElementById("text"), at = box.value.indexOf("along the beach ");
        box.focus(); box.setSelectionRange(at, at + "along the beach ".length); }""")
    page.locator("#chosen", has_text="Selected: “along the beach”").wait_for()
    assert page.input_value("#blank") == "4"  # 15 letters
    page.fill("#blank", "5")
    page.click("#fill")
    finished(page)
    assert given(page) == ["She walked ", " and looked for shells."]
    assert page.inner_text("#count") == "pass 5 of 5"
    whole = page.inner_text("#said").split(": ", 1)[1]
    assert whole.startswith("She walked ") and whole.endswith(" and looked for shells.")
    page.click("#use")
    assert page.input_value("#text") == whole


def test_a_part_of_the_canvas_can_be_selected(page):
    pytest.importorskip("outlines_core")
    page.fill("#text", "The cat is ")
    page.fill("#length", "24")
    page.locator("#settings").evaluate("box => { box.open = true; }")
    page.fill("#schema", '{"enum": ["cat", "fox"]}')
    page.click("#write")
    finished(page)
    page.evaluate("""() => { document.activeElement.blur(); const range = document.createRange();
        range.setStart(document.querySelector("#canvas .given").firstChild, 4);
        range.setEnd(document.querySelector("#canvas .given").firstChild, 7);
        getSelection().removeAllRanges(); getSelection().addRange(range); }""")
    page.locator("#chosen", has_text="Selected: “cat”").wait_for()
    page.fill("#schema", "")
    page.click("#fill")
    finished(page)
    before, after = given(page)
    assert before == "The " and after in (' is "cat"', ' is "fox"')


def test_examples_set_all_that_they_need_and_nothing_of_the_last_one(page):
    def fields():
        return [page.input_value(f"#{field}") for field in ("length", "method", "commit", "schema")]

    page.click("text=in any order")
    assert fields() == ["96", "none", "threshold", ""] and page.locator("#threshold").is_visible()
    page.click("text=JSON")
    assert fields()[:3] == ["48", "", ""] and json.loads(fields()[3])["type"] == "object"
    page.click("text=a missing middle")
    assert fields() == ["", "", "", ""] and page.inner_text("#chosen") == "Selected: “The dog was sad.”"


# ---------------------------------------------------------------- errors, in words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"length": "500"}, "max_tokens is 500"),
        ({"length": "0"}, "Length, in tokens is 0: "),
        ({"temperature": "-1"}, "Temperature is -1: "),
        ({"schema": "{a"}, "The JSON schema is not JSON: "),
        ({"block": "4", "text": "a <|mdm_mask|> b"}, "mask token"),
    ],
)
def test_what_does_not_work_is_said_in_words(page, fields, words):
    for field, value in fields.items():
        page.fill(f"#{field}", value)
    page.click("#write")
    page.locator("#problem", has_text=words).wait_for()
    assert page.get_attribute("#problem", "role") == "alert" and page.locator("#write").is_enabled()


def test_fill_without_a_selection_says_what_to_do(page):
    page.click("#fill")
    assert page.inner_text("#problem").startswith("Select the words to rewrite first")


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"Retry-After": "7"}, "The server is busy (so it is). Try again in 7 s."),
        (401, {}, "The server asks for an API key: give it under Settings."),
        (500, {}, "so it is"),
        (None, {}, "The server does not answer. Is dlm serve still running?"),
    ],
)
def test_answers_of_a_server_in_trouble(page, status, headers, words):
    body = json.dumps({"error": {"message": "so it is"}})
    page.route("**/v1/completions", lambda route: route.abort() if status is None else
               route.fulfill(status=status, headers=headers, body=body))  # fmt: skip
    page.click("#write")
    page.locator("#problem", has_text=words).wait_for()
    assert page.locator("#key").is_visible() == (status == 401)
    page.unroute("**/v1/completions")
    page.fill("#length", "2")
    page.click("#write")
    page.locator("#said", has_text="Finished").wait_for()
    assert page.locator("#problem").is_hidden()


def test_a_page_that_was_open_before_its_server_works_once_it_is_there(page):
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    page.locator("#problem", has_text="The server does not answer.").wait_for()
    page.click("#write")
    page.locator("#problem", has_text="The server does not answer.").wait_for()
    page.unroute("**/v1/models")
    page.fill("#length", "2")
    page.click("#write")
    finished(page)
    assert page.inner_text("#model") == "tiny-fox" and page.locator("#problem").is_hidden()


def answer_with(page, *passes, end="data: [DONE]\n\n"):
    """The next completion has these passes: (pieces, committed) each."""
    events = ""
    for pieces, committed in passes:
        sure = [None if piece is None else 0.5 for piece in pieces]
        canvas = {"pass": 1, "pieces": pieces, "confidence": sure, "committed": committed}
        events += f"data: {json.dumps({'choices': [{'text': ''}], 'canvas': canvas})}\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=events + end, content_type="text/event-stream"))


def test_a_connection_that_breaks_keeps_what_was_written(page):
    answer_with(page, ([" a", None], [0]), end="")
    page.click("#write")
    page.locator("#problem", has_text="The connection broke before the text was finished.").wait_for()
    assert page.inner_text("#said") == "Not finished after 1 pass: Once upon a time a"


def test_places_that_change_show_what_they_held(page):
    """A place is written, changed, masked again: back and forth, each pass shows its own state."""
    answer_with(page, ([" a", None], [0]), ([" b", " c"], [0, 1]), ([None, " c"], [0]))
    page.click("#write")
    finished(page)
    shown = {0: "", 1: " a", 2: " b c", 3: " c"}
    for number in (2, 1, 0, 3, 1, 3):
        page.locator("#pass").fill(str(number))
        assert page.locator("#canvas").text_content() == "Once upon a time" + shown[number]
    page.locator("#canvas .masked").focus()
    assert page.inner_text("#tip") == "masked\nchanged 2 times"


def test_a_prompt_is_text_and_never_markup(page):
    page.fill("#text", '<img src="x" onerror="document.title=1"><b>')
    page.fill("#length", "2")
    page.click("#write")
    finished(page)
    assert page.locator("#canvas img, #canvas b").count() == 0 and given(page)[0].endswith("<b>")


# ---------------------------------------------------------------- for everybody


def test_every_field_has_a_name_and_the_keyboard_goes_in_order(page):
    nameless = page.evaluate("""() => [...document.querySelectorAll("input, select, textarea, button")]
        .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim()).map((one) => one.id)""")
    assert nameless == []
    page.focus("#text")
    order = []
    for _ in range(4):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert order == ["write", "fill", "blank", "a story"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_and_contrast_in_both_schemes(served, browser, scheme):
    """At 360 pixels nothing sticks out; every text has a contrast of 4.5 (WCAG AA), on the colours of tokens too."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served[0])
    page.locator("#model", has_text="tiny-fox").wait_for()
    page.fill("#text", "a" * 300)
    page.locator("#settings").evaluate("box => { box.open = true; }")
    page.fill("#length", "8")
    page.click("#write")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = page.evaluate("""() => { const one = (of, name) => getComputedStyle(of)[name]; const body = document.body;
        return { paper: one(body, "backgroundColor"), ink: one(body, "color"),
            quiet: one(document.querySelector(".quiet"), "color"),
            wrong: one(document.getElementById("problem"), "color"),
            tokens: [...document.querySelectorAll(".scale i")].map((box) => one(box, "backgroundColor")) }; }""")
    context.close()
    paper = rgba(colours["paper"])
    for name in ("ink", "quiet", "wrong"):
        assert contrast(rgba(colours[name]), paper) >= 4.5, name
    assert min(contrast(rgba(colours["ink"]), over(rgba(token), paper)) for token in colours["tokens"]) >= 4.5


def rgba(text):
    """Of `rgb(1, 2, 3)` or `rgba(1, 2, 3, 0.4)` the numbers."""
    numbers = [float(number) for number in re.findall(r"[0-9.]+", text)]
    return (*numbers, 1.0)[:4]


def over(top, paper):
    return [top[3] * a + (1 - top[3]) * b for a, b in zip(top[:3], paper[:3], strict=True)]


def contrast(one, other):
    """WCAG 2.2's contrast ratio."""
    light = []
    for colour in (one, other):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour[:3])]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_the_pages_of_replay_have_the_same_colours():
    """One colour scale in both: replay's page holds the file of the server's page."""
    from importlib.resources import files

    from dlm.cli.replay import page as replay_page
    from dlm.sampling.trajectory import Recording

    scale = files("dlm.serving").joinpath("page/scale.js").read_text(encoding="utf-8")
    assert "hue" in scale and scale in replay_page([Recording(0, frozenset(), {}, [[0]], [[False]])])
