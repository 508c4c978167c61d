"""Mutation testing: plants bugs one at a time in a copy of the project and reports which ones the tests catch.

    python scripts/mutate.py                        # all planted bugs and a fixed sample of operator mutants
    python scripts/mutate.py --only model/lstm      # those of some files
    python scripts/mutate.py --tests-from 64b281c   # the same bugs against the tests of another commit
    python scripts/mutate.py --gpu                  # those that only a GPU meets, under the tests' pretend GPU
    python scripts/mutate.py --check                # only whether every planted bug still applies

Bugs come from two sources. `scripts/mutants/*.yaml` lists hand-written ones under `bugs`: a piece of a file, what
replaces it, and what is wrong then. Operators on the syntax tree make the rest, a fixed sample of each file. A mutant
that changes nothing a test should see is listed under `equivalent` with the reason.

One run of the tests under coverage records which tests execute which lines. Each mutant then runs only the tests that
execute its lines, fastest first, in a process forked from one that has imported torch already.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
CATALOGUE = REPOSITORY / "scripts" / "mutants"
TARGETS = (
    *("data/", "model/", "decoding/", "inference/", "evaluation/", "training/", "reporting/", "serving/"),
    *("utils/io.py", "utils/run.py", "config/loading.py"),
)
UNTARGETED = (
    "__init__.py",
    *("data/toy/", "data/doctor.py", "training/environment.py"),  # a grammar, and two reports
    "inference/step_graphs.py",  # which a GPU runs: its bugs are those of mutants/gpu.yaml
    *("inference/prompt.py", "inference/ctranslate2.py"),  # a dialogue; an export that compares itself with its origin
)
CALLERS = {"seq2seq/model/native.cpp": "seq2seq/model/int8.py"}  # of code whose lines are not counted
TIMEOUT, COMPILED_TIMEOUT = 60, 300  # seconds for one mutant: an endless loop is a caught bug


@dataclass(frozen=True)
class Mutant:
    """A piece of a file (in UTF-8 bytes) replaced by another."""

    file: str  # within the repository
    start: int
    stop: int
    new: str
    bug: str  # in words
    lines: tuple[int, ...]  # the lines that tests must execute to meet it
    planted: bool  # by hand

    def apply(self, text: bytes) -> bytes:
        return text[: self.start] + self.new.encode() + text[self.stop :]

    @property
    def line(self) -> int:
        return self.lines[0]


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    verdict: str  # caught, survived, timeout, untested
    by: str = ""  # the first test that failed
    reason: str = ""  # why a survivor changes nothing


# ------------------------------------------------------------------------------------------ planted bugs


def planted(root: Path, files: str = "*") -> list[Mutant]:
    """The hand-written bugs of some files of the catalogue; each must apply at exactly one position of its file."""
    found = []
    for entry in catalogue("bugs", files):
        text = (root / entry["file"]).read_bytes()
        old, new = entry["old"].rstrip("\n"), entry["new"].rstrip("\n")
        count = text.count(old.encode())
        if count != 1:
            raise SystemExit(f"error: {entry['bug']!r} applies {count} times to {entry['file']}, not once: {old!r}")
        start = text.index(old.encode())
        first = text[:start].count(b"\n") + 1
        lines = tuple(range(first, first + old.count("\n") + 1))
        found.append(Mutant(entry["file"], start, start + len(old.encode()), new, entry["bug"], lines, True))
    return found


def catalogue(kind: str, files: str = "*") -> Iterator[dict[str, str]]:
    """The entries of one kind, `bugs` or `equivalent`, in some files of the catalogue."""
    for path in sorted(CATALOGUE.glob(f"{files}.yaml")):
        for entry in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(kind) or []:
            if ("bug" in entry) != (kind == "bugs"):
                raise SystemExit(f"error: {path.name}: listed under {kind!r}, where nothing reads it: {entry}")
            yield entry


# ------------------------------------------------------------------------------------- operator mutants

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
PAIRS = (
    "min max, any all, sin cos, amax amin, minimum maximum, tanh sigmoid, floor ceil, triu tril, argmax argmin, exp log"
)
NAMES = {
    **{x: y for pair in PAIRS.split(", ") for x, y in (pair.split(), reversed(pair.split()))},
    **{"sum": "mean", "cumsum": "cumprod", "softmax": "log_softmax", "zeros_like": "ones_like", "eval": "train"},
}
# A forgotten `strict=` fails only where another bug is; a stream has no other end; the last are wording.
KEYWORDS_KEPT = {"strict", "flush", "encoding", "errors", "file", "ensure_ascii", "indent", "parents", "exist_ok",
                 "ignore_errors", "missing_ok", "daemon", "maxsize", "non_blocking", "fused", "requires_grad", "device",
                 "dtype", "use_reentrant", "sorted", "sort_keys", "allow_unicode", "keepdim", "code"}  # fmt: skip
CALLS_KEPT = {"status", "say", "fact", "raise_", "warn", "wait", "close", "flush", "fsync", "synchronize", "cast"}
WRAPPERS = {"clamp", "masked_fill", "detach", "abs", "clone", "float", "flip", "sqrt", "square", "strip"}
UNORDERED = {"zip", "isinstance", "where", "getattr", "setattr", "hasattr", "min", "max", "minimum", "maximum"}
SKIPPED_FUNCTIONS = {"__str__", "__repr__"}


def operators(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Each replacement of one node, and the bug in words."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield (
            ast.Compare(node.left, [COMPARE[type(node.ops[0])](), *node.ops[1:]], node.comparators),
            "another comparison",
        )
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not isinstance(node.left, ast.JoinedStr):
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right), "another operator"
        yield node.left, "the second operand is forgotten"
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values), "and for or"
        yield node.values[0], "the second condition is forgotten"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert, ast.USub)):
        if not isinstance(node.operand, ast.Constant):
            yield node.operand, "a negation is forgotten"
    elif isinstance(node, ast.IfExp):
        yield node.body, "the condition is forgotten"
        yield node.orelse, "the condition is never met"
    elif isinstance(node, ast.Constant):
        yield from _constants(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Slice):
        yield from _slices(node)
    elif isinstance(node, ast.If):
        yield ast.Constant(False), "the branch is never taken"
    elif isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign)):
        yield ast.Pass(), "the statement is forgotten"


def _constants(node: ast.Constant) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value), "the flag is reversed"
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1), "one too many"
        if node.value > 0:
            yield ast.Constant(node.value - 1), "one too few"
    elif isinstance(node.value, float) and 1e-6 < abs(node.value) < 1e6:
        yield ast.Constant(node.value * 2 if node.value else 1.0), "another constant"


def _calls(node: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in NAMES:
        new = copy.deepcopy(node)
        setattr(new.func, "attr" if isinstance(function, ast.Attribute) else "id", NAMES[name])
        yield new, f"{NAMES[name]} for {name}"
    if name in WRAPPERS and isinstance(function, ast.Attribute) and not isinstance(function.value, ast.Name):
        yield function.value, f"{name} is forgotten"
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in KEYWORDS_KEPT and name not in CALLS_KEPT:
            new = copy.deepcopy(node)
            new.keywords = [k for k in new.keywords if k.arg != keyword.arg]
            yield new, f"{keyword.arg}= is forgotten"
    plain = not any(isinstance(argument, (ast.Starred, ast.Constant)) for argument in node.args[:2])
    if len(node.args) >= 2 and plain and name not in UNORDERED:
        new = copy.deepcopy(node)
        new.args[:2] = new.args[1::-1]
        yield new, "two arguments are swapped"


def _slices(node: ast.Slice) -> Iterator[tuple[ast.AST, str]]:
    for side in ("lower", "upper"):
        bound = getattr(node, side)
        if bound is not None:
            new = copy.deepcopy(node)
            setattr(new, side, None)
            yield new, f"the {side} bound is forgotten"


def operator_mutants(root: Path, file: str, count: int) -> list[Mutant]:
    """A sample of what the operators make of a file, from as many lines as possible.

    It follows from the text of each line alone, so that edits and moves elsewhere leave the sample as it is.
    """
    text = (root / file).read_text(encoding="utf-8")
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    by_line: dict[int, list[Mutant]] = {}
    for node in _mutable(ast.parse(text)):
        if not hasattr(node, "end_lineno"):
            continue
        target = node.test if isinstance(node, ast.If) else node
        start = starts[target.lineno - 1] + target.col_offset  # type: ignore[attr-defined]
        stop = starts[target.end_lineno - 1] + target.end_col_offset  # type: ignore[attr-defined]
        lines = tuple(range(target.lineno, target.end_lineno + 1))  # type: ignore[attr-defined]
        for new, bug in operators(node):
            if ast.dump(new) == ast.dump(node):  # two equal arguments are swapped
                continue
            written = ast.unparse(new)
            if isinstance(node, ast.expr) and isinstance(new, ast.expr):
                written = f"({written})"
            by_line.setdefault(lines[0], []).append(Mutant(file, start, stop, written, bug, lines, False))
    source = text.splitlines()

    def rank(mutant: Mutant) -> str:
        return hashlib.blake2b(f"{source[mutant.line - 1].strip()} {mutant.bug} {mutant.new}".encode()).hexdigest()

    chosen = sorted((min(mutants, key=rank) for mutants in by_line.values()), key=rank)[:count]
    return sorted(chosen, key=lambda m: m.start)


def _mutable(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes inside functions that compute something: no annotations, texts, messages or progress lines."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name not in SKIPPED_FUNCTIONS:
                for statement in node.body:
                    yield from _statement(statement)
        elif isinstance(node, ast.ClassDef):
            yield from _mutable(node)


def _statement(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.ExceptHandler)):
        return
    if isinstance(node, ast.keyword) and node.arg in KEYWORDS_KEPT:
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    called = node.value if isinstance(node, ast.Expr) else node
    if isinstance(called, ast.Call):
        name = called.func.attr if isinstance(called.func, ast.Attribute) else getattr(called.func, "id", "")
        if name in CALLS_KEPT or name.endswith("Error"):
            return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield from _mutable(ast.Module([node], []))
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "slice") and not isinstance(node, ast.Subscript):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _statement(child)


# ------------------------------------------------------------------------------- which tests to run


class Recorder:
    """A pytest plugin that notes how long each test takes and which one fails first."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.failed = ""

    def pytest_runtest_logreport(self, report: object) -> None:
        self.seconds[report.nodeid] += report.duration  # type: ignore[attr-defined]
        if report.failed and not self.failed:  # type: ignore[attr-defined]
            self.failed = report.nodeid  # type: ignore[attr-defined]

    def pytest_collectreport(self, report: object) -> None:
        if report.failed and not self.failed:  # type: ignore[attr-defined]
            self.failed = f"import of {report.nodeid}"  # type: ignore[attr-defined]


