"""Laws of scores: equal to sacreBLEU's own program; the diagnostics count what their names state."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seq2seq.cli.main import load_config
from seq2seq.cli.overrides import with_runs
from seq2seq.config.schema import EvaluateConfig
from seq2seq.evaluation import diagnostics, significance
from seq2seq.evaluation import metrics as evaluation
from seq2seq.evaluation.testsets import search_name
from seq2seq.utils.errors import UserError

COMMAND_LINE = {
    "bleu": ["-m", "bleu", "--force"],
    "bleu_lc": ["-m", "bleu", "-lc", "--force"],
    "chrf": ["-m", "chrf"],
    "chrf_lc": ["-m", "chrf", "--chrf-lowercase"],
    "chrf++": ["-m", "chrf", "--chrf-word-order", "2"],
    "ter": ["-m", "ter"],
}
WORDS = ["Der", "Hund", "schläft", "nicht", ",", "sondern", "bellt", ".", "Die", "Katze", "sieht", "ihn", "an", "und"]


def noisy_test(sentences: int = 40, systems: int = 2, references: int = 2) -> tuple[list[list[str]], Any]:
    """Sentences, several references of each, and systems that come close to them."""
    chance = random.Random(3)

    def near(text: str) -> str:
        words = [chance.choice(WORDS) if chance.random() < 0.3 else word for word in text.split()]
        return " ".join(words[: chance.randint(len(words) // 2, len(words))]) + chance.choice(["", " ", "\u2028x"])

    first = [" ".join(chance.choices(WORDS, k=chance.randint(2, 12))) for _ in range(sentences)]
    test = evaluation.TestSet("t", first, [first, *([near(t) for t in first] for _ in range(references - 1))])
    return [[near(text) for text in first] for _ in range(systems)], test


def sacrebleu(folder: Path, systems: list[list[str]], test: evaluation.TestSet, *flags: str) -> Any:
    """The output of sacreBLEU's program on the same text in files."""
    files = {f"system{i}": lines for i, lines in enumerate(systems)}
    files.update((f"reference{i}", list(lines)) for i, lines in enumerate(test.references))
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    references = [name for name in files if name.startswith("reference")]
    command = ["-m", "sacrebleu", *references, "-i", *(name for name in files if name.startswith("system"))]
    done = subprocess.run(
        [sys.executable, *command, "-w", "12", "-q", *flags], cwd=folder, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout if "text" in flags else json.loads(done.stdout)


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_scores_and_intervals_are_those_of_sacrebleus_program(name: str, tmp_path: Path) -> None:
    (hypotheses,), test = noisy_test(systems=1)
    printed = sacrebleu(tmp_path, [hypotheses], test, *COMMAND_LINE[name], "--confidence")
    ours = evaluation.measure(name, hypotheses, test, resamples=evaluation.RESAMPLES)
    assert ours.interval and ours.mean and ours.interval > 0
    assert (ours.value, ours.mean, ours.interval) == pytest.approx(
        (printed["score"], printed["confidence_mean"], printed["confidence_var"]), abs=1e-11
    )
    assert ours.signature == printed["signature"]
    plain = evaluation.measure(name, hypotheses, test)
    assert (plain.value, plain.interval) == (ours.value, None)


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_near_empty_output_has_an_interval(name: str) -> None:
    """Some resamples match nothing at all: sacreBLEU's own program ends in a traceback."""
    references = [f"Satz {number} ist da ." for number in range(40)]
    test = evaluation.TestSet("t", references, [references])
    for output in (["", *[references[1]], *[""] * 38], [""] * 40, ["x y z"] * 39 + [references[39]]):
        found = evaluation.measure(name, output, test, resamples=200)
        assert found.mean is not None and found.interval is not None
        assert math.isfinite(found.mean) and found.interval >= 0


def test_output_that_is_almost_all_wrong_has_scores() -> None:
    """Some resamples match nothing at all, others a little."""
    scores = evaluation.score(
        ["q"] * 5 + ["ein Hund"], ["zwei Katzen sehen dich"] * 5 + ["ein alter Hund"], resamples=100
    )
    assert 0 <= scores.bleu < 50 and 0 < scores.chrf < 50


@pytest.mark.parametrize("tokenize", ["none", "char", "intl"])
def test_text_is_split_by_the_given_tokenizer(tokenize: str, tmp_path: Path) -> None:
    (hypotheses,), test = noisy_test(systems=1, references=1)
    printed = sacrebleu(tmp_path, [hypotheses], test, "-m", "bleu", "-tok", tokenize, "--force")
    ours = evaluation.measure("bleu", hypotheses, dataclasses.replace(test, tokenize=tokenize))
    assert ours.value == pytest.approx(printed["score"], abs=1e-11) and f"tok:{tokenize}" in ours.signature


def test_a_language_decides_how_it_is_split() -> None:
    assert evaluation.tokenizer_of("de") == evaluation.tokenizer_of("") == "13a"
    assert evaluation.tokenizer_of("zh") == evaluation.tokenizer_of("sentence_zho_Hans") == "zh"
    assert evaluation.tokenizer_of("ja") in ("ja-mecab", "char"), "characters where MeCab is not installed"


@pytest.mark.slow
@pytest.mark.parametrize("kind,flag", [("bootstrap", "--paired-bs"), ("randomised", "--paired-ar")])
@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_p_values_are_those_of_sacrebleus_program(name: str, kind: str, flag: str, tmp_path: Path) -> None:
    systems, test = noisy_test(systems=3)
    # Its JSON cannot hold the intervals of chrF, so its table is read.
    printed = sacrebleu(tmp_path, systems, test, *COMMAND_LINE[name], flag, "-f", "text", "-nc", "-w", "9")
    ours = significance.paired_tests([name], systems, test)[name]
    assert re.findall(r"p = (\d\.\d+)", printed) == [f"{getattr(row, kind):.4f}" for row in ours[1:]]
    numbers = [float(number) for number in re.findall(r"\d+\.\d{9}", printed)]
    expected = [n for row in ours for n in ((row.value, row.interval) if kind == "bootstrap" else (row.value,))]
    scores = [n for i, n in enumerate(numbers) if i % 3 != 1] if kind == "bootstrap" else numbers
    assert scores == pytest.approx(expected, abs=1e-8), "the score, and between it and the interval the mean"


def test_groups_by_length_hold_every_sentence_once() -> None:
    _, test = noisy_test(sentences=57)
    groups = diagnostics.length_groups(test.source)
    assert sorted(i for _, indices in groups for i in indices) == list(range(57))
    for label, indices in groups:
        low, _, high = label.partition("–")
        sizes = [len(test.source[i].split()) for i in indices]
        assert (min(sizes), max(sizes)) == (int(low), int(high or low))
    assert diagnostics.length_groups(["a b"] * 9) == [("2", list(range(9)))]
    (everything,) = diagnostics.grouped_score("bleu", test.references[1], test, [("all", range(57)), ("none", [])])
    assert everything.value == evaluation.measure("bleu", test.references[1], test).value


def test_words_are_counted_by_how_often_training_saw_them() -> None:
    counts = Counter({"often": 5000, "some": 50, "once": 1})
    found = diagnostics.by_target_frequency(["often some new often"], ["often some once new."], counts)
    # "often" is twice in the translation and once in the reference: one in common, F1 = 2·1 / (2 + 1).
    assert {group.label: (group.count, round(group.value, 3)) for group in found} == {
        "never": (1, 100.0),
        "1": (1, 0.0),
        "10–99": (1, 100.0),
        "1,000 or more": (1, 66.667),
    }
    groups = dict(diagnostics.source_frequency_groups(["often some", "once often", "new", ""], counts))
    assert groups["10–99"] == [0] and groups["1"] == [1] and groups["never"] == [2, 3]


def test_repetition_and_truncation_are_detected() -> None:
    assert diagnostics.repetitions(["the", "the", "cat"]) == 1
    assert diagnostics.repetitions(["a", "b", "a", "b", "c"]) == 1
    assert diagnostics.repetitions(["a", "b", "c", "a", "d"]) == 0
    assert [diagnostics.repetitions([word]) for word in ("Prospprüsssss", "hahahaha", "Schifffahrt", "100000")] == [
        1,
        1,
        0,
        0,
    ]
    references = [["so so it is now", "one two three four", "a b c d e f g h i j"]]
    test = evaluation.TestSet("t", references[0], references)
    found = diagnostics.output_errors(["so so it is now", "one two two three four", "a b c d e f"], test)
    assert (found.repeating, found.short) == ([1], [2]), "a repetition of the reference is none"
    assert found.ratio == pytest.approx(16 / 19)


def test_comet_is_called_as_its_authors_document_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is heavy and its models are fetched: its interface stands in for it."""
    (hypotheses,), test = noisy_test(systems=1)
    seen: list[Any] = []

    def predict(rows: list[dict[str, str]], **_: object) -> SimpleNamespace:
        seen.extend(rows)
        return SimpleNamespace(scores=[len(row["mt"]) / 100 for row in rows])

    with pytest.raises(UserError, match="comet is not installed"):
        evaluation.comet(hypotheses, test, "m", 0)
    module = SimpleNamespace(
        download_model=lambda name: f"{name}.ckpt",
        load_from_checkpoint=lambda path: SimpleNamespace(predict=predict),
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "comet", module)
    found = evaluation.comet(hypotheses, test, "org/model", 100)
    assert seen[0] == {"src": test.source[0], "mt": hypotheses[0], "ref": test.references[0][0]}
    assert found.value == pytest.approx(sum(map(len, hypotheses)) / len(hypotheses)) and found.interval


def test_training_watches_the_same_scores() -> None:
    (hypotheses,), test = noisy_test(systems=1, references=1)
    watched = evaluation.score(hypotheses, test.references[0])
    assert watched.bleu == evaluation.measure("bleu", hypotheses, test).value
    assert watched.chrf_signature == evaluation.measure("chrf", hypotheses, test).signature
    assert "±" not in str(watched) and "±" in str(evaluation.score(hypotheses, test.references[0], resamples=100))


# ------------------------------------------------------------------------------------------ test sets


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["source=a.en"], "reference: a value is missing"),
        (["source=[a.en,b.en]", "reference=a.de"], "must be a list like source"),
        (["source=[a.en,b.en]", "reference=[a.de]"], "must be a list like source"),
        (["source=a.en", "reference=[[a.de]]"], "for the one source"),
        (["source=a.en", "reference=a.de", "public=wmt14"], "mutually exclusive"),
        (["metrics=[blue]"], "did you mean bleu?"),
        (["tokenize=13"], "possible: 13a, none"),
    ],
)
def test_contradictions_of_test_sets(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load_config("evaluate", *overrides)


def test_every_search_writes_its_own_file() -> None:
    searches = [[], ["search.beam=4"], ["search=greedy"], ["search=mbr"], ["search=sample"], ["search.require=[a b]"]]
    names = [search_name(load_config("evaluate", *overrides).search) for overrides in searches]
    assert names[:3] == ["beam5.penalty1", "beam4.penalty1", "beam1.penalty1"]
    assert len(set(names)) == len(names) and not set("".join(names)) & set("/ []'")


def test_bare_words_are_runs() -> None:
    assert with_runs("compare", ["a", "search=greedy", "b"]) == ["search=greedy", "run=[a,b]"]
    assert with_runs("evaluate", ["a"]) == ["run=a"] and with_runs("compare", ["a"]) == ["run=[a]"]
    assert with_runs("train", ["a"]) == ["a"], "a command without runs takes none"
    config: EvaluateConfig = load_config("evaluate", "a", "b")
    assert config.run == ["a", "b"]
    with pytest.raises(UserError, match="must name two different runs"):
        load_config("compare", "run=[a]")
