"""Scores of detokenised text by sacreBLEU and COMET, always with their signatures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from seq2seq.config.schema import DataConfig
from seq2seq.data.languages import code_of, is_unknown
from seq2seq.data.store import key_of
from seq2seq.utils.errors import UserError, reason_of

RESAMPLES = 1000  # for bootstrap intervals, as on sacreBLEU's command line
TITLES: dict[str, str] = {
    "bleu": "BLEU",
    "bleu_lc": "BLEU lc",
    "chrf": "chrF",
    "chrf_lc": "chrF lc",
    "chrf++": "chrF++",
    "ter": "TER",
    "comet": "COMET",
}
LOWER_IS_BETTER = ("ter",)
# BLEU's tokenizer by target language, where it is not 13a: sacreBLEU's own choice for zh, ja and ko; characters for
# the other languages that put no spaces between words.
TOKENIZERS = {
    **dict.fromkeys(("zh", "yue", "wuu", "nan", "lzh"), "zh"),
    "ja": "ja-mecab",
    "ko": "ko-mecab",
    **dict.fromkeys(("th", "lo", "km", "my", "bo", "dz"), "char"),
}
MODULES = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}  # what a tokenizer imports


@dataclass(frozen=True)
class TestSet:
    """Sentences to translate, with one or several references each."""

    name: str
    source: Sequence[str]
    references: Sequence[Sequence[str]]  # by translator, then by sentence
    language: str = ""  # of the references, if known
    grammar: bool = False  # made by the built-in grammar, which knows its word alignment
    tokenize: str | None = None  # BLEU's tokenizer; None: by language

    def __len__(self) -> int:
        return len(self.source)

    @property
    def bleu_tokenizer(self) -> str:
        return self.tokenize or tokenizer_of(self.language)

    @cached_property
    def key(self) -> str:
        """A fingerprint that distinguishes test sets of the same name."""
        return key_of(*self.source, "", *(line for lines in self.references for line in lines))[:6]


@dataclass(frozen=True)
class MetricResult:
    """A corpus score; 95 % of its resamples lie within `mean` ± `interval`."""

    name: str
    value: float
    signature: str
    mean: float | None = None
    interval: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.interval is None else f" ± {self.interval:.2f}")


@dataclass(frozen=True)
class TranslationScores:
    """BLEU and chrF of translations: training monitors one of them, and both are logged."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    bleu_interval: float | None = None
    chrf_interval: float | None = None

    def __str__(self) -> str:
        bleu = MetricResult("BLEU", self.bleu, "", None, self.bleu_interval)
        return f"BLEU {bleu}  chrF {MetricResult('chrF', self.chrf, '', None, self.chrf_interval)}"


# ------------------------------------------------------------------------------------------- metrics


def score(
    hypotheses: Sequence[str], references: Sequence[str], data: DataConfig | None = None, resamples: int = 0
) -> TranslationScores:
    """Return BLEU and chrF, from 0 to 100, of translations of a corpus."""
    language, tokenize = (data.target or "", data.tokenize) if data else ("", None)
    test = TestSet("", hypotheses, [references], language, tokenize=tokenize)
    bleu, chrf = (measure(name, hypotheses, test, resamples=resamples) for name in ("bleu", "chrf"))
    return TranslationScores(bleu.value, chrf.value, bleu.signature, chrf.signature, bleu.interval, chrf.interval)


def measure(name: str, hypotheses: Sequence[str], test: TestSet, *, resamples: int = 0) -> MetricResult:
    """Compute one metric by its name in the config."""
    metric = sacrebleu_metric(name, test.bleu_tokenizer)
    references = [rstrip_lines(lines) for lines in test.references]
    result = metric.corpus_score(rstrip_lines(hypotheses), references)
    mean, interval = (
        bootstrap_interval(metric, rstrip_lines(hypotheses), references, resamples) if resamples > 1 else (None, None)
    )
    return MetricResult(TITLES[name], result.score, str(metric.get_signature()), mean, interval)


def bootstrap_interval(
    metric: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]], resamples: int
) -> tuple[float, float]:
    """Return the mean of a metric's resamples and half their 95 % interval, as sacreBLEU's `corpus_score` does.

    `corpus_score` itself fails on mixed float types, which arise when only some resamples match nothing.
    """
    from sacrebleu.metrics.base import Score as Resampled
    from sacrebleu.significance import _bootstrap_resample

    stats = metric._extract_corpus_statistics(hypotheses, references)
    metric.n_bootstrap = resamples
    metric.seed, resampled = _bootstrap_resample(stats, metric, resamples)
    if len({type(one.score) for one in resampled}) > 1:
        resampled = [Resampled(one.name, float(one.score)) for one in resampled]
    summary = Resampled("", 0.0)
    summary.estimate_ci(resampled)
    return float(summary._mean), float(summary._ci)


