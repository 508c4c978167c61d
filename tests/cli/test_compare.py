"""Laws of seq2seq compare: whether its runs may be compared on one test set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from seq2seq.cli.commands.compare import contaminations
from seq2seq.cli.main import call, load_config
from seq2seq.config.schema import CompareConfig, TrainConfig
from seq2seq.data.corpus import open_corpora
from seq2seq.evaluation import testsets
from seq2seq.inference.translator import Translator
from seq2seq.utils.errors import UserError
from tests.helpers.runs import empty_run, saved_run


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, TrainConfig]:
    """The training configs of runs by name, on one corpus whose pairs are held out by different choices."""
    files = [tmp_path / f"a.{side}" for side in ("en", "de")]
    for file in files:
        file.write_text("".join(f"{file.suffix} {i}\n" for i in range(200)), encoding="utf-8")
    base = load_config("train", f"data.train=[{files[0]},{files[1]}]", f"data.cache={tmp_path}/cache")
    named = dataclasses.replace(base.data, validation=base.data.train, test=base.data.train)
    configs = {
        "base": base,
        "same": dataclasses.replace(base, device="cpu"),
        "seed": dataclasses.replace(base, seed=base.seed + 1),
        "fewer": dataclasses.replace(base, data=dataclasses.replace(base.data, held_out=2)),
        "named": dataclasses.replace(base, data=named),
        "moved": dataclasses.replace(base, data=dataclasses.replace(base.data, train=["gone.en", "gone.de"])),
    }
    monkeypatch.setattr(testsets, "read_config", lambda path: configs[path.parent.parent.parent.name])
    return configs


def warned(folder: Path, baseline: str, *others: str, **changes: object) -> dict[str, str]:
    """The warnings of a comparison with a baseline, by the run that they name."""
    config: CompareConfig = dataclasses.replace(load_config("compare", "run=[a,b]"), **changes)
    runs = [empty_run(folder / name) for name in (baseline, *others)]
    (test,) = testsets.find_test_sets(config, runs[0])
    return {line.partition(" ")[0]: line for line in contaminations(test, runs, config)}


def test_runs_that_saw_what_another_held_out_are_named(tmp_path: Path, stored: dict[str, TrainConfig]) -> None:
    """With the number of sources; a corpus that cannot be opened is not counted."""
    found = warned(tmp_path, "base", *list(stored)[1:])
    test = open_corpora(stored["base"].data, stored["base"].seed).test
    assert test is not None
    for name in ("same", "seed", "fewer", "named"):
        seen = set(open_corpora(stored[name].data, stored[name].seed).train.source)
        count = sum(source in seen for source in test.source)
        assert (name in found) == (count > 0)
        assert not count or f"{name} was trained on {count:,} of these {len(test):,} sources" in found[name]
    assert set(found) == {"seed", "fewer", "named"}


@pytest.mark.parametrize(
    ("command", "more"),
    [("evaluate", []), ("evaluate", ["metrics=[chrf]", "detail=true"]), ("compare", ["run=[a,b]"]), ("report", [])],
)
def test_a_tokenizer_that_is_not_installed_is_refused_before_any_translation(
    command: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the corpus of the run names, too; where no BLEU is computed, none is needed."""
    runs = [saved_run(tmp_path / name, "lstm", "data.tokenize=ja-mecab") for name in "ab"]
    files = [tmp_path / f"t.{side}" for side in ("en", "de")]
    for file in files:
        file.write_text("a cow\n", encoding="utf-8")
    given = [f"source={files[0]}", f"reference={files[1]}", f"outputs={tmp_path}", "run=a", *more]

    def missing(force: bool, tokenize: str, **_: object) -> None:
        if tokenize == "ja-mecab":
            raise RuntimeError("install mecab")

    monkeypatch.setattr("sacrebleu.metrics.bleu.BLEU", missing)
    monkeypatch.setattr(Translator, "from_checkpoint", None)
    with pytest.raises(UserError, match=r"^tokenize: ja-mecab cannot be used \(install mecab\); choose another"):
        call(command, *given)
    assert not any(run.evaluation.exists() for run in runs)
    if command == "evaluate":
        with pytest.raises(TypeError, match="not callable"):  # it loads the model
            call(command, *given, "metrics=[chrf]", "detail=false")


def test_test_sets_that_were_named_warn_of_nothing(tmp_path: Path, stored: dict[str, TrainConfig]) -> None:
    """Whoever names a test set answers for it."""
    assert warned(tmp_path, "named", "base", "seed") == {}
    assert isinstance(stored["base"].data.train, list)
    source, reference = stored["base"].data.train
    assert warned(tmp_path, "base", "seed", source=source, reference=reference) == {}
