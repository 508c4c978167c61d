"""One-page report on a run: training, translation quality, attention, and how to reproduce it.

The page is template/report.html with its style sheets, its scripts and the data of a run inside; it needs no network.
The page of `seq2seq serve` uses the same base.css, elements.js, theme.js and attention.js.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.evaluation.alignment import AlignmentErrors, letter_fractions, words_of_pieces
from seq2seq.evaluation.diagnostics import Group, output_errors
from seq2seq.evaluation.metrics import MetricResult, TestSet, sentence_scores
from seq2seq.inference.translator import Translation
from seq2seq.utils.run import Run

TEMPLATE = Path(__file__).with_name("template")
STYLES = ("base.css", "report.css")
SCRIPTS = ("elements.js", "theme.js", "attention.js", "report.js")  # each imports only from those before it
# Counters that only grow are uninformative as curves.
COUNTERS = ("kind", "update", "target_tokens", "skipped", "seconds", "epoch", "graphs")

# ---------------------------------------------------------------------- the data, as template/report.js reads it


@dataclass(frozen=True)
class RunFacts:
    """What was trained, and on which sentences it is tested."""

    name: str
    checkpoint: str  # name of its folder
    model: str  # preset
    family: str  # "lstm" or "transformer"
    parameters: int  # of the model as trained
    corpus: str
    source_language: str
    target_language: str
    test_set: str
    pairs: int  # in the test set
    search: str  # in words


@dataclass(frozen=True)
class TrainingTotals:
    """The extent of a finished training."""

    update: int  # the last
    seconds: float  # without validations


@dataclass(frozen=True)
class Example:
    """A translated sentence beside its references."""

    index: int  # in the test set, from 0
    source: str
    references: list[str]
    output: str
    score: float  # chrF


@dataclass(frozen=True)
class ExampleGroup:
    """Sentences that share a property."""

    name: str  # title of its tab
    total: int | None  # in the test set; None where the group is only a ranking
    examples: list[Example]  # the first of them


@dataclass(frozen=True)
class ErrorCounts:
    """Counts and fractions of the errors in `diagnostics.OutputErrors`."""

    sentences: int  # in the test set
    repeating: int  # sentences that repeat words where no reference does
    short: int  # sentences with under 70 % of the words of the shortest reference
    ratio: float  # output words / reference words
    omitted: float  # fraction of reference words missing in the output
    added: float  # fraction of output words missing in the reference


@dataclass(frozen=True)
class Sentences:
    """Translations one by one."""

    groups: list[ExampleGroup]
    errors: ErrorCounts
    histogram: list[int]  # sentences by chrF, in steps of 5


@dataclass(frozen=True)
class AttentionPlot:
    """All attention weights of a sentence; rows are target pieces, columns source pieces, both with an end mark."""

    example: Example
    source_pieces: list[str]
    target_pieces: list[str]
    source_words: list[str]
    target_words: list[str]
    source_fractions: list[list[float]]  # of each piece's letters in each word
    target_fractions: list[list[float]]
    shape: list[int]  # layers, heads, target pieces, source pieces
    weights: str  # from 0 to 1 in steps of 1/65535, as 16-bit numbers in base64


@dataclass(frozen=True)
class Alignment:
    """Alignment error rates: of each head, of the means of heads, and of the best head, counted from 0."""

    heads: list[list[float]]  # by layer
    layers: list[float]  # of the mean of each layer's heads
    mean: float  # of the mean of all heads
    best_rate: float
    best_layer: int
    best_head: int


Point = tuple[int, float]  # update, value
Metrics = list[dict[str, Any]]  # lines of metrics.jsonl, whose keys depend on what was trained


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    run: RunFacts
    totals: TrainingTotals | None  # None if training has not finished
    scores: list[MetricResult]
    lengths: list[Group]  # BLEU by words of the source
    curves: dict[str, dict[str, list[Point]]]  # by metric, then "train" or "validation"
    time: dict[str, float]  # seconds by activity
    sentences: Sentences
    attention: list[AttentionPlot]
    alignment: Alignment | None  # None if the true alignment is unknown
    config: str  # as YAML
    environment: dict[str, Any] | None  # the last entry of environment.json, whose keys depend on the machine
    commands: list[str]  # that reproduce the run, its scores and this page
    version: str  # of this package


# ------------------------------------------------------------------------------------------------ page


def page(report: Report) -> str:
    """Return the report as one HTML page."""
    return fill_template(json.dumps(asdict(report), ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def fill_template(data: str) -> str:
    """Return the template with all its parts inside, the data escaped so that no sentence can end its script."""
    script = "".join(without_modules(template(name)) for name in SCRIPTS)
    parts = {
        **{f'<link rel="stylesheet" href="{name}">': f"<style>\n{template(name)}</style>" for name in STYLES},
        '<script type="module" src="report.js">': f'<script type="module">\n{script}',
        '<script id="data" type="application/json">': f'<script id="data" type="application/json">{escape(data)}',
    }
    html = template("report.html")
    for reference, content in parts.items():
        html = html.replace(reference, content, 1)
    return html


def template(name: str) -> str:
    return (TEMPLATE / name).read_text(encoding="utf-8")


def without_modules(script: str) -> str:
    """Return a module's code as a part of one script: nothing is imported or exported."""
    return re.sub(r"^import [^;]*;\n|^export ", "", script, flags=re.MULTILINE)


