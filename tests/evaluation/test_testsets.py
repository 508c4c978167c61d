"""Laws of the test sets that a run is measured on, and of its cached translations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import DataConfig, EvaluateConfig, SearchConfig
from seq2seq.evaluation import testsets
from seq2seq.evaluation.metrics import TestSet as EvaluationSet
from seq2seq.inference.translator import EMPTY, Translation
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import INDEX
from tests.helpers.configs import files_config
from tests.helpers.runs import empty_run

pytestmark = pytest.mark.usefixtures("yaml_parsed_once")

# ------------------------------------------------------------------------------------------- test sets


@lru_cache
def evaluate_config() -> EvaluateConfig:
    config: EvaluateConfig = load_config("evaluate")
    return config


def write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_files_are_test_sets_each_with_all_its_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One source with one or several references, or several sources with one or several each."""
    monkeypatch.setattr(testsets, "read_config", lambda path: files_config())
    run = empty_run(tmp_path / "run", last="update-0000001")
    sources = [write(tmp_path / f"{name}.en", [f"{name} 1", f"{name} 2"]) for name in "st"]
    references = [write(tmp_path / f"{i}.de", [f"ref {i} 1", f"ref {i} 2"]) for i in range(3)]

    def found(source: Any, reference: Any) -> list[tuple[str, list[str], list[list[str]], str]]:
        config = dataclasses.replace(evaluate_config(), source=source, reference=reference)
        sets = testsets.find_test_sets(config, run)
        return [(t.name, list(t.source), [list(r) for r in t.references], t.language) for t in sets]

    texts = [[f"ref {i} 1", f"ref {i} 2"] for i in range(3)]
    s, t = (["s 1", "s 2"], ["t 1", "t 2"])
    assert found(sources[0], references[1]) == [("s.en", s, [texts[1]], "de")]
    assert found(sources[0], references[::-1]) == [("s.en", s, texts[::-1], "de")]
    assert found(sources, references[:2]) == [("s.en", s, [texts[0]], "de"), ("t.en", t, [texts[1]], "de")]
    assert found(sources, [references[:2], references[2]]) == [
        ("s.en", s, texts[:2], "de"), ("t.en", t, [texts[2]], "de"),
    ]  # fmt: skip
    short = write(tmp_path / "short.de", ["x"])
    with pytest.raises(UserError, match=r"has 2 lines, .*short\.de has 1"):
        found(sources[0], [references[0], short])
    nothing = [write(tmp_path / name, []) for name in ("n.en", "n.de")]
    with pytest.raises(UserError, match=r"n\.en is empty"):
        found(*nothing)


def test_splits_are_those_of_the_run_or_of_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the seed that the run was trained with, under the name and in the language of the corpus."""
    run = empty_run(tmp_path / "run", last="update-0000001")
    stored = dataclasses.replace(files_config(), seed=77)
    asked: list[Any] = []

    def load_split(data: DataConfig, split: str, seed: int) -> Any:
        asked.append((data, split, seed))
        return None if split == "train" else SimpleNamespace(source=[f"{split} s"], target=[f"{split} t"])

    monkeypatch.setattr(testsets, "read_config", lambda path: stored)
    monkeypatch.setattr(testsets, "load_split", load_split)
    config = dataclasses.replace(evaluate_config(), split=["validation", "test"])
    found = testsets.find_test_sets(config, run)
    assert [(t.name, t.source, t.references, t.language, t.grammar) for t in found] == [
        (f"files.{split}", [f"{split} s"], [[f"{split} t"]], "de", False) for split in ("validation", "test")
    ]
    assert asked == [(stored.data, split, 77) for split in ("validation", "test")]
    toy = dataclasses.replace(stored.data, name="toy", path="toy", target="en", source="de")
    (other,) = testsets.find_test_sets(dataclasses.replace(evaluate_config(), data=toy), run)
    assert (other.name, other.language, other.grammar) == ("toy.test", "en", True)
    assert asked[-1] == (toy, "test", 77)
    with pytest.raises(UserError, match="files has no train set"):
        testsets.find_test_sets(dataclasses.replace(config, split="train"), run)
    monkeypatch.setattr(testsets, "load_split", lambda *_: SimpleNamespace(source=[], target=[]))
    with pytest.raises(UserError, match=r"split: files\.validation is empty; give two files"):
        testsets.find_test_sets(config, run)


def test_a_command_chooses_the_tokenizer_of_bleu_or_the_corpus_or_the_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order, for files and for splits alike; another corpus has its own."""
    run = empty_run(tmp_path / "run", last="update-0000001")
    files: dict[str, Any] = {"source": write(tmp_path / "s.en", ["a"]), "reference": [write(tmp_path / "r.de", ["b"])]}
    monkeypatch.setattr(testsets, "load_split", lambda *_: SimpleNamespace(source=["a"], target=["b"]))
    command: Any
    corpus: Any
    for command, corpus, expected in ((None, None, "13a"), (None, "none", "none"), ("char", "none", "char")):
        data = dataclasses.replace(files_config().data, tokenize=corpus)
        stored = dataclasses.replace(files_config(), data=data)
        monkeypatch.setattr(testsets, "read_config", lambda path, stored=stored: stored)
        config = dataclasses.replace(evaluate_config(), tokenize=command)
        for one in (config, dataclasses.replace(config, **files)):
            (found,) = testsets.find_test_sets(one, run)
            assert found.bleu_tokenizer == expected
        other = dataclasses.replace(config, data=dataclasses.replace(data, tokenize=None))
        (found,) = testsets.find_test_sets(other, run)
        assert found.bleu_tokenizer == (command or "13a")


