"""A release is what its tag says: version, changelog and citation agree; actions of workflows are pinned."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from seq2seq import __version__

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "release_notes.py"))
changelog, notes = SCRIPT["changelog"], SCRIPT["notes"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FILES = ("seq2seq/__init__.py", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that name the version."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_the_notes_are_the_section_of_the_version(copy: Path) -> None:
    replace(copy / "CHANGELOG.md", "## [0.1.0]", "## [9.9.9] - 2099-01-01\n\n### Added\n\n- One.\n\n## [0.1.0]")
    for name in FILES[:2]:
        replace(copy / name, __version__, "9.9.9")
    assert notes(copy, "v9.9.9") == "### Added\n\n- One."


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("seq2seq/__init__.py", f'"{__version__}"', '"9.9.9"', "the version is 9.9.9, but the tag"),
        ("seq2seq/__init__.py", "__version__ =", "version =", "no line __version__"),
        ("CITATION.cff", f"\nversion: {__version__}", "\nversion: 9.9.9", "does not name version"),
        ("CHANGELOG.md", f"## [{__version__}]", "## [9.9.9]", "no section"),
    ],
)
def test_a_file_that_names_another_version_ends_the_release(
    copy: Path, name: str, old: str, new: str, message: str
) -> None:
    notes(copy, f"v{__version__}")
    replace(copy / name, old, new)
    with pytest.raises(SystemExit, match=f"error: {name}: .*{message}"):
        notes(copy, f"v{__version__}")


def test_the_changelog_is_kept_by_version_and_date() -> None:
    """Newest first, each entry under a heading of Keep a Changelog."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    versions = [tuple(map(int, version.split("."))) for version in changelog(ROOT)]
    assert headings[0] == "[Unreleased]" and len(headings) == 1 + len(versions)
    assert versions == sorted(versions, reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_have_no_more_rights_than_they_need(path: Path) -> None:
    workflow: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job.get("steps", ())]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in actions)
    assert all(job.get("timeout-minutes") or "uses" in job for job in workflow["jobs"].values())