def escape(data: str) -> str:
    """Escape the only character of JSON that HTML reads inside a script."""
    return data.replace("<", "\\u003c")


# ------------------------------------------------------------------------------------------- training


def read_metrics(run: Run) -> Metrics:
    """Read the metrics that training logged."""
    try:
        lines = run.metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def training_totals(run: Run) -> TrainingTotals | None:
    """Return the totals of a run, or None if it has not finished."""
    try:
        progress = json.loads(run.result.read_text(encoding="utf-8"))["progress"]
        return TrainingTotals(progress["update"], progress["seconds"])
    except (OSError, ValueError, KeyError):
        return None


def curves(metrics: Metrics) -> dict[str, dict[str, list[Point]]]:
    """Return every logged number by name and kind of line, as points of update and value."""
    points: dict[str, dict[str, list[Point]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in COUNTERS and isinstance(value, (int, float)) and math.isfinite(value):
                points.setdefault(name, {}).setdefault(line["kind"], []).append((line["update"], value))
    return points


def time_spent(metrics: Metrics) -> dict[str, float]:
    """Return seconds by activity, from the tokens and fractions that training logged."""
    seconds = {"real tokens": 0.0, "padding": 0.0, "waiting for batches": 0.0, "validation and checkpoints": 0.0}
    before = 0.0
    for line in metrics:
        if line["kind"] == "validation":
            seconds["validation and checkpoints"] += line.get("seconds", 0.0)
        elif line.get("tokens_per_second") and "target_tokens" in line:
            spent = (line["target_tokens"] - before) / line["tokens_per_second"]
            before = line["target_tokens"]
            waiting, padding = line.get("waiting", 0.0), line.get("padding", 0.0)
            seconds["waiting for batches"] += spent * waiting
            seconds["padding"] += spent * (1 - waiting) * padding
            seconds["real tokens"] += spent * (1 - waiting) * (1 - padding)
    return {name: spent for name, spent in seconds.items() if spent > 0}


# ------------------------------------------------------------------------------------------ sentences


def sentences(hypotheses: Sequence[str], test: TestSet, count: int) -> Sentences:
    """Return the worst and the best sentences, and those that are repetitive or too short."""
    scores, errors = sentence_scores(hypotheses, test), output_errors(hypotheses, test)
    order = sorted(range(len(test)), key=lambda i: scores[i])

    def group(name: str, total: int | None, indices: list[int]) -> ExampleGroup:
        return ExampleGroup(name, total, [example(i, hypotheses[i], test, scores[i]) for i in indices[:count]])

    groups = [
        group("Worst", None, order),
        group("Best", None, order[::-1]),
        group("Repetitive", len(errors.repeating), errors.repeating),
        group("Too short", len(errors.short), errors.short),
    ]
    totals = len(test), len(errors.repeating), len(errors.short)
    histogram = np.histogram(scores, bins=20, range=(0, 100))[0].tolist()
    return Sentences(groups, ErrorCounts(*totals, errors.ratio, errors.omitted, errors.added), histogram)


def example(index: int, output: str, test: TestSet, score: float) -> Example:
    return Example(index, test.source[index], [lines[index] for lines in test.references], output, score)


def typical(test: TestSet, count: int) -> list[int]:
    """Return indices of sentences spread evenly over all lengths, shortest first."""
    order = sorted(range(len(test)), key=lambda i: len(test.source[i].split()))
    return [order[round((i + 0.5) * len(order) / count - 0.5)] for i in range(min(count, len(order)))]


# ------------------------------------------------------------------------------------------ attention


def attention_plot(example: Example, translation: Translation) -> AttentionPlot:
    """Return the pieces and words of a sentence and the weights of every layer and head."""
    assert translation.weights_LNTS is not None
    sources, targets = list(translation.source_pieces[:-1]), list(translation.pieces)
    return AttentionPlot(
        example,
        source_pieces=[*sources, "⏎"],
        target_pieces=[*targets, "⏎"],
        source_words=words_of_pieces(sources),
        target_words=words_of_pieces(targets),
        source_fractions=rounded(letter_fractions(sources)),
        target_fractions=rounded(letter_fractions(targets)),
        shape=list(translation.weights_LNTS.shape),
        weights=encode_weights(translation.weights_LNTS.float().numpy()),
    )


def encode_weights(weights: NDArray[np.float32]) -> str:
    """Encode weights from 0 to 1 in steps of 1/65535, as base64."""
    return base64.b64encode((weights.clip(0, 1) * 65535).round().astype("<u2").tobytes()).decode()


def rounded(fractions_PW: Tensor) -> list[list[float]]:
    return [[round(fraction, 3) for fraction in row] for row in fractions_PW.tolist()]


def alignment(errors: AlignmentErrors | None) -> Alignment | None:
    return Alignment(errors.heads, errors.layers, errors.mean, *errors.best) if errors else None
