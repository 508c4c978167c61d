"""What each fast path buys, and that none changes what is learned.

python scripts/fast_paths.py                      the built-in corpus: every fast path on, each one off, all off
python scripts/fast_paths.py --laws               the tests of models, training and search with all of them off
python scripts/fast_paths.py --model lstm training.updates=200 data=multi30k     another model, length, corpus

The plain forms are in `tests/reference/fast_paths.py`; each replaces the fast one in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import benchmarks

from seq2seq.cli import main as cli
from seq2seq.utils.run import Run

sys.path.insert(0, str(benchmarks.REPOSITORY))  # for the tests
from tests.reference.fast_paths import EVERY, PATHS, do_without

LAWS = (
    "model/test_attention.py",
    "model/test_model.py",
    "decoding/test_search.py",
    "training/test_training.py",
    "inference/test_translator.py",
)


def pytest_configure() -> None:
    """Pytest loads this file as a plugin: all tests without fast paths."""
    do_without(list(PATHS))


def laws() -> int:
    tests = [benchmarks.REPOSITORY / "tests" / name for name in LAWS]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(benchmarks.REPOSITORY)])}
    # Two laws are about fast paths themselves: that sentences wait for the next batch, and what is laid out once.
    others = "not that_wait and not laid_out"
    command = [sys.executable, "-m", "pytest", "-p", "fast_paths", "-k", others, *map(str, tests)]
    return subprocess.run(command, env=environ, check=False).returncode


def run(model: str, without: list[str], number: int, overrides: list[str]) -> dict[str, float]:
    """A training in a process of its own → its last validation loss, its test score, and its seconds an update."""
    name = f"{model}-{number}"
    words = [f"name={name}", "outputs=outputs/fast_paths", "overwrite=true", f"model={model}", *overrides]
    subprocess.run(
        [sys.executable, __file__, "--run", json.dumps(without), *words], check=True, stdout=subprocess.DEVNULL
    )
    found = Run.find(name, "outputs/fast_paths")
    metrics = map(json.loads, found.metrics.read_text(encoding="utf-8").splitlines())
    validations = [line for line in metrics if line["kind"] == "validation"]
    result = json.loads(found.result.read_text(encoding="utf-8"))
    return {
        "loss": validations[-1]["loss"],
        "validation": sum(line["seconds"] for line in validations) / len(validations),
        "update": 1000 * result["progress"]["seconds"] / result["progress"]["update"],
        **{key: result["test"][key] for key in ("bleu", "bleu_interval")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laws", action="store_true", help="run the tests instead")
    parser.add_argument("--model", default="transformer")
    parser.add_argument("--ends", action="store_true", help="only with all of them, and with none")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.laws:
        raise SystemExit(laws())
    if options.run is not None:
        sys.argv = ["seq2seq", "train", *overrides, *do_without(options.run)]
        cli.main()
        return
    has = [name for name, path in EVERY.items() if not path.family or options.model.startswith(path.family)]
    contestants: dict[str, list[str]] = {"as it is": []} | {
        (f"without: {n}" if n in PATHS else f"with: {n}"): [n] for n in has
    }
    contestants["without any"] = [name for name in has if name in PATHS]
    if options.ends:
        contestants = {name: contestants[name] for name in ("as it is", "without any")}
    rows = []
    for number, (name, without) in enumerate(contestants.items()):
        print(name, file=sys.stderr, flush=True)
        found = run(options.model, without, number, overrides)
        rows.append(
            (
                name,
                f"{found['loss']:.3f}",
                f"{found['bleu']:.2f} ± {found['bleu_interval']:.2f}",
                f"{found['update']:,.0f}",
                f"{found['validation']:.1f}",
            )
        )
    heads = (options.model, "validation loss", "test BLEU", "ms an update", "s a validation")
    print(benchmarks.table(heads, rows))


if __name__ == "__main__":
    main()
