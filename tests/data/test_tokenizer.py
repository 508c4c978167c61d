"""Laws of tokenizers: what each setting changes, what is cached, special ids, sampling, and which lines are read."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.cli.main import load_config
from seq2seq.config.schema import TokenizerConfig
from seq2seq.data.corpus import Corpus
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, SubwordSampling, Tokenizer, make_tokenizer, train_tokenizer
from seq2seq.utils.errors import UserError

ADJECTIVES, NOUNS = ("big", "old", "red", "Ｗide"), ("dog", "cat", "cow")
SOURCE = [f"the {a} {n} sees  {m} {i}" for i, (a, n, m) in enumerate(itertools.product(ADJECTIVES, NOUNS, NOUNS))]
TARGET = [f"Der {a}e {n} sieht {m} zum {i}. Mal ß" for i, (a, n, m) in enumerate(itertools.product("xyäz", "AB", "CD"))]
TARGET += [f"Die {a} {n} ruft" for a, n in itertools.product(("groß", "alt", "rot", "日"), ("Katze", "Kuh"))]
CORPUS = Corpus(SOURCE[:24], TARGET, "pairs")


@lru_cache
def base() -> TokenizerConfig:
    config: TokenizerConfig = load_config("train").tokenizer
    return dataclasses.replace(config, vocabulary=66)


@lru_cache
def made(joint: bool = True, kind: str = "unigram") -> Tokenizer:
    config = dataclasses.replace(base(), joint=joint, type=kind)  # type: ignore[arg-type]
    return train_tokenizer(CORPUS, config)[0]


CHANGES: dict[str, dict[str, Any]] = {
    "type": {"type": "bpe"},
    "characters": {"type": "char"},
    "words": {"type": "word"},
    "vocabulary": {"vocabulary": 67},
    "joint": {"joint": False},
    "coverage": {"character_coverage": 0.98},
    "byte_fallback": {"byte_fallback": True, "vocabulary": 330},
    "larger": {"vocabulary": 330},
    "normalization": {"normalization": "identity"},
    "lower case": {"normalization": "nmt_nfkc_cf"},
    "symbols": {"user_symbols": ["<2de>"]},
    "other symbols": {"user_symbols": ["<2fr>"]},
    "sentences": {"max_sentences": 12},
}


def test_a_warm_cache_gives_the_tokenizer_that_each_setting_asks_for(tmp_path: Path) -> None:
    """Every setting makes a model of its own, whatever was cached before; the notes are cached with it."""
    cold = {"base": train_tokenizer(CORPUS, base())}
    cold |= {name: train_tokenizer(CORPUS, dataclasses.replace(base(), **change)) for name, change in CHANGES.items()}
    for left, right in itertools.combinations(cold, 2):
        assert cold[left][0].models != cold[right][0].models, f"{left} and {right} do not differ"
    assert cold["larger"][1] and not cold["base"][1]
    for _ in range(2):
        for name, change in {"base": {}, **CHANGES}.items():
            found, notes = make_tokenizer(CORPUS, dataclasses.replace(base(), **change), str(tmp_path))
            assert (found.models, notes) == (cold[name][0].models, cold[name][1]), name
            assert found.vocabulary == cold[name][0].vocabulary


def test_a_tokenizer_is_cached_by_corpus_and_version_and_not_by_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another corpus has another model; sampling alone takes the same one, and is trained once."""
    turned = Corpus(CORPUS.target, CORPUS.source[::-1], "turned")
    separate = dataclasses.replace(base(), joint=False)
    first, _ = make_tokenizer(CORPUS, separate, str(tmp_path))
    other, _ = make_tokenizer(turned, separate, str(tmp_path))
    assert first.models["source"] != other.models["source"]
    assert other.decode_source(other.encode_source(["Die Kuh"])[0]) == "Die Kuh"

    def count() -> int:
        return sum(path.is_dir() for path in tmp_path.iterdir())

    before = count()
    sampled, _ = make_tokenizer(CORPUS, dataclasses.replace(separate, sampling=0.3), str(tmp_path))
    assert sampled.models == first.models and count() == before
    monkeypatch.setattr(sentencepiece, "__version__", "another")
    make_tokenizer(CORPUS, separate, str(tmp_path))
    assert count() == before + 1


