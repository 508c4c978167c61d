"""One-page report on a run: training, translation quality, attention, and how to reproduce it.

The page is report.html with the data of a run inside; it needs no network.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seq2seq.evaluation.alignment import AlignmentErrors, letter_fractions, words_of_pieces
from seq2seq.evaluation.diagnostics import lengths as lengths_of
from seq2seq.evaluation.metrics import TestSet, sentence_scores
from seq2seq.inference.translator import Translation
from seq2seq.utils.run import Run

TEMPLATE = Path(__file__).with_name("report.html")
PLACEHOLDER = "/*DATA*/"
# Counters that only grow are uninformative as curves.
COUNTERS = ("kind", "update", "target_tokens", "skipped", "seconds", "epoch", "graphs")


def page(data: dict[str, Any]) -> str:
    """Return the page with its data, escaped so that no sentence can end the enclosing script."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, text.replace("<", "\\u003c"), 1)


# ------------------------------------------------------------------------------------------- training


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """Read the metrics that training logged."""
    try:
        lines = run.metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curves(metrics: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return every logged number by name and kind of line, as points of update and value."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in COUNTERS and isinstance(value, (int, float)) and math.isfinite(value):
                points.setdefault(name, {}).setdefault(line["kind"], []).append((line["update"], value))
    return points


def time_spent(metrics: list[dict[str, Any]]) -> dict[str, float]:
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


def sentences(hypotheses: Sequence[str], test: TestSet, count: int) -> dict[str, Any]:
    """Return the worst and the best sentences, and those that repeat themselves or break off."""
    scores, length_errors = sentence_scores(hypotheses, test), lengths_of(hypotheses, test)
    order = sorted(range(len(test)), key=lambda i: scores[i])
    kinds = {
        "worst": order[:count],
        "best": order[: -count - 1 : -1],
        "repeating": length_errors.repeating[:count],
        "breaking off": length_errors.short[:count],
    }
    chosen = sorted({i for indices in kinds.values() for i in indices})
    return {
        "kinds": kinds,
        "texts": {i: sentence(i, hypotheses[i], test, scores[i]) for i in chosen},
        "counts": {
            "sentences": len(test),
            "repeating": len(length_errors.repeating),
            "breaking off": len(length_errors.short),
            "ratio": length_errors.ratio,
            "omitted": length_errors.omitted,
            "added": length_errors.added,
        },
        "histogram": np.histogram(scores, bins=20, range=(0, 100))[0].tolist(),
    }


def sentence(index: int, hypothesis: str, test: TestSet, score: float) -> dict[str, Any]:
    references = [lines[index] for lines in test.references]
    return {"source": test.source[index], "references": references, "output": hypothesis, "score": score}


def typical(test: TestSet, count: int) -> list[int]:
    """Return indices of sentences spread evenly over all lengths, shortest first."""
    order = sorted(range(len(test)), key=lambda i: len(test.source[i].split()))
    return [order[round((i + 0.5) * len(order) / count - 0.5)] for i in range(min(count, len(order)))]


# ------------------------------------------------------------------------------------------ attention


def attention(index: int, translation: Translation, source: str, reference: str, score: float) -> dict[str, Any]:
    """Return the data of an attention plot: pieces, words, and the weights of every layer and head."""
    assert translation.weights_LNTS is not None
    # Rows are target pieces and the end mark, columns source pieces and the end mark.
    sources, targets = list(translation.source_pieces[:-1]), list(translation.pieces)
    return {
        "index": index,
        "text": [source, translation.text],
        "source": [*sources, "⏎"],
        "target": [*targets, "⏎"],
        "source_words": words_of_pieces(sources),
        "target_words": words_of_pieces(targets),
        "source_fractions": rounded(letter_fractions(sources)),
        "target_fractions": rounded(letter_fractions(targets)),
        "shape": list(translation.weights_LNTS.shape),
        "weights": packed(translation.weights_LNTS.float().numpy()),
        "reference": reference,
        "score": score,
    }


def packed(weights: np.ndarray[Any, Any]) -> str:
    """Encode weights from 0 to 1 in steps of 1/65535, as base64."""
    return base64.b64encode((weights.clip(0, 1) * 65535).round().astype("<u2").tobytes()).decode()


def rounded(fractions_PW: Any) -> list[list[float]]:
    return [[round(float(fraction), 3) for fraction in row] for row in fractions_PW]


def alignment_data(errors: AlignmentErrors | None) -> dict[str, Any] | None:
    if errors is None:
        return None
    rate, layer, head = errors.best
    return {
        "heads": errors.heads,
        "layers": errors.layers,
        "mean": errors.mean,
        "best": {"rate": rate, "layer": layer, "head": head},
    }
