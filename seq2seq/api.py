"""Commands as functions: the same overrides as on the command line, results as objects."""

from __future__ import annotations

from seq2seq.cli.commands.evaluate import Evaluated
from seq2seq.cli.main import call
from seq2seq.utils.run import Run


def train(*overrides: str) -> Run:
    """Train a run, or resume it; it prints its progress as the command does.

    Examples:
        >>> run = train("name=mine", "data.train=[train.en,train.de]", "training.updates=2")
        run        outputs/mine
        ...
        >>> run.checkpoint("best").name
        'update-0000002'
    """
    run: Run = call("train", *overrides)
    return run


def evaluate(*overrides: str) -> list[Evaluated]:
    """Score runs on test sets: their own, or your files.

    Examples:
        >>> (result,) = evaluate("run=mine", "source=test.en", "reference=test.de", "metrics=[bleu,chrf]")
        run        outputs/mine...
        ...
        >>> [score.name for score in result.scores]
        ['BLEU', 'chrF']
    """
    results: list[Evaluated] = call("evaluate", *overrides)
    return results
