"""search.shortlist: a search over each sentence's own words is the plain search without all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seq2seq.cli.commands.shortlist import shortlist as shortlist_command
from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data.shortlist import FILE, SPECIAL_IDS, Shortlist
from seq2seq.inference.engines import unsupported_search
from seq2seq.inference.translator import Translation, Translator
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES
from tests.helpers.models import compiled
from tests.helpers.runs import saved_run

SENTENCES = ["Some dogs see cats.", "A cow.", "Some birds see a cow, the dogs and cats.", "", "The cats see dogs."]
PREFIXES = ["Some", "", "A Cow", "", "Dogs And"]
SHORT = replace(search_preset("beam"), length_factor=1.0, length_extra=3, beam=3, n_best=2)
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"beam": 1, "n_best": 1},
    "beam": {},
    "stops late": {"stop": "certain", "min_length_extra": 2},
    "diverse": {"beam": 4, "groups": 2, "diversity": 0.5},
    "forbid": {"forbid": ["Dogs", "a"]},
    "require": {"require": ["Birds"], "beam": 5},
    "no repeat": {"no_repeat_ngram": 1},
    "coverage": {"coverage_penalty": 0.3},
    "sample": {"beam": 1, "samples": 3},
    "sample with rules": {"beam": 1, "samples": 3, "forbid": ["Dogs"], "top_p": 0.9},
}


PREFIXED = ("greedy", "diverse", "require", "sample")


def random_shortlist(translator: Translator, count: int = 6) -> Shortlist:
    """Any words at all: the laws of the search do not depend on how they were learned."""
    random, vocabulary = np.random.default_rng(3), translator.tokenizer.vocabulary
    always_T = np.zeros(vocabulary.target, np.bool_)
    always_T[[*SPECIAL_IDS, 9, 11]] = True
    return Shortlist(random.integers(4, vocabulary.target, (vocabulary.source, count), np.int32), always_T)


def whole_shortlist(translator: Translator) -> Shortlist:
    vocabulary = translator.tokenizer.vocabulary
    return Shortlist(np.zeros((vocabulary.source, 1), np.int32), np.ones(vocabulary.target, np.bool_))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("shortlist"), request.param).checkpoint("best")


def loaded(checkpoint: Path, precision: str = "float32") -> Translator:
    if precision == "int8":
        compiled()
    translator = Translator.from_checkpoint(checkpoint, "cpu", precision)
    translator.shortlist = random_shortlist(translator)
    return translator


def numbers(found: list[list[Translation]]) -> list[float]:
    each = [one for ranked in found for one in ranked]
    return [x for one in each for x in (one.score, one.log_probability, *one.token_log_probabilities)]


def pieces(found: list[list[Translation]]) -> list[list[tuple[str, ...]]]:
    return [[one.pieces for one in ranked] for ranked in found]


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "float32") for name in SEARCHES), ("greedy", "int8"), ("beam", "int8")]
)
def test_a_shortlist_of_the_whole_vocabulary_changes_nothing(name: str, precision: str, checkpoint: Path) -> None:
    search = replace(SHORT, **SEARCHES[name])
    translator = loaded(checkpoint, precision)
    translator.shortlist = whole_shortlist(translator)
    plain, short = (translator.translate(SENTENCES, replace(search, shortlist=n)) for n in (0, 1))
    assert pieces(plain) == pieces(short)
    assert numbers(short) == pytest.approx(numbers(plain), abs=1e-4)


def masked_search(translator: Translator, sentence: str, prefix: str, search: SearchConfig) -> list[Translation]:
    """The plain search for one sentence, where all other words are impossible."""
    assert translator.shortlist is not None
    required = [i for ids in translator._target_ids([prefix, *search.require]) for i in ids]
    source = translator._encode_sources([sentence])[0].ids[0]
    ids = torch.from_numpy(translator.shortlist.of(source, search.shortlist, required))
    outside_V = torch.ones(translator.tokenizer.vocabulary.target, dtype=torch.bool).index_fill(0, ids, False)

    def masked(logits: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda features, _=None: logits(features).masked_fill(outside_V, float("-inf"))

    with pytest.MonkeyPatch.context() as patch:
        for model in translator.models.models:
            patch.setattr(model, "logits", masked(model.logits))
        return translator.translate([sentence], replace(search, shortlist=0), prefixes=[prefix])[0]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_the_plain_one_where_other_words_are_impossible(name: str, checkpoint: Path) -> None:
    """So rules hold, scores are normalised over the shortlist, and no sentence depends on its neighbours."""
    translator, search = loaded(checkpoint), replace(SHORT, shortlist=4, tokens=20, **SEARCHES[name])
    prefixes = PREFIXES if name in PREFIXED else [""] * len(SENTENCES)
    found = translator.translate(SENTENCES, search, prefixes=prefixes)
    for i in (1, 4):
        wanted = masked_search(translator, SENTENCES[i], prefixes[i], search)
        assert pieces([found[i]]) == pieces([wanted])
        assert numbers([found[i]]) == pytest.approx(numbers([wanted]), abs=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_every_subword_is_in_the_shortlist_of_its_sentence(precision: str, checkpoint: Path) -> None:
    translator = loaded(checkpoint, precision)
    found = translator.translate(SENTENCES, replace(SHORT, shortlist=2))
    assert translator.shortlist is not None
    for sentence, ranked in zip(SENTENCES, found, strict=True):
        if sentence:
            (source,) = translator.tokenizer.encode_source([sentence])
            allowed = set(translator.tokenizer.pieces(translator.shortlist.of(source, 2).tolist()))
            assert all(set(one.pieces) <= allowed for one in ranked)
            assert len(allowed) < translator.tokenizer.vocabulary.target


@pytest.mark.parametrize("name", ["greedy", "beam", "forbid"])
def test_in_int8_a_translation_is_the_same_in_every_batch(name: str, checkpoint: Path) -> None:
    translator, search = loaded(checkpoint, "int8"), replace(SHORT, shortlist=3, **SEARCHES[name])
    alone = [translator.translate([sentence], search)[0] for sentence in SENTENCES]
    for tokens in (1, 30, 1000):
        assert translator.translate(SENTENCES, replace(search, tokens=tokens)) == alone


def test_an_ensemble_uses_the_shortlists_of_its_first_run(tmp_path: Path, checkpoint: Path) -> None:
    translators = [loaded(checkpoint), loaded(saved_run(tmp_path, "lstm", seed=1).checkpoint("best"))]
    translators[1].shortlist = None
    ensemble, search = Translator.ensemble(translators, ["a", "b"]), replace(SHORT, shortlist=3)
    found = ensemble.translate(SENTENCES[:3], search)
    for i in range(3):
        wanted = masked_search(ensemble, SENTENCES[i], "", search)
        assert pieces([found[i]]) == pieces([wanted])
        assert numbers([found[i]]) == pytest.approx(numbers([wanted]), abs=1e-4)


def test_without_a_shortlist_one_line_says_how_to_make_it(checkpoint: Path) -> None:
    translator = Translator.from_checkpoint(checkpoint, "cpu", "float32")
    with pytest.raises(UserError, match=r"^search\.shortlist: .* make one with seq2seq shortlist run=NAME"):
        translator.translate(SENTENCES, replace(SHORT, shortlist=3))


def test_a_damaged_file_stops_only_those_who_ask_for_shortlists(tmp_path: Path) -> None:
    """Cut off or changed anywhere, it is read as it was written, or named with its remedy."""
    checkpoint = saved_run(tmp_path / "any", "transformer").checkpoint("best")
    vocabulary = Translator.from_checkpoint(checkpoint, "cpu", "float32").tokenizer.vocabulary
    whole = loaded(checkpoint).require_shortlist()
    content, random = whole.save(checkpoint).read_bytes(), np.random.default_rng(5)
    damaged = [content[:n] for n in (0, 1, 30, len(content) // 2, len(content) - 1)]
    for _ in range(60):
        i, bit = int(random.integers(len(content))), 1 << int(random.integers(8))
        damaged.append(content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :])
    refused = 0
    for data in damaged:
        (checkpoint / FILE).write_bytes(data)
        try:
            found = Shortlist.load(checkpoint, vocabulary)
            assert found and (found.always_T == whole.always_T).all()
            assert (found.likeliest_SK == whole.likeliest_SK).all()
        except UserError as error:
            refused += 1
            assert f"{checkpoint / FILE}: damaged (" in str(error) and "make it again: seq2seq shortlist" in str(error)
    assert refused > 30
    (checkpoint / FILE).write_bytes(content[:-1])
    translator = Translator.from_checkpoint(checkpoint, "cpu", "float32")
    assert translator.translate(SENTENCES[:1], SHORT)[0][0].score < 0
    with pytest.raises(UserError, match=r"shortlist\.npz: damaged .*make it again: seq2seq shortlist run=NAME"):
        translator.translate(SENTENCES[:1], replace(SHORT, shortlist=3))


def test_shortlists_that_cannot_be_written_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former file stays."""
    learned = Shortlist(np.zeros((3, 1), np.int32), np.ones(3, np.bool_))
    before = learned.save(tmp_path).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        learned.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE] and (tmp_path / FILE).read_bytes() == before


