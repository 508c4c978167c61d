"""Laws of the Python interface: importing it takes no time, and its functions do what the commands do."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import seq2seq
from seq2seq import api
from seq2seq.inference import translator
from seq2seq.utils.errors import UserError
from tests.helpers.configs import TINY


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, seq2seq; print(*({'torch', 'numpy', 'hydra', 'sacrebleu'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_exists_and_no_other() -> None:
    assert all(getattr(seq2seq, name) for name in seq2seq.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        seq2seq.nothing  # noqa: B018


@pytest.mark.slow
def test_the_examples_of_the_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order: a run is trained, scored and loaded."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 81), ("test", 5)):
        write_numbers(name, count)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for module in (api, translator):
        for test in sorted(doctest.DocTestFinder().find(module), key=lambda test: test.lineno or 0):
            runner.run(test)
    assert runner.tries >= 8 and not runner.failures


def write_numbers(name: str, count: int) -> None:
    """Pairs of four words, in the current folder."""
    for side, words in (("en", ["one", "two", "three"]), ("de", ["eins", "zwei", "drei"])):
        lines = [" ".join(words[(n // 3**i) % 3] for i in range(4)) for n in range(count)]
        Path(f"{name}.{side}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.mark.slow
def test_train_evaluate_and_translate_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is trained, resumed under its stored config, scored and loaded, as by the commands."""
    monkeypatch.chdir(tmp_path)
    write_numbers("a", 81)
    small = [*TINY["lstm"], "tokenizer.vocabulary=30", "training.tokens=200", "training.validate_every=2"]
    run = seq2seq.train("name=mine", "data.train=[a.en,a.de]", "model=lstm", "training.updates=2", *small)
    assert run.folder == Path("outputs/mine") and run.index()["last"] == "update-0000002"
    again = seq2seq.train("name=mine", "training.updates=4")
    assert again.index()["last"] == "update-0000004" and "changed    training.updates: 2 → 4" in capsys.readouterr().out
    (result,) = seq2seq.evaluate("run=mine", "metrics=[bleu,chrf]", "resamples=0", "search=greedy")
    assert [score.name for score in result.scores] == ["BLEU", "chrF"] and len(result.test) > 0
    assert isinstance(seq2seq.Translator.load("mine").translate(["one two"])[0][0], seq2seq.Translation)


def test_a_wrong_key_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match="modle: no such key; did you mean model"):
        seq2seq.train("modle=lstm")
