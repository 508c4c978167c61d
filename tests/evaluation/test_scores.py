"""Laws of scores: sacreBLEU called directly, counts by plain loops, and the alignment error rate as a formula."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER
from sacrebleu.significance import PairedTest

from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data import toy
from seq2seq.data.corpus import Corpus
from seq2seq.evaluation import alignment, diagnostics, significance, testsets
from seq2seq.evaluation import metrics as evaluation
from seq2seq.evaluation.metrics import TestSet as EvaluationSet
from seq2seq.inference.translator import EMPTY, Translation, Translator
from seq2seq.utils.errors import UserError
from seq2seq.utils.text import words_of
from tests.reference import scores as reference

LAW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
METRICS: dict[str, Callable[[], Any]] = {
    "bleu": lambda: BLEU(force=True),
    "bleu_lc": lambda: BLEU(force=True, lowercase=True),
    "chrf": CHRF,
    "chrf_lc": lambda: CHRF(lowercase=True),
    "chrf++": lambda: CHRF(word_order=2),
    "ter": TER,
}
WORDS = ["Der", "der", "Hund", "schläft", "nicht", ",", "sondern", "bellt", ".", "Katze", "sieht", "ihn", "an", "(und)"]


def near(text: str, chance: random.Random, most: float = 0.3) -> str:
    words = [chance.choice(WORDS) if chance.random() < most else word for word in text.split()]
    return " ".join(words[: chance.randint(max(1, len(words) // 2), len(words))])


def noisy(sentences: int = 12, references: int = 3, systems: int = 3) -> tuple[list[list[str]], EvaluationSet]:
    """Systems of different quality and a test set with several unlike references, some with spaces at the end."""
    chance = random.Random(5)
    first = [" ".join(chance.choices(WORDS, k=chance.randint(3, 12))) for _ in range(sentences)]
    several = [[near(text, chance) + chance.choice(["", " ", "\u2028"]) for text in first] for _ in range(references)]
    made = [[near(text, chance, 0.2 * (s + 1)) + chance.choice(["", "  "]) for text in first] for s in range(systems)]
    return made, EvaluationSet("t", [f"source {i}" for i in range(sentences)], several)


def bare(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in lines]


# ------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("name", METRICS)
def test_a_score_with_its_interval_is_that_of_sacrebleu(name: str, references: int) -> None:
    """Every reference counts, lines lose the spaces behind them, and the interval has the resamples asked for."""
    (hypotheses, *_), test = noisy(references=references)
    found = evaluation.measure(name, hypotheses, test, resamples=60)
    metric = METRICS[name]()
    expected = metric.corpus_score(bare(hypotheses), [bare(lines) for lines in test.references], n_bootstrap=60)
    assert found.value == pytest.approx(expected.score, abs=1e-12)
    assert (found.mean, found.interval) == pytest.approx((expected._mean, expected._ci), abs=1e-9)
    assert found.signature == str(metric.get_signature()) and "bs:60" in found.signature
    assert found.name == evaluation.TITLES[name]
    for none in (0, 1):
        plain = evaluation.measure(name, hypotheses, test, resamples=none)
        assert (plain.value, plain.mean, plain.interval) == (found.value, None, None) and "bs:" not in plain.signature


def test_metrics_differ_in_what_their_names_say() -> None:
    """Lower case, word order and characters each make another score."""
    (hypotheses, *_), test = noisy()
    values = {name: evaluation.measure(name, hypotheses, test).value for name in METRICS}
    assert len(set(values.values())) == len(METRICS)
    assert values["bleu_lc"] > values["bleu"] and values["chrf_lc"] > values["chrf"]
    lowered = [line.lower() for line in hypotheses]
    of_lowered = EvaluationSet("l", test.source, [[line.lower() for line in lines] for lines in test.references])
    assert evaluation.measure("bleu", lowered, of_lowered).value == values["bleu_lc"]


def test_text_that_looks_tokenised_is_scored_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody needs to be warned of spaces before full stops."""
    lines = ["a b c d ."] * 150
    for name in METRICS:
        evaluation.measure(name, lines, EvaluationSet("t", lines, [lines]))
    assert not caplog.records


