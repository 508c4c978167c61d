"""Make the pictures of the documentation again, from a run of the built-in corpus.

seq2seq train name=demo
python scripts/pictures.py                               prompt, attention, page and report
python scripts/pictures.py --mermaid mermaid.min.js      the diagrams, by the script of `npm pack mermaid`
python scripts/pictures.py --concepts                    the concept pages, from runs that it trains where missing
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import concept_pictures
from docs_hooks import DOCS, diagram_file, diagrams

from seq2seq.cli.main import load_config
from seq2seq.inference.prompt import Prompt, open_runs
from tests.helpers.browser import chromium

IMAGES = DOCS / "images"
SENTENCE = "During the movie, the singer ate every potato."
TEXT = f"{SENTENCE} The teacher is thirty years old."
LINES = (SENTENCE, ":tokens", ":alternatives 4", ":beam 3")
PROMPT = re.compile(r'(```text title="prompt"\n).*?(^```$)', re.MULTILINE | re.DOTALL)
COLOURS = 64  # of a screenshot: text and areas of one colour need no more
WIDTH, HEIGHT = 1100, 760


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="demo", help="a run of the built-in corpus")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--mermaid", type=Path, help="draw the diagrams instead, with this mermaid.min.js")
    parser.add_argument("--concepts", action="store_true", help="draw the pictures of the concept pages instead")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if arguments.concepts:
        concept_pictures.draw(arguments.outputs, IMAGES)
        return
    with chromium() as browser:
        if arguments.mermaid:
            draw_diagrams(browser, arguments.mermaid)
            return
        show_prompt(arguments.run, arguments.outputs)
        show_page(browser, arguments.run, arguments.outputs)
        show_report(browser, arguments.run, arguments.outputs)
    for path in sorted(IMAGES.iterdir()):
        print(f"{path.relative_to(DOCS)}  {path.stat().st_size / 1000:.0f} kB")


def show_prompt(run: str, outputs: str) -> None:
    """Write a session of the prompt into the tutorial, and the attention map that it draws."""
    config = load_config("translate", f"run={run}", f"outputs={outputs}", "device=cpu")
    out = io.StringIO()
    prompt = Prompt(config, open_runs(config.run, config.checkpoint, config), out)
    for line in LINES:
        out.write(f"> {line}\n")
        prompt.answer(line)
    session = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
    page = DOCS / "tutorial" / "first.md"
    page.write_text(PROMPT.sub(lambda m: m[1] + session + m[2], page.read_text("utf-8")), encoding="utf-8")
    prompt.answer(SENTENCE)
    prompt.answer(f":attention {IMAGES / 'attention.png'}")


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


def photograph(page: Page, name: str) -> None:
    """Save the visible part of a page in few colours."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
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


if __name__ == "__main__":
    main()
