"""Laws of a run's folder, of the test sets it is measured on, of its cached translations, and of merged configs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.cli.main import load_config
from seq2seq.config.loading import build_config, differences, flatten, search_preset, to_dict, with_defaults
from seq2seq.config.paths import CONFIGS
from seq2seq.config.schema import DataConfig, EvaluateConfig, Range, SearchConfig, TrainConfig
from seq2seq.evaluation import testsets
from seq2seq.evaluation.metrics import TestSet as EvaluationSet
from seq2seq.inference.translator import EMPTY, Translation
from seq2seq.utils import io
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import write_atomically
from seq2seq.utils.run import INDEX, Run

SAFE_LOAD = yaml.safe_load
LAW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def saved(folder: Path, names: Sequence[str] = ("update-0000001",), **index: str) -> Run:
    """A run with empty checkpoints, and an index where one is given."""
    run = Run(folder)
    for name in names:
        (run.checkpoints / name).mkdir(parents=True, exist_ok=True)
        (run.checkpoints / name / "config.yaml").touch()
    if index:
        (run.checkpoints / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return run


# ------------------------------------------------------------------------------------------- checkpoints


def test_the_index_names_the_last_and_the_best_checkpoint(tmp_path: Path) -> None:
    """Not the newest folder; without a best one the last is taken."""
    names = ["update-0000002", "update-0000010", "update-0000003"]
    run = saved(tmp_path / "a", names, last=names[1], best=names[2])
    assert run.exists and run.index() == {"last": names[1], "best": names[2]}
    assert [run.checkpoint(which) for which in ("last", "best")] == [
        run.checkpoints / names[1],
        run.checkpoints / names[2],
    ]
    assert saved(tmp_path / "b", names, last=names[0]).checkpoint("best").name == names[0]


@pytest.mark.parametrize("text", [None, "", "{", "5", "null", "[1]"])
def test_without_a_readable_index_the_newest_checkpoint_is_the_last(text: str | None, tmp_path: Path) -> None:
    """By its number; half-made folders of other names do not count, and without any there is no run."""
    run = saved(tmp_path, ["update-0000009", "update-0000010", "zz", ".update-0000099"])
    if text is not None:
        (run.checkpoints / INDEX).write_text(text)
    assert run.index() == {"last": "update-0000010"} and run.exists
    assert run.checkpoint("best") == run.checkpoint("last") == run.checkpoints / "update-0000010"
    empty = Run(tmp_path / "none")
    assert not empty.exists and empty.index() == {}
    with pytest.raises(UserError, match="no checkpoint yet"):
        empty.checkpoint("best")


def test_a_checkpoint_is_found_by_its_path_or_by_its_name_in_the_run(tmp_path: Path) -> None:
    """Only where it holds a config."""
    run = saved(tmp_path / "run", ["update-0000001", "update-0000002"], last="update-0000002")
    other = saved(tmp_path / "other").checkpoints / "update-0000001"
    assert run.checkpoint(str(other)) == other
    assert run.checkpoint("update-0000001") == run.checkpoints / "update-0000001"
    for wrong in ("update-0000003", str(tmp_path), "Best"):
        with pytest.raises(UserError, match=f"checkpoint: {wrong} is not a checkpoint"):
            run.checkpoint(wrong)


# ------------------------------------------------------------------------------------------- metrics


def metrics_of(run: Run) -> list[int]:
    return [json.loads(line)["update"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("update", [0, 1, 2, 5, 9])
def test_metrics_of_later_updates_and_half_a_line_are_forgotten(update: int, tmp_path: Path) -> None:
    """Those of the update itself stay, in their order and to the byte, whatever comes between."""
    run = Run(tmp_path)
    run.drop_metrics_after(update)
    assert not run.metrics.exists(), "without metrics nothing is written"
    lines = [json.dumps({"kind": kind, "update": u, "text": "ä\u2028"}, ensure_ascii=u > 2) + "\n"
             for u, kind in itertools.product((1, 2, 3, 5, 2, 9), ("training", "validation"))]  # fmt: skip
    for rest in ("", '{"kind": "x", "update": 0', '{"kind": "x", "update": 0}'):
        run.metrics.write_text("".join(line for line in lines if "\u2028" not in line) + rest, encoding="utf-8")
        run.drop_metrics_after(update)
        kept = [line for line in lines if "\u2028" not in line and json.loads(line)["update"] <= update]
        assert run.metrics.read_text(encoding="utf-8") == "".join(kept), rest


# ------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("fails", ["write_text", "fsync_file", "replace"])
def test_a_file_that_was_not_written_whole_keeps_its_old_text(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a process ends on the way; the next attempt is not hindered by what is left."""
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(io if fails == "fsync_file" else Path, fails, broken)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "newer ä\n")
    assert path.read_bytes() == "newer ä\n".encode() and os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves the old text or the new one: first all bytes, then the name."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append("bytes") or fsync(file))  # type: ignore[func-returns-value]

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"{path.read_text()} → {target.name}")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(tmp_path / "a", "text")
    assert steps == ["bytes", "text → a"]