@pytest.mark.parametrize("name", METRICS)
def test_resamples_without_any_match_beside_others_have_an_interval(name: str) -> None:
    """sacreBLEU itself stops where some resamples have a score of another type."""
    references = [f"sentence {i} is right here ." for i in range(12)]
    test = EvaluationSet("t", references, [references])
    found = evaluation.measure(name, [references[0], *[""] * 11], test, resamples=40)
    assert found.interval is not None and 0 < found.interval < 100 and 0 <= (found.mean or 0) <= 100


@pytest.mark.parametrize(
    ("language", "plain", "with_mecab"),
    [
        ("zh", "zh", "zh"), ("zh_cn", "zh", "zh"), ("zho_Hans", "zh", "zh"), ("sentence_cmn", "zh", "zh"),
        ("ja", "char", "ja-mecab"), ("JPN_Jpan", "char", "ja-mecab"), ("ko", "char", "ko-mecab"),
        ("kor-x", "char", "ko-mecab"), ("de", "13a", "13a"), ("", "13a", "13a"), ("zhuang", "13a", "13a"),
        ("jam", "13a", "13a"), ("kok", "13a", "13a"), ("Chinese", "zh", "zh"), ("yue_Hant", "zh", "zh"),
        ("th", "char", "char"), ("khm", "char", "char"), ("lo", "char", "char"), ("mya_Mymr", "char", "char"),
    ],
)  # fmt: skip
def test_words_are_found_as_the_language_asks(
    language: str, plain: str, with_mecab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its code anywhere in the name; by characters where a language's own splitter is not installed."""
    for installed, expected in ((set(), plain), ({"MeCab", "mecab_ko"}, with_mecab)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: name in found or None)
        assert evaluation.tokenizer_of(language) == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "MeCab" or None)
    assert (evaluation.tokenizer_of("ja"), evaluation.tokenizer_of("ko")) == ("ja-mecab", "char")


