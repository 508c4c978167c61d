"""Laws of corpora, tokenizers and batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_corpus

from seq2seq.cli import load_config
from seq2seq.config import TokenizerConfig
from seq2seq.errors import UserError
from seq2seq.text.batches import Batch, Batches, by_budget, encode_corpus, in_order
from seq2seq.text.corpus import Corpus, from_files, load_corpus
from seq2seq.text.tokenizer import BEGIN, END, PAD, UNKNOWN, Tokenizer, train_tokenizer

SENTENCES = Corpus(
    [
        f"the {size} {animal} sees the {other}"
        for size, animal, other in itertools.product(("big", "old", "red"), ("dog", "cat", "cow"), ("bird", "man"))
    ],
    [
        f"{groß} {tier} sieht {anderer}"
        for groß, tier, anderer in itertools.product(
            ("groß", "alt", "rot"), ("Hund", "Katze", "Kuh"), ("Vögel", "Männer")
        )
    ],
)


def tokenizer(**changes: object) -> tuple[Tokenizer, list[str]]:
    settings = {"type": "unigram", "vocabulary": 50, "joint": True, "coverage": 1.0, **changes}
    return train_tokenizer(SENTENCES, TokenizerConfig(**settings))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("type_", ["unigram", "bpe"])
@pytest.mark.parametrize("joint", [True, False])
def test_text_survives_encoding(type_: str, joint: bool) -> None:
    made, _ = tokenizer(type=type_, joint=joint)
    encoded = made.encode_target(SENTENCES.target)
    assert [made.decode(ids) for ids in encoded] == SENTENCES.target
    assert all(ids[-1] == END and not {PAD, BEGIN, UNKNOWN} & set(ids) for ids in encoded)
    assert made.vocabulary.joint is joint
    assert (made.encode_source(["dog"]) == made.encode_target(["dog"])) is joint


def test_a_stored_tokenizer_is_the_same(tmp_path: Path) -> None:
    made, _ = tokenizer(joint=False)
    made.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.models == made.models and loaded.vocabulary == made.vocabulary
    assert tokenizer(joint=False)[0].models == made.models, "training again gives the same model"


@pytest.mark.parametrize("type_", ["unigram", "bpe"])
def test_a_vocabulary_too_large_is_clamped_with_a_message(type_: str) -> None:
    made, notes = tokenizer(type=type_, vocabulary=30000)
    assert len(notes) == 1 and f"30,000 → {made.vocabulary.target:,}" in notes[0]
    assert made.decode(made.encode_target(["alt Kuh sieht Männer"])[0]) == "alt Kuh sieht Männer"


def test_a_vocabulary_too_small_says_how_large_it_must_be() -> None:
    with pytest.raises(UserError, match=r"tokenizer.vocabulary: 10 .* at least (\d+)") as error:
        tokenizer(vocabulary=10)
    assert tokenizer(vocabulary=int(str(error.value).rpartition(" ")[2]))


# ------------------------------------------------------------------------------------------- corpora


def write(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


PAIRS: list[dict[str, object]] = [{"en": f"word {i}", "de": f"Wort {i}"} for i in range(5)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("direction", [("en", "de"), ("de", "en")])
def test_a_folder_in_hub_layout(tmp_path: Path, nested: bool, direction: tuple[str, str]) -> None:
    for name in ("train", "val", "test"):
        write(tmp_path, f"{name}.jsonl", [{"translation": pair} for pair in PAIRS] if nested else PAIRS)
    data = load_config(
        "train", "data=multi30k", f"data.path={tmp_path}", f"data.cache={tmp_path / 'cache'}",
        f"data.source={direction[0]}", f"data.target={direction[1]}",
    ).data  # fmt: skip
    for split in ("train", "validation", "test"):
        corpus = load_corpus(data, split)
        assert corpus is not None
        assert [list(corpus.source), list(corpus.target)] == [[pair[side] for pair in PAIRS] for side in direction]


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", PAIRS)
    data = load_config(
        "train", "data=multi30k", f"data.path={tmp_path}", f"data.cache={tmp_path / 'c'}", "data.target=fr"
    ).data
    with pytest.raises(UserError, match=r"no column fr; possible: en, de"):
        load_corpus(data, "train")
    with pytest.raises(UserError, match=r"no split validation; possible: train"):
        load_corpus(data, "validation")


def test_a_folder_that_is_not_there_is_told_before_the_hub_is_asked() -> None:
    data = load_config("train", "data=multi30k", "data.path=/no/such/folder").data
    with pytest.raises(UserError, match="/no/such/folder is no folder here"):
        load_corpus(data, "train")


def test_plain_files_pair_by_line_feeds_alone(tmp_path: Path) -> None:
    """Other characters that some libraries take for a line's end stay inside their sentence."""
    odd = ["one\u2028two", "three\x0bfour\x0c", "", "five\x85six"]
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_bytes("".join(f"{line}\n" for line in odd).encode())
    corpus = from_files(str(tmp_path / "a.en"), str(tmp_path / "a.de"))
    assert corpus.source == corpus.target == odd


