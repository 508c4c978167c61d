"""The files of the page: a fixed list of names, so that no path of a request reaches the disk."""

from __future__ import annotations

from pathlib import Path

from seq2seq.reporting.report import TEMPLATE

PAGE = Path(__file__).with_name("page")
INDEX = PAGE / "index.html"
DOCS = PAGE / "api.html"
SHARED = ("base.css", "elements.js", "theme.js", "attention.js")  # with the report
MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


def assets() -> dict[str, tuple[bytes, str]]:
    """Return the content and media type of each file below /static/."""
    own = (path for path in sorted(PAGE.iterdir()) if path.suffix in MEDIA_TYPES)
    paths = [*own, *(TEMPLATE / name for name in SHARED)]
    return {path.name: (path.read_bytes(), MEDIA_TYPES[path.suffix]) for path in paths}