@pytest.mark.parametrize(
    ("language", "words"),
    [("ja", ["ja-mecab", "pip install 'sacrebleu[ja]'"]), ("kor_Hang", ["ko-mecab", "pip install 'sacrebleu[ko]'"]),
     ("", ["unknown", "13a", "do this"]), ("target", ["unknown", "13a", "do this"])],
)  # fmt: skip
def test_a_tokenizer_that_is_not_the_languages_is_warned_of(
    language: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that says what to do, until it is done or a tokenizer is named."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    warning = evaluation.tokenizer_warning(language, "do this")
    assert warning and "\n" not in warning and all(word in warning for word in words)
    for known in ("de", "zh", "th", "tlh"):
        assert evaluation.tokenizer_warning(known, "do this") is None
    test = EvaluationSet("t", ["a"], [["a"]], language)
    evaluation.print_tokenizer_warning(replace(test, tokenize="char"))
    assert capsys.readouterr().out == ""
    evaluation.print_tokenizer_warning(test)
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert (evaluation.tokenizer_warning(language, "do this") is None) == (language in ("ja", "kor_Hang"))


def test_the_language_of_the_references_decides_unless_a_tokenizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a measurement, in groups and in paired tests alike; only BLEU splits by it."""
    monkeypatch.setattr(PairedTest, "_DEFAULT_SAMPLES", {"ar": 20, "bs": 20})
    lines = ["我喜欢狗。很大", "他看书了，好"]
    hypotheses = ["我喜欢猫。很大", "他看书了，好吗"]
    test = EvaluationSet("t", lines, [lines], "zh")
    split = {
        name: BLEU(force=True, tokenize=name).corpus_score(hypotheses, [lines]).score for name in ("zh", "13a", "char")
    }
    assert len(set(split.values())) > 1
    chinese = load_config("train", "data.target=zh").data
    for tokenize, expected in ((None, "zh"), ("13a", "13a"), ("char", "char")):
        named = replace(test, tokenize=tokenize)
        assert evaluation.measure("bleu", hypotheses, named).value == pytest.approx(split[expected])
        data = replace(chinese, tokenize=tokenize)
        assert evaluation.score(hypotheses, lines, data).bleu == pytest.approx(split[expected])
        (group,) = diagnostics.grouped_score("bleu", hypotheses, named, [("all", [0, 1])])
        assert group.value == pytest.approx(split[expected])
        first, _ = significance.paired_tests(["bleu"], [hypotheses, lines], named)["bleu"]
        assert first.value == pytest.approx(split[expected]) and all(f"tok:{expected}" in s for s in first.signatures)


def test_what_a_tokenizer_lacks_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, too."""

    def broken(**_: object) -> None:
        raise RuntimeError("no  such\nthing")

    monkeypatch.setattr("sacrebleu.metrics.bleu.BLEU", broken)
    with pytest.raises(UserError, match=r"tokenize: zh cannot be used \(no such thing\)"):
        evaluation.require_tokenizer("zh")


@pytest.mark.parametrize("references", [1, 3])
def test_sentence_scores_are_chrf_of_each_line_with_its_own_references(references: int) -> None:
    """In the order of the lines; of several references the best match counts."""
    (hypotheses, *_), test = noisy(references=references)
    expected = [
        CHRF().sentence_score(line.rstrip(), [lines[i].rstrip() for lines in test.references]).score
        for i, line in enumerate(hypotheses)
    ]
    found = evaluation.sentence_scores(hypotheses, test)
    assert found == pytest.approx(expected, abs=1e-12) and len(set(found)) > 6


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_paired_tests_compare_each_run_with_the_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stand in the order of the runs: score and interval, p of the bootstrap, p of randomisation."""
    monkeypatch.setattr(PairedTest, "_DEFAULT_SAMPLES", {"ar": 80, "bs": 40})
    systems, test = noisy(sentences=10)
    for order in ((0, 1, 2), (2, 0, 1)):
        ordered = [systems[i] for i in order]
        found = significance.paired_tests(["ter", name], ordered, test)[name]
        expected = {}
        for kind in ("bs", "ar"):
            named: list[tuple[str, Sequence[str]]] = [(f"system {i}", bare(lines)) for i, lines in enumerate(ordered)]
            run = PairedTest(named, {name: METRICS[name]()}, [bare(lines) for lines in test.references], kind)
            signatures, rows = run()
            expected[kind] = next(row for title, row in rows.items() if title != "System")
            assert str(next(iter(signatures.values()))) in found[0].signatures
        for row, bootstrap, randomised in zip(found, expected["bs"], expected["ar"], strict=True):
            assert (row.value, row.interval) == pytest.approx((bootstrap.score, bootstrap.ci), abs=1e-9)  # type: ignore[union-attr]
            assert (row.bootstrap, row.randomised) == (bootstrap.p_value or 1.0, randomised.p_value or 1.0)  # type: ignore[union-attr]
        assert (found[0].bootstrap, found[0].randomised) == (1.0, 1.0)
        assert found[1].bootstrap != found[1].randomised


def test_comet_is_a_hundred_times_the_mean_with_the_interval_of_its_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line with its source and its first reference; the middle 95 % of the means of resampled lines."""
    (hypotheses, *_), test = noisy(sentences=9)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for unavailable in (evaluation.require_comet, lambda: evaluation.comet(hypotheses, test, "m", 0)):
        with pytest.raises(UserError, match="comet is not installed"):
            unavailable()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    asked: list[Any] = []

    def predict(rows: list[dict[str, str]], **settings_: Any) -> SimpleNamespace:
        asked.append((rows, settings_))
        return SimpleNamespace(scores=[len(row["mt"]) / 100 for row in rows])

    loaded: list[str] = []
    module = SimpleNamespace(
        download_model=lambda name: f"{name}.ckpt",
        load_from_checkpoint=lambda p: loaded.append(p) or SimpleNamespace(predict=predict),  # type: ignore[func-returns-value]
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "comet", module)
    found = evaluation.comet(hypotheses, test, "org/model", 500, gpus=2)
    rows, settings_ = asked[0]
    assert rows == [
        {"src": test.source[i], "mt": hypotheses[i], "ref": test.references[0][i]} for i in range(len(test))
    ]
    assert (settings_["gpus"], settings_["progress_bar"]) == (2, False) and loaded == ["org/model.ckpt"]
    lengths = np.array([len(line) for line in hypotheses])
    assert found.value == pytest.approx(lengths.mean()) and "org/model" in found.signature
    assert found.mean == pytest.approx(lengths.mean(), abs=0.2 * lengths.std())
    assert found.interval == pytest.approx(1.96 * lengths.std() / len(lengths) ** 0.5, rel=0.2)
    plain = evaluation.comet(hypotheses, test, "mine.ckpt", 1)
    assert (plain.value, plain.mean, plain.interval) == (found.value, None, None) and loaded[-1] == "mine.ckpt"


class FixedTranslator:
    """A translator whose output is given: several translations of each sentence, the best first."""

    def __init__(self, of_each: Sequence[Sequence[str]]) -> None:
        self.of_each = of_each
        self.asked: list[Any] = []

    def translate(self, sources: Sequence[str], search: SearchConfig, **_: bool) -> list[list[Translation]]:
        self.asked.append((list(sources), search))
        empty = EMPTY
        return [[Translation(text, *list(vars(empty).values())[1:]) for text in several] for several in self.of_each]


def test_what_training_watches_is_the_best_translation_of_each_sentence_against_the_target() -> None:
    """BLEU and chrF with the intervals asked for, in the language of the targets."""
    (hypotheses, other, _), test = noisy(references=1)
    translator = FixedTranslator(list(zip(hypotheses, other, strict=True)))
    corpus, search = Corpus(test.source, test.references[0]), search_preset("greedy")
    found, scores = testsets.translate_and_score(
        cast(Translator, translator), corpus, search, load_config("train").data, 40
    )
    assert found == hypotheses and translator.asked == [(list(test.source), search)]
    for name, value, interval, signature in (
        ("bleu", scores.bleu, scores.bleu_interval, scores.bleu_signature),
        ("chrf", scores.chrf, scores.chrf_interval, scores.chrf_signature),
    ):
        expected = evaluation.measure(name, hypotheses, test, resamples=40)
        assert (value, interval, signature) == (expected.value, expected.interval, expected.signature)
    assert str(scores) == (
        f"BLEU {scores.bleu:.2f} ± {scores.bleu_interval:.2f}  chrF {scores.chrf:.2f} ± {scores.chrf_interval:.2f}"
    )


def test_the_key_of_a_test_set_changes_with_every_sentence_of_every_side() -> None:
    """And with nothing else: neither its name nor its language."""
    sides = [["a", "b"], ["c", "d"], ["e", "f"]]
    keys = {EvaluationSet("t", sides[0], sides[1:]).key, EvaluationSet("t", sides[0], sides[1:2]).key}
    for side, line in itertools.product(range(3), range(2)):
        changed = [[*lines] for lines in sides]
        changed[side][line] += "x"
        keys.add(EvaluationSet("t", changed[0], changed[1:]).key)
    keys.add(EvaluationSet("t", sides[0], sides[:0:-1]).key)
    keys.add(EvaluationSet("t", sides[0][::-1], sides[1:]).key)
    assert len(keys) == 10
    assert EvaluationSet("other", sides[0], sides[1:], "de", True).key in keys


# -------------------------------------------------------------------------------- beyond the score

LINE = st.lists(
    st.sampled_from(["a", "b", "a-b", "it's", ".", "haha", "hahahaha", "xxxx", "1111", "Aaaa"]), max_size=12
)
LINES = st.lists(st.tuples(LINE, LINE, LINE), min_size=1, max_size=5)


@LAW
@given(LINES, st.integers(1, 2))
def test_problems_of_length_are_those_of_plain_loops(lines: list[tuple[list[str], ...]], count: int) -> None:
    """Repetition beyond every reference, less than 70 % of the shortest, words left out and added to the first."""
    hypotheses, *references = ([" ".join(line[i]) for line in lines] for i in range(3))
    test = EvaluationSet("t", hypotheses, references[:count])
    found = diagnostics.output_errors(hypotheses, test)
    ratio, repeating, short, omitted, added = reference.length_problems(hypotheses, references[:count])
    assert (found.ratio, found.omitted, found.added) == pytest.approx((ratio, omitted, added), abs=1e-12)
    assert (found.repeating, found.short) == (repeating, short)


@LAW
@given(st.lists(st.sampled_from(["a", "b", "c", "ababababa", "zzzz", "abcdabcdabcdabcd", "123123123123"]), max_size=14))
def test_repetitions_are_counted_at_every_position_and_length(words: list[str]) -> None:
    """One to four words right behind themselves, up to the last word, and stuttering inside each word once."""
    assert diagnostics.repetitions(words) == reference.repetitions(words)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a a", 1), ("x a a", 1), ("a b a b", 1), ("x a b c a b c", 1), ("a b c d a b c d", 1),
        ("a b c d e a b c d e", 0),
        ("a a a", 2), ("a a a a", 4), ("aaaa", 1), ("aaa", 0), ("ababab", 0), ("abababab", 1), ("abcdabcdabcdabcd", 1),
        ("abcdeabcdeabcdeabcde", 0), ("1111", 0), ("____", 0), ("xxhahahahaxx", 1), ("", 0), ("a", 0), ("aAaA", 0),
    ],
)  # fmt: skip
def test_repetitions_at_their_limits(text: str, count: int) -> None:
    """At the end of a sentence as at its beginning; letters count, digits do not."""
    assert diagnostics.repetitions(text.split()) == count