def test_a_result_is_readable_text(tmp_path: Path) -> None:
    """JSON with letters as they are and a line feed at the end."""
    run = Run(tmp_path)
    run.write_result({"größe": 1.5, "none": None})
    text = run.result.read_text(encoding="utf-8")
    assert json.loads(text) == {"größe": 1.5, "none": None} and "größe" in text and text.endswith("}\n")


def test_clearing_removes_what_a_run_made_and_nothing_else(tmp_path: Path) -> None:
    """Folders with all in them, files where they are, and notes of one's own stay."""
    run = saved(tmp_path / "run", last="update-0000001")
    made = {
        run.config,
        run.log,
        run.metrics,
        run.result,
        run.environment,
        run.checkpoints,
        run.tensorboard,
        run.evaluation,
    }
    assert {path.parent for path in made} == {run.folder}
    for folder in (run.tensorboard, run.evaluation):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").touch()
    own = [run.folder / "notes.txt", run.folder / "config.yaml.bak", run.folder / "export" / "model.bin"]
    own[2].parent.mkdir()
    for path in (run.config, run.log, run.metrics, run.result, run.environment, *own):
        path.touch()
    assert {path for path in run.folder.iterdir()} >= made
    for _ in range(2):
        run.clear()
        assert {path for path in run.folder.rglob("*") if path.is_file()} == set(own)
        assert not run.exists and not any(path.exists() for path in made)


# ------------------------------------------------------------------------------------------- finding


def test_runs_are_found_by_name_folder_or_as_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is the one saved last, wherever it lies below the folder of outputs and whatever its name."""
    outputs = tmp_path / "outputs"
    runs = {name: saved(outputs / name, last="update-0000001") for name in ("c", "a", "deep/b")}
    for time, name in enumerate(("deep/b", "c", "a")):
        os.utime(runs[name].checkpoints / INDEX, (1000 + time, 1000 + time))
    found = [run.folder for run in Run.all(str(outputs))]
    assert found == [outputs / "deep" / "b", outputs / "c", outputs / "a"]
    assert Run.find(None, str(outputs)).folder == outputs / "a"
    os.utime(runs["c"].checkpoints / INDEX, (2000, 2000))
    assert Run.find(None, str(outputs)).folder == outputs / "c"
    assert Run.find("deep/b", str(outputs)).folder == outputs / "deep" / "b"
    elsewhere = saved(tmp_path / "elsewhere", last="update-0000001")
    monkeypatch.chdir(tmp_path)
    assert Run.find("elsewhere", "outputs").folder == Path("elsewhere")
    assert Run.find(str(elsewhere.folder), "outputs").folder == elsewhere.folder
    saved(tmp_path / "a", last="update-0000001")
    assert Run.find("a", "outputs").folder == Path("outputs") / "a", "a name goes before a folder"
    with pytest.raises(UserError, match=r"run: no run x in outputs; possible: c, a, deep/b"):
        Run.find("x", "outputs")
    with pytest.raises(UserError, match=r"no run x in .*nothing; train one with seq2seq train"):
        Run.find("x", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no runs found"):
        Run.find(None, str(tmp_path / "nothing"))


def test_a_run_that_has_only_begun_is_named_and_many_runs_are_shortened(tmp_path: Path) -> None:
    """The ten newest are enough to remember a name by."""
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").touch()
    with pytest.raises(UserError, match="begun has no checkpoint yet"):
        Run.find("begun", str(tmp_path))
    for count in (10, 11):
        for i in range(count):
            run = saved(tmp_path / f"run{i:02}", last="update-0000001")
            os.utime(run.checkpoints / INDEX, (1000 + i, 1000 + i))
        with pytest.raises(UserError) as error:
            Run.find("zzzzzz", str(tmp_path))
        names = str(error.value).partition("possible: ")[2].split(", ")
        assert names[:10] == [f"run{i:02}" for i in range(count - 1, count - 11, -1)]
        assert len(names) == 10 + (count > 10) and names[10:] == (["…"] if count > 10 else [])


# ------------------------------------------------------------------------------------------- test sets


@lru_cache
def evaluate_config() -> EvaluateConfig:
    config: EvaluateConfig = load_config("evaluate")
    return config


@lru_cache
def train_config() -> TrainConfig:
    config: TrainConfig = load_config("train", "data=files", "data.train=[x/a.en,x/a.de]", "data.validation=v.tsv")
    return config


def write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_files_are_test_sets_each_with_all_its_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One source with one or several references, or several sources with one or several each."""
    monkeypatch.setattr(testsets, "read_config", lambda path: train_config())
    run = saved(tmp_path / "run", last="update-0000001")
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
    run = saved(tmp_path / "run", last="update-0000001")
    stored = dataclasses.replace(train_config(), seed=77)
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