def sacrebleu_metric(name: str, tokenize: str = "13a") -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    makers: dict[str, Callable[[], Any]] = {
        # `force` silences the warning that text ending in " ." looks tokenised.
        "bleu": lambda: BLEU(force=True, tokenize=tokenize),
        "bleu_lc": lambda: BLEU(force=True, tokenize=tokenize, lowercase=True),
        "chrf": CHRF,
        "chrf_lc": lambda: CHRF(lowercase=True),
        "chrf++": lambda: CHRF(word_order=2),
        "ter": TER,
    }
    try:
        return makers[name]()
    except (RuntimeError, ImportError, OSError) as error:
        reason = reason_of(error)
        raise UserError(f"tokenize: {tokenize} cannot be used ({reason}); choose another, such as char") from None


def require_tokenizer(tokenize: str | None) -> None:
    """Fail before any work if a tokenizer's dependencies are missing."""
    sacrebleu_metric("bleu", tokenize or "13a")


def tokenizer_of(language: str) -> str:
    """Return BLEU's tokenizer for a language, or `char` if its package is not installed."""
    tokenize = TOKENIZERS.get(code_of(language) or "", "13a")
    return tokenize if _is_installed(tokenize) else "char"


def _is_installed(tokenize: str) -> bool:
    return tokenize not in MODULES or importlib.util.find_spec(MODULES[tokenize]) is not None


def language_advice(data: DataConfig) -> str:
    """Return how to name the languages of a corpus."""
    if data.target:
        return "rename the columns after the languages, such as en and de"
    return "name the languages with data.source=… data.target=…, such as data.source=en data.target=de"


def corpus_warning(data: DataConfig) -> str | None:
    """Return a warning if BLEU cannot split a corpus into words as its target language needs."""
    require_tokenizer(data.tokenize)
    return None if data.tokenize else tokenizer_warning(data.target or "", language_advice(data))


def tokenizer_warning(language: str, remedy: str) -> str | None:
    """Return a warning if BLEU cannot use the tokenizer that the language needs; `remedy` names an unknown language."""
    tokenize = TOKENIZERS.get(code_of(language) or "", "13a")
    if is_unknown(language):
        return f"the target language is unknown, so BLEU uses 13a, for words between spaces; {remedy}"
    if not _is_installed(tokenize):
        return f"BLEU compares characters: {tokenize} is not installed; pip install 'sacrebleu[{tokenize[:2]}]'"
    return None


def print_tokenizer_warning(test: TestSet) -> None:
    """Warn of a test set's tokenizer, unless one is given."""
    remedy = "tokenize=zh, tokenize=char and others choose another"
    if not test.tokenize and (warning := tokenizer_warning(test.language, remedy)):
        print(f"warning    {warning}")


def rstrip_lines(lines: Sequence[str]) -> list[str]:
    """Strip lines as sacreBLEU's command line does."""
    return [line.rstrip() for line in lines]


def comet(hypotheses: Sequence[str], test: TestSet, model: str, resamples: int, gpus: int = 0) -> MetricResult:
    """Return COMET × 100 against the first reference, by its authors' package."""
    require_comet()
    from comet import download_model, load_from_checkpoint

    try:
        path = model if model.endswith(".ckpt") else download_model(model)
        rows = [
            {"src": source, "mt": hypothesis, "ref": reference}
            for source, hypothesis, reference in zip(test.source, hypotheses, test.references[0], strict=True)
        ]
        result = load_from_checkpoint(path).predict(rows, batch_size=32, gpus=gpus, progress_bar=False)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"comet: {model} cannot be used ({reason_of(error)})") from None
    segments = 100 * np.array(result.scores)
    mean, interval = None, None
    if resamples > 1:
        from sacrebleu.significance import estimate_ci

        resampled = np.random.default_rng(12345).choice(len(segments), (resamples, len(segments)))
        mean, interval = map(float, estimate_ci(segments[resampled].mean(1)))
    return MetricResult(TITLES["comet"], float(segments.mean()), f"model:{model}|nrefs:1", mean, interval)


def require_comet() -> None:
    if importlib.util.find_spec("comet") is None:
        raise UserError("metrics: comet is not installed; run pip install unbabel-comet, or remove it from the metrics")


def sentence_scores(hypotheses: Sequence[str], test: TestSet) -> list[float]:
    """Return chrF of each sentence; unlike BLEU, it is meaningful for few words."""
    metric = sacrebleu_metric("chrf")
    references = zip(*(rstrip_lines(lines) for lines in test.references), strict=True)
    return [
        float(metric.sentence_score(hypothesis.rstrip(), list(several)).score)
        for hypothesis, several in zip(hypotheses, references, strict=True)
    ]
