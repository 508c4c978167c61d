"""Scores of detokenised text through sacreBLEU, always with their signatures, and what a score alone does not tell."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from seq2seq.config import SearchConfig
from seq2seq.errors import UserError
from seq2seq.text.corpus import Corpus
from seq2seq.text.store import key_of
from seq2seq.translator import Translator

RESAMPLES = 1000  # of the bootstrap that gives an interval, as sacreBLEU's command line draws
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


@dataclass(frozen=True)
class TestSet:
    """Sentences to translate, and one or several translations of each."""

    name: str
    source: Sequence[str]
    references: Sequence[Sequence[str]]  # by translator, then by sentence
    language: str = ""  # of the references, where it is known
    grammar: bool = False  # the embedded grammar made it, and knows which words belong together

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def key(self) -> str:
        """What tells it from other test sets of the same name."""
        return key_of(*self.source, "", *(line for lines in self.references for line in lines))[:6]


@dataclass(frozen=True)
class Score:
    """A corpus score; the mean of its resamples ± `interval` holds 95 % of them."""

    name: str
    value: float
    signature: str
    mean: float | None = None
    interval: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.interval is None else f" ± {self.interval:.2f}")


@dataclass(frozen=True)
class Scores:
    """What training watches."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str
    bleu_interval: float | None = None
    chrf_interval: float | None = None

    def __str__(self) -> str:
        bleu = Score("BLEU", self.bleu, "", None, self.bleu_interval)
        return f"BLEU {bleu}  chrF {Score('chrF', self.chrf, '', None, self.chrf_interval)}"


# ------------------------------------------------------------------------------------------- metrics


def score(hypotheses: Sequence[str], references: Sequence[str], language: str = "", resamples: int = 0) -> Scores:
    """BLEU and chrF from 0 to 100."""
    test = TestSet("", hypotheses, [references], language)
    bleu, chrf = (measure(name, hypotheses, test, resamples=resamples) for name in ("bleu", "chrf"))
    return Scores(bleu.value, chrf.value, bleu.signature, chrf.signature, bleu.interval, chrf.interval)


def translate_and_score(
    translator: Translator, corpus: Corpus, search: SearchConfig, language: str = "", resamples: int = 0
) -> tuple[list[str], Scores]:
    """The best translation of every source sentence, and how they compare with the targets."""
    hypotheses = [translations[0].text for translations in translator.translate(corpus.source, search)]
    return hypotheses, score(hypotheses, corpus.target, language, resamples)


def measure(
    name: str, hypotheses: Sequence[str], test: TestSet, *, tokenize: str | None = None, resamples: int = 0
) -> Score:
    """One metric by its name in the config."""
    metric = sacrebleu_metric(name, tokenize or tokenizer_of(test.language))
    references = [stripped(lines) for lines in test.references]
    found = metric.corpus_score(stripped(hypotheses), references)
    mean, interval = estimate(metric, stripped(hypotheses), references, resamples) if resamples > 1 else (None, None)
    return Score(TITLES[name], found.score, str(metric.get_signature()), mean, interval)


def estimate(
    metric: Any, hypotheses: Sequence[str], references: Sequence[Sequence[str]], resamples: int
) -> tuple[float, float]:
    """The mean of a metric's resamples and half of what holds 95 % of them, as sacreBLEU's `corpus_score` has them.

    It stops at a mix of float types, which it makes where a resample matches nothing and others do.
    """
    from sacrebleu.metrics.base import Score as Resampled
    from sacrebleu.significance import _bootstrap_resample

    stats = metric._extract_corpus_statistics(hypotheses, references)
    metric.n_bootstrap = resamples
    metric.seed, drawn = _bootstrap_resample(stats, metric, resamples)
    if len({type(one.score) for one in drawn}) > 1:
        drawn = [Resampled(one.name, float(one.score)) for one in drawn]
    told = Resampled("", 0.0)
    told.estimate_ci(drawn)
    return float(told._mean), float(told._ci)


def sacrebleu_metric(name: str, tokenize: str = "13a") -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    makers: dict[str, Callable[[], Any]] = {
        # `force` silences the guess that text ending in " ." must be tokenised.
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
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"tokenize: {tokenize} cannot be used here ({reason}); choose another, such as char") from None


def require_tokenizer(tokenize: str | None) -> None:
    """What a way to find words lacks here is told before any work."""
    sacrebleu_metric("bleu", tokenize or "13a")