BREAKS = [
    (7, 10, False), (6, 10, True), (14, 20, False), (13, 20, True), (63, 90, False), (62, 90, True), (70, 100, False),
    (2, 3, True), (5, 7, False), (4, 6, True), (0, 0, False), (0, 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("words", "of", "short"), BREAKS)
def test_a_translation_breaks_off_under_seventy_percent_of_the_shortest_reference(
    words: int, of: int, short: bool
) -> None:
    """Exactly 70 % is enough, wherever the shortest reference stands."""
    hypothesis, least, more = (" ".join(["w"] * n) for n in (words, of, of + 5))
    for several in ([least], [least, more], [more, least]):
        test = EvaluationSet("t", ["s"], [[text] for text in several])
        assert diagnostics.output_errors([hypothesis], test).short == ([0] if short else [])


def test_words_are_what_lies_between_spaces_and_punctuation() -> None:
    """Hyphens and apostrophes inside a word stay, others do not."""
    text = "Don't stop-it -- 'now' e-mail’s, x_1 (ja)! a- -b ''c"
    expected = ["Don't", "stop-it", "now", "e-mail’s", "x_1", "ja", "a", "b", "c"]
    assert words_of(text) == reference.words(text) == expected
    assert diagnostics.count_words([text, "now now"]) == Counter([*expected, "now", "now"])


COUNTS = (0, 1, 2, 9, 10, 99, 100, 999, 1000, 5000)


@LAW
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(COUNTS), max_size=8)] * 2), min_size=1, max_size=5))
def test_words_are_grouped_by_their_frequency_in_training(lines: list[tuple[list[int], list[int]]]) -> None:
    """F1 of each group, with the limits of groups inclusive, as a plain loop counts it."""
    sides = [[" ".join(f"w{count}." for count in line[i]) for line in lines] for i in (0, 1)]
    counts = Counter({f"w{count}": count for count in COUNTS})
    labels = ["never", "1", "2–9", "10–99", "100–999", "1,000 or more"]
    found = diagnostics.by_target_frequency(sides[0], sides[1], counts)
    expected = reference.word_f1(sides[0], sides[1], {word: n for word, n in counts.items() if n})
    assert [(g.label, g.count) for g in found] == [(labels[g], count) for g, (count, _) in expected.items()]
    assert [g.value for g in found] == pytest.approx([value for _, value in expected.values()])


