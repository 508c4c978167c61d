"""Minimum Bayes risk: of several translations, choose the one most similar to all (Eikema & Aziz 2020)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence


def expected_similarity(texts: Sequence[str], metric: str) -> list[float]:
    """Return the mean similarity of each text to all, itself included; a text drawn twice counts twice."""
    similarity = sentence_metric(metric)
    counts = Counter(texts)
    mean = {
        text: sum(count * similarity(text, other) for other, count in counts.items()) / len(texts) for text in counts
    }
    return [mean[text] for text in texts]


def sentence_metric(metric: str) -> Callable[[str, str], float]:
    """Return sacreBLEU's score of one sentence against another, 0 to 100, as a function."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # Short sentences have no 4-grams: only the orders that occur count.
    measure = CHRF() if metric == "chrf" else BLEU(effective_order=True, force=True)
    return lambda text, other: float(measure.sentence_score(text, [other]).score)