def test_files_of_different_length_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("1\n2\n3\n")
    (tmp_path / "a.de").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"a\.en has 3 lines, .*a\.de has 2;"):
        from_files(str(tmp_path / "a.en"), str(tmp_path / "a.de"))


def test_what_is_not_utf8_is_named_by_file_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "a.de").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"a\.en, line 2, byte 4: not UTF-8 \(0xe9\)"):
        from_files(str(tmp_path / "a.en"), str(tmp_path / "a.de"))


# ------------------------------------------------------------------------------------------- batches

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 30, 500)]


def epoch(batches: Batches, number: int) -> list[list[int]]:
    return [rows.tolist() for rows in batches.rows(number)]


def test_an_epoch_holds_every_pair_once_within_the_budget() -> None:
    corpus = random_corpus(LENGTHS)
    batches = Batches(corpus, tokens=200, seed=1)
    for number in range(3):
        rows = epoch(batches, number)
        assert sorted(itertools.chain(*rows)) == list(range(len(corpus)))
        for batch in (corpus.batch(np.array(r)) for r in rows):
            assert max(batch.source_BS.numel(), batch.target_in_BT.numel()) <= 200


def test_order_is_a_pure_function_of_seed_and_epoch() -> None:
    corpus = random_corpus(LENGTHS)
    first, again = (Batches(corpus, 200, seed=1) for _ in range(2))
    assert [epoch(first, n) for n in (0, 1, 2)] == [epoch(again, n) for n in (0, 1, 2)]
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(Batches(corpus, 200, seed=2), 0)
    together = [{frozenset(batch) for batch in epoch(first, n)} for n in (0, 1)]
    assert len(together[0] & together[1]) < len(together[0]) / 4, "epochs shuffle inside batches as well"


def test_batches_continue_where_they_stopped() -> None:
    corpus = random_corpus(LENGTHS)
    whole, half = Batches(corpus, 200, seed=1), Batches(corpus, 200, seed=1)
    expected = [batch.index_B.tolist() for batch in islice(whole, 150)]
    assert len(expected) > 2 * len(whole), "the test runs over an epoch's end"
    list(islice(half, 67))
    continued = Batches(corpus, 200, seed=9)
    continued.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert [batch.index_B.tolist() for batch in islice(continued, 83)] == expected[67:]


def test_a_sentence_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert by_budget(np.array([2, 3, 50, 60]), 10) == [slice(0, 2), slice(2, 3), slice(3, 4)]


def check_shift(batch: Batch) -> None:
    assert batch.target_in_BT[:, 0].eq(BEGIN).all()
    inner = batch.target_out_BT[:, :-1]
    assert torch.equal(batch.target_in_BT[:, 1:][batch.target_mask_BT[:, 1:]], inner[batch.target_mask_BT[:, 1:]])


def test_target_in_is_target_out_one_place_later() -> None:
    corpus = random_corpus(LENGTHS)
    seen: Iterator[Batch] = in_order(corpus, 200)
    rows = []
    for batch in seen:
        check_shift(batch)
        rows += batch.index_B.tolist()
        for i, place in enumerate(batch.index_B.tolist()):
            assert batch.source_mask_BS[i].sum() == corpus.source.lengths[place]
            assert batch.target_mask_BT[i].sum() == corpus.target.lengths[place]
    assert sorted(rows) == list(range(len(corpus)))


def test_empty_and_long_pairs_are_left_out_whole_and_counted() -> None:
    made, _ = tokenizer()
    sentences = ["the old dog", "", "the cat", "the big cow sees the red bird sees the old man"]
    encoded = encode_corpus(Corpus(sentences, ["alt", "rot", "", "groß"]), made, max_length=12)
    assert (len(encoded), encoded.dropped) == (1, 3)
    assert made.target.decode(encoded.source.flat[:-1].tolist()) == "the old dog"


def test_padding_is_small_on_real_text(multi30k: Path, tmp_path: Path) -> None:
    data = load_config("train", "data=multi30k", f"data.path={multi30k}", f"data.cache={tmp_path}").data
    corpus = load_corpus(data, "train")
    assert corpus is not None and len(corpus) == 29000
    made, _ = train_tokenizer(corpus, TokenizerConfig("bpe", 8000, True, 1.0))
    encoded = encode_corpus(corpus, made, 250)
    batches = Batches(encoded, 4096, seed=1)
    real = places = 0
    for batch in islice(batches, len(batches)):
        real += int(batch.source_mask_BS.sum() + batch.target_mask_BT.sum())
        places += batch.source_BS.numel() + batch.target_in_BT.numel()
    assert 1 - real / places < 0.08