def test_sentences_are_grouped_by_their_rarest_word() -> None:
    """Every sentence is in one group; one without words is in that of words never seen."""
    counts = Counter({f"w{count}": count for count in COUNTS})
    source = [f"w5000 w{count}, w1000" for count in COUNTS] + ["...", "w9 w99"]
    groups = diagnostics.source_frequency_groups(source, counts)
    assert [label for label, _ in groups] == ["never", "1", "2–9", "10–99", "100–999", "1,000 or more"]
    expected: list[list[int]] = [[] for _ in range(6)]
    for i, count in enumerate([*[min(count, 1000) for count in COUNTS], 0, 9]):
        expected[reference.band(count)].append(i)
    assert [rows for _, rows in groups] == expected


@LAW
@given(st.lists(st.integers(0, 9), min_size=1, max_size=25), st.integers(1, 6))
def test_sentences_of_like_length_make_groups_between_quantiles(lengths: list[int], groups: int) -> None:
    """Every sentence once, the shortest first, named by the lengths that are in a group."""
    source = [" ".join(["w"] * n) for n in lengths]
    found = diagnostics.length_groups(source, groups)
    expected = reference.quantile_groups(lengths, groups)
    assert [rows for _, rows in found] == expected
    for label, rows in found:
        of_group = sorted({lengths[i] for i in rows})
        assert label == (f"{of_group[0]}" if len(of_group) == 1 else f"{of_group[0]}–{of_group[-1]}")


