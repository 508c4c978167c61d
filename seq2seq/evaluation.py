"""BLEU and chrF of detokenised text through sacreBLEU, always with their signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seq2seq.config import SearchConfig
from seq2seq.text.corpus import Corpus
from seq2seq.translator import Translator


@dataclass(frozen=True)
class Scores:
    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.2f}  chrF {self.chrf:.2f}"


def score(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Corpus scores from 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # `force` silences the guess that text ending in " ." must be tokenised.
    bleu, chrf = BLEU(force=True), CHRF()
    bleu_score = bleu.corpus_score(hypotheses, [references])
    chrf_score = chrf.corpus_score(hypotheses, [references])
    return Scores(bleu_score.score, chrf_score.score, str(bleu.get_signature()), str(chrf.get_signature()))


def translate_and_score(translator: Translator, corpus: Corpus, search: SearchConfig) -> tuple[list[str], Scores]:
    """The best translation of every source sentence, and how they compare with the targets."""
    hypotheses = [translations[0].text for translations in translator.translate(corpus.source, search)]
    return hypotheses, score(hypotheses, corpus.target)
