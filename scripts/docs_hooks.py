"""Hooks of the documentation site: reference pages from configs/, code from the source, diagrams, formulas as MathML.

MkDocs calls the functions named `on_…`; the others run without it, and the tests use them.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import html
import json
import re
import types
import typing
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from seq2seq.cli.commands import COMMANDS
from seq2seq.cli.help import examples, purpose
from seq2seq.config.loading import default_choices
from seq2seq.config.paths import CONFIGS, choices
from seq2seq.config.schema import (
    DataConfig,
    LSTMConfig,
    OptimizerConfig,
    Range,
    SearchConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
)

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The choices that explain every key of their group, with the type of the result; other choices change some values.
EXPLAINED: dict[str, type] = {
    "model/transformer": TransformerConfig,
    "model/lstm": LSTMConfig,
    "data/toy": DataConfig,
    "tokenizer/unigram": TokenizerConfig,
    "optimizer/adamw": OptimizerConfig,
    "training/default": TrainingConfig,
    "search/greedy": SearchConfig,
}
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages of the site that lie beside docs/, where GitHub expects them

# A link such as [`rotate`](../../seq2seq/model/attention.py "code"), alone on its line: the site shows the code.
CODE_LINK = re.compile(r'^\[`(?P<name>[\w.]+)`\]\((?:\.\./)+(?P<path>seq2seq/[\w/]+\.py) "code"\)$', re.MULTILINE)
ROOT_LINK = re.compile(rf"\((?P<up>(?:\.\./)+)(?P<page>{'|'.join(map(re.escape, ROOT_PAGES))})(?P<rest>[)#])")
MERMAID = re.compile(r"^```mermaid\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<text>.*?)</(?P=tag)>', re.DOTALL)
NAME = re.compile("<mo>([A-Za-z]{2,}|&#x0221E;)</mo>")  # spaced as an operator, which a function and ∞ are not
INLINE_CODE = re.compile(r"(?<!<span></span>)<code>([^<]+)</code>")
LONGEST_WHOLE = 40  # characters of code that a phone shows on one line


@dataclasses.dataclass(frozen=True)
class Key:
    """A config key as the reference shows it."""

    name: str
    type: str
    default: str
    comment: str


# ------------------------------------------------------------------------------------------ the reference of all keys


def keys_of(cls: type, file: str, prefix: str = "") -> list[Key]:
    """Return every key of a config class that a file of configs/ gives a default, with the file's comments."""
    values, comments = _values(file), comments_of(file)
    return [
        Key(prefix + name, type_name(hint), default_name(_look_up(values, name)), _comment(comments, name))
        for name, hint in _leaves(cls, values)
    ]