def test_a_group_is_scored_on_its_own_lines_of_every_side() -> None:
    """Hypotheses, and each reference; empty groups are left out, and order counts for nothing."""
    (hypotheses, *_), test = noisy()
    groups = [("odd", [9, 1, 3]), ("none", []), ("one", [4])]
    found = diagnostics.grouped_score("chrf", hypotheses, test, groups)
    assert [(group.label, group.count) for group in found] == [("odd", 3), ("one", 1)]
    for group, rows in zip(found, ([1, 3, 9], [4]), strict=True):
        lines = [[lines[i].rstrip() for i in rows] for lines in test.references]
        expected = CHRF().corpus_score([hypotheses[i].rstrip() for i in rows], lines)
        assert group.value == pytest.approx(expected.score, abs=1e-12)
    part = diagnostics.subset(EvaluationSet("n", test.source, test.references, "zh"), [5, 2])
    assert (part.name, part.language, list(part.source)) == ("n", "zh", ["source 5", "source 2"])
    assert [list(lines) for lines in part.references] == [[lines[5], lines[2]] for lines in test.references]


# ------------------------------------------------------------------------------------------ alignment

LINKS = st.frozensets(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6)


@LAW
@given(st.lists(st.tuples(LINKS, LINKS), min_size=1, max_size=4).filter(lambda pairs: any(a or b for a, b in pairs)))
def test_the_alignment_error_rate_is_that_of_och_and_ney(pairs: list[tuple[Any, Any]]) -> None:
    """Section 4 of Och & Ney 2003, over all sentences together, where every true link is sure."""
    found, true = zip(*pairs, strict=True)
    expected = reference.alignment_error_rate([set(a) for a in found], *[[set(s) for s in true]] * 2)
    assert alignment.error_rate(found, true) == pytest.approx(expected, abs=1e-12)


PIECES = st.lists(
    st.sampled_from(["▁", "▁a", "b", "▁it", "'", "s", ".", "▁x.", "y▁z", "-", ",▁"]), min_size=1, max_size=6
)


@LAW
@given(PIECES, PIECES, st.integers(0, 3))
def test_attention_between_words_is_summed_over_source_and_averaged_over_target_pieces(
    source: list[str], target: list[str], seed: int
) -> None:
    """Pieces that span words count in each by their letters; the rows and columns of end marks are left out."""
    generator = torch.Generator().manual_seed(seed)
    weights_NTS = torch.rand(2, len(target) + 1, len(source) + 1, generator=generator)
    source_words, target_words = alignment.words_of_pieces(source), alignment.words_of_pieces(target)
    found = alignment.word_weights(weights_NTS, source, target)
    assert found.shape == (2, len(target_words), len(source_words))
    if source_words and target_words:
        for head in range(2):
            expected = reference.word_matrix(weights_NTS[head].tolist(), source, target)
            assert torch.allclose(found[head], torch.tensor(expected), atol=1e-6)


def test_each_target_word_is_linked_to_the_source_word_it_attends_to_most() -> None:
    """Links name the source word first; without words there is no link."""
    weights_WX = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1], [0.1, 0.2, 0.9], [0.0, 1.0, 0.0]])
    assert alignment.links_of(weights_WX) == {(1, 0), (0, 1), (2, 2), (1, 3)}
    assert alignment.links_of(torch.zeros(0, 3)) == alignment.links_of(torch.zeros(2, 0)) == frozenset()