def test_the_config_is_that_of_the_checkpoint_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one or another; its corpus is looked for elsewhere only on request."""
    run = saved(tmp_path / "run", ["update-0000001", "update-0000002"], last="update-0000002", best="update-0000001")
    read: list[Path] = []
    monkeypatch.setattr(testsets, "read_config", lambda p: read.append(p) or train_config())  # type: ignore[func-returns-value]
    config = dataclasses.replace(evaluate_config(), checkpoint="best")
    assert testsets.stored_config(run, config) == train_config()
    moved = testsets.stored_config(run, dataclasses.replace(config, checkpoint="last", data_path=str(tmp_path)))
    assert [path.parent.name for path in read] == ["update-0000001", "update-0000002"]
    assert moved.data.train == [f"{tmp_path}/a.en", f"{tmp_path}/a.de"]


def test_a_corpus_that_moved_keeps_its_files_names_or_its_splits(tmp_path: Path) -> None:
    """Files are looked for in the folder, each by its own name; of a corpus in a folder only that changes."""
    data = dataclasses.replace(train_config().data, train=["x/a.en", "y/b.de"], validation="z/v.tsv", test=None)
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
    """One that lacks the pair of languages, or a name that is none, is named with what there is."""
    from sacrebleu import dataset

    files = [write(tmp_path / name, [f"{name} 1", "x\u2028y"]) for name in ("src", "ref1", "ref2")]
    asked: list[str] = []
    fake = SimpleNamespace(
        langpairs={"en-de": 1, "fr-en": 1},
        get_source_file=lambda pair: asked.append(pair) or files[0],  # type: ignore[func-returns-value]
        get_reference_files=lambda pair: asked.append(pair) or files[1:],  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(dataset, "DATASETS", {"mtedx/test": fake})
    data = train_config().data
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


class Said:
    """Stands in for a translator: numbers its calls, and says two translations of each sentence."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def from_checkpoint(self, *where: Any) -> Said:
        self.calls.append(where)
        return self

    def translate(self, sources: Sequence[str], search: SearchConfig) -> list[list[Translation]]:
        rest = list(vars(EMPTY).values())[1:]
        number = len(self.calls)
        return [[Translation(f"{number} {s}\nx\u2028y\r", *rest), Translation("worse", *rest)] for s in sources]