def _leaves(cls: type, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and types of the values below a config class; groups are left out."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(hint) and isinstance(values[name], dict):
            yield from _leaves(typing.cast(type, hint), values[name], f"{prefix}{name}.")
        else:
            yield prefix + name, hint


@cache
def _values(file: str) -> dict[str, Any]:
    return dict(yaml.safe_load((CONFIGS / f"{file}.yaml").read_text(encoding="utf-8")) or {})


def _look_up(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _comment(comments: dict[str, str], name: str) -> str:
    """Return the comment of a key, or of the mapping that holds it."""
    while name not in comments and "." in name:
        name = name.rpartition(".")[0]
    return comments.get(name, "")


def comments_of(file: str) -> dict[str, str]:
    """Return the comment of every dotted key: on its line, and on lines below that hold only an indented comment."""
    comments: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (CONFIGS / f"{file}.yaml").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)([\w+]+):", line):
            indent = len(match[1])
            path = [*(entry for entry in path if entry[0] < indent), (indent, match[2])]
            if found := re.search(r"(?:^|\s)#\s*(.*)$", line):
                comments[".".join(name for _, name in path)] = found[1]
        elif (match := re.match(r"\s+#\s*(.*)$", line)) and path:
            key = ".".join(name for _, name in path)
            comments[key] = f"{comments.get(key, '')} {match[1]}".strip()
    return comments


def type_name(hint: Any) -> str:
    """Return a type in words: its numbers, its choices."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = next(str(part) for part in arguments[1:] if isinstance(part, Range))
        return f"{type_name(arguments[0])}, {limits}".replace(f"{2**63 - 1:g}", "2⁶³ − 1")
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in arguments)
    if origin is list:
        return "list of " + re.sub(r"\b(number|text|mapping|list)\b", r"\1s", type_name(arguments[0]))
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
    return names.get(hint, "mapping")


def default_name(value: Any) -> str:
    """Return a value as a command line writes it."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def table_of(keys: list[Key]) -> str:
    rows = [[f"`{key.name}`", key.type, key.default, key.comment] for key in keys]
    return stacked_table(["key", "type", "default", "meaning"], rows, "keys")


def stacked_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    """Return a table whose rows a phone shows as paragraphs."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join([f'<div class="stacked {kind}" markdown>', "", *lines, "", "</div>"])


def _cell(text: str) -> str:
    parts = text.split("`")  # odd ones are code
    return "`".join(part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(parts)).replace(
        "|", "\\|"
    )


def configuration_page() -> str:
    """Return the reference of all config groups."""
    sections = [
        "# Configuration",
        "Every config group with its choices and keys, generated from `configs/`. A key is given as "
        "`GROUP.KEY=VALUE`, a choice as `GROUP=CHOICE`; [the commands](commands.md) have keys of their own.",
    ]
    groups = dict.fromkeys(name.partition("/")[0] for name in EXPLAINED)
    for group in [*groups, "experiment"]:
        sections.append(f"## {group}")
        for name, cls in EXPLAINED.items():
            if name.partition("/")[0] == group:
                choice = name.partition("/")[2]
                sections += [
                    f"### {group}={choice}",
                    _cell(first_comment(name)),
                    table_of(keys_of(cls, name, f"{group}.")),
                ]
        others = [choice for choice in choices(group) if f"{group}/{choice}" not in EXPLAINED]
        if others:
            described = any(name.startswith(f"{group}/") for name in EXPLAINED)
            sections += [f"### {'Other choices' if described else 'Choices'} of {group}", _others(group, others)]
    return "\n\n".join(sections) + "\n"


def first_comment(file: str) -> str:
    """Return the purpose of a file of configs/, from its first comment."""
    lines = (CONFIGS / f"{file}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("#").strip() for line in lines if re.match(r"# [^@]", line))


def _others(group: str, names: list[str]) -> str:
    rows = []
    for name in names:
        values = {key: value for key, value in _values(f"{group}/{name}").items() if key != "defaults"}
        changed = ", ".join(f"`{key}={_short(value)}`" for key, value in _flat(values))
        rows.append([f"`{group}={name}`", first_comment(f"{group}/{name}"), changed])
    return stacked_table(["choice", "purpose", "values"], rows, "choices")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def commands_page() -> str:
    """Return the reference of all commands."""
    sections = [
        "# Commands",
        "Every command with its keys, generated from `configs/`. `seq2seq COMMAND --help` prints the same in a "
        "terminal. Groups such as `search` are explained in [the configuration](configuration.md).",
    ]
    for command, cls in COMMANDS.items():
        groups = {group: choice for group, choice in default_choices(command).items() if choices(group)}
        sections += [f"## seq2seq {command}", f"{purpose(command)[:1].upper()}{purpose(command)[1:]}."]
        sections.append(examples_block(command))
        if groups:
            listed = ", ".join(
                f"[`{group}={choice or 'null'}`](configuration.md#{group})" for group, choice in groups.items()
            )
            sections.append(f"Config groups, with their defaults: {listed}.")
        sections.append(table_of([key for key in keys_of(cls, command) if key.name not in groups]))
    return "\n\n".join(sections) + "\n"


def examples_block(command: str) -> str:
    """Return the examples of a command, their explanations as comments in one column."""
    rows = [re.split(" {2,}", line, maxsplit=1) for line in examples(command)]
    width = max(len(row[0]) for row in rows if len(row) > 1)
    return "\n".join(["```bash", *(f"{row[0]:<{width}}  # {row[1]}" if row[1:] else row[0] for row in rows), "```"])


def root_page(name: str) -> str:
    """Return a page that lies beside docs/, with links as seen from docs/ and versions without their brackets."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"^## \[(.+?)\]", r"## \1", re.sub(r"\]\(docs/", "](", text), flags=re.MULTILINE)


def generated_pages() -> dict[str, str]:
    """Return the pages that the site has instead of a file of docs/, or of none, by their paths."""
    pages = {name.lower(): root_page(name) for name in ROOT_PAGES}
    return {**pages, "reference/commands.md": commands_page(), "reference/configuration.md": configuration_page()}


# ------------------------------------------------------------------------------------------ code, diagrams, formulas


def source_of(path: str, name: str) -> str:
    """Return the source of a function, class or method of a file, such as `Attention._weights`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def with_code(markdown: str) -> str:
    """Replace each link to code by the code."""

    def block(match: re.Match[str]) -> str:
        return f'```python title="{match["path"]}"\n{source_of(match["path"], match["name"])}\n```'

    return CODE_LINK.sub(block, markdown)


def diagram_file(text: str) -> Path:
    """Return the drawing of a diagram; its name depends on the diagram's text, so an old one is never shown."""
    return DOCS / "images" / f"diagram-{hashlib.sha256(text.encode()).hexdigest()[:8]}.svg"


def diagrams() -> list[str]:
    """Return the text of every Mermaid diagram of docs/."""
    return [m["text"] for page in sorted(DOCS.rglob("*.md")) for m in MERMAID.finditer(page.read_text("utf-8"))]


def with_diagrams(markdown: str, depth: int) -> str:
    """Replace each diagram by its drawing, since Mermaid itself would be larger than the whole site."""

    def image(match: re.Match[str]) -> str:
        return f"![Diagram]({'../' * depth}images/{diagram_file(match['text']).name})"

    return MERMAID.sub(image, markdown)


def with_root_pages(markdown: str) -> str:
    """Point links to pages beside docs/ at their copies on the site."""
    return ROOT_LINK.sub(lambda m: f"({m['up'][3:]}{m['page'].lower()}{m['rest']}", markdown)


def with_mathml(content: str) -> str:
    """Replace TeX by MathML, which browsers draw without a script; a wide gap may become the end of a line."""

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match["text"]).strip()[2:-2]
        if match["tag"] == "span":
            return mathml(tex, "inline")
        parts = [mathml(part, "block") for part in tex.split(r"\qquad")]
        return f'<div class="formulas">{"".join(parts)}</div>'

    return FORMULA.sub(formula, content)