def test_models_of_the_user_are_read_for_each_side(tmp_path: Path) -> None:
    """The first file is the source's, a single one is for both sides, and nothing is trained or cached."""
    sides = [made(joint=False).models[side] for side in ("source", "target")]
    paths = [str(tmp_path / name) for name in "ab"]
    for path, model in zip(paths, sides, strict=True):
        Path(path).write_bytes(model)
    for given_, expected in ((paths, sides), (paths[::-1], sides[::-1]), (paths[1], [sides[1]] * 2)):
        config = dataclasses.replace(base(), model=given_)
        found, notes = make_tokenizer(CORPUS, config, str(tmp_path / "cache"))
        assert [found.models["source"], found.models["target"]] == expected and notes == []
        assert found.vocabulary.joint is (given_ == paths[1])
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("sentences", [1, 2, 8, 11, 12, 13, 23, 24, 25, 47, 48, 49, 1000])
def test_lines_are_read_evenly_over_both_sides(sentences: int, joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every n-th line of each side, with the smallest n that keeps both together within the limit."""
    read: list[list[str]] = []
    original = sentencepiece.SentencePieceTrainer.train

    def train(*, sentence_iterator: Iterable[str], **settings_: Any) -> None:
        read.append(list(sentence_iterator))
        small = {**settings_, "vocab_size": 300, "hard_vocab_limit": False}
        original(sentence_iterator=iter([*SOURCE, *TARGET]), **small)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    train_tokenizer(CORPUS, dataclasses.replace(base(), max_sentences=sentences, joint=joint))
    step = next(n for n in itertools.count(1) if n * sentences >= 2 * len(CORPUS))
    sides = [[side[i] for i in range(0, len(CORPUS), step)] for side in (CORPUS.source, CORPUS.target)]
    assert read == ([sides[0] + sides[1]] if joint else sides)
    assert sum(map(len, read)) <= sentences + sentences % 2 or sentences == 1


def test_long_lines_are_read_too() -> None:
    """A line of ten thousand letters teaches its letters."""
    long = "x" * 5000 + "ø" * 5000
    tokenizer, _ = train_tokenizer(Corpus([*SOURCE[:24], long], [*TARGET, "a"]), base())
    assert UNKNOWN not in tokenizer.encode_source(["øx"])[0]


# ------------------------------------------------------------------------------------------- vocabulary


def test_the_largest_vocabulary_a_corpus_supports_is_taken_for_each_side_with_a_note() -> None:
    """Exactly that many is no reason for a note; one more is, and names the side."""
    separate = dataclasses.replace(base(), joint=False, vocabulary=9000)
    tokenizer, notes = train_tokenizer(CORPUS, separate)
    most = tokenizer.vocabulary
    assert notes == [
        f"vocabulary 9,000 → {size:,}: as many subwords as this corpus supports for the {side} language"
        for size, side in ((most.source, "source"), (most.target, "target"))
    ]
    alike = Corpus(SOURCE[:24], SOURCE[:24])
    assert train_tokenizer(alike, dataclasses.replace(separate, vocabulary=most.source))[1] == []
    more = train_tokenizer(alike, dataclasses.replace(separate, vocabulary=most.source + 1))[1]
    assert [note.partition(":")[0] for note in more] == [f"vocabulary {most.source + 1:,} → {most.source:,}"] * 2
    joint, notes = train_tokenizer(CORPUS, dataclasses.replace(base(), vocabulary=9000))
    assert notes == [
        f"vocabulary 9,000 → {joint.vocabulary.source:,}: as many subwords as this corpus supports for both languages"
    ]
    assert joint.vocabulary.source == joint.vocabulary.target == len(joint.target_pieces)


def test_the_smallest_vocabulary_is_named_for_its_side() -> None:
    """One less fails, and so many do."""
    problem = "9 is smaller than the character set of the target language; it must be at least"
    with pytest.raises(UserError, match=problem) as e:
        train_tokenizer(Corpus(["a b"] * 30, SOURCE[:30]), dataclasses.replace(base(), joint=False, vocabulary=9))
    least = int(str(e.value).rpartition(" ")[2])
    small = dataclasses.replace(base(), joint=False, vocabulary=least)
    assert train_tokenizer(Corpus(["a b"] * 30, SOURCE[:30]), small)[0].vocabulary.target == least


@pytest.mark.parametrize("joint", [True, False])
def test_the_sizes_are_those_of_each_side(joint: bool) -> None:
    """A joint tokenizer has one model; otherwise the first size is the source's."""
    config = dataclasses.replace(base(), joint=joint, vocabulary=9000)
    tokenizer, _ = train_tokenizer(CORPUS, config)
    sizes = [len(sentencepiece.SentencePieceProcessor(model_proto=model)) for model in tokenizer.models.values()]
    assert (tokenizer.vocabulary.source, tokenizer.vocabulary.target) == tuple(sizes)
    assert tokenizer.vocabulary.joint is joint and (sizes[0] == sizes[1]) is joint


def test_two_models_of_one_size_are_not_joint() -> None:
    """Only one and the same model is."""
    config = dataclasses.replace(base(), joint=False, vocabulary=31)
    tokenizer, _ = train_tokenizer(Corpus(SOURCE[:24], [text.upper() for text in SOURCE[:24]]), config)
    assert tokenizer.vocabulary.source == tokenizer.vocabulary.target == 31 and not tokenizer.vocabulary.joint


# ------------------------------------------------------------------------------------------- encoding

SENTENCES = st.lists(st.text("abcdeghilorstwxyz ßKMD.0123", max_size=12), max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(SENTENCES)
def test_each_side_is_encoded_as_its_model_does_and_ends_with_its_mark(sentences: list[str]) -> None:
    """An empty sentence is its end mark alone; text comes back but for spaces that normalisation removes."""
    for joint in (True, False):
        tokenizer = made(joint)
        sides = (
            ("source", tokenizer.encode_source, tokenizer.decode_source, tokenizer.source_pieces),
            ("target", tokenizer.encode_target, tokenizer.decode, tokenizer.pieces),
        )
        for side, encode, decode, pieces in sides:
            plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.models[side])
            expected = [[*plain.encode(text), END] for text in sentences]
            found = encode(sentences)
            assert found == expected
            for ids, text in zip(found, sentences, strict=True):
                assert pieces(ids[:-1]) == [plain.id_to_piece(i) for i in ids[:-1]]
                if UNKNOWN not in ids:
                    assert decode(ids) == " ".join(text.split())


def test_special_ids_have_their_numbers_and_are_no_text() -> None:
    """Wherever they stand; the first real subword is text."""
    tokenizer, _ = train_tokenizer(CORPUS, dataclasses.replace(base(), joint=False))
    for model, decode, encode in (
        (tokenizer.source, tokenizer.decode_source, tokenizer.encode_source),
        (tokenizer.target, tokenizer.decode, tokenizer.encode_target),
    ):
        assert [model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id()] == [PAD, UNKNOWN, BEGIN, END]
        text = "ee" if model is tokenizer.source else "Die Kuh"
        ids = encode([text])[0]
        assert decode([BEGIN, UNKNOWN, *ids[:1], PAD, UNKNOWN, *ids[1:], END, PAD]) == text
        assert decode([PAD, UNKNOWN, BEGIN, END]) == "" == decode([])
        assert decode([END + 1]) == model.id_to_piece(END + 1).replace("▁", "")
        assert model.id_to_piece(END + 1) not in ("<unk>", "</s>", "<s>", "<pad>")
        assert model.decode([UNKNOWN]) == "", "nor to another program that reads the model"
    assert tokenizer.decode(tokenizer.encode_target(["Die \U0001f600 Kuh"])[0]).split() == ["Die", "Kuh"]


def test_unknown_words_are_never_decoded_to_text() -> None:
    """A model of the user may decode an unknown word as a sign; no translation contains it."""
    model = io.BytesIO()
    numbers = {"pad_id": PAD, "unk_id": UNKNOWN, "bos_id": BEGIN, "eos_id": END}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE), model_writer=model, vocab_size=32, minloglevel=2, **numbers
    )
    tokenizer = Tokenizer(dict.fromkeys(("source", "target"), model.getvalue()))
    assert "⁇" in tokenizer.source.decode([UNKNOWN])
    assert tokenizer.decode_source([UNKNOWN]) == tokenizer.decode([UNKNOWN]) == ""


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sampled_segmentations_are_those_of_the_library(kind: str) -> None:
    """Under the seed and rate given, for each side by its own model, ending with END, and never the n best alone."""
    tokenizer = made(joint=False, kind=kind)
    drawn = {}
    for rate, seed in ((0.1, 3), (0.1, 4), (0.5, 3)):
        for side, encode, texts in (
            ("source", tokenizer.encode_source, SOURCE[:24]),
            ("target", tokenizer.encode_target, TARGET),
        ):
            plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.models[side])
            found = encode(texts, SubwordSampling(rate, seed))
            sentencepiece.set_random_generator_seed(seed)
            options = {"enable_sampling": True, "alpha": rate, "nbest_size": -1, "num_threads": 1}
            expected = [[*ids, END] for ids in plain.encode(texts, **options)]
            assert found == expected == encode(texts, SubwordSampling(rate, seed))
            assert found != encode(texts)
            drawn[rate, seed, side] = found
            decode = tokenizer.decode_source if side == "source" else tokenizer.decode
            assert [decode(ids) for ids in found] == [decode(ids) for ids in encode(texts)]
    for left, right in itertools.combinations(drawn, 2):
        assert drawn[left] != drawn[right]


