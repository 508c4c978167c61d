"""Minimum Bayes risk: of several translations the one that is most like all of them (Eikema & Aziz 2020)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence


def expected_similarity(texts: Sequence[str], metric: str) -> list[float]:
    """The mean similarity of each text to all, itself included; a text drawn twice counts twice."""
    similarity = sentence_metric(metric)
    counts = Counter(texts)
    mean = {
        text: sum(count * similarity(text, other) for other, count in counts.items()) / len(texts) for text in counts
    }
    return [mean[text] for text in texts]


def sentence_metric(metric: str) -> Callable[[str, str], float]:
    """sacreBLEU's score of one sentence against another, 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # Short sentences have no 4-grams: the orders that they have are counted.
    measure = CHRF() if metric == "chrf" else BLEU(effective_order=True, force=True)
    return lambda text, other: float(measure.sentence_score(text, [other]).score)
