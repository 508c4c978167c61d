"""Sentences ↔ subword ids: sentencepiece models, trained, stored and loaded."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from seq2seq.config.schema import TokenizerConfig
from seq2seq.data.corpus import Corpus
from seq2seq.data.store import key_of
from seq2seq.utils.errors import UserError, reason_of
from seq2seq.utils.io import build_once

PAD, UNKNOWN, BEGIN, END = range(4)
FILES = {"source": "tokenizer.source.model", "target": "tokenizer.target.model"}


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary sizes of both sides, and whether they share one vocabulary."""

    source: int
    target: int
    joint: bool


class SubwordSampling(NamedTuple):
    """Random segmentation: unigram sampling or BPE dropout (Kudo 2018; Provilkov et al. 2020)."""

    rate: float
    seed: int


class Tokenizer:
    """A sentencepiece model for each side; the same model if joint."""

    def __init__(self, models: dict[str, bytes]) -> None:
        self.models = models
        self.source, self.target = (_load(models[side]) for side in ("source", "target"))
        self.vocabulary = Vocabulary(len(self.source), len(self.target), joint=models["source"] == models["target"])

    def encode_source(
        self, sentences: Sequence[str], subword_sampling: SubwordSampling | None = None
    ) -> list[list[int]]:
        return _encode(self.source, sentences, subword_sampling)

    def encode_target(
        self, sentences: Sequence[str], subword_sampling: SubwordSampling | None = None
    ) -> list[list[int]]:
        return _encode(self.target, sentences, subword_sampling)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode target ids, skipping special ids."""
        return str(self.target.decode([i for i in ids if i > END]))

    def decode_source(self, ids: Iterable[int]) -> str:
        return str(self.source.decode([i for i in ids if i > END]))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the vocabulary entry of each target id."""
        return [str(self.target.id_to_piece(i)) for i in ids]

    def source_pieces(self, ids: Iterable[int]) -> list[str]:
        return [str(self.source.id_to_piece(i)) for i in ids]

    @property
    def target_pieces(self) -> list[str]:
        """The entire target vocabulary, by id."""
        return self.pieces(range(self.vocabulary.target))

    def save(self, folder: Path) -> None:
        for side, name in FILES.items():
            (folder / name).write_bytes(self.models[side])

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        try:
            return cls({side: (folder / name).read_bytes() for side, name in FILES.items()})
        except (OSError, RuntimeError) as error:
            files, remedy = " and ".join(FILES.values()), "restore them, or use another checkpoint"
            raise UserError(f"{folder}: {files} are missing or damaged ({reason_of(error)}); {remedy}") from None


def make_tokenizer(corpus: Corpus, config: TokenizerConfig, cache: str) -> tuple[Tokenizer, list[str]]:
    """Return the config's tokenizer, from its files or trained once for all runs, and notes on it."""
    if config.model:
        paths = config.model if isinstance(config.model, list) else [config.model] * 2
        return Tokenizer({side: _read_model(path) for side, path in zip(FILES, paths, strict=True)}), []
    # The sampling rate is not part of the model.
    settings = dataclasses.replace(config, sampling=0.0)
    folder = Path(cache) / f"tokenizer-{key_of(corpus.fingerprint, settings, sentencepiece.__version__)}"

    def build(tmp_dir: Path) -> None:
        tokenizer, notes = train_tokenizer(corpus, config)
        tokenizer.save(tmp_dir)
        (tmp_dir / "notes.txt").write_text("\n".join(notes), encoding="utf-8")

    build_once(folder, build)
    return Tokenizer.load(folder), (folder / "notes.txt").read_text(encoding="utf-8").splitlines()


def train_tokenizer(corpus: Corpus, config: TokenizerConfig) -> tuple[Tokenizer, list[str]]:
    """Return a tokenizer trained on these pairs, and notes on it."""
    step = -(-2 * len(corpus) // config.max_sentences)
    source, target = (range(0, len(corpus), step), corpus.source), (range(0, len(corpus), step), corpus.target)
    if config.joint:
        model, notes = _train([source, target], config, "both languages")
        return Tokenizer({"source": model, "target": model}), notes
    source_model, source_notes = _train([source], config, "the source language")
    target_model, target_notes = _train([target], config, "the target language")
    return Tokenizer({"source": source_model, "target": target_model}), source_notes + target_notes


Chosen = tuple[range, Sequence[str]]  # the sentences of a side that train a model


def _train(sides: list[Chosen], config: TokenizerConfig, what: str) -> tuple[bytes, list[str]]:
    try:
        return _train_exactly(sides, config, config.vocabulary), []
    except RuntimeError as error:
        reason = str(error)
        most = re.search(r"value <= (\d+)", reason)
        least = re.search(r"smaller than required_chars. \d+ vs (\d+)", reason)
    if most:
        size = int(most.group(1))
        note = f"vocabulary {config.vocabulary:,} → {size:,}: as many subwords as this corpus supports for {what}"
        return _train_exactly(sides, config, size), [note]
    if least:
        raise UserError(
            f"tokenizer.vocabulary: {config.vocabulary} is smaller than the character set of {what}; "
            f"it must be at least {least.group(1)}"
        )
    raise UserError(f"tokenizer: sentencepiece cannot train on {what}: {reason_of(reason)}")


def _train_exactly(sides: list[Chosen], config: TokenizerConfig, size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(texts[i] for indices, texts in sides for i in indices),
        model_writer=model,
        model_type=config.type,
        vocab_size=size,
        # A corpus may have fewer words or characters than vocab_size; that is no error.
        use_all_vocab=False,
        character_coverage=config.character_coverage,
        byte_fallback=config.byte_fallback,
        normalization_rule_name=config.normalization,
        user_defined_symbols=config.user_symbols,
        pad_id=PAD,
        unk_id=UNKNOWN,
        bos_id=BEGIN,
        eos_id=END,
        unk_surface="",
        max_sentence_length=16384,
        # Fixed, because sums of floats, and so the model, depend on the number of threads.
        num_threads=4,
        minloglevel=2,
    )
    return model.getvalue()


def _read_model(path: str) -> bytes:
    try:
        model = Path(path).read_bytes()
        processor = _load(model)
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer.model: {path} is not a sentencepiece model ({str(error)[:100]})") from None
    if (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id()) != (PAD, UNKNOWN, BEGIN, END):
        wanted = "--pad_id=0 --unk_id=1 --bos_id=2 --eos_id=3"
        raise UserError(f"tokenizer.model: {path} uses other ids for the special tokens; train it with {wanted}")
    return model


def _load(model: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _encode(processor: Any, sentences: Sequence[str], subword_sampling: SubwordSampling | None) -> list[list[int]]:
    if subword_sampling is None:
        return [[*ids, END] for ids in processor.encode(list(sentences))]
    # One thread and a fresh seed: the same segmentations in every process.
    sentencepiece.set_random_generator_seed(subword_sampling.seed)
    sampled = processor.encode(
        list(sentences), enable_sampling=True, alpha=subword_sampling.rate, nbest_size=-1, num_threads=1
    )
    return [[*ids, END] for ids in sampled]
