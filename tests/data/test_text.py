"""Laws of corpora, tokenizers and batches."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from seq2seq.cli.main import load_config
from seq2seq.data.batching import Batches, sequential_batches, split_by_token_budget
from seq2seq.data.corpus import Corpus, open_corpora
from seq2seq.data.encoding import Batch, encode_training
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, SubwordSampling, Tokenizer, make_tokenizer, train_tokenizer
from seq2seq.utils.errors import UserError
from tests.helpers.corpora import drawn, random_corpus

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
    config = load_config("train", "tokenizer.vocabulary=50").tokenizer
    return train_tokenizer(SENTENCES, dataclasses.replace(config, **changes))


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


@pytest.mark.parametrize("type_", ["char", "word"])
def test_characters_and_words_can_be_units(type_: str) -> None:
    made, _ = tokenizer(type=type_, vocabulary=60)
    assert made.decode(made.encode_target(["alt Kuh sieht Männer"])[0]) == "alt Kuh sieht Männer"
    pieces = made.pieces(made.encode_target(["alt Kuh"])[0][:-1])
    assert pieces == (["▁alt", "▁Kuh"] if type_ == "word" else list("▁alt▁Kuh"))


def test_byte_fallback_symbols_and_normalisation() -> None:
    made, _ = tokenizer(byte_fallback=True, vocabulary=400, user_symbols=["<2de>"], normalization="nfkc_cf")
    assert made.decode(made.encode_target(["alt 日本"])[0]) == "alt 日本"
    assert "<2de>" in made.pieces(made.encode_target(["<2de> alt"])[0])
    assert made.encode_target(["ALT"]) == made.encode_target(["alt"])


def test_a_tokenizer_model_of_the_user_is_used_or_refused(tmp_path: Path) -> None:
    made, _ = tokenizer(joint=False)
    made.save(tmp_path)
    paths = [str(tmp_path / name) for name in ("tokenizer.source.model", "tokenizer.target.model")]
    config = load_config("train").tokenizer
    own, _ = make_tokenizer(SENTENCES, dataclasses.replace(config, model=paths), str(tmp_path))
    assert own.models == made.models
    one, _ = make_tokenizer(SENTENCES, dataclasses.replace(config, model=paths[0]), str(tmp_path))
    assert one.vocabulary.joint
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES.target), model_writer=other, vocab_size=25, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(other.getvalue())
    with pytest.raises(UserError, match=r"other\.model uses other ids for the special tokens"):
        make_tokenizer(SENTENCES, dataclasses.replace(config, model=str(tmp_path / "other.model")), str(tmp_path))
    (tmp_path / "bad.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"tokenizer.model: .*bad\.model is not a sentencepiece model"):
        make_tokenizer(SENTENCES, dataclasses.replace(config, model=str(tmp_path / "bad.model")), str(tmp_path))


def test_threads_do_not_change_encoding() -> None:
    made, _ = tokenizer()
    one, four = (made.source.encode(list(SENTENCES.source) * 50, num_threads=n) for n in (1, 4))
    assert one == four


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


def test_a_vocabulary_too_small_is_refused_with_the_smallest_possible() -> None:
    with pytest.raises(UserError, match=r"tokenizer.vocabulary: 10 .* at least (\d+)") as error:
        tokenizer(vocabulary=10)
    assert tokenizer(vocabulary=int(str(error.value).rpartition(" ")[2]))


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
    expected = [batch.index_B.tolist() for batch in drawn(whole, 150)]
    assert whole.epoch > 1, "the test runs over an epoch's end"
    list(islice(half, 67))
    continued = Batches(corpus, 200, seed=9)
    continued.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert [batch.index_B.tolist() for batch in drawn(continued, 83)] == expected[67:]


def test_another_corpus_begins_its_own_epoch() -> None:
    first, other = Batches(random_corpus(LENGTHS), 200, seed=1), Batches(random_corpus(LENGTHS[:300]), 200, seed=1)
    list(islice(first, 50))
    other.load_state_dict(first.state_dict())
    assert (other.epoch, other.pool, other.position) == (first.epoch + 1, 0, 0)


def test_a_sentence_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert split_by_token_budget(np.array([2, 3, 50, 60]), 10) == [slice(0, 2), slice(2, 3), slice(3, 4)]


def check_shift(batch: Batch) -> None:
    assert batch.target_in_BT[:, 0].eq(BEGIN).all()
    inner = batch.target_out_BT[:, :-1]
    assert torch.equal(batch.target_in_BT[:, 1:][batch.target_mask_BT[:, 1:]], inner[batch.target_mask_BT[:, 1:]])


def test_target_in_is_target_out_one_position_later() -> None:
    corpus = random_corpus(LENGTHS)
    seen: Iterator[Batch] = sequential_batches(corpus, 200)
    rows = []
    for batch in seen:
        check_shift(batch)
        rows += batch.index_B.tolist()
        for i, index in enumerate(batch.index_B.tolist()):
            assert batch.source_mask_BS[i].sum() == len(corpus.source[index])
            assert batch.target_mask_BT[i].sum() == len(corpus.target[index])
    assert sorted(rows) == list(range(len(corpus)))


def test_empty_and_long_pairs_are_left_out_whole_and_counted(tmp_path: Path) -> None:
    made, _ = tokenizer()
    sentences = ["the old dog", "", "the cat", "the big cow sees the red bird sees the old man"]
    corpus = Corpus(sentences, ["alt", "rot", "", "groß"], fingerprint="a")
    encoded, cached = encode_training(corpus, made, 12, str(tmp_path))
    assert (len(encoded), encoded.dropped, cached, encoded.rows.tolist()) == (1, 3, False, [0])
    assert made.target.decode(encoded.source[0][:-1].tolist()) == "the old dog"
    again, cached = encode_training(corpus, made, 12, str(tmp_path))
    assert cached and again.source[0].tolist() == encoded.source[0].tolist()


@pytest.mark.slow
def test_padding_is_small_on_real_text(multi30k: Path, tmp_path: Path) -> None:
    config = load_config("train", "data=multi30k", "tokenizer=bpe", f"data.path={multi30k}", f"data.cache={tmp_path}")
    corpus = open_corpora(config.data, 1).train
    assert len(corpus) == 29000
    made, _ = train_tokenizer(corpus, config.tokenizer)
    batches = Batches(encode_training(corpus, made, 250, str(tmp_path))[0], 4096, seed=1)
    real = positions = 0
    for (batch,), _ in iter(batches):
        if batches.epoch:
            break
        real += int(batch.source_mask_BS.sum() + batch.target_mask_BT.sum())
        positions += batch.source_BS.numel() + batch.target_in_BT.numel()
    assert 1 - real / positions < 0.08
    assert batches.estimate_padding()[1] == pytest.approx(1 - real / positions, abs=0.003)


def test_sampled_segmentations_are_the_same_in_every_process(tmp_path: Path) -> None:
    """The seed alone decides; some releases of sentencepiece add what differs from process to process."""
    made, _ = tokenizer()
    made.save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from seq2seq.data.tokenizer import SubwordSampling, Tokenizer\n"
        "made = Tokenizer.load(Path(sys.argv[1])); print(made.encode_source(sys.argv[2:], SubwordSampling(0.3, 5)))"
    )
    run = [sys.executable, "-c", code, str(tmp_path), *SENTENCES.source[:]]
    first, second = (subprocess.run(run, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second == f"{made.encode_source(SENTENCES.source[:], SubwordSampling(0.3, 5))}\n"
    assert made.encode_source(SENTENCES.source[:], SubwordSampling(0.3, 6)) != made.encode_source(
        SENTENCES.source[:], SubwordSampling(0.3, 5)
    )