Coverage = dict[str, dict[int, set[str]]]  # file → line → tests


def measure(root: Path, selection: str, paths: list[str]) -> tuple[Coverage, Counter[str]]:
    """Runs the unchanged tests: the tests that execute each line, and the seconds of each test."""
    script = (
        "import json, sys, pytest\nsys.path.insert(0, 'scripts')\nfrom mutate import Recorder\nr = Recorder()\n"
        "code = pytest.main(sys.argv[1:], plugins=[r])\njson.dump(r.seconds, open('seconds.json', 'w'))\nsys.exit(code)"
    )
    options = [
        "-q",
        "-p",
        "no:randomly",
        "--cov=seq2seq",
        "--cov-context=test",
        "--cov-report=",
        *(["-m", selection] if selection else []),
        *paths,
    ]
    done = subprocess.run([sys.executable, "-c", script, *options], cwd=root, env=_environment(root))
    if done.returncode:
        raise SystemExit("error: the tests fail without any bug planted; mend them first")
    lines: Coverage = {}
    with sqlite3.connect(root / ".coverage") as database:
        if next(database.execute("select value from meta where key = 'has_arcs'"))[0] not in ("1", "True"):
            raise SystemExit("error: coverage must measure branches")
        query = (
            "select file.path, arc.tono, context.context from arc join file on arc.file_id = file.id "
            "join context on arc.context_id = context.id where arc.tono > 0"
        )
        for path, line, context in database.execute(query):
            file = str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path
            lines.setdefault(file, {}).setdefault(line, set()).add(context.split("|")[0])
    return lines, Counter(json.loads((root / "seconds.json").read_text(encoding="utf-8")))