def test_the_config_is_that_of_the_checkpoint_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best or the last one; its corpus is read from another folder only on request."""
    run = empty_run(
        tmp_path / "run", ["update-0000001", "update-0000002"], last="update-0000002", best="update-0000001"
    )
    read: list[Path] = []
    monkeypatch.setattr(testsets, "read_config", lambda p: read.append(p) or files_config())  # type: ignore[func-returns-value]
    config = dataclasses.replace(evaluate_config(), checkpoint="best")
    assert testsets.stored_config(run, config) == files_config()
    moved = testsets.stored_config(run, dataclasses.replace(config, checkpoint="last", data_path=str(tmp_path)))
    assert [path.parent.name for path in read] == ["update-0000001", "update-0000002"]
    assert moved.data.train == [f"{tmp_path}/a.en", f"{tmp_path}/a.de"]


def test_a_corpus_that_moved_keeps_its_files_names_or_its_splits(tmp_path: Path) -> None:
    """Each file is read from the new folder under its own name; of a corpus in a folder only the path changes."""
    data = dataclasses.replace(files_config().data, train=["x/a.en", "y/b.de"], validation="z/v.tsv", test=None)
    found = testsets.relocate(data, str(tmp_path))
    assert (found.train, found.validation, found.test, found.path) == (
        [f"{tmp_path}/a.en", f"{tmp_path}/b.de"], f"{tmp_path}/v.tsv", None, None,
    )  # fmt: skip
    folder = dataclasses.replace(data, path="old", train="train", validation="dev", test="test")
    assert testsets.relocate(folder, str(tmp_path)) == dataclasses.replace(folder, path=str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        testsets.relocate(data, str(tmp_path / "none"))


def test_public_sets_come_in_the_direction_of_the_run_with_all_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an unknown name or one without the pair of languages, the error lists the existing ones."""
    from sacrebleu import dataset

    files = [write(tmp_path / name, [f"{name} 1", "x\u2028y"]) for name in ("src", "ref1", "ref2")]
    asked: list[str] = []
    fake = SimpleNamespace(
        langpairs={"en-de": 1, "fr-en": 1},
        get_source_file=lambda pair: asked.append(pair) or files[0],  # type: ignore[func-returns-value]
        get_reference_files=lambda pair: asked.append(pair) or files[1:],  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(dataset, "DATASETS", {"mtedx/test": fake})
    data = files_config().data
    found = testsets.test_set_from_sacrebleu("mtedx/test", data)
    assert (found.name, found.language, asked) == ("mtedx_test.en-de", "de", ["en-de"] * 2)
    assert found.source == ["src 1", "x\u2028y"] and found.references == [
        ["ref1 1", "x\u2028y"],
        ["ref2 1", "x\u2028y"],
    ]
    with pytest.raises(UserError, match="has no pair de-en; possible: en-de, fr-en"):
        testsets.test_set_from_sacrebleu("mtedx/test", dataclasses.replace(data, source="de", target="en"))
    with pytest.raises(UserError, match="is not a test set of sacreBLEU"):
        testsets.test_set_from_sacrebleu("wmt14", data)


# ------------------------------------------------------------------------------------ cached translations


class FakeTranslator:
    """Stands in for a translator: numbers its calls, and returns two translations of each sentence."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def from_checkpoint(self, *where: Any) -> FakeTranslator:
        self.calls.append(where)
        return self

    def use_processes(self, count: int | str) -> FakeTranslator:
        assert count == "auto"
        return self

    def translate(
        self, sources: Sequence[str], search: SearchConfig, *, on_done: Callable[[int], None], probabilities: bool
    ) -> list[list[Translation]]:
        assert not probabilities
        rest = list(vars(EMPTY).values())[1:]
        on_done(1)
        number = len(self.calls)
        return [[Translation(f"{number} {s}\nx\u2028y\r", *rest), Translation("worse", *rest)] for s in sources]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTranslator:
    translator = FakeTranslator()
    monkeypatch.setattr(testsets, "Translator", translator)
    return translator


def changed(value: Any, hint: Any) -> Any:
    """Another value of a field."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) or value == 0 else value / 2
    if isinstance(value, list):
        return ["new"]
    options = {"length_normalization": "average", "stop": "certain", "select_by": "chrf", "tokens": 300}
    return options[hint]


CHANGED = {
    field.name: changed(getattr(search_preset("beam"), field.name), field.name)
    for field in dataclasses.fields(SearchConfig)
}


def test_a_terminal_shows_how_many_sentences_are_translated(
    fake: FakeTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From none on; the line is gone when others follow."""
    shown: list[str] = []
    monkeypatch.setattr(testsets, "status", shown.append)
    testsets.translate(fake, EvaluationSet("t.test", ["a", "b"], [["x", "y"]]), search_preset("beam"))  # type: ignore[arg-type]
    assert shown == [f"translating t.test: {n} of 2 sentences …" for n in (0, 1)] + [""]


def test_translations_are_made_again_for_every_setting_they_depend_on(tmp_path: Path, fake: FakeTranslator) -> None:
    """Each field of the search, the precision, the checkpoint, the sentences; and for the same ones they are read."""
    run = empty_run(
        tmp_path / "run", ["update-0000001", "update-0000002"], last="update-0000001", best="update-0000001"
    )
    config = dataclasses.replace(
        evaluate_config(), search=search_preset("beam"), checkpoint="last", precision="float32"
    )
    test = EvaluationSet("t.test", ["a", "b"], [["x", "y"]])
    first = testsets.cached_translations(run, test, config)
    assert first == ["1 a x y", "1 b x y"] and fake.calls == [(run.checkpoints / "update-0000001", "auto", "float32")]
    assert testsets.cached_translations(run, test, config) == first and len(fake.calls) == 1
    other_device = dataclasses.replace(config, device="cpu")
    assert testsets.cached_translations(run, test, other_device) == first, (
        "devices and measurements change no translation"
    )
    assert testsets.cached_translations(run, test, dataclasses.replace(config, resamples=0, metrics=["ter"])) == first
    for name, value in CHANGED.items():
        calls = len(fake.calls)
        variant = dataclasses.replace(config, search=dataclasses.replace(config.search, **{name: value}))
        assert testsets.cached_translations(run, test, variant)[0] == f"{calls + 1} a x y", name
        assert testsets.cached_translations(run, test, variant)[0] == f"{calls + 1} a x y", name
    calls = len(fake.calls)
    for variant in (
        dataclasses.replace(config, precision="bfloat16"),
        dataclasses.replace(config, precision="auto"),
        dataclasses.replace(config, checkpoint="best"),
        dataclasses.replace(config, checkpoint="update-0000002"),
    ):
        calls += 1
        assert testsets.cached_translations(run, test, variant)[0] == f"{calls} a x y"
    for other in (EvaluationSet("t.test", ["a", "c"], [["x", "y"]]), EvaluationSet("u.test", ["a", "b"], [["x", "y"]])):
        calls += 1
        assert testsets.cached_translations(run, other, config)[0] == f"{calls} a x y"
    same_name = EvaluationSet("t.test", ["a", "d"], [["x", "y"]])
    vars(same_name)["key"] = test.key  # keys are short and may meet
    testsets.cached_translations(run, test, config)
    calls = len(fake.calls) + 1
    assert testsets.cached_translations(run, same_name, config) == [f"{calls} a x y", f"{calls} d x y"]
    (run.checkpoints / INDEX).write_text(json.dumps({"last": "update-0000002", "best": "update-0000001"}))
    assert testsets.cached_translations(run, test, config)[0] == f"{calls + 1} a x y", (
        "the last checkpoint is another one now"
    )
    assert fake.calls[-1][0].name == "update-0000002"


def test_translations_of_files_that_were_damaged_are_made_again(tmp_path: Path, fake: FakeTranslator) -> None:
    """Without its description, with an unreadable one, or without the text."""
    run = empty_run(tmp_path / "run", last="update-0000001")
    config, test = evaluate_config(), EvaluationSet("t", ["a"], [["x"]])
    testsets.cached_translations(run, test, config)
    path = testsets.translations_path(run, test, config)
    for number, damage in enumerate(("no description", "{", "[]", "no text"), 2):
        if damage.startswith("no "):
            (path if damage == "no text" else path.with_suffix(".json")).unlink()
        else:
            path.with_suffix(".json").write_text(damage)
        assert testsets.cached_translations(run, test, config) == [f"{number} a x y"]
    assert path.read_text(encoding="utf-8") == "5 a x y\n"
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (description["test"], description["sentences"], description["checkpoint"]) == ("t", 1, "update-0000001")
    testsets.write_translations(run, test, ["é", ""], config, {"bleu": 5})
    assert path.read_bytes() == "é\n\n".encode() and json.loads(path.with_suffix(".json").read_text())["bleu"] == 5
    assert testsets.cached_translations(run, test, config) == ["é", ""]


def test_test_sets_checkpoints_and_searches_have_files_of_their_own(tmp_path: Path) -> None:
    """Except for settings that only order the work: the number shown and the tokens translated together."""
    run = empty_run(tmp_path / "run", last="update-0000001")
    config = dataclasses.replace(evaluate_config(), search=search_preset("beam"))
    test = EvaluationSet("t", ["a"], [["x"], ["y"]])
    names = {name: testsets.translations_path(run, test, config).name for name in ("", "n_best", "tokens")}
    assert len(set(names.values())) == 1
    for name, value in CHANGED.items():
        if name not in names:
            search = dataclasses.replace(config.search, **{name: value})
            names[name] = testsets.translations_path(run, test, dataclasses.replace(config, search=search)).name
    others: list[dict[str, Any]] = [{"precision": "tf32"}, {"precision": "float32"}]
    for change in (*others, {"checkpoint": "last"}, {"checkpoint": "x/best2"}):
        names[str(change)] = testsets.translations_path(run, test, dataclasses.replace(config, **change)).name
    for other in (
        EvaluationSet("u", ["a"], [["x"], ["y"]]),
        EvaluationSet("t", ["b"], [["x"]]),
        EvaluationSet("t", ["a"], [["x"], ["z"]]),
    ):
        names[f"{other.name}{other.key}"] = testsets.translations_path(run, other, config).name
    assert len(set(names.values())) == len(names) - 2
    assert all("/" not in name and " " not in name and name.endswith(".txt") for name in names.values())
    odd = dataclasses.replace(config.search, require=["a b/c"])
    assert "/" not in testsets.translations_path(run, test, dataclasses.replace(config, search=odd)).name


def test_searches_are_named_in_words() -> None:
    """Greedy, by a beam, or by samples, and how one of them is chosen."""
    greedy = search_preset("greedy")
    named = {testsets.describe_search(dataclasses.replace(greedy, **c)): c for c in (
        {}, {"beam": 2}, {"samples": 1}, {"samples": 8, "select_by": "chrf"}, {"beam": 4, "select_by": "bleu"},
    )}  # fmt: skip
    assert list(named) == ["greedy", "beam 2", "1 samples", "8 samples selected by chrf", "beam 4 selected by bleu"]
