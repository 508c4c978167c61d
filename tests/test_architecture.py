"""Laws of the architecture: each package imports only from those above it, and no import runs in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

# Each may import from those before it; `seq2seq/__init__.py` imports lazily, by name.
PACKAGES = [
    "utils",
    "config",
    "data",
    "model",
    "decoding",
    "inference",
    "evaluation",
    "training",
    "reporting",
    "serving",
    "cli",
    "api",
]


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without `seq2seq.`, entry points left out."""
    root = REPOSITORY / "seq2seq"
    paths = (path for path in root.rglob("*.py") if path.parent != root or path.stem == "api")
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports(path: Path) -> list[str]:
    """The modules that a file imports anywhere, inside functions as well; names are resolved to their modules."""
    known, found = modules(), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "seq2seq":
            module = (node.module or "").partition(".")[2]
            inside = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            found += [name if name in known else module for name in inside]
        elif isinstance(node, ast.Import):
            found += [a.name.partition(".")[2] for a in node.names if a.name.startswith("seq2seq.")]
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_the_packages_above_its_own(module: str) -> None:
    own = module.partition(".")[0]
    for imported in filter(None, imports(modules()[module])):
        package = imported.partition(".")[0]
        assert PACKAGES.index(package) <= PACKAGES.index(own), f"{module} imports {imported}"


def test_no_import_runs_in_a_circle() -> None:
    graph = {name: {i for i in imports(path) if i in modules()} for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())


def test_no_command_imports_another() -> None:
    for name, path in modules().items():
        if name.startswith("cli.commands."):
            assert not [i for i in imports(path) if i.startswith("cli.commands.")], name


def test_the_shared_module_of_both_families_is_one() -> None:
    """Scores and positions live in one module that the LSTM and the Transformer both import."""
    for family in ("lstm", "transformer"):
        assert "model.attention" in set(imports(modules()[f"model.{family}"]))


def test_shared_test_code_is_in_the_helpers() -> None:
    """No file imports tests or fixtures from another one."""
    for path in (REPOSITORY / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                assert (node.module or "").split(".")[1] in ("helpers", "reference"), f"{path}: {ast.unparse(node)}"