def tests_of(mutant: Mutant, coverage: Coverage, seconds: Counter[str]) -> list[str]:
    """The tests that execute a mutant's lines, fastest first."""
    by_line = coverage.get(CALLERS.get(mutant.file, mutant.file), {})
    lines = () if mutant.file in CALLERS else mutant.lines
    covering = {test for line in lines for test in by_line.get(line, ())} - {""}
    if not covering:  # it runs at import, or in another process, where coverage counts no test
        covering = {test for tests in by_line.values() for test in tests} - {""}
    return sorted(covering, key=lambda test: seconds[test])


# ------------------------------------------------------------------------------------------- running


def copy_project(folder: Path, tests_from: str | None) -> Path:
    """The files that git knows or would take, in a folder of their own; with the tests of another commit on request."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    if tests_from:
        shutil.rmtree(folder / "tests")
        archive = subprocess.run(
            ["git", "archive", tests_from, "tests"], cwd=REPOSITORY, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x"], input=archive.stdout, cwd=folder, check=True)
    return folder


def _environment(root: Path) -> dict[str, str]:
    cache = {"XDG_CACHE_HOME": str(root / ".cache")}  # of what the tests compile
    return {
        **os.environ,
        **cache,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MULTI30K": os.environ.get("MULTI30K", ""),
    }


def run_mutant(mutant: Mutant, root: Path, tests: list[str]) -> int:
    """Starts the tests of one mutant in a forked process → its pid; the name of a failed test goes to a file."""
    path = root / mutant.file
    path.write_bytes(mutant.apply(path.read_bytes()))
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        stale.unlink()
    (root / "failed.txt").unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()
        output = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(root)
        os.environ.update(_environment(root))
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(root))
        import pytest

        recorder = Recorder()
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            "-p",
            "no:xdist",
            "-p",
            "no:cov",
            "-W",
            "ignore",
        ]
        code = int(pytest.main([*options, *tests], plugins=[recorder]))
        (root / "failed.txt").write_text(recorder.failed, encoding="utf-8")
    except BaseException as error:
        (root / "failed.txt").write_text(f"{type(error).__name__}", encoding="utf-8")
    finally:
        os._exit(code if code < 128 else 3)


def is_late(mutant: Mutant, began: float) -> bool:
    return time.monotonic() - began > (COMPILED_TIMEOUT if mutant.file in CALLERS else TIMEOUT)


def run_all(
    mutants: list[Mutant],
    roots: list[Path],
    tests: Callable[[Mutant], list[str]],
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Every mutant, as many at a time as there are copies of the project."""
    waiting, free, outcomes = list(mutants), list(roots), []
    running: dict[int, tuple[Mutant, Path, float]] = {}

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_outcome(outcome)

    while waiting or running:
        while waiting and free:
            mutant = waiting.pop(0)
            if not _parses(mutant):
                continue
            chosen = tests(mutant)
            if not chosen:
                ended(Outcome(mutant, "untested"))
                continue
            root = free.pop()
            running[run_mutant(mutant, root, chosen)] = (mutant, root, time.monotonic())
        if not running:
            continue
        pid, status = os.waitpid(-1, os.WNOHANG)
        late = [p for p, (mutant, _, began) in running.items() if is_late(mutant, began)]
        for p in late:
            with suppress(ProcessLookupError):  # it may have ended by itself just now
                os.killpg(p, signal.SIGKILL)
        if pid not in running:
            time.sleep(0.02)
            continue
        mutant, root, began = running.pop(pid)
        shutil.copy2(REPOSITORY / mutant.file, root / mutant.file)
        failed = (root / "failed.txt").read_text(encoding="utf-8") if (root / "failed.txt").exists() else ""
        if is_late(mutant, began):
            ended(Outcome(mutant, "timeout", "no end within the time"))
        elif os.waitstatus_to_exitcode(status) == 0:
            ended(Outcome(mutant, "survived"))
        else:
            ended(Outcome(mutant, "caught", failed or "a crash"))
        free.append(root)
    return outcomes


