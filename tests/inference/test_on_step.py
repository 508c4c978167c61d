"""Laws of translations that grow: what a watched search reports, and that watching changes nothing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data.corpus import Corpus
from seq2seq.data.tokenizer import Tokenizer, train_tokenizer
from seq2seq.inference.translator import Translation, Translator
from tests.helpers.configs import FAMILIES, tiny_config
from tests.helpers.models import tiny_model
from tests.helpers.program import forks

SOURCES = ["A dog runs.", "", "Two young men are playing.", "A woman sings.", "  ", "Two men sing and a woman runs."]
TARGETS = ["Ein Hund rennt.", "", "Zwei junge Männer spielen.", "Eine Frau singt.", "", "Zwei Männer singen."]
PREFIXES = ["Ein", "", "", "Eine Frau", "", "Zwei Männer spielen"]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"beam": 1},
    "beam": {"beam": 4, "n_best": 2},
    "diverse": {"beam": 4, "groups": 2, "diversity": 0.5},
    "coverage": {"beam": 3, "coverage_penalty": 0.4, "stop": "certain"},
    "require": {"beam": 5, "require": ["Hund"]},
    "small batches": {"beam": 2, "tokens": 20},
    "sample": {"beam": 1, "samples": 3, "n_best": 3},
    "mbr": {"beam": 4, "select_by": "chrf"},
}


def tokenizer(*overrides: str) -> Tokenizer:
    config = tiny_config("transformer", "tokenizer.vocabulary=70", *overrides).tokenizer
    return train_tokenizer(Corpus(SOURCES[::2] + SOURCES[3:], TARGETS[::2] + TARGETS[3:]), config)[0]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer()


def translator(words: Tokenizer, *families: str) -> Translator:
    models = [tiny_model(family, vocabulary=words.vocabulary, seed=i) for i, family in enumerate(families)]
    single = [Translator(model, words, torch.device("cpu"), 64) for model in models]
    return Translator.ensemble(single, [*families])


def options(**changes: object) -> SearchConfig:
    shorter = {"length_factor": 1.0, "length_extra": 4}
    return dataclasses.replace(search_preset("beam"), **{**shorter, **changes})  # type: ignore[arg-type]


def watched(
    model: Translator, search: SearchConfig, prefixes: list[str] | None = None
) -> tuple[list[list[Translation]], dict[int, list[str]]]:
    """Translations, and every text reported for each sentence."""
    reports: dict[int, list[str]] = defaultdict(list)
    found = model.translate(SOURCES, search, prefixes=prefixes, on_step=lambda i, text: reports[i].append(text))
    return found, reports


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("families", [FAMILIES[:1], FAMILIES[1:], FAMILIES], ids="+".join)
def test_watching_changes_nothing_and_the_last_text_is_the_translation(
    name: str, families: tuple[str, ...], words: Tokenizer
) -> None:
    """Each report is a change; an empty translation needs none."""
    model, search = translator(words, *families), options(**SEARCHES[name])
    found, reports = watched(model, search)
    assert found == model.translate(SOURCES, search)
    for i, ranked in enumerate(found):
        texts = ["", *reports[i]]
        assert texts[-1] == ranked[0].text
        assert all(a != b for a, b in pairwise(texts))
        assert len(texts) <= 2 or not search.samples


@pytest.mark.parametrize("prefixes", [None, PREFIXES])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_translation_grows_by_its_own_subwords(
    family: str, prefixes: list[str] | None, words: Tokenizer
) -> None:
    """Its reports are the texts of its beginnings, from the prefix on, each once."""
    found, reports = watched(translator(words, family), options(beam=1), prefixes)
    assert any(len(texts) > 3 for texts in reports.values())
    for i, ((best,), prefix) in enumerate(zip(found, prefixes or [""] * len(SOURCES), strict=True)):
        ids = words.target.piece_to_id([*best.pieces])
        beginnings = [words.decode(ids[:n]) for n in range(len(words.target.encode(prefix)), len(ids) + 1)]
        assert reports[i] == [text for text in dict.fromkeys(beginnings) if text]


@pytest.mark.parametrize("beam", [1, 4])
def test_every_text_begins_with_the_prefix(beam: int, words: Tokenizer) -> None:
    _, reports = watched(translator(words, "transformer"), options(beam=beam), PREFIXES)
    for i, prefix in enumerate(PREFIXES):
        assert all(text.startswith(prefix) for text in reports[i])
        assert reports[i] or not SOURCES[i].strip()


def test_a_character_appears_when_its_last_byte_is_known() -> None:
    """With byte subwords half a character is no text, and greedy text still only grows."""
    words = tokenizer("tokenizer.byte_fallback=true", "tokenizer.vocabulary=320")
    model = translator(words, "transformer")
    assert len(words.target.encode("Ω")) > 2
    reports: list[str] = []
    scripted = words.target.encode("Ω→Ω", out_type=int)
    search = options(beam=1, length_factor=0.0, length_extra=len(scripted) + 1)
    with pytest.MonkeyPatch.context() as patch:
        step = model.models.step

        def scripted_step(target_RT: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
            logits_RTV, after = step(target_RT, state)  # type: ignore[arg-type]
            logits_RTV[:, :, scripted[after.length - 1] if after.length <= len(scripted) else 3] += 1e4
            return logits_RTV, after

        patch.setattr(model.models, "step", scripted_step)
        (best,) = model.translate(["A dog."], search, on_step=lambda _, text: reports.append(text))[0]
    assert best.text == "Ω→Ω"
    assert reports == ["Ω", "Ω→", "Ω→Ω"]


def test_an_exception_of_the_watcher_ends_the_search(words: Tokenizer) -> None:
    calls: list[int] = []

    def stop(i: int, text: str) -> None:
        calls.append(i)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        translator(words, "transformer").translate(SOURCES, options(), on_step=stop)
    assert len(calls) == 1


@forks
def test_a_watched_search_runs_in_this_process(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of processes divides other searches."""
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_OF_TWO_PARTS", 40)
    model = translator(words, "transformer").use_processes(2)
    reports: list[str] = []
    found = model.translate(["A dog runs."] * 40, options(beam=1), on_step=lambda _, text: reports.append(text))
    assert found[0][0].text in reports and model.workers is not None and not model.workers.pipes
