"""The pages of the documentation, and the commands, code, requests and links that they show."""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import Any

import yaml
from docs_hooks import DOCS, generated_pages

from seq2seq.cli.commands import COMMANDS
from tests.helpers import REPOSITORY

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(rf"(?:^|[\s/])seq2seq ((?:{'|'.join(COMMANDS)})(?: .*)?$)")
HEADING = re.compile(r"^(?:#+|:::) (.+)$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")


@cache
def pages() -> dict[str, str]:
    """Return the text of every written page by its path: README first, then in the order of the menu."""
    written = ["README.md", *(f"docs/{path}" for path in menu() if (DOCS / path).is_file())]
    return {path: (REPOSITORY / path).read_text(encoding="utf-8") for path in written}


def menu() -> list[str]:
    """Return the pages in the menu of the site."""
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def flat(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [path for child in (part.values() if isinstance(part, dict) else part) for path in flat(child)]

    return flat(nav)


def blocks(text: str, *languages: str) -> list[str]:
    """Return the code blocks of a page in some languages, without the indentation of their fence."""
    found = [m for m in BLOCK.finditer(text) if m["language"] in languages]
    return ["\n".join(line.removeprefix(m["indent"]) for line in m["text"].splitlines()) for m in found]


def commands(text: str, *languages: str) -> list[list[str]]:
    """Return the arguments of every `seq2seq` command in the blocks of some languages."""
    lines = [line for block in blocks(text, *languages) for line in block.replace("\\\n", " ").splitlines()]
    found = (COMMAND.search(line) for line in lines if not line.lstrip().startswith(("#", "docker")))
    arguments = [shlex.split(match[1], comments=True) for match in found if match]
    return [words[: next((i for i, word in enumerate(words) if word in ("<", ">", "|")), None)] for words in arguments]


def requests(text: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """Return the path, the data and the headers of every request that a page makes with curl."""
    found = []
    for line in "\n".join(blocks(text, "bash", "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[:1] == ["curl"]:
            url = next(word for word in words if word.startswith("http"))
            data = [words[i + 1] for i, word in enumerate(words) if word == "-d"]
            headers = [words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H"]
            found.append(("/" + url.split("/", 3)[3], data, {name: value for name, value in headers}))
    return found


def links(text: str) -> list[str]:
    """Return the relative links of a page, those in code left out."""
    without_code = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
    without_code += "\n".join(re.findall(r"\[`[\w.]+`\]\([^)]+\)", BLOCK.sub("", text)))
    return [link for link in LINK.findall(without_code) if not link.startswith(("http:", "https:"))]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown and GitHub name them."""
    headings = HEADING.findall(BLOCK.sub("", text))
    return {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())
        for heading in headings
    }


def site_text(path: str) -> str | None:
    """Return the text of a page of the site, or else of the repository."""
    return generated_pages().get(path.removeprefix("docs/")) or repository_text(path)


def repository_text(path: str) -> str | None:
    """Return the text of a page of the repository, nothing for a folder or another file, and None for none at all."""
    file = REPOSITORY / path
    if file.suffix == ".md" and file.is_file():
        return file.read_text(encoding="utf-8")
    return "" if file.exists() else None
