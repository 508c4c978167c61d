"""Make the pictures of the documentation again, from a run of the built-in corpus.

seq2seq train name=demo
python scripts/pictures.py                               prompt, attention, page and report
python scripts/pictures.py --mermaid mermaid.min.js      the diagrams, by the script of `npm pack mermaid`
python scripts/pictures.py --font DejaVuMathTeXGyre.ttf  the font of the formulas, after a new symbol
python scripts/pictures.py --concepts                    the concept pages, from runs that it trains where missing
"""

from __future__ import annotations

import argparse
import fcntl
import html
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Locator, Page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import concept_pictures
from docs_hooks import DOCS, diagram_file, diagrams, formula_characters

from tests.helpers.browser import chromium

IMAGES = DOCS / "images"
SENTENCE = "During the movie, the singer ate every potato."
TEXT = f"{SENTENCE} The teacher is thirty years old."
LINES = (SENTENCE, ":tokens", ":alternatives 4", ":attention")
COLUMNS = 104  # of the terminal
PROMPT = re.compile(r'(```text title="prompt"\n).*?(^```$)', re.MULTILINE | re.DOTALL)
STYLE = re.compile(r"\x1b\[([\d;]*)m")
TERMINAL = """<style>
body { margin: 0; background: #1b1f24; }
pre { margin: 0; padding: 18px 22px; width: max-content; color: #e6e6e6; font: 17px/1.3 "DejaVu Sans Mono", monospace; }
</style>"""
COLOURS = 64  # of a screenshot: text and areas of one colour need no more
WIDTH, HEIGHT = 1100, 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo", help="a run of the built-in corpus")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--mermaid", type=Path, help="draw the diagrams instead, with this mermaid.min.js")
    parser.add_argument("--font", type=Path, help="cut out the characters of the formulas instead, of this font")
    parser.add_argument("--concepts", action="store_true", help="draw the pictures of the concept pages instead")
    arguments = parser.parse_args()
    if arguments.font:
        cut_font(arguments.font)
        return
    IMAGES.mkdir(exist_ok=True)
    if arguments.concepts:
        concept_pictures.draw(arguments.outputs, IMAGES)
        return
    with chromium() as browser:
        if arguments.mermaid:
            draw_diagrams(browser, arguments.mermaid)
            return
        show_prompt(browser, arguments.run, arguments.outputs)
        show_page(browser, arguments.run, arguments.outputs)
        show_report(browser, arguments.run, arguments.outputs)
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.relative_to(DOCS)}  {path.stat().st_size / 1000:.0f} kB")


def show_prompt(browser: Browser, run: str, outputs: str) -> None:
    """Photograph a session of the prompt, and write it into the tutorial; draw the attention map."""
    screen = session(run, outputs, LINES)
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.set_content(f"{TERMINAL}<pre>{with_colours(screen)}</pre>")
    photograph(page.locator("pre"), "prompt.png")
    shown = STYLE.sub("", screen).partition(f"> {LINES[-1]}")[0]  # the attention map is a picture there
    text = "".join(f"{line.rstrip()}\n" for line in shown.splitlines()[1:])
    tutorial = DOCS / "tutorial" / "first.md"
    tutorial.write_text(PROMPT.sub(lambda m: m[1] + text + m[2], tutorial.read_text("utf-8")), encoding="utf-8")
    session(run, outputs, (SENTENCE, f":attention {IMAGES / 'attention.png'}"))


