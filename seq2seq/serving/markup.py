"""Pages in HTML: what of them is text to translate, and what stays."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from html.parser import HTMLParser
from typing import NamedTuple


class Piece(NamedTuple):
    """A piece of a page: markup as it was, or text without entities."""

    text: str
    translatable: bool


VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"))
KEPT = frozenset(("script", "style", "pre", "code", "textarea"))


class Markup(HTMLParser):
    """Divides a page into markup and text; the contents of kept elements are markup."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[Piece] = []
        self.kept: list[str] = []  # the open element whose contents are kept, and those of its name in it

    def markup(self, text: str | None) -> None:
        self.pieces.append(Piece(text or "", False))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.markup(self.get_starttag_text())
        opens = tag == self.kept[-1] if self.kept else tag in KEPT or ("translate", "no") in attrs
        if opens and tag not in VOID:
            self.kept.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.markup(self.get_starttag_text())

    def handle_endtag(self, tag: str) -> None:
        self.markup(f"</{tag}>")
        if self.kept and tag == self.kept[-1]:
            self.kept.pop()

    def handle_data(self, data: str) -> None:
        raw = self.cdata_elem is not None  # in script and style, entities are plain text
        if self.kept:
            self.markup(data if raw else escape(data, quote=False))
        else:
            self.pieces.append(Piece(data, bool(data.strip())))

    def handle_comment(self, data: str) -> None:
        self.markup(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.markup(f"<!{decl}>")

    def unknown_decl(self, data: str) -> None:
        self.markup(f"<![{data}]>")

    def handle_pi(self, data: str) -> None:
        self.markup(f"<?{data}>")


def split_markup(page: str) -> list[Piece]:
    parser = Markup()
    parser.feed(page)
    parser.close()
    return parser.pieces


def joined_markup(pieces: Sequence[Piece], translations: Sequence[str]) -> str:
    """Return the page with its texts translated and written in entities again."""
    texts = iter(translations)
    return "".join(escape(next(texts), quote=False) if piece.translatable else piece.text for piece in pieces)
