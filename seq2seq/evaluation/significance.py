"""Paired significance tests between runs, computed by sacreBLEU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seq2seq.evaluation.metrics import TestSet, rstrip_lines, sacrebleu_metric


@dataclass(frozen=True)
class Paired:
    """A run's score, and the p-values of its difference from the first run."""

    value: float
    interval: float
    bootstrap: float = 1.0
    randomised: float = 1.0
    signatures: tuple[str, ...] = ()


def paired_tests(names: Sequence[str], hypotheses: Sequence[Sequence[str]], test: TestSet) -> dict[str, list[Paired]]:
    """Run sacreBLEU's paired bootstrap and approximate randomisation against the first run, for each metric."""
    from sacrebleu.significance import PairedTest

    references = [rstrip_lines(lines) for lines in test.references]
    systems: list[tuple[str, Sequence[str]]] = [(str(i), rstrip_lines(lines)) for i, lines in enumerate(hypotheses)]
    by_metric = {}
    for name in names:
        results: list[Any] = []
        signatures: list[str] = []
        for kind in ("bs", "ar"):
            metric = sacrebleu_metric(name, test.bleu_tokenizer)
            signature, scores = PairedTest(systems, {name: metric}, references, kind)()
            signatures += map(str, signature.values())
            results.append(next(rows for title, rows in scores.items() if title != "System"))
        by_metric[name] = [
            Paired(bs.score, float(bs.ci), bs.p_value or 1.0, ar.p_value or 1.0, tuple(signatures))
            for bs, ar in zip(*results, strict=True)
        ]
    return by_metric
