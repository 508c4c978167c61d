"""Pages in HTML: what of them is text to translate, and what stays as it is.

The pages come from the network, so reading one takes time linear in its length: a tag holds no "<", and what has no end
reaches to the end of the page. Python's own HTML parser takes minutes for 100,000 characters of unfinished tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape, unescape
from typing import NamedTuple

# A comment's begin, a tag whose quoted values may hold ">", or a declaration.
MARKUP = re.compile(r"""<!--|<(?P<end>/?)(?P<name>[a-zA-Z][^\s/<>]*)(?:"[^"<]*"|'[^'<]*'|[^'"<>])*>|<[!?][^<>]*>""")
NOT_TRANSLATED = re.compile(r"\stranslate\s*=\s*[\"']?no\b", re.IGNORECASE)
VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"))
RAW = frozenset(("script", "style", "textarea", "title"))  # raw text elements, whose contents are no markup
KEPT = frozenset(("script", "style", "textarea", "pre", "code"))


class Piece(NamedTuple):
    """A piece of a page: markup as it was, or text without entities."""

    text: str
    translatable: bool


def split_markup(page: str) -> list[Piece]:
    """Divide a page into markup and text; the contents of kept elements are markup."""
    pieces: list[Piece] = []
    kept: list[str] = []  # the open element whose contents are kept, and those of its name within
    for text, is_markup in tokens(page):
        match = MARKUP.match(text) if is_markup else None
        name = (match["name"] or "").lower() if match else ""
        plain = unescape(text)
        translatable = not (kept or is_markup) and bool(plain.strip())
        pieces.append(Piece(plain if translatable else text, translatable))
        if match and match["end"]:
            if kept and name == kept[-1]:
                kept.pop()
        elif name and name not in VOID and not text.endswith("/>"):
            opens = name == kept[-1] if kept else name in KEPT or NOT_TRANSLATED.search(text)
            kept += [name] if opens else []
    return pieces


def tokens(page: str) -> Iterator[tuple[str, bool]]:
    """Yield every tag, comment and text of a page in turn, and whether it is markup."""
    position = 0
    while match := MARKUP.search(page, position):
        if match.start() > position:
            yield page[position : match.start()], False
        position = match.end()
        if match[0] == "<!--":
            end = page.find("-->", position)
            position = len(page) if end < 0 else end + 3
        yield page[match.start() : position], True
        name = (match["name"] or "").lower()
        if name in RAW and not match["end"]:
            closing = re.compile(f"</{name}", re.IGNORECASE).search(page, position)
            end = closing.start() if closing else len(page)
            if end > position:
                yield page[position:end], False
            position = end
    if position < len(page):
        yield page[position:], False


def joined_markup(pieces: Sequence[Piece], translations: Sequence[str]) -> str:
    """Return the page with its texts translated and written in entities again."""
    texts = iter(translations)
    return "".join(escape(next(texts), quote=False) if piece.translatable else piece.text for piece in pieces)