@pytest.fixture(autouse=True)
def _yaml_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are read from configs/ for each name and each stored config."""
    monkeypatch.setattr(yaml, "safe_load", lambda text: copy.deepcopy(parsed(text)))


@lru_cache(None)
def parsed(text: str) -> Any:
    return SAFE_LOAD(text)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    translator = Said()
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
    options = {"length_normalization": "average", "stop": "certain", "select_by": "chrf"}
    return options[hint]


CHANGED = {
    field.name: changed(getattr(search_preset("beam"), field.name), field.name)
    for field in dataclasses.fields(SearchConfig)
}


def test_translations_are_made_anew_for_every_setting_they_depend_on(tmp_path: Path, said: Said) -> None:
    """Each field of the search, the precision, the checkpoint, the sentences; and for the same ones they are read."""
    run = saved(tmp_path / "run", ["update-0000001", "update-0000002"], last="update-0000001", best="update-0000001")
    config = dataclasses.replace(
        evaluate_config(), search=search_preset("beam"), checkpoint="last", precision="float32"
    )
    test = EvaluationSet("t.test", ["a", "b"], [["x", "y"]])
    first = testsets.cached_translations(run, test, config)
    assert first == ["1 a x y", "1 b x y"] and said.calls == [(run.checkpoints / "update-0000001", "auto", "float32")]
    assert testsets.cached_translations(run, test, config) == first and len(said.calls) == 1
    other_device = dataclasses.replace(config, device="cpu")
    assert testsets.cached_translations(run, test, other_device) == first, (
        "devices and measurements change no translation"
    )
    assert testsets.cached_translations(run, test, dataclasses.replace(config, resamples=0, metrics=["ter"])) == first
    for name, value in CHANGED.items():
        calls = len(said.calls)
        variant = dataclasses.replace(config, search=dataclasses.replace(config.search, **{name: value}))
        assert testsets.cached_translations(run, test, variant)[0] == f"{calls + 1} a x y", name
        assert testsets.cached_translations(run, test, variant)[0] == f"{calls + 1} a x y", name
    calls = len(said.calls)
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
    calls = len(said.calls) + 1
    assert testsets.cached_translations(run, same_name, config) == [f"{calls} a x y", f"{calls} d x y"]
    (run.checkpoints / INDEX).write_text(json.dumps({"last": "update-0000002", "best": "update-0000001"}))
    assert testsets.cached_translations(run, test, config)[0] == f"{calls + 1} a x y", (
        "the last checkpoint is another one now"
    )
    assert said.calls[-1][0].name == "update-0000002"


def test_translations_of_files_that_were_damaged_are_made_again(tmp_path: Path, said: Said) -> None:
    """Without its description, with an unreadable one, or without the text."""
    run = saved(tmp_path / "run", last="update-0000001")
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
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert (told["test"], told["sentences"], told["checkpoint"]) == ("t", 1, "update-0000001")
    testsets.write_translations(run, test, ["é", ""], config, {"bleu": 5})
    assert path.read_bytes() == "é\n\n".encode() and json.loads(path.with_suffix(".json").read_text())["bleu"] == 5
    assert testsets.cached_translations(run, test, config) == ["é", ""]


def test_test_sets_checkpoints_and_searches_have_files_of_their_own(tmp_path: Path) -> None:
    """All but what only orders work: the number shown and the tokens translated together."""
    run = saved(tmp_path / "run", last="update-0000001")
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


# ------------------------------------------------------------------------------------------- configs

TREES = st.recursive(
    st.one_of(st.none(), st.integers(0, 3), st.sampled_from(["a", "b"]), st.lists(st.integers(0, 1), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    max_leaves=8,
)
TREE = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@LAW
@given(TREE)
def test_a_flat_config_has_a_dotted_key_for_every_leaf(tree: dict[str, Any]) -> None:
    """In order, lists as they stand, and without groups that are empty."""
    assert list(flatten(tree).items()) == [(".".join(path), value) for path, value in leaves(tree)]


@LAW
@given(TREE, TREE)
def test_differences_name_every_leaf_that_is_not_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Once each, with the old value and the new; a group against a value is one difference."""

    def walk(a: Any, b: Any, path: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in [*a, *(name for name in b if name not in a)]:
                yield from walk(a.get(name), b.get(name), f"{path}.{name}".lstrip("."))
        elif a != b:
            yield f"{path}: {a} → {b}"

    found = differences(old, new)
    assert found == list(walk(old, new, ""))
    assert differences(old, copy.deepcopy(old)) == []
    assert len(found) == len(differences(new, old))


@LAW
@given(
    st.integers(-3, 3), st.integers(-3, 3) | st.just(float("inf")), st.booleans(), st.floats(-4, 4) | st.integers(-4, 4)
)
def test_a_range_holds_its_ends_unless_it_is_open(low: int, high: float, is_open: bool, value: float) -> None:
    """The upper end always, the lower one unless excluded; nothing that is not finite."""
    allowed = (value > low if is_open else value >= low) and not value > high
    assert (value in Range(low, high, is_open)) is allowed
    assert (low in Range(low, low + 1, is_open)) is not is_open and low + 1 in Range(low, low + 1, is_open)
    assert all(wrong not in Range(-9) for wrong in (float("inf"), float("-inf"), float("nan")))


@lru_cache
def defaults(family: str) -> TrainConfig:
    config: TrainConfig = load_config("train", f"model={family}", "data.extra=[{train: train, path: x, weight: 2}]")
    return config


def test_numbers_in_configs_are_numbers_to_every_reader() -> None:
    """A plain YAML reader takes 1e-9 for text, Hydra's does not: both read these files."""
    for path in CONFIGS.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        texts = [value for _, value in leaves(values) if isinstance(value, str)]
        assert not [text for text in texts if re.fullmatch(r"[-+.\de]*\d[-+.\de]*", text)], path


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_a_config_survives_being_written_and_read(family: str) -> None:
    """Plain values make the same object again, and no default replaces what is stored."""
    config = defaults(family)
    assert build_config(TrainConfig, to_dict(config)) == config
    assert with_defaults(to_dict(config)) == to_dict(config)


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_keys_newer_than_a_stored_config_have_the_defaults_of_their_family(family: str) -> None:
    """A missing key in each group at a time, groups inside groups too, and all others as they were stored."""
    everything = to_dict(
        dataclasses.replace(defaults(family), data=dataclasses.replace(defaults(family).data, extra=[]))
    )
    of_group: dict[str, list[tuple[str, ...]]] = {}
    for path, _ in leaves(everything):
        if path[0] != "name" and path[-1] != "family":  # composed from others; what the family is known by
            of_group.setdefault(path[0] if len(path) > 1 else "", []).append(path)
    for paths in itertools.zip_longest(*of_group.values()):
        stored = copy.deepcopy(everything)
        for path in filter(None, paths):
            group = stored
            for name in path[:-1]:
                group = group[name]
            del group[path[-1]]
        assert with_defaults(stored) == everything, paths
    groups = ("search", "training", "optimizer", "tokenizer", "data")
    assert with_defaults({name: value for name, value in everything.items() if name not in groups}) == everything


def test_stored_values_go_before_defaults_at_every_depth() -> None:
    """Where a value is a group, a list or nothing as well."""
    stored = to_dict(defaults("lstm"))
    rng = random.Random(0)
    changed_: dict[tuple[str, ...], Any] = {}
    for path, _ in list(leaves(stored)):
        if rng.random() < 0.5 and path[-1] != "family":
            group = stored
            for name in path[:-1]:
                group = group[name]
            group[path[-1]] = changed_[path] = rng.choice([None, "mine", 7, ["x"], False])
    found = dict(leaves(with_defaults(stored)))
    assert {path: found[path] for path in changed_} == changed_
    assert "unknown" in with_defaults({**stored, "unknown": 1})


FIELDS: list[tuple[str, Any, Any, str | None]] = [
    ("seed", 0, 0, None),
    ("seed", -1, None, "seed: -1 is out of range; it must be between 0 and"),
    ("seed", 2.0, 2, None),
    ("seed", 2.5, None, "seed: 2.5 is not a whole number"),
    ("seed", True, None, "seed: True is not a whole number"),
    ("seed", "1", None, "seed: '1' is not a whole number"),
    ("seed", 2**63 - 1, 2**63 - 1, None),
    ("seed", 2**63, None, "out of range"),
    ("compile", 1, None, "compile: 1 is not true or false"),
    ("name", 5, "5", None),
    ("name", None, None, "name: None is not text"),
    ("init_from", None, None, None),
    ("init_from", 3, "3", None),
    ("device", "???", None, "device: no value; set one with device=…"),
    ("precision", "float", None, "precision: 'float' is not a choice; possible: auto, float32, tf32, bfloat16"),
    ("training.tokens", "auto", "auto", None),
    ("training.tokens", 1, 1, None),
    ("training.tokens", 0, None, "training.tokens: 0 is out of range; it must be at least 1; also possible: auto"),
    ("training.tokens", "car", None, "training.tokens: 'car' is not a whole number; also possible: auto"),
    ("optimizer.lr", 0, None, "optimizer.lr: 0 is out of range; it must be greater than 0"),
    ("optimizer.lr", 1, 1.0, None),
    ("optimizer.betas", 5, None, "optimizer.betas: 5 is not a list; write optimizer.betas=[a,b]"),
    ("optimizer.betas", [0.5, "x"], None, "optimizer.betas[1]: 'x' is not a number"),
    ("optimizer.betas", [0.5, 1], None, "optimizer.betas: [0.5, 1.0] must be two numbers"),
    ("model.dropout", 0.999, 0.999, None),
    ("model.dropout", 1, None, "model.dropout: 1 is out of range; it must be between 0 and 0.999"),
    ("model.dropout", float("nan"), None, "model.dropout: nan is out of range"),
    ("model.embedding_dropout", 0.5, 0.5, None),
    ("model.attention", 5, None, "model.attention: expected a group of values, got 5"),
    ("model.attention.heads", [1, 2], None, "not a whole number; to try several values in turn, add -m"),
    ("model.family", "rnn", None, "model.family: 'rnn' is not a choice; possible: transformer, lstm"),
    ("data.train", ["a", "b"], ["a", "b"], None),
    ("data.train", ["a"], None, "data.train: ['a'] names 1 files"),
    ("data.train", 5, "5", None),
    ("data.filters.emtpy", True, None, "data.filters.emtpy: no such key"),
    ("data.extra", [{"train": "x"}], None, None),
    ("data.extra", [{"path": "x"}], None, "data.extra[0].train: missing"),
    ("data.extra", [{"train": "x", "weight": 0}], None, "data.extra[0].weight: 0 is out of range"),
    ("search.top_p", 1, 1.0, None),
    ("search.top_p", 0, None, "search.top_p: 0 is out of range; it must be between 0 and 1"),
    ("tokenizer.character_coverage", 0.98, 0.98, None),
    ("tokenizer.character_coverage", 0.97, None, "coverage: 0.97 is out of range; it must be between 0.98 and 1"),
]  # fmt: skip


@lru_cache
def plain_config() -> dict[str, Any]:
    return to_dict(train_config())


@pytest.mark.parametrize(("key", "value", "expected", "problem"), FIELDS, ids=lambda x: str(x)[:24])
def test_values_become_what_their_field_asks_for_or_a_problem_that_names_it(
    key: str, value: Any, expected: Any, problem: str | None
) -> None:
    """Whole floats are whole numbers, numbers are text where text belongs, and booleans are neither."""
    values = copy.deepcopy(plain_config())
    *groups, name = key.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[name] = value
    if problem is None:
        built: Any = build_config(TrainConfig, values)
        for part in key.split("."):
            built = getattr(built, part)
        if key != "data.extra":
            assert built == expected and type(built) is type(expected)
        else:
            assert [(more.train, more.path, more.subset, more.weight) for more in built] == [("x", None, None, 1.0)]
    else:
        with pytest.raises(UserError) as error:
            build_config(TrainConfig, values)
        assert len(error.value.problems) == 1 and problem in error.value.problems[0]
        assert error.value.code == 2


def test_all_problems_are_named_at_once() -> None:
    """Of every group; contradictions inside a group only once its values are sound."""
    values = copy.deepcopy(plain_config())
    values["seed"] = -1
    del values["outputs"]
    values["extra"] = 1
    values["model"]["attention"]["heads"] = 0
    values["data"]["source"] = " "
    values["search"]["n_best"] = 7
    with pytest.raises(UserError) as error:
        build_config(TrainConfig, values)
    keys = sorted(problem.partition(":")[0] for problem in error.value.problems)
    assert keys == ["data.source", "extra", "model.attention.heads", "outputs", "search.n_best", "seed"]


@pytest.mark.parametrize(
    ("cls", "changes", "problem"),
    [
        ("data", {"source": "de"}, "target: de is also the source"),
        ("data", {"validation": ["a", "b", "c"]}, "validation: ['a', 'b', 'c'] names 3 files"),
        ("tokenizer", {"type": "word", "sampling": 0.1}, "sampling: 0.1 requires alternative"),
        ("tokenizer", {"type": "char", "sampling": 0.1}, "sampling: 0.1 requires alternative"),
        ("tokenizer", {"model": ["a"]}, "model: ['a'] names 1 files"),
        ("optimizer", {"betas": [0.9]}, "betas: [0.9] must be two"),
        ("optimizer", {"betas": [-0.1, 0.9]}, "must be two numbers"),
        ("optimizer", {"name": "schedule_free"}, "schedule: cosine is incompatible with"),
        (
            "optimizer",
            {"name": "schedule_free", "schedule": "constant", "betas": [0, 0.9]},
            "betas: schedule_free",
        ),
        ("training", {"r_drop": 1.0, "simcut": 1.0}, "simcut: and r_drop"),
        ("search", {"n_best": 2}, "n_best: 2 exceeds beam=1"),
        ("search", {"samples": 2, "n_best": 3}, "n_best: 3 exceeds samples=2"),
        ("search", {"min_length_factor": 2.5}, "min_length_factor: requires longer"),
        ("search", {"min_length_extra": 11, "min_length_factor": 2.0}, "min_length_factor: requires longer"),
        ("search", {"beam": 4, "groups": 3}, "groups: 3 does not divide"),
        ("search", {"diversity": 0.5}, "diversity: 0.5"),
        ("search", {"beam": 4, "groups": 2, "require": ["a"]}, "require: and groups"),
        ("search", {"select_by": "bleu"}, "select_by: bleu compares"),
        ("search", {"samples": 2, "beam": 2}, "beam: applies to beam search"),
        ("search", {"samples": 2, "coverage_penalty": 0.1}, "coverage_penalty: applies to beam search"),
        ("search", {"samples": 2, "require": ["a"]}, "require: applies to beam search"),
        ("search", {"top_k": 1}, "top_k: applies to sampling"),
        ("search", {"top_p": 0.9}, "top_p: applies to sampling"),
        ("search", {"min_p": 0.1}, "min_p: applies to sampling"),
        ("search", {"epsilon_cutoff": 0.1}, "epsilon_cutoff: applies to sampling"),
        ("search", {"temperature": 0.5}, "temperature: applies to sampling"),
        ("search", {"require": [" "]}, "require: has an empty entry"),
        ("search", {"forbid": ["a", ""]}, "forbid: has an empty entry"),
        ("search", {"beam": 5, "forbid": ["a"], "require": ["a"]}, "forbid: a is also required"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_contradictions_inside_a_group_are_named(cls: str, changes: dict[str, Any], problem: str) -> None:
    """Each under the key to change, and alone."""
    config: Any = search_preset("greedy") if cls == "search" else getattr(train_config(), cls)
    assert not list(config.problems())
    found = [f"{key}: {text}" for key, text in dataclasses.replace(config, **changes).problems()]
    assert len(found) == 1 and problem in found[0]


FINE: list[tuple[str, dict[str, Any]]] = [
    ("search", {"beam": 2, "n_best": 2}),
    ("search", {"min_length_factor": 2.0, "min_length_extra": 10}),
    ("search", {"beam": 4, "groups": 2, "diversity": 0.5}),
    (
        "search",
        {"samples": 3, "n_best": 3, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "epsilon_cutoff": 0.1, "temperature": 2.0},
    ),
    ("search", {"samples": 2, "select_by": "chrf"}),
    ("tokenizer", {"type": "bpe", "sampling": 0.1}),
    ("optimizer", {"betas": [0.0, 0.0]}),
    ("training", {"r_drop": 1.0}),
]


@pytest.mark.parametrize(("cls", "changes"), FINE, ids=lambda x: str(x)[:30])
def test_what_is_allowed_at_its_limits_is_no_contradiction(cls: str, changes: dict[str, Any]) -> None:
    """As many translations as hypotheses, as long at least as at most, groups that divide a beam."""
    config = search_preset("greedy") if cls == "search" else getattr(train_config(), cls)
    assert not list(dataclasses.replace(config, **changes).problems())