def test_a_file_of_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """One with other sizes, or with ids beyond the vocabulary."""
    translator = loaded(checkpoint)
    vocabulary, fitting = translator.tokenizer.vocabulary, random_shortlist(translator)
    beyond = fitting.likeliest_SK.copy()
    beyond[5, 0] = vocabulary.target
    others = {
        "source": replace(fitting, likeliest_SK=fitting.likeliest_SK[1:]),
        "target": replace(fitting, always_T=fitting.always_T[1:]),
        "ids": replace(fitting, likeliest_SK=beyond),
    }
    fitting.save(tmp_path)
    assert Shortlist.load(tmp_path, vocabulary) is not None
    for other in others.values():
        other.save(tmp_path)
        with pytest.raises(UserError, match="of another vocabulary"):
            Shortlist.load(tmp_path, vocabulary)


def test_ctranslate2_refuses_it_by_name() -> None:
    assert not unsupported_search(replace(SHORT, shortlist=0))
    (problem,) = unsupported_search(replace(SHORT, shortlist=3))
    assert problem.startswith("search.shortlist: engine=ctranslate2 does not support 3; use engine=torch")


def test_training_has_no_shortlist_yet() -> None:
    with pytest.raises(UserError, match=r"search\.shortlist: seq2seq shortlist makes it after training"):
        load_config("train", "search.shortlist=10")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    for name, lines in (("a", SENTENCES[:3] * 4), ("v", SENTENCES[:2])):
        (tmp_path / f"{name}.en").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (tmp_path / f"{name}.de").write_text("".join(f"{line.title()}\n" for line in lines), encoding="utf-8")
    return saved_run(
        tmp_path / "outputs" / "any", "transformer", "data.validation=[v.en,v.de]", "data.test=[v.en,v.de]"
    )