def _parses(mutant: Mutant) -> bool:
    if mutant.file in CALLERS:
        command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        text = mutant.apply((REPOSITORY / mutant.file).read_bytes())
        if subprocess.run(command, input=text, capture_output=True).returncode:
            raise SystemExit(f"error: {mutant.file}:{mutant.line}: {mutant.bug!r} does not compile")
        return True
    try:
        ast.parse(mutant.apply((REPOSITORY / mutant.file).read_bytes()))
    except SyntaxError:
        if mutant.planted:
            raise SystemExit(f"error: {mutant.file}:{mutant.line}: {mutant.bug!r} is not Python") from None
        return False
    return True


# --------------------------------------------------------------------------------------------- report


def shown(mutant: Mutant) -> str:
    """The replaced text and the new one, on one line."""
    text = (REPOSITORY / mutant.file).read_bytes()
    old = " ".join(text[mutant.start : mutant.stop].decode().split())
    return f"{old}  →  {' '.join(mutant.new.split())}"


def explained(outcomes: list[Outcome]) -> list[Outcome]:
    """Survivors that the list of equivalent mutants explains, by file, replacement and perhaps part of the line."""
    known = list(catalogue("equivalent"))

    def reason(mutant: Mutant) -> str:
        line = (REPOSITORY / mutant.file).read_text(encoding="utf-8").splitlines()[mutant.line - 1]
        fitting = (e for e in known if (e["file"], e["change"]) == (mutant.file, shown(mutant)))
        return next((e["reason"] for e in fitting if e.get("code", "") in line), "")

    return [
        Outcome(o.mutant, "equivalent", "", why)
        if o.verdict in ("survived", "untested") and (why := reason(o.mutant))
        else o
        for o in outcomes
    ]


