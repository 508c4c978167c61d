"""Paths of the package and its YAML files."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# A wheel carries the configs inside the package; a checkout has them beside it.
CONFIGS = next(path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir())


def choices(group: str) -> list[str]:
    """Return the choices of a config group, such as the presets of the search."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