def tokenizer_of(language: str) -> str:
    """How sacreBLEU splits a language, or its characters where what that takes is not installed."""
    codes = set(re.split(r"[^a-z]+", language.lower()))
    if codes & {"zh", "zho", "cmn"}:
        return "zh"
    for module, tokenize, of in (("MeCab", "ja-mecab", {"ja", "jpn"}), ("mecab_ko", "ko-mecab", {"ko", "kor"})):
        if codes & of:
            return tokenize if importlib.util.find_spec(module) else "char"
    return "13a"


def stripped(lines: Sequence[str]) -> list[str]:
    """Lines as sacreBLEU's command line reads them."""
    return [line.rstrip() for line in lines]


def comet(hypotheses: Sequence[str], test: TestSet, model: str, resamples: int, gpus: int = 0) -> Score:
    """COMET × 100 against the first reference, by the package that its authors publish."""
    require_comet()
    from comet import download_model, load_from_checkpoint

    try:
        path = model if model.endswith(".ckpt") else download_model(model)
        rows = [
            {"src": source, "mt": hypothesis, "ref": reference}
            for source, hypothesis, reference in zip(test.source, hypotheses, test.references[0], strict=True)
        ]
        found = load_from_checkpoint(path).predict(rows, batch_size=32, gpus=gpus, progress_bar=False)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"comet: {model} cannot be used ({' '.join(str(error).split())[:160]})") from None
    segments = 100 * np.array(found.scores)
    mean, interval = None, None
    if resamples > 1:
        from sacrebleu.significance import estimate_ci

        drawn = np.random.default_rng(12345).choice(len(segments), (resamples, len(segments)))
        mean, interval = map(float, estimate_ci(segments[drawn].mean(1)))
    return Score(TITLES["comet"], float(segments.mean()), f"model:{model}|nrefs:1", mean, interval)


def require_comet() -> None:
    if importlib.util.find_spec("comet") is None:
        raise UserError("metrics: comet is not installed here; pip install unbabel-comet, or leave it out")


@dataclass(frozen=True)
class Paired:
    """A run's score, and how likely equal runs differ as much as it and the first one do."""

    value: float
    interval: float
    bootstrap: float = 1.0
    randomised: float = 1.0
    signatures: tuple[str, ...] = ()


def paired_tests(
    names: Sequence[str], hypotheses: Sequence[Sequence[str]], test: TestSet, tokenize: str | None = None
) -> dict[str, list[Paired]]:
    """sacreBLEU's paired bootstrap and approximate randomisation of all runs against the first, for each metric."""
    from sacrebleu.significance import PairedTest

    references = [stripped(lines) for lines in test.references]
    systems: list[tuple[str, Sequence[str]]] = [(str(i), stripped(lines)) for i, lines in enumerate(hypotheses)]
    found = {}
    for name in names:
        results: list[Any] = []
        signatures: list[str] = []
        for kind in ("bs", "ar"):
            metric = sacrebleu_metric(name, tokenize or tokenizer_of(test.language))
            signature, scores = PairedTest(systems, {name: metric}, references, kind)()
            signatures += map(str, signature.values())
            results.append(next(rows for title, rows in scores.items() if title != "System"))
        found[name] = [
            Paired(bs.score, float(bs.ci), bs.p_value or 1.0, ar.p_value or 1.0, tuple(signatures))
            for bs, ar in zip(*results, strict=True)
        ]
    return found


def sentence_scores(hypotheses: Sequence[str], test: TestSet) -> list[float]:
    """chrF of each sentence: unlike BLEU it says something about few words."""
    metric = sacrebleu_metric("chrf")
    references = zip(*(stripped(lines) for lines in test.references), strict=True)
    return [
        float(metric.sentence_score(hypothesis.rstrip(), list(several)).score)
        for hypothesis, several in zip(hypotheses, references, strict=True)
    ]


# -------------------------------------------------------------------------------- beyond the score


@dataclass(frozen=True)
class Group:
    """Some sentences or words of a test set that have something in common."""

    label: str
    count: int
    value: float


def words_of(text: str) -> list[str]:
    """Words without punctuation; hyphens and apostrophes stay inside."""
    return re.findall(r"\w+(?:[-'’]\w+)*", text)


def subset(test: TestSet, places: Sequence[int]) -> TestSet:
    picked = [[lines[i] for i in places] for lines in (test.source, *test.references)]
    return TestSet(test.name, picked[0], picked[1:], test.language)


def grouped_score(
    name: str,
    hypotheses: Sequence[str],
    test: TestSet,
    groups: Iterable[tuple[str, Sequence[int]]],
    tokenize: str | None = None,
) -> list[Group]:
    """A corpus score of each group of sentences that has any."""
    return [
        Group(
            label,
            len(places),
            measure(name, [hypotheses[i] for i in places], subset(test, places), tokenize=tokenize).value,
        )
        for label, places in groups
        if len(places)
    ]


