"""Laws of the page of `seq2seq serve`, in Chromium against a server with canned answers."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from seq2seq.serving.app import create_app
from seq2seq.serving.assets import PAGE, assets
from tests.helpers import fake_server
from tests.helpers.browser import chromium
from tests.helpers.fake_server import FakeServer
from tests.helpers.serving import HEADS, LAYERS, FakeService, model_info, running, serve_config

SLOW = pytest.mark.slow
TEXT = "A dog runs in the snow. The teacher reads a book.\n\n  The cat sleeps."
SENTENCES = ["A dog runs in the snow.", "The teacher reads a book.", "The cat sleeps."]
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;b"
DESKTOP = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server.fake_server() as server:
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])  # type: ignore[arg-type]
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: FakeServer) -> Iterator[Page]:
    """A tab with the page, in which no script may fail and no request may go elsewhere."""
    problems: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("console", lambda message: problems.append(message.text) if is_problem(message.text) else None)
    page.on("request", lambda request: problems.extend([] if is_local(request.url, server) else [request.url]))
    page.on("response", lambda response: problems.extend([response.url] if is_missing(response) else []))
    page.goto(server.url)
    expect(page.locator("#title")).to_have_text("English → German")
    yield page
    assert problems == []


def is_problem(message: str) -> bool:
    return not message.startswith("Failed to load resource")  # an answer of the API: `is_missing` judges the files


def is_local(url: str, server: FakeServer) -> bool:
    return url.startswith((server.url, "data:", f"blob:{server.url}"))


def is_missing(response: Any) -> bool:
    return response.status >= 400 and not urlsplit(response.url).path.startswith(("/v1/", "/health"))


def finished(page: Page) -> None:
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")


# Both events together: between them a slow machine would translate what rests.
ENTER = """(node, text) => {
  node.value = text;
  node.dispatchEvent(new Event("input", { bubbles: true }));
  node.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true, bubbles: true, cancelable: true }));
}"""


def translate(page: Page, text: str) -> None:
    page.locator("#source").evaluate(ENTER, text)
    finished(page)


def german(text: str) -> str:
    return str(fake_server.translated(text, "", {})["text"])


def output(page: Page) -> str:
    return page.locator("#output").evaluate("node => node.textContent")


def word(page: Page, text: str) -> Any:
    return page.locator("#output .word", has_text=re.compile(f"^{re.escape(text)}$")).first


def call(page: Page, module: str, expression: str, argument: Any) -> Any:
    """Evaluate an expression of a module `m` and an argument `x` in the page."""
    return page.evaluate(f"async x => {{ const m = await import('./static/{module}'); return {expression} }}", argument)


# ---------------------------------------------------------------------------------------------------------- files


def test_every_file_that_the_page_names_is_served() -> None:
    served = assets()
    html = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.html"))
    named = re.findall(r'(?:src|href)="static/([^"]+)"', html)
    for content, _ in served.values():
        named += re.findall(r'from "\./([^"]+)"', content.decode())
    assert set(named) == set(served), "each is needed, and no other"
    types = {(Path(name).suffix, media_type.partition(";")[0]) for name, (_, media_type) in served.items()}
    assert types == {(".css", "text/css"), (".js", "text/javascript")}, "what browsers accept"


def test_the_page_obeys_its_security_policy() -> None:
    html = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.html"))
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=|https?://", html)
    for name, (content, _) in assets().items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", content.decode()), name


# ---------------------------------------------------------------------------------------------- pure functions


@SLOW
def test_words_spell_what_their_subwords_do(page: Page) -> None:
    pieces = ["▁Ein", "▁Haus", "boot", ",", "▁", "das", "▁don", "'", "t", "▁(", "3", ")", "!", "?", "▁", "."]
    words = call(page, "words.js", "m.wordsOf(x).map(({ text, isSpaced }) => [text, isSpaced])", pieces)
    spelled = "".join(" " * spaced + text for text, spaced in words)
    assert spelled == "".join(pieces).replace("▁", " ").strip()
    assert [text for text, _ in words] == ["Ein", "Hausboot", ",", "das", "don't", "(", "3", ")!?", "."]
    odd = ["▁gr", "<0xC3>", "<0xBC>", "n"]
    assert call(page, "words.js", "m.wordsOf(x).map((word) => word.text)", odd) == ["grün"], "bytes of one letter"
    given = [0.5, 0.25, 0.5]
    assert call(page, "words.js", "m.wordsOf(['▁a', 'b', '▁c'], x).map((w) => w.probability)", given) == [0.125, 0.5]


@SLOW
def test_marked_words_are_those_outside_a_longest_common_subsequence(page: Page) -> None:
    draw = random.Random(1)
    for _ in range(30):
        a, b = ([draw.choice("uvwxyz") for _ in range(draw.randrange(9))] for _ in range(2))
        kept_a, kept_b = call(page, "words.js", "m.commonWords(x[0], x[1])", [a, b])
        common = [word for word, kept in zip(a, kept_a, strict=True) if kept]
        assert common == [word for word, kept in zip(b, kept_b, strict=True) if kept]
        matched = sum(block.size for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
        assert len(common) >= matched, "at least as long as a greedy match"


@SLOW
def test_events_do_not_depend_on_how_the_stream_is_cut(page: Page) -> None:
    text = 'event: partial\ndata: {"a":\ndata: 1}\n\n: comment\n\nevent: done\r\ndata: {"ä": 2}\r\n\r\n'
    whole = [{"name": "partial", "data": '{"a":\n1}'}, {"name": "done", "data": '{"ä": 2}'}]
    read = "x.reduce(([all, rest], part) => { const [e, r] = m.readEvents(rest + part); return [[...all, ...e], r] }"
    for size in (1, 2, 3, 7, len(text)):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert call(page, "server.js", f"{read}, [[], ''])", parts) == [whole, ""], size


@SLOW
def test_the_chunks_of_a_file_hold_every_line_once(page: Page) -> None:
    lines = ["", "x" * 20_000, *(["a line of text", " "] * 200), "y" * 7_990, "last"]
    chunks = call(page, "file.js", "m.chunksOf(x)", lines)
    assert [i for chunk in chunks for i in chunk] == [i for i, line in enumerate(lines) if line.strip()]
    assert all(len(chunk) == 1 or sum(len(lines[i]) for i in chunk) <= 8000 for chunk in chunks)


# ---------------------------------------------------------------------------------------------------- translation


@SLOW
def test_a_translation_grows(page: Page, server: FakeServer) -> None:
    server.held = SENTENCES[0]
    page.fill("#source", SENTENCES[0])
    growing = page.locator("#output .growing")
    growing.wait_for()
    assert german(SENTENCES[0]).startswith(growing.inner_text())
    server.released.set()
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    finished(page)
    expect(growing).to_have_count(0)
    assert server.bodies("/v1/stream") == [{"text": SENTENCES[0], "model": "demo"}], "nothing but what is needed"


@SLOW
def test_a_text_is_translated_when_the_keys_rest(page: Page, server: FakeServer) -> None:
    page.clock.install()
    page.clock.pause_at("2100-01-01")
    page.locator("#source").press_sequentially(SENTENCES[0])
    assert not server.bodies("/v1/stream"), "not for every key"
    page.clock.run_for(1000)
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    assert [body["text"] for body in server.bodies("/v1/stream")] == [SENTENCES[0]]


@SLOW
def test_a_text_keeps_its_line_ends_and_spaces(page: Page) -> None:
    translate(page, TEXT)
    assert output(page) == german(TEXT)
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == german(TEXT)


@SLOW
def test_a_new_text_cancels_the_request_for_the_former_one(page: Page, server: FakeServer) -> None:
    server.held = SENTENCES[0]
    page.fill("#source", SENTENCES[0])
    page.locator("#output .growing").wait_for()
    with page.expect_event("requestfailed") as cancelled:
        page.fill("#source", SENTENCES[1])
    assert json.loads(cancelled.value.post_data or "")["text"] == SENTENCES[0]
    expect(page.locator("#output")).to_have_text(german(SENTENCES[1]))


@SLOW
def test_a_text_on_its_way_is_not_sent_again(page: Page, server: FakeServer) -> None:
    server.held = SENTENCES[0]
    page.fill("#source", SENTENCES[0])
    page.locator("#output .growing").wait_for()
    page.press("#source", "Control+Enter")
    server.released.set()
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    finished(page)
    assert len(server.bodies("/v1/stream")) == 1
    translate(page, SENTENCES[0])
    assert len(server.bodies("/v1/stream")) == 2, "but once it is translated"


@SLOW
def test_control_enter_translates_at_once_and_enter_begins_a_line(page: Page, server: FakeServer) -> None:
    page.clock.install()
    page.clock.pause_at("2100-01-01")
    page.locator("#source").press_sequentially("A dog")
    page.press("#source", "Enter")
    assert page.input_value("#source") == "A dog\n" and not server.bodies("/v1/stream"), "the clock stands still"
    page.press("#source", "Control+Enter")
    expect(page.locator("#output")).to_have_text("Ein Hund")


@SLOW
def test_an_empty_text_needs_no_request(page: Page, server: FakeServer) -> None:
    translate(page, SENTENCES[0])
    page.click("#clear")
    expect(page.locator("#output .word")).to_have_count(0)
    finished(page)
    assert [body["text"] for body in server.bodies("/v1/stream")] == [SENTENCES[0]]


@SLOW
def test_the_shade_of_a_word_is_its_probability(page: Page) -> None:
    translate(page, TEXT)
    sentences = fake_server.translated(TEXT, "", {})["sentences"]
    words = [
        found
        for sentence in sentences
        for one in sentence["translations"]
        for found in call(page, "words.js", "m.wordsOf(...x)", [one["pieces"], one["probabilities"]])
    ]
    shown = page.locator("#output .word")
    assert shown.all_text_contents() == [found["text"] for found in words]
    classes = shown.evaluate_all("nodes => nodes.map(node => node.className)")
    for found, name in zip(words, classes, strict=True):
        p = found["probability"]
        assert name == f"word {'sure' if p >= 0.9 else 'unsure' if p >= 0.5 else 'doubtful'}", found
    styles = page.locator(".legend .word").evaluate_all(
        "nodes => nodes.map(node => { const s = getComputedStyle(node);"
        " return `${s.textDecorationLine} ${s.textDecorationStyle}` })"
    )
    assert len(set(styles)) == 3, "not by colour alone"


@SLOW
def test_the_probability_of_a_word_appears_on_hover_and_focus(page: Page) -> None:
    translate(page, SENTENCES[1])
    pieces = fake_server.translation(SENTENCES[1], german(SENTENCES[1]))
    parts = dict(zip(pieces["pieces"], pieces["probabilities"], strict=False))
    number = parts["▁Lehr"] * parts["er"]
    tip = page.locator("#tip")
    word(page, "Lehrer").hover()
    expect(tip).to_have_text(f"{number:.2f}  =  ▁Lehr {parts['▁Lehr']:.2f} · er {parts['er']:.2f}")
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    word(page, "Lehrer").focus()
    expect(tip).to_be_visible()
    assert word(page, "Lehrer").get_attribute("aria-label") == f"Lehrer, probability {number:.2f}"


@SLOW
def test_a_screen_reader_hears_the_translation_once(page: Page) -> None:
    page.evaluate(
        "() => { window.heard = []; const node = document.getElementById('announcer');"
        " new MutationObserver(() => heard.push(node.textContent)).observe(node, { childList: true }) }"
    )
    translate(page, TEXT)
    assert page.evaluate("heard") == [german(TEXT)]
    assert page.locator("#announcer").get_attribute("aria-live") == "polite"


# --------------------------------------------------------------------------------------------------- alternatives


@SLOW
def test_the_model_goes_on_from_a_chosen_word(page: Page, server: FakeServer) -> None:
    translate(page, TEXT)
    word(page, "Hund").click()
    options = page.locator("[role=option]")
    expect(options).to_have_count(4)
    asked = server.bodies("/v1/alternatives")[0]
    assert asked == {"text": SENTENCES[0], "prefix": "Ein", "model": "demo", "count": 6}
    expect(options.nth(1)).to_contain_text("Wolf")
    expect(options.nth(1)).to_contain_text("0.25")
    expect(options.nth(1)).to_contain_text("rennt im der Schnee.")
    options.nth(1).click()
    expect(page.locator("#fixed .fixed")).to_contain_text("Fixed beginning: Ein Wolf")
    body = server.bodies("/v1/translate")[-1]
    assert (body["text"], body["prefix"], body["split"]) == ([SENTENCES[0]], ["Ein Wolf"], False)
    assert output(page) == german(TEXT).replace("Hund", "Wolf"), "no other sentence changes"
    assert page.locator("#output .chosen").all_text_contents() == ["Ein", "Wolf"]


@SLOW
def test_a_choice_can_be_undone_and_all_be_released(page: Page) -> None:
    translate(page, SENTENCES[0])
    for shown, chosen in (("Hund", "Wolf"), ("rennt", "Mann")):
        word(page, shown).click()
        page.locator("[role=option]", has_text=chosen).click()
        expect(page.locator("#fixed .fixed")).to_contain_text(chosen)
    assert output(page) == "Ein Wolf Mann im der Schnee."
    page.click("text=Undo")
    assert output(page) == "Ein Wolf rennt im der Schnee."
    word(page, "rennt").click()
    page.locator("[role=option]", has_text="Vogel").click()
    expect(page.locator("#output")).to_have_text("Ein Wolf Vogel im der Schnee.")
    page.click("text=Release")
    assert output(page) == german(SENTENCES[0])
    expect(page.locator("#fixed .fixed")).to_have_count(0)


@SLOW
def test_a_fixed_beginning_lasts_as_long_as_its_sentence(page: Page) -> None:
    translate(page, SENTENCES[0])
    word(page, "Hund").click()
    page.locator("[role=option]", has_text="Wolf").click()
    expect(page.locator("#fixed .fixed")).to_have_count(1)
    translate(page, TEXT)
    assert output(page) == german(TEXT).replace("Hund", "Wolf"), "while another sentence is typed"
    translate(page, "A dog runs.")
    expect(page.locator("#fixed .fixed")).to_have_count(0)
    translate(page, TEXT)
    assert output(page) == german(TEXT)


@SLOW
def test_an_alternative_that_lengthens_a_word_is_one(page: Page, server: FakeServer) -> None:
    server.alternatives = [
        {"piece": "e", "probability": 0.3, "text": "Ein Hunde rennt."},
        {"piece": "</s>", "probability": None, "text": "Ein Hund"},
    ]
    translate(page, "A dog runs.")
    word(page, "rennt").click()
    options = page.locator("[role=option]")
    expect(options.nth(0)).to_contain_text("…e")
    expect(options.nth(1)).to_have_attribute("aria-disabled", "true")
    options.nth(0).click()
    expect(page.locator("#fixed .fixed")).to_contain_text("Ein Hunde")
    assert server.bodies("/v1/translate")[-1]["prefix"] == ["Ein Hunde"]


@SLOW
def test_the_keyboard_suffices(page: Page, server: FakeServer) -> None:
    keyboard = page.keyboard

    def focused() -> str:
        return str(page.evaluate("document.activeElement.textContent.trim()"))

    keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    keyboard.press("/")
    expect(page.locator("#source")).to_be_focused()
    keyboard.type(SENTENCES[0])
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    finished(page)
    for _ in range(3):  # past the two buttons below the text
        keyboard.press("Tab")
    assert focused() == "Ein"
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    expect(page.locator("[role=option]").first).to_be_focused()
    keyboard.press("Escape")
    assert focused() == "Hund", "the focus returns"
    keyboard.press("Enter")
    expect(page.locator("[role=option]").first).to_be_focused()
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    expect(page.locator("#output")).to_contain_text("Ein Wolf")
    expect(word(page, "Wolf")).to_be_focused()
    keyboard.press("Backspace")
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    page.locator("#copy-link").focus()
    keyboard.press("Tab")
    for name in ("Other translations", "Compare", "Search options", "File", "History", "Attention"):
        keyboard.press("ArrowRight")
        assert focused() == name and page.locator("[role=tab][aria-selected=true]").inner_text() == name


@SLOW
def test_every_control_has_a_name(page: Page, server: FakeServer) -> None:
    translate(page, TEXT)
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('input, select, textarea, button, [role=tab], [role=option]')]"
        ".filter(n => !(n.getAttribute('aria-label') || n.labels?.length || n.textContent.trim()))"
        ".map(n => n.outerHTML)"
    )
    assert nameless == []
    assert page.locator("main, header, footer").count() == 3 and page.locator("h1").count() == 1


# --------------------------------------------------------------------------------------------- panels: attention


@SLOW
def test_attention_shows_every_head_as_a_map_and_as_links(page: Page, server: FakeServer) -> None:
    translate(page, TEXT)
    cells = page.locator("#attention rect.cell")
    target, source = fake_server.pieces_of(german(SENTENCES[0])), fake_server.pieces_of(SENTENCES[0])
    expect(cells).to_have_count((len(target) + 1) * (len(source) + 1))
    layers, heads = fake_server.LAYERS, fake_server.HEADS
    assert page.locator("#attention .heads button").count() == layers * (heads + 1) + 1
    weights = fake_server.weights(len(target) + 1, len(source) + 1)
    means = [head for layer in weights for head in layer]
    cells.nth(1).hover()
    mean = sum(head[0][1] for head in means) / len(means)
    expect(page.locator("#attention .head .number")).to_have_text(f"{target[0][1:]} → {source[1][1:]}: {mean:.3f}")
    page.click('#attention [data-layer="1"][data-head="2"]')
    cells.nth(1).hover()
    expect(page.locator("#attention .head .number")).to_contain_text(f"{weights[1][2][0][1]:.3f}")
    page.locator("#attention .links text", has_text="Hund").hover()
    assert page.locator("#attention path.hot").count() >= 1 and page.locator("#attention path.faint").count() >= 1
    assert page.locator("#attention [aria-pressed=true]").count() == 2, "the unit and the head"


@SLOW
def test_attention_is_that_of_the_selected_sentence_and_is_fetched_once(page: Page, server: FakeServer) -> None:
    translate(page, TEXT)
    word(page, "Lehrer").focus()
    target, source = fake_server.pieces_of(german(SENTENCES[1])), fake_server.pieces_of(SENTENCES[1])
    expect(page.locator("#attention rect.cell")).to_have_count((len(target) + 1) * (len(source) + 1))
    page.select_option("#attention select", "0")
    expect(page.locator("#attention .text")).to_contain_text(SENTENCES[0])
    assert [body["source"] for body in server.bodies("/v1/score")] == [[SENTENCES[0]], [SENTENCES[1]]]
    page.click("#tab-file")
    translate(page, SENTENCES[2])
    assert len(server.bodies("/v1/score")) == 2, "only while its panel is open"


@SLOW
def test_arrow_keys_read_single_weights(page: Page) -> None:
    translate(page, SENTENCES[0])
    page.locator("#attention rect.cell").first.wait_for()
    page.get_by_role("button", name="Words", exact=True).press("Enter")
    page.locator("#attention .heat[tabindex]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#attention .head .number")).to_contain_text("Hund → dog: 0.")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#attention .head .number")).to_contain_text("Ein → dog: 0.")


# ----------------------------------------------------------------------------------------- panels: other ones


@SLOW
def test_another_translation_of_the_list_takes_the_first_ones_role(page: Page, server: FakeServer) -> None:
    translate(page, SENTENCES[0])
    page.click("#tab-others")
    page.click("text=Show the 5 best")
    rows = page.locator("#others tbody tr")
    expect(rows).to_have_count(5)
    assert server.bodies("/v1/stream")[-1]["search"] == {"n_best": 5}, "the beam has five hypotheses already"
    best = fake_server.sentence(SENTENCES[0], {"n_best": 5})["translations"]
    for row, one in zip(rows.all(), best, strict=True):
        assert f"{one['score']:.3f}".replace("-", "−") in row.inner_text()
    rows.nth(2).locator("button").click()
    expect(page.locator("#output")).to_have_text(best[2]["text"])
    page.click("#tab-attention")
    expect(page.locator("#attention .text")).to_contain_text(best[2]["text"])
    assert server.bodies("/v1/score")[-1]["target"] == [best[2]["text"]]


@SLOW
def test_two_searches_are_compared_word_by_word(page: Page, server: FakeServer) -> None:
    translate(page, SENTENCES[0])
    page.click("#tab-compare")
    marks = page.locator("#compare mark")
    expect(marks.first).to_be_visible()
    assert server.bodies("/v1/translate")[-1] == {"text": [SENTENCES[0]], "model": "demo", "search": {"beam": 1}}
    ours, greedy = german(SENTENCES[0]), fake_server.german(SENTENCES[0], variant=1)
    differing = [set(ours.split()) - set(greedy.split()), set(greedy.split()) - set(ours.split())]
    assert [set(page.locator(f"#compare .{name}").all_text_contents()) for name in ("missed", "added")] == differing
    assert page.locator("#compare .compared").all_text_contents() == [ours, greedy]
    page.select_option("#compare-search", "as above")
    expect(page.locator("#compare [role=status]")).to_have_text("Both translations are the same.")
    expect(marks).to_have_count(0)


@SLOW
def test_two_models_are_compared_and_chosen(context: BrowserContext, server: FakeServer) -> None:
    server.models = [fake_server.model(name, "lstm") for name in ("demo", "other")]
    page = context.new_page()
    page.goto(server.url)
    translate(page, SENTENCES[0])
    page.click("#tab-compare")
    expect(page.locator("#compare h3").last).to_have_text("other, the same search")
    assert server.bodies("/v1/translate")[-1] == {"text": [SENTENCES[0]], "model": "other"}
    page.select_option("#model", "other")
    expect(page.locator("#description")).to_contain_text("other")
    finished(page)
    assert server.bodies("/v1/stream")[-1]["model"] == "other"


@SLOW
def test_only_changed_options_are_sent(page: Page, server: FakeServer) -> None:
    def sent() -> Any:
        finished(page)
        return server.bodies("/v1/stream")[-1].get("search")

    translate(page, SENTENCES[0])
    assert sent() is None
    page.click("#tab-search")
    for option in fake_server.OPTIONS:
        expect(page.locator(f"#search-{option['name']}-help")).to_have_text(option["help"].replace("`", ""))
    page.click("#search >> text=greedy")
    expect(page.locator("#tab-search")).to_have_text("Search options · 1 changed")
    expect(page.locator("#output")).to_have_text(fake_server.german(SENTENCES[0], variant=1))
    assert sent() == fake_server.changes("greedy")
    expect(page.locator("#search .changed")).to_contain_text("changed from 5")
    page.click("#reset")
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    assert sent() is None
    page.fill("#search-require", "Schnee, alter Hund")
    page.press("#search-require", "Enter")
    finished(page)  # each request alone: the server may read one that the page gave up after the next
    page.select_option("#search-stop", "likely")
    finished(page)
    page.fill("#search-length_penalty", "0.5")
    page.press("#search-length_penalty", "Enter")
    expect(page.locator("#tab-search")).to_have_text("Search options · 3 changed")
    changed = {"stop": "likely", "length_penalty": 0.5, "require": ["Schnee", "alter Hund"]}
    assert sent() == changed


@SLOW
def test_former_translations_are_kept_in_the_browser(page: Page) -> None:
    stored = "JSON.parse(localStorage.getItem('seq2seq-history')).map((entry) => entry.text)"
    translate(page, "A dog")
    translate(page, SENTENCES[0].replace(".", ""))
    translate(page, "A dog runs")
    assert page.evaluate(stored) == ["A dog runs"], "what is typed on is one entry"
    page.click("#clear")
    translate(page, SENTENCES[1])
    assert page.evaluate(stored) == [SENTENCES[1], "A dog runs"]
    page.reload()
    page.click("#tab-history")
    page.click("#history >> text=A dog runs")
    expect(page.locator("#output")).to_have_text("Ein Hund rennt")
    assert page.input_value("#source") == "A dog runs"
    page.click("text=Clear the history")
    assert page.evaluate(stored) == []
    translate(page, SENTENCES[0])
    page.click("#history [type=checkbox]")
    assert page.evaluate(stored) == [], "nothing remains"
    translate(page, SENTENCES[2])
    assert page.evaluate(stored) == [], "and nothing is added"
    page.reload()
    page.click("#tab-history")
    expect(page.locator("#history")).to_contain_text("switched off")


@SLOW
def test_the_history_is_bounded_and_survives_what_others_store(page: Page) -> None:
    old = [{"text": f"text {i}", "translation": "x", "model": "demo", "time": i} for i in range(60)]
    for value in (json.dumps([None, 3, {"text": 1}, *old]), "not JSON", '{"a": 1}'):
        page.evaluate("value => localStorage.setItem('seq2seq-history', value)", value)
        page.reload()
        translate(page, SENTENCES[0])
        stored = page.evaluate("JSON.parse(localStorage.getItem('seq2seq-history'))")
        assert stored[0]["text"] == SENTENCES[0] and len(stored) <= 50


@SLOW
def test_a_link_restores_text_and_settings_without_the_server_seeing_it(
    page: Page, context: BrowserContext, server: FakeServer
) -> None:
    page.click("#tab-search")
    page.click("#search >> text=greedy")
    translate(page, f"{SENTENCES[0]} #?&=ü\n{SENTENCES[1]}")
    page.click("#copy-link")
    expect(page.locator("#copy-link")).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    shown = output(page)
    server.requests.clear()
    other = context.new_page()
    other.goto(link)
    expect(other.locator("#output")).to_have_text(shown)
    assert other.input_value("#source") == page.input_value("#source")
    assert server.bodies("/v1/stream")[-1]["search"] == fake_server.changes("greedy")
    assert not [path for path, _ in server.requests if "dog" in path or "#" in path]
    other.goto(f"{server.url}#text=A%20dog&model=nosuch&search=%7Bcut")
    other.reload()
    expect(other.locator("#output")).to_have_text("Ein Hund")


# ------------------------------------------------------------------------------------------------------------ files


def text_file(name: str, content: bytes) -> Any:
    return {"name": name, "mimeType": "text/plain", "buffer": content}


def download(page: Page) -> tuple[str, str]:
    with page.expect_download() as begun:
        page.locator("#file a.button").click()
    return begun.value.suggested_filename, Path(begun.value.path()).read_bytes().decode()


@SLOW
def test_a_file_is_translated_line_by_line(page: Page, server: FakeServer) -> None:
    lines = [f"{SENTENCES[i % 3]} {i}" if i % 7 else "  " for i in range(150)]
    text = "\r\n".join(lines) + "\n"
    server.busy = 2
    page.set_input_files("#chooser", text_file("notes.en.txt", text.encode()))
    expect(page.locator("#file [role=status]")).to_contain_text("the server is busy, waiting")
    expect(page.locator("#file a.button")).to_be_visible()
    name, content = download(page)
    assert name == "notes.en.de.txt"
    assert content == "\r\n".join(german(line) if line.strip() else line for line in lines) + "\n"
    bodies = server.bodies("/v1/translate")
    assert len({tuple(body["text"]) for body in bodies}) > 1, "several requests"


@SLOW
def test_a_cancelled_file_goes_on_where_it_stopped(page: Page, server: FakeServer) -> None:
    lines = [f"{SENTENCES[0]} {i}" for i in range(300)]
    server.held = lines[-1]
    page.set_input_files("#chooser", text_file("a.txt", "\n".join(lines).encode()))
    expect(page.locator("#file [role=status]")).to_contain_text("288 of 300 lines")
    page.click("text=Cancel")
    expect(page.locator("#file [role=status]")).to_contain_text("cancelled")
    server.held = ""
    before = len(server.bodies("/v1/translate"))
    page.click("text=Go on")
    expect(page.locator("#file [role=status]")).to_have_text("300 of 300 lines translated")
    assert download(page)[1] == "\n".join(map(german, lines))
    again = [line for body in server.bodies("/v1/translate")[before:] for line in body["text"]]
    assert again == lines[288:], "what was translated is kept"


@SLOW
def test_a_dropped_file_must_be_text(page: Page) -> None:
    drop = (
        "bytes => { const data = new DataTransfer();"
        " data.items.add(new File([new Uint8Array(bytes)], 'dropped.txt'));"
        " for (const type of ['dragover', 'drop'])"
        " document.body.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true })) }"
    )
    page.evaluate(drop, list(SENTENCES[0].encode("utf-16")))
    expect(page.locator("#problem")).to_contain_text("dropped.txt is not UTF-8 text")
    page.evaluate(drop, list(SENTENCES[0].encode()))
    expect(page.locator("#file a.button")).to_be_visible()
    assert download(page)[1] == german(SENTENCES[0])


# --------------------------------------------------------------------------------------------------------- problems


@SLOW
def test_a_busy_server_is_asked_again(page: Page, server: FakeServer) -> None:
    server.busy = 1
    page.fill("#source", SENTENCES[0])
    expect(page.locator("#progress")).to_have_text("the server is busy; goes on in 1 s")
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    assert page.locator("#problem").inner_text() == ""


@SLOW
def test_an_error_is_one_line_until_it_is_mended(page: Page, server: FakeServer) -> None:
    server.error = "search.beam: 'x' is not a whole number"
    page.fill("#source", SENTENCES[0])
    expect(page.locator("#problem span")).to_have_text(server.error)
    assert page.locator("#problem").get_attribute("role") == "alert"
    finished(page)
    server.error = None
    page.click("text=Try again")
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    expect(page.locator("#problem span")).to_have_count(0)


@SLOW
def test_a_lost_server_is_found_again(page: Page, context: BrowserContext) -> None:
    page.clock.install()
    translate(page, SENTENCES[0])
    context.set_offline(True)
    page.fill("#source", SENTENCES[1])
    page.press("#source", "Control+Enter")
    expect(page.locator("#problem span")).to_contain_text("The server does not answer.")
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    page.clock.fast_forward(5000)
    expect(page.locator("#problem span")).to_contain_text("The server does not answer.")
    context.set_offline(False)
    for _ in range(3):
        page.clock.fast_forward(5000)
    expect(page.locator("#output")).to_have_text(german(SENTENCES[1]))
    expect(page.locator("#problem span")).to_have_count(0)


@SLOW
def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page, server: FakeServer) -> None:
    server.key = "sesame"
    page.fill("#source", SENTENCES[0])
    dialog = page.locator("#key")
    expect(dialog).to_be_visible()
    expect(page.locator("#key-problem")).to_have_text("the API key is wrong")
    page.fill("#key-value", "wrong")
    page.press("#key-value", "Enter")
    expect(page.locator("#key-value")).to_have_value("")
    expect(dialog).to_be_visible()
    page.fill("#key-value", "sesame")
    page.press("#key-value", "Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#output")).to_have_text(german(SENTENCES[0]))
    page.reload()
    translate(page, SENTENCES[1])
    expect(dialog).to_be_hidden()
    assert page.evaluate("localStorage.getItem('seq2seq-api-key')") is None
    server.key = "changed"
    page.fill("#source", SENTENCES[2])
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#problem span")).to_have_text("the API key is wrong")


# -------------------------------------------------------------------------------------------------- the application


@SLOW
def test_the_application_answers_all_that_the_page_asks(context: BrowserContext) -> None:
    """The same page, served by the application of `seq2seq serve` over a service without models."""
    service = FakeService([model_info("toy"), model_info("other")])
    problems: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    with running(create_app(service, serve_config())) as url:
        page.goto(url)
        expect(page.locator("#facts")).to_contain_text("BLEU 30.5")
        translate(page, "one two three.\n\nfour five.")
        assert output(page) == "three. two one\n\nfive. four"
        expect(page.locator("#attention rect.cell").first).to_be_visible()
        assert page.locator("#attention .heads button").count() == LAYERS * (HEADS + 1) + 1
        page.locator("#output .word").nth(2).click()
        expect(page.locator("[role=option]")).to_have_count(6)
        page.keyboard.press("Enter")
        expect(page.locator("#fixed .fixed")).to_have_count(1)
        page.click("#tab-others")
        page.click("text=Show the 5 best")
        expect(page.locator("#others tbody tr")).to_have_count(5)
        page.click("#tab-compare")
        expect(page.locator("#compare .compared")).to_have_count(2)
        page.click("#tab-search")
        for preset in page.locator("#search [role=group] button").all():  # the last one resets
            preset.click()
            finished(page)
        page.set_input_files("#chooser", text_file("a.txt", b"one two\nthree four\n"))
        expect(page.locator("#file a.button")).to_be_visible()
        assert download(page)[1] == "two one\nfour three\n"
    assert problems == []


# ------------------------------------------------------------------------------------------------------- appearance


PANELS = ("attention", "others", "compare", "search", "file", "history")
# The contrast of each visible text with what is painted below it.
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const below = (node) => (node ? [...below(node.parentElement), getComputedStyle(node).backgroundColor] : []);
  const isText = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const nodes = [...document.body.querySelectorAll("*")];
  return nodes.filter((node) => isText(node) && node.checkVisibility()).map((node) => {
    const style = getComputedStyle(node);
    const ink = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [paint([...below(node), ink]), paint(below(node))].map(luminance);
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 120)];
  });
}"""