def table(outcomes: list[Outcome]) -> str:
    rows: list[tuple[str, ...]] = [("file", "planted", "caught", "survived", "equivalent", "score")]
    files = sorted({o.mutant.file for o in outcomes})
    for name in [*files, "all"]:
        counts = Counter(o.verdict for o in outcomes if name in ("all", o.mutant.file))
        caught, survived = counts["caught"] + counts["timeout"], counts["survived"] + counts["untested"]
        score = f"{100 * caught / max(1, caught + survived):.1f} %"
        rows.append((name, *(str(n) for n in (sum(counts.values()), caught, survived, counts["equivalent"])), score))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * 5, *lines[1:]])


def target_files(root: Path, only: str) -> list[str]:
    files = [str(path.relative_to(root)) for path in sorted((root / "seq2seq").rglob("*.py"))]
    inner = [
        f for f in files if f.removeprefix("seq2seq/").startswith(TARGETS) and not any(part in f for part in UNTARGETED)
    ]
    return [f for f in (*inner, *CALLERS) if re.search(only, f)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="files whose path matches")
    parser.add_argument("--bugs", default="", metavar="REGEX", help="planted bugs whose words match")
    parser.add_argument("--planted", action="store_true", help="no operator mutants")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth planted bug (default 1)")
    parser.add_argument(
        "--density", type=float, default=0.06, help="operator mutants for each line of code (default 0.06)"
    )
    parser.add_argument("--tests-from", metavar="REV", help="run the tests of another commit")
    parser.add_argument(
        "--select", default="not slow", metavar="MARKS", help="tests to run, as for pytest -m (default: not slow)"
    )
    parser.add_argument("--tests", nargs="*", default=[], metavar="PATH", help="test files to run (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one for each core)"
    )
    parser.add_argument("--check", action="store_true", help="only check that every planted bug applies")
    parser.add_argument("--output", type=Path, help="write every outcome to this JSON file")
    parser.add_argument("--gpu", action="store_true", help="the bugs of mutants/gpu.yaml, with the tests of tests/gpu")
    options = parser.parse_args()

    files, bugs = target_files(REPOSITORY, options.only), planted(REPOSITORY)
    if options.gpu:
        options.planted, options.select, options.tests = True, "slow", ["tests/gpu"]
    if not options.check:
        on_gpu = planted(REPOSITORY, "gpu")
        bugs = on_gpu if options.gpu else [bug for bug in bugs if bug not in on_gpu]
    mutants = [m for m in bugs if m.file in files and re.search(options.bugs, m.bug)][:: options.every]
    if options.check:
        for mutant in mutants:
            _parses(mutant)
        explained([])  # reads the equivalent ones
        print(f"{len(mutants)} planted bugs apply")
        return
    if not options.planted and not options.bugs:
        for file in (file for file in files if file not in CALLERS):
            code = len((REPOSITORY / file).read_text(encoding="utf-8").splitlines())
            mutants += operator_mutants(REPOSITORY, file, round(options.density * code))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate-") as tmp:
        root = copy_project(Path(tmp).resolve() / "0" / "seq2seq", options.tests_from)
        coverage, seconds = measure(root, options.select, options.tests)
        compileall.compile_dir(root / "seq2seq", quiet=1)
        roots = [root]
        for i in range(1, options.jobs):
            roots.append(Path(tmp).resolve() / str(i) / "seq2seq")
            shutil.copytree(root, roots[-1])
        print(f"{len(seconds)} tests ran in {sum(seconds.values()):.0f} s; {len(mutants)} mutants follow", flush=True)
        preload()
        outcomes = run_all(mutants, roots, lambda m: tests_of(m, coverage, seconds), print_outcome)
    outcomes = explained(outcomes)
    print(table(outcomes))
    left = [o for o in outcomes if o.verdict in ("survived", "untested")]
    for outcome in sorted((*left, *(o for o in outcomes if o.verdict == "equivalent")), key=lambda o: o.verdict):
        mutant, reason = outcome.mutant, outcome.reason and f"  ({outcome.reason})"
        print(f"{outcome.verdict}  {mutant.file}:{mutant.line}  {mutant.bug}: {shown(mutant)}{reason}")
    print(f"{len(outcomes)} mutants in {time.monotonic() - began:.0f} s")
    if options.output:
        options.output.write_text(json.dumps([row(o) for o in outcomes], indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(left))


def row(outcome: Outcome) -> dict[str, object]:
    mutant = outcome.mutant
    where = {"file": mutant.file, "line": mutant.line, "bug": mutant.bug, "change": shown(mutant)}
    return {**where, "planted": mutant.planted, "verdict": outcome.verdict, "by": outcome.by, "reason": outcome.reason}


def print_outcome(outcome: Outcome) -> None:
    mutant = outcome.mutant
    by = f"  [{outcome.by.split('::')[-1]}]" if outcome.by else ""
    print(f"{outcome.verdict:9} {mutant.file}:{mutant.line}  {mutant.bug}{by}", flush=True)


def preload() -> None:
    """The slow imports, once for all mutants; nothing of the project itself."""
    import torch

    torch.set_num_threads(1)
    for name in ("pytest", "hydra", "sacrebleu.metrics", "safetensors.torch", "sentencepiece", "numpy", "datasets",
                 "torch._dynamo", "torch.utils.tensorboard", "hypothesis", "PIL.Image"):  # fmt: skip
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)


if __name__ == "__main__":
    main()