def length_groups(source: Sequence[str], groups: int = 5) -> list[tuple[str, list[int]]]:
    """Sentences of like length in words, in groups of about the same size."""
    lengths = np.array([len(text.split()) for text in source])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, groups + 1)[1:], method="lower"))
    group_of = np.searchsorted(edges, lengths)
    found = []
    for group in range(len(edges)):
        places = np.flatnonzero(group_of == group)
        least, most = lengths[places].min(), lengths[places].max()
        found.append((f"{least}" if least == most else f"{least}–{most}", places.tolist()))
    return found


FREQUENCIES = (0, 1, 9, 99, 999)  # the most often that words of each group come in the training text


def frequency_label(group: int) -> str:
    if group == len(FREQUENCIES):
        return f"{FREQUENCIES[-1] + 1:,} or more"
    least, most = (FREQUENCIES[group - 1] + 1 if group else 0), FREQUENCIES[group]
    return f"{least:,}–{most:,}" if least < most else f"{most:,}" if most else "never"


def by_target_frequency(hypotheses: Sequence[str], references: Sequence[str], counts: Counter[str]) -> list[Group]:
    """F1 of words, by how often training saw them: words in common, at most as often as each side has them."""
    common, said, meant = (np.zeros(len(FREQUENCIES) + 1, int) for _ in range(3))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = Counter(words_of(hypothesis)), Counter(words_of(reference))
        for total, words in ((common, ours & theirs), (said, ours), (meant, theirs)):
            for word, times in words.items():
                total[np.searchsorted(FREQUENCIES, counts[word])] += times
    f1 = 200 * common / np.maximum(1, said + meant)
    return [Group(frequency_label(g), int(meant[g]), float(f1[g])) for g in range(len(f1)) if meant[g]]


def source_frequency_groups(source: Sequence[str], counts: Counter[str]) -> list[tuple[str, list[int]]]:
    """Sentences by how often training saw the rarest of their words."""
    rarest = np.array([min((counts[word] for word in words_of(text)), default=0) for text in source])
    group_of = np.searchsorted(FREQUENCIES, rarest)
    return [(frequency_label(g), np.flatnonzero(group_of == g).tolist()) for g in range(len(FREQUENCIES) + 1)]


def count_words(sentences: Iterable[str]) -> Counter[str]:
    return Counter(word for text in sentences for word in words_of(text))


@dataclass(frozen=True)
class Lengths:
    """What goes wrong with the length of translations."""

    ratio: float  # words said over words of the first reference
    repeating: list[int]  # sentences that say something twice in a row where no reference does
    short: list[int]  # sentences with under 70 % of the words of the shortest reference
    omitted: float  # share of the words of the first reference that are not said, each as often as it stands there
    added: float  # share of the words said that do not stand in the first reference

    def __str__(self) -> str:
        return f"{self.ratio:.3f} of the reference; {len(self.repeating):,} repeat, {len(self.short):,} break off"


def lengths(hypotheses: Sequence[str], test: TestSet) -> Lengths:
    said = [hypothesis.split() for hypothesis in hypotheses]
    meant = [[text.split() for text in several] for several in zip(*test.references, strict=True)]
    total = sum(len(several[0]) for several in meant)
    common = sum(
        sum((Counter(words_of(hypothesis)) & Counter(words_of(reference))).values())
        for hypothesis, reference in zip(hypotheses, test.references[0], strict=True)
    )
    spoken, asked = (sum(len(words_of(text)) for text in side) for side in (hypotheses, test.references[0]))
    return Lengths(
        sum(map(len, said)) / max(1, total),
        [i for i, words in enumerate(said) if repetitions(words) > max(map(repetitions, meant[i]))],
        [i for i, words in enumerate(said) if len(words) < 0.7 * min(map(len, meant[i]))],
        1 - common / max(1, asked),
        1 - common / max(1, spoken),
    )


def repetitions(words: Sequence[str], longest: int = 4) -> int:
    """How often one to four words come a second time right behind themselves, or letters inside a word four times."""
    stuttered = sum(bool(re.search(r"([^\W\d_]{1,4})\1{3}", word)) for word in words)
    return stuttered + sum(
        words[i : i + n] == words[i + n : i + 2 * n]
        for n in range(1, longest + 1)
        for i in range(len(words) - 2 * n + 1)
    )
