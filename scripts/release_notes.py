"""Check that a tag names the version of the package, and print what the changelog says about that version.

python scripts/release_notes.py v0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HEADING = re.compile(r"## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}")


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    if len(sys.argv) != 2:
        raise SystemExit("error: give the tag of the release, such as v0.1.0")
    print(notes(root, sys.argv[1]))


def notes(root: Path, tag: str) -> str:
    """Return the changelog's section on the version that the tag, the package and the citation name."""
    version = package_version(root)
    if tag != f"v{version}":
        raise SystemExit(f"error: seq2seq/__init__.py: the version is {version}, but the tag {tag}; change one of them")
    if f"\nversion: {version}\n" not in (root / "CITATION.cff").read_text(encoding="utf-8"):
        raise SystemExit(f"error: CITATION.cff: it does not name version {version}; change its `version`")
    sections = changelog(root)
    if version not in sections:
        raise SystemExit(f"error: CHANGELOG.md: no section '## [{version}] - DATE'; rename Unreleased and add the date")
    return sections[version]


def package_version(root: Path) -> str:
    text = (root / "seq2seq" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('error: seq2seq/__init__.py: no line __version__ = "…"')
    return found[1]


def changelog(root: Path) -> dict[str, str]:
    """Return the text of each released version, newest first."""
    sections: dict[str, list[str]] = {}
    current: list[str] = []  # what precedes the first version belongs to none
    for line in (root / "CHANGELOG.md").read_text(encoding="utf-8").splitlines():
        if heading := HEADING.fullmatch(line):
            current = sections[heading[1]] = []
        else:
            current.append(line)
    return {version: "\n".join(lines).strip() for version, lines in sections.items()}


if __name__ == "__main__":
    main()
