"""precision=int8: the translator's laws hold to the last bit, and where nothing can be compiled it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.inference.ensemble import Ensemble
from seq2seq.inference.translator import Translation, Translator
from seq2seq.model import native
from seq2seq.utils.device import choose_precision
from seq2seq.utils.errors import UserError
from tests.helpers.models import compiled
from tests.helpers.runs import saved_run

SENTENCES = ["Some dogs see cats.", "A cow.", "Some birds see a cow, the dogs and cats.", "", "The cats see dogs."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("int8"), "transformer").checkpoint("best")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def summary(ranked: list[Translation]) -> list[tuple[str, float, tuple[float, ...]]]:
    return [(one.text, one.score, one.token_log_probabilities) for one in ranked]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("options", [{}, {"forbid": ["cats"]}, {"coverage_penalty": 0.2}], ids=str)
def test_a_translation_is_the_same_in_every_batch(beam: int, options: dict[str, object], checkpoint: Path) -> None:
    """To the last bit: alone, together, and in small batches whose last sentences wait for the next one."""
    compiled()
    translator = Translator.from_checkpoint(checkpoint, "cpu", "int8")
    search = dataclasses.replace(search_preset("beam"), beam=beam, length_factor=1.0, **options)  # type: ignore[arg-type]
    alone = [summary(translator.translate([sentence], search)[0]) for sentence in SENTENCES]
    for tokens in (1, 30, 1000):
        found = translator.translate(SENTENCES, dataclasses.replace(search, tokens=tokens))
        assert [*map(summary, found)] == alone


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forbid": ["cats"]},
        {"require": ["dogs"]},
        {"no_repeat_ngram": 1},
        {"coverage_penalty": 0.5},
        {"min_length_extra": 3},
        {"stop": "certain"},
    ],
    ids=str,
)
def test_every_search_finds_what_the_one_in_steps_does(
    beam: int, options: dict[str, object], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with prefixes, and where each step is shown."""
    compiled()
    translator = Translator.from_checkpoint(checkpoint, "cpu", "int8")
    shown: list[tuple[int, str]] = []
    search = dataclasses.replace(search_preset("beam"), beam=beam, n_best=beam, length_factor=1.0, **options)  # type: ignore[arg-type]
    prefixes = ["Die", "", "Einige", "", ""]

    def found() -> list[list[Translation]]:
        plain, begun = (
            translator.translate(SENTENCES, search),
            translator.translate(SENTENCES, search, prefixes=prefixes),
        )
        return plain + begun + translator.translate(SENTENCES, search, on_step=lambda i, text: shown.append((i, text)))

    ours, steps = found(), [*shown]
    assert len(steps) > len(SENTENCES)
    shown.clear()
    monkeypatch.setattr(Ensemble, "has_plain_search", False)
    theirs = found()
    assert shown == steps
    for ranked, others in zip(ours, theirs, strict=True):
        assert [one.text for one in ranked] == [one.text for one in others]
        assert [one.score for one in ranked] == pytest.approx([one.score for one in others], rel=1e-6)


def test_a_forced_score_is_that_of_the_search(checkpoint: Path) -> None:
    compiled()
    translator = Translator.from_checkpoint(checkpoint, "cpu", "int8")
    search = dataclasses.replace(search_preset("greedy"), length_factor=1.0)
    found = [ranked[0] for ranked in translator.translate(SENTENCES[:3], search, attention=True)]
    scored = translator.score(SENTENCES[:3], [one.text for one in found], search, attention=True)
    for one, other in zip(found, scored, strict=True):
        if one.pieces == other.pieces:
            assert other.token_log_probabilities == pytest.approx(one.token_log_probabilities, abs=1e-4)
            assert torch.equal(one.attention(), other.attention())
    assert any(one.pieces == other.pieces for one, other in zip(found, scored, strict=True))


def test_without_a_compiler_it_is_slower_and_says_why(
    checkpoint: Path, no_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    translator = Translator.from_checkpoint(checkpoint, "cpu", "int8")
    assert capsys.readouterr().err == (
        "precision=int8 is slow here, in plain torch: no C++ compiler found; install one, or set CXX\n"
    )
    assert translator.library is None
    exact = Translator.from_checkpoint(checkpoint, "cpu", "float32")
    ours, wanted = (
        [one.log_probability for one in t.score(SENTENCES[:3], ["Some Dogs.", "A Cow.", "Cats."])]
        for t in (translator, exact)
    )
    assert ours == pytest.approx(wanted, rel=0.03) and ours != wanted


def test_it_needs_a_cpu() -> None:
    with pytest.raises(UserError, match="precision: int8 runs on a CPU only, not on mps; use device=cpu or auto"):
        choose_precision("int8", torch.device("mps"))


def test_training_refuses_it() -> None:
    assert load_config("translate", "precision=int8").precision == "int8"
    with pytest.raises(UserError, match="precision: 'int8' is not a choice; possible: auto, float32, tf32, bfloat16"):
        load_config("train", "precision=int8")