class Attentive:
    """A translator whose attention under teacher forcing is given."""

    def __init__(self, weights: Sequence[torch.Tensor], sources: Sequence[str], targets: Sequence[str]) -> None:
        self.weights, self.pairs = weights, (list(sources), list(targets))

    def score(self, sources: Sequence[str], targets: Sequence[str], attention: bool = False) -> list[Translation]:
        assert (list(sources), list(targets), attention) == (*self.pairs, True)
        found = []
        for weights_LNTS, source, target in zip(self.weights, sources, targets, strict=True):
            sides = [tuple(f"▁{word}" for word in text.split()) for text in (source, target)]
            found.append(Translation(target, sides[1], 0.0, 0.0, False, (*sides[0], "</s>"), (), weights_LNTS))
        return found


def test_each_head_each_layer_and_their_mean_have_an_error_rate_of_their_own() -> None:
    """Rates of heads by layer, of the mean of each layer's heads, of the mean of all, over all sentences."""
    sources, targets = ["a b c", "d e"], ["x y", "u v w"]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.rand(2, 3, words + 1, of_source + 1, generator=generator) for words, of_source in ((2, 3), (3, 2))]
    for weights_LNTS in weights:
        weights_LNTS[..., -1] += 9  # the end mark, which has no word
    true = [frozenset({(0, 0), (2, 1)}), frozenset({(0, 0), (1, 1), (1, 2)})]
    translator = cast(Translator, Attentive(weights, sources, targets))
    found = alignment.alignment_errors(translator, sources, targets, true)

    def rate(of_each: Callable[[torch.Tensor], torch.Tensor]) -> float:
        links = []
        for weights_LNTS in weights:
            rows = of_each(weights_LNTS)[:-1, :-1].tolist()
            links.append({(row.index(max(row)), t) for t, row in enumerate(rows)})
        sets: list[set[tuple[int, int]]] = [set(s) for s in true]
        return reference.alignment_error_rate(links, sets, sets)

    def head(i: int, j: int) -> float:
        return rate(lambda weights_LNTS: weights_LNTS[i, j])

    def layer(i: int) -> float:
        return rate(lambda weights_LNTS: weights_LNTS[i].mean(0))

    heads = [[head(i, j) for j in range(3)] for i in range(2)]
    assert list(itertools.chain(*found.heads)) == pytest.approx(list(itertools.chain(*heads)))
    assert list(map(len, found.heads)) == [3, 3] and found.layers == pytest.approx([layer(0), layer(1)])
    assert found.mean == pytest.approx(rate(lambda w: w.mean((0, 1))))
    least = min(itertools.chain(*heads))
    where = next((i, j) for i, rates in enumerate(heads) for j, value in enumerate(rates) if value == least)
    assert found.best[0] == pytest.approx(least) and found.best[1:] == where
    assert str(found) == (
        f"best head: {least:.3f} (layer {where[0] + 1}, head {where[1] + 1}); mean of all heads: {found.mean:.3f}"
    )
    assert str(alignment.AlignmentErrors([[0.25]], [0.25], 0.25)) == "0.250"


def test_true_links_are_known_for_pairs_of_the_grammar_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any split; turned around with the pair; one pair that is not of the grammar leaves none."""
    pairs = {
        "train": [SimpleNamespace(source="a b", target="x y z", links=[(0, 1), (1, 2)])],
        "test": [SimpleNamespace(source="c", target="u", links=[(0, 0)])],
    }
    monkeypatch.setattr(toy, "splits", lambda: pairs)
    assert alignment.known_links(["c", "a b"], ["u", "x y z"]) == [frozenset({(0, 0)}), frozenset({(0, 1), (1, 2)})]
    assert alignment.known_links(["x y z"], ["a b"]) == [frozenset({(1, 0), (2, 1)})]
    assert alignment.known_links(["c", "a b"], ["u", "u"]) is None
    generator = torch.Generator().manual_seed(0)
    translator = cast(Translator, Attentive([torch.rand(1, 1, 4, 3, generator=generator)], ["a b"], ["x y z"]))
    several = [["x y z"], ["something else"]]
    found = alignment.alignment_of(translator, EvaluationSet("t", ["a b"], several, grammar=True))
    expected = alignment.alignment_errors(translator, ["a b"], ["x y z"], [frozenset({(0, 1), (1, 2)})])
    assert found == expected
    assert alignment.alignment_of(translator, EvaluationSet("t", ["a b"], several)) is None
    assert alignment.alignment_of(translator, EvaluationSet("t", ["a b"], several[::-1], grammar=True)) is None
