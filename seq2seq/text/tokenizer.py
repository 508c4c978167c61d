"""Sentences ↔ subword ids: sentencepiece models, trained, stored and loaded."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from seq2seq.config import TokenizerConfig
from seq2seq.errors import UserError
from seq2seq.text.corpus import Corpus

PAD, UNKNOWN, BEGIN, END = range(4)
FILES = {"source": "tokenizer.source.model", "target": "tokenizer.target.model"}


@dataclass(frozen=True)
class Vocabulary:
    """What a model must know of its tokenizer."""

    source: int
    target: int
    joint: bool


class Tokenizer:
    """A sentencepiece model for each side; one and the same when they are joint."""

    def __init__(self, models: dict[str, bytes]) -> None:
        self.models = models
        self.source, self.target = (_load(models[side]) for side in ("source", "target"))
        self.vocabulary = Vocabulary(len(self.source), len(self.target), joint=models["source"] == models["target"])

    def encode_source(self, sentences: Sequence[str]) -> list[list[int]]:
        return _encode(self.source, sentences)

    def encode_target(self, sentences: Sequence[str]) -> list[list[int]]:
        return _encode(self.target, sentences)

    def decode(self, ids: Iterable[int]) -> str:
        """Target ids as text; special ids say nothing."""
        return str(self.target.decode([i for i in ids if i > END]))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Target ids one by one, as they stand in the vocabulary."""
        return [str(self.target.id_to_piece(i)) for i in ids]

    def save(self, folder: Path) -> None:
        for side, name in FILES.items():
            (folder / name).write_bytes(self.models[side])

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        try:
            return cls({side: (folder / name).read_bytes() for side, name in FILES.items()})
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: its tokenizer cannot be read ({error})") from None


def train_tokenizer(corpus: Corpus, config: TokenizerConfig) -> tuple[Tokenizer, list[str]]:
    """A tokenizer for these pairs, and what there is to say about it."""
    if config.joint:
        model, notes = _train([*corpus.source, *corpus.target], config, "both languages")
        return Tokenizer({"source": model, "target": model}), notes
    source, source_notes = _train(corpus.source, config, "the source language")
    target, target_notes = _train(corpus.target, config, "the target language")
    return Tokenizer({"source": source, "target": target}), source_notes + target_notes


def _train(sentences: Sequence[str], config: TokenizerConfig, what: str) -> tuple[bytes, list[str]]:
    try:
        return _train_exactly(sentences, config, config.vocabulary), []
    except RuntimeError as error:
        reason = str(error)
        most = re.search(r"value <= (\d+)", reason)
        least = re.search(r"smaller than required_chars. \d+ vs (\d+)", reason)
    if most:
        size = int(most.group(1))
        note = f"vocabulary {config.vocabulary:,} → {size:,}: as many subwords as this corpus supports for {what}"
        return _train_exactly(sentences, config, size), [note]
    if least:
        raise UserError(
            f"tokenizer.vocabulary: {config.vocabulary} cannot hold the characters of {what}; "
            f"it must be at least {least.group(1)}"
        )
    raise UserError(f"tokenizer: sentencepiece cannot train on {what}: {' '.join(reason.split())[:200]}")


def _train_exactly(sentences: Sequence[str], config: TokenizerConfig, size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=config.type,
        vocab_size=size,
        character_coverage=config.coverage,
        pad_id=PAD,
        unk_id=UNKNOWN,
        bos_id=BEGIN,
        eos_id=END,
        unk_surface="",
        max_sentence_length=16384,
        # A fixed number of threads: sums of floats, and so the model, depend on it.
        num_threads=4,
        minloglevel=2,
    )
    return model.getvalue()


def _load(model: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def _encode(processor: Any, sentences: Sequence[str]) -> list[list[int]]:
    return [[*ids, END] for ids in processor.encode(list(sentences))]