def mathml(tex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return NAME.sub(r"<mi>\1</mi>", str(convert(tex, display=display)))


def formula_characters() -> set[str]:
    """Return the characters of all formulas of docs/; a variable is drawn in the italics of mathematics."""
    texts = (re.sub(r"```.*?```|`[^`]*`", "", page.read_text("utf-8"), flags=re.DOTALL) for page in DOCS.rglob("*.md"))
    formulas = (tex for text in texts for _, tex in re.findall(r"(\$\$?)([^$]+)\1", text))
    shown = html.unescape(re.sub("<.*?>", "", "".join(mathml(tex, "inline") for tex in formulas)))
    italics = map(chr, [*range(0x1D434, 0x1D468), *range(0x1D6FC, 0x1D71C)])  # Latin and Greek
    return {*shown, *"ℎ√", *(sign for sign in italics if unicodedata.normalize("NFKC", sign) in shown)}


def with_whole_words(content: str) -> str:
    """Keep the words of inline code on one line; a long one breaks after its separators."""

    def word(match: re.Match[str]) -> str:
        if len(match[0]) > LONGEST_WHOLE:
            return re.sub("::|[/.,|=_]", r"\g<0><wbr>", match[0])
        return f'<span class="whole">{match[0]}</span>' if re.search(r"[-/(\[{]", match[0]) else match[0]

    return INLINE_CODE.sub(lambda code: f"<code>{re.sub('[^ ]+', word, code[1])}</code>", content)


# ------------------------------------------------------------------------------------------ what MkDocs calls


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        if for_the_repository := files.get_file_from_path(path):
            files.remove(for_the_repository)
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/")
    return with_root_pages(with_diagrams(with_code(markdown), depth))


def on_page_content(content: str, **_: Any) -> str:
    return with_mathml(with_whole_words(content))
