"""Commands as functions: the same overrides as on the command line, results as objects."""

from __future__ import annotations

from seq2seq.cli.commands.evaluate import Evaluated
from seq2seq.cli.main import call
from seq2seq.utils.run import Run


def train(*overrides: str) -> Run:
    """Train a run, or resume it: `train("name=mine", "model=lstm", "training.updates=500")`."""
    run: Run = call("train", *overrides)
    return run


def evaluate(*overrides: str) -> list[Evaluated]:
    """Score runs on test sets: `evaluate("run=mine", "search.beam=5")`."""
    results: list[Evaluated] = call("evaluate", *overrides)
    return results