def session(run: str, outputs: str, lines: tuple[str, ...]) -> str:
    """Return what a terminal shows of `seq2seq translate` while lines are typed, with its colours."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "seq2seq", "translate", f"run={run}", f"outputs={outputs}", "device=cpu"]
    with tempfile.TemporaryDirectory() as state:  # the user's own history stays as it is
        environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": state}
        with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment):
            os.close(terminal)
            shown = ""
            for line in (*lines, ":quit"):
                shown += read_until(master, "> ")
                os.write(master, f"{line}\n".encode())
            os.read(master, 1000)  # the echo of :quit
    os.close(master)
    return re.sub(r"\x1b\[\?\d+[hl]|\r", "", shown).removesuffix("> ")


def read_until(master: int, end: str) -> str:
    """Return what a program writes to its terminal until it waits."""
    text = b""
    while not text.endswith(end.encode()):
        text += os.read(master, 10_000)
    return text.decode()


def with_colours(text: str) -> str:
    """Return a terminal's text as HTML: 256 colours and dim text."""
    parts = STYLE.split(text)  # odd ones are the styles
    spans = [
        f'<span style="{css(parts[i - 1] if i else "")}">{html.escape(parts[i])}</span>'
        for i in range(0, len(parts), 2)
    ]
    return "".join(spans)


def css(style: str) -> str:
    if style.startswith("38;5;"):
        cube = int(style[5:]) - 16  # 6 × 6 × 6 levels of red, green and blue
        levels = (cube // 36, cube // 6 % 6, cube % 6)
        return f"color: rgb{tuple(55 + 40 * level if level else 0 for level in levels)}"
    return "opacity: 0.65" if style == "2" else ""


def show_page(browser: Browser, run: str, outputs: str) -> None:
    """Photograph the page of `seq2seq serve` after a translation."""
    command = [sys.executable, "-m", "seq2seq", "serve", f"run={run}", f"outputs={outputs}", "port=0", "processes=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            page = new_page(browser, re.findall(r"http://\S+", server.stdout.readline())[0])
            page.fill("#source", TEXT)
            page.locator("#output").get_by_text("alt").first.wait_for()
            page.click("#tab-attention")
            page.set_viewport_size({"width": WIDTH, "height": HEIGHT - 34})  # ends below a row of heads
            page.wait_for_timeout(2000)  # the attention of both sentences arrives
            photograph(page, "serve.png")
        finally:
            server.terminate()


def show_report(browser: Browser, run: str, outputs: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        command = [sys.executable, "-m", "seq2seq", "report", run, f"outputs={outputs}", f"output={path}"]
        subprocess.run([*command, "search=greedy"], check=True)
        page = new_page(browser, path.as_uri())
        page.wait_for_timeout(500)
        photograph(page, "report.png")


def new_page(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
    page.goto(address)
    return page


def photograph(shown: Page | Locator, name: str) -> None:
    """Save the visible part of a page, or an element, in few colours."""
    image = Image.open(io.BytesIO(shown.screenshot())).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


def draw_diagrams(browser: Browser, script: Path) -> None:
    """Draw the diagrams of docs/, and remove drawings of earlier ones."""
    page = browser.new_page()
    page.set_content("<body></body>")
    page.add_script_tag(path=script)
    layout = "{htmlLabels: false, rankSpacing: 22, nodeSpacing: 30, padding: 6}"
    options = f"{{startOnLoad: false, theme: 'neutral', htmlLabels: false, flowchart: {layout}}}"
    page.evaluate(f"mermaid.initialize({options})")
    drawn = set()
    for text in diagrams():
        svg = page.evaluate("async text => (await mermaid.render('diagram', text)).svg", text)
        path = diagram_file(text)
        white = '<rect width="100%" height="100%" fill="white"/>'  # legible on a dark page
        svg = re.sub("(<svg[^>]*>)", rf"\1{white}", svg, count=1)
        width = re.findall(r'viewBox="0 0 (\d+)', svg)[0]
        path.write_text(svg.replace('width="100%"', f'width="{width}"', 1) + "\n", encoding="utf-8")
        drawn.add(path)
    for old in set(IMAGES.glob("diagram-*.svg")) - drawn:
        old.unlink()


def cut_font(path: Path) -> None:
    """Write a font with the characters of the formulas: phones and some systems have none for mathematics."""
    from fontTools import subset  # a dependency of matplotlib

    options = subset.Options(flavor="woff", layout_features=["*"], drop_tables=["FFTM"])
    font = subset.load_font(str(path), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(formula_characters()))
    subsetter.subset(font)
    subset.save_font(font, str(DOCS / "fonts" / "math.woff"), options)


if __name__ == "__main__":
    main()