def test_a_saved_tokenizer_keeps_its_sides_separate(tmp_path: Path) -> None:
    """Each side in its own file; what cannot be read is named, with the remedy."""
    tokenizer = made(joint=False)
    tokenizer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        f"tokenizer.{side}.model": model for side, model in tokenizer.models.items()
    }
    assert Tokenizer.load(tmp_path).models == tokenizer.models
    for damage in (lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 9), Path.unlink):
        damage(tmp_path / "tokenizer.target.model")
        with pytest.raises(UserError, match=r"and tokenizer\.target\.model are missing or damaged \(.*; restore them"):
            Tokenizer.load(tmp_path)


def test_tokens_named_otherwise_are_refused(tmp_path: Path) -> None:
    """Each of the four special ids counts."""
    for name in ("pad_id", "unk_id", "bos_id", "eos_id"):
        numbers = {"pad_id": PAD, "unk_id": UNKNOWN, "bos_id": BEGIN, "eos_id": END}
        other = "eos_id" if name != "eos_id" else "bos_id"
        numbers[name], numbers[other] = numbers[other], numbers[name]
        prefix = tmp_path / name
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SOURCE), model_prefix=str(prefix), vocab_size=32, minloglevel=2, **numbers
        )
        with pytest.raises(UserError, match="uses other ids for the special tokens"):
            make_tokenizer(CORPUS, dataclasses.replace(base(), model=f"{prefix}.model"), str(tmp_path))