@SLOW
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible_in_both_themes(scheme: Any, page: Page, server: FakeServer) -> None:
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("html")).to_have_attribute("data-theme", scheme)
    translate(page, TEXT)
    for panel in PANELS:
        page.click(f"#tab-{panel}")
        page.mouse.move(0, 0)
        for contrast, node in page.evaluate(CONTRASTS):
            assert contrast >= 4.5, (panel, node)
    server.held = "grows"
    page.fill("#source", "This grows.")
    page.locator("#output .growing").wait_for()
    assert min(contrast for contrast, _ in page.evaluate(CONTRASTS)) >= 4.5


@SLOW
@pytest.mark.parametrize("width", [360, 600])  # a phone; a desktop of 1200 pixels at 200 %
def test_nothing_is_wider_than_a_phone(width: int, page: Page) -> None:
    page.set_viewport_size({"width": width, "height": 780})
    translate(page, f"{TEXT} {'Donaudampfschifffahrt' * 6} {'x' * 300}")
    word(page, "Hund").click()
    page.locator("[role=option]").first.click()
    expect(page.locator("#fixed .fixed")).to_have_count(1)
    for panel in PANELS:
        page.click(f"#tab-{panel}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, panel
    word(page, "Schnee").click()
    page.locator("[role=option]").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@SLOW
def test_reduced_motion_is_respected(page: Page, server: FakeServer) -> None:
    server.held = SENTENCES[0]
    blink = "node => getComputedStyle(node, '::after').animationName"
    for motion, name in (("no-preference", "blink"), ("reduce", "none")):
        page.emulate_media(reduced_motion=motion)  # type: ignore[arg-type]
        page.fill("#source", f"{motion} {SENTENCES[0]}")
        growing = page.locator("#output .growing", has_text=re.compile(motion, re.IGNORECASE))
        assert growing.evaluate(blink) == name


@SLOW
def test_a_text_from_right_to_left_begins_on_the_right(page: Page) -> None:
    direction = "node => getComputedStyle(node).direction"
    translate(page, "كلب يجري في الثلج.")
    assert page.locator("#output").evaluate(direction) == "rtl"
    words = page.locator("#output .word").evaluate_all("nodes => nodes.map(node => node.getBoundingClientRect().x)")
    assert words[0] > words[1], "the first word is the rightmost"
    page.locator("#output .word").first.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#output .word").nth(1)).to_be_focused()


@SLOW
def test_nothing_that_is_shown_is_markup(context: BrowserContext, server: FakeServer) -> None:
    server.models = [{**fake_server.model(MARKUP, MARKUP), "engine": MARKUP}, fake_server.model("b", "lstm")]
    server.alternatives = [{"piece": MARKUP, "probability": math.pi / 4, "text": f"{MARKUP} {MARKUP}"}]
    page = context.new_page()
    alerts: list[str] = []
    page.on("dialog", lambda dialog: alerts.append(dialog.message))
    page.goto(server.url)
    translate(page, f"{MARKUP} dog.\n\n{MARKUP}")
    page.set_input_files("#chooser", text_file(f"{MARKUP}.txt".replace("/", ""), MARKUP.encode()))
    for panel in PANELS:
        page.click(f"#tab-{panel}")
    page.locator("#output .word").first.click()
    page.locator("[role=option]").first.wait_for()
    server.error = MARKUP
    page.fill("#source", "A dog.")
    expect(page.locator("#problem span")).to_have_text(MARKUP)
    assert MARKUP in page.locator("#description").inner_text() and MARKUP in page.locator("#facts").inner_text()
    assert page.locator("img, body script:not([src])").count() == 0 and alerts == []