def test_the_command_learns_what_a_search_then_uses(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shortlist_command(load_config("shortlist", "run=any"))
    printed = capsys.readouterr().out
    assert "from 12 training pairs" in printed and f"/{FILE}; use it: seq2seq translate" in printed
    assert printed.count("% of the reference subwords") == 4
    translator = Translator.from_checkpoint(run.checkpoint("best"), "cpu", "float32")
    assert translator.shortlist is not None
    source, target = (
        translator.tokenizer.encode_source(["A cow."])[0],
        translator.tokenizer.encode_target(["A Cow."])[0],
    )
    assert set(target) <= {*translator.shortlist.of(source, 5).tolist()}
    assert translator.translate(SENTENCES, replace(SHORT, shortlist=5))[0][0].score < 0


def test_a_corpus_that_has_moved_is_asked_for(run: Run, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for path in [*tmp_path.glob("?.en"), *tmp_path.glob("?.de")]:
        path.rename(tmp_path / "moved" / path.name)
    with pytest.raises(UserError, match=r"a\.en"):
        shortlist_command(load_config("shortlist", "run=any"))
    assert not (run.checkpoint("best") / FILE).exists()
    shortlist_command(load_config("shortlist", "run=any", "data_path=moved"))
    assert (run.checkpoint("best") / FILE).exists()
