"""Corpora: sources read once into a memory-mapped store, then filtered and split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seq2seq.config.schema import DataConfig, FilterConfig
from seq2seq.data.sources import PairStream, find_stream, with_languages
from seq2seq.data.store import Integers, Ragged, Texts, Writer, blocks, key_of, open_array
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import build_once

SIDES = ("source", "target")
Status = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Parallel text: sentence i of the target translates sentence i of the source."""

    source: Sequence[str]
    target: Sequence[str]
    fingerprint: str = ""  # changes with any sentence
    corpus_ends: tuple[int, ...] = ()  # where each of several mixed corpora ends
    stored: StoredPairs | None = None
    rows: Integers | None = None  # None: all stored pairs

    def __len__(self) -> int:
        return len(self.source)

    @property
    def hashes(self) -> dict[str, NDArray[np.uint64]]:
        """The hash of each sentence of each side."""
        return self._of_rows("hashes")

    @property
    def characters(self) -> dict[str, NDArray[np.int32]]:
        """The length of each sentence of each side."""
        return self._of_rows("characters")

    def _of_rows(self, name: str) -> Any:
        rows = slice(None) if self.rows is None else self.rows
        return {side: array[rows] for side, array in getattr(self.stored, name).items()}


@dataclass(frozen=True)
class StoredPairs:
    """All pairs of a stream, unfiltered, with the length in characters and the hash of each sentence."""

    name: str  # of its folder
    source: Ragged
    target: Ragged
    characters: dict[str, NDArray[np.int32]]
    hashes: dict[str, NDArray[np.uint64]]

    def __len__(self) -> int:
        return len(self.source)

    def corpus(self, rows: Integers | None = None, fingerprint: str = "", corpus_ends: tuple[int, ...] = ()) -> Corpus:
        return Corpus(Texts(self.source, rows), Texts(self.target, rows), fingerprint, corpus_ends, self, rows)


@dataclass(frozen=True)
class Corpora:
    train: Corpus
    validation: Corpus
    test: Corpus | None
    notes: tuple[str, ...]  # for the log: how they were filtered and split


def open_corpora(config: DataConfig, seed: int, status: Status = lambda _: None) -> Corpora:
    """Open training, validation and test pairs; without data.validation, hold missing ones out of training."""
    config = with_languages(config)
    stored, ends = store_training(config, status)
    held_out = {}
    for split in ("validation", "test"):
        location = getattr(config, split)
        held_out[split] = store(find_stream(config, location), config.cache, status).corpus() if location else None
    missing = [split for split in held_out if held_out[split] is None] if held_out["validation"] is None else []
    folder = choose_rows(stored, config, missing, seed)
    rows = {split: open_array(folder / f"{split}.int32") for split in ("train", *missing)}
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    held_out.update((split, stored.corpus(rows[split])) for split in missing)
    if not len(rows["train"]):
        raise UserError("data: no training pairs remain; loosen data.filters, or lower data.held_out")
    validation = held_out["validation"]
    if validation is None or not len(validation):
        raise UserError("data.validation: the set is empty; training needs it to choose the best checkpoint")
    corpus_ends = tuple(int(end) for end in np.searchsorted(rows["train"], ends))
    train = stored.corpus(rows["train"], metadata["content"], corpus_ends)
    return Corpora(train, validation, held_out["test"], tuple(metadata["notes"]))


def choose_rows(stored: StoredPairs, config: DataConfig, missing: list[str], seed: int) -> Path:
    """Return a folder with the rows of the training pairs and the missing splits, filtered and split off once."""
    settings = (config.filters, missing, config.held_out if missing else 0, seed if missing else 0)
    folder = Path(config.cache) / f"split-{key_of(stored.name, *settings)}"

    def build(tmp_dir: Path) -> None:
        rows, notes = filter_pairs(stored, config.filters)
        if missing and not len(rows):
            raise UserError("data: no training pairs remain; loosen data.filters")
        if missing:
            rows, held_out_rows = split_held_out(stored, rows, config.held_out, len(missing), seed)
            sizes = " and ".join(f"{len(part):,} {split}" for split, part in zip(missing, held_out_rows, strict=True))
            notes.append(f"{sizes} pairs held out of the training pairs (seed {seed}; equal sources stay in one split)")
            for split, part in zip(missing, held_out_rows, strict=True):
                part.astype(np.int32).tofile(tmp_dir / f"{split}.int32")
        rows.astype(np.int32).tofile(tmp_dir / "train.int32")
        fingerprint = key_of(*(np.ascontiguousarray(stored.hashes[side][rows]).tobytes() for side in SIDES))
        metadata = json.dumps({"notes": notes, "content": fingerprint}, ensure_ascii=False)
        (tmp_dir / "metadata.json").write_text(metadata, encoding="utf-8")

    build_once(folder, build)
    return folder


def load_split(config: DataConfig, split: str, seed: int) -> Corpus | None:
    """Load one split; None if the config names none."""
    location = getattr(config, split)
    if location and split != "train":
        return store(find_stream(config, location), config.cache).corpus()
    if config.train is None:
        return None
    corpora = open_corpora(config, seed)
    return {"train": corpora.train, "validation": corpora.validation, "test": corpora.test}[split]


def store_training(config: DataConfig, status: Status) -> tuple[StoredPairs, list[int]]:
    """Store the pairs of the training corpus and of all additional ones; also return where each of them ends."""
    assert config.train is not None  # checked with the config
    streams = [
        find_stream(config, config.train),
        *(find_stream(more.within(config), more.train) for more in config.extra),
    ]
    if len(streams) == 1:
        stored = store(streams[0], config.cache, status)
        return stored, [len(stored)]
    corpora = [store(stream, config.cache, status).corpus() for stream in streams]
    ends = np.cumsum([len(corpus) for corpus in corpora])

    def all_pairs() -> Iterator[tuple[str, str]]:
        for corpus in corpora:
            yield from zip(corpus.source, corpus.target, strict=True)

    combined = PairStream(tuple(stream.identity for stream in streams), all_pairs)
    return store(combined, config.cache, status), [int(end) for end in ends]


def store(stream: PairStream, cache: str, status: Status = lambda _: None) -> StoredPairs:
    """Store the pairs of a stream, read once for all runs and processes."""
    folder = Path(cache) / f"pairs-{key_of(stream.identity)}"

    def build(tmp_dir: Path) -> None:
        done = 0
        with ExitStack() as files:
            writers = {side: files.enter_context(SideWriter(tmp_dir, side)) for side in SIDES}
            for block in blocks(stream.pairs()):
                for side, sentences in zip(SIDES, zip(*block, strict=True), strict=True):
                    writers[side].extend(sentences)
                done += len(block)
                status(f"reading the corpus: {done:,} pairs …")
        if not done:
            raise UserError(f"{_describe(stream)}: no pairs found")

    build_once(folder, build)
    return StoredPairs(
        folder.name,
        Ragged.open(folder, "source"),
        Ragged.open(folder, "target"),
        {side: open_array(folder / f"{side}.characters.int32") for side in SIDES},
        {side: open_array(folder / f"{side}.hashes.uint64") for side in SIDES},
    )


def hashes_of(encoded: Iterable[bytes]) -> NDArray[np.uint64]:
    """Hash sentences in UTF-8."""
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in encoded), np.uint64)


class SideWriter:
    """Writer for one language of a store, with the length and the hash of each sentence."""

    def __init__(self, folder: Path, side: str) -> None:
        self.texts = Writer(folder, side, np.uint8)
        self.characters = open(folder / f"{side}.characters.int32", "wb")  # noqa: SIM115 (closed on exit)
        self.hashes = open(folder / f"{side}.hashes.uint64", "wb")  # noqa: SIM115

    def extend(self, sentences: Sequence[str]) -> None:
        encoded = [sentence.encode("utf-8", "replace") for sentence in sentences]
        self.texts.extend(encoded)
        self.characters.write(np.array([len(sentence.strip()) for sentence in sentences], np.int32).tobytes())
        self.hashes.write(hashes_of(encoded).tobytes())

    def __enter__(self) -> SideWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.texts, self.characters, self.hashes):
            file.close()


def filter_pairs(stored: StoredPairs, config: FilterConfig) -> tuple[Integers, list[str]]:
    """Return the pairs that pass every filter, and notes on how many each filter removed."""
    lengths = [stored.characters[side] for side in SIDES]
    shorter, longer = np.minimum(*lengths), np.maximum(*lengths)
    passing = np.ones(len(stored), bool)
    counts: Counter[str] = Counter()

    def drop(name: str, rejected: NDArray[np.bool_]) -> None:
        counts[name] = int((passing & rejected).sum())
        passing[rejected] = False

    if config.empty:
        drop("with an empty side", shorter == 0)
    if config.max_characters:
        drop(f"over {config.max_characters:,} characters", longer > config.max_characters)
    if config.max_ratio:
        drop(f"with a length ratio over {config.max_ratio:g}", longer > config.max_ratio * np.maximum(shorter, 1))
    if config.identical:
        drop("with identical sides", stored.hashes["source"] == stored.hashes["target"])
    if config.duplicate:
        rows = np.flatnonzero(passing)
        duplicate = np.zeros(len(stored), bool)
        duplicate[rows] = find_duplicates(*(stored.hashes[side][rows] for side in SIDES))
        drop("that repeat an earlier pair", duplicate)
    notes = [f"{count:,} pairs {name} removed" for name, count in counts.items() if count]
    return np.flatnonzero(passing), notes


def find_duplicates(source: NDArray[np.uint64], target: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Flag pairs that occurred before, by the hashes of their sides."""
    duplicate = np.ones(len(source), bool)
    duplicate[np.unique(source * np.uint64(0x9E3779B97F4A7C15) + target, return_index=True)[1]] = False
    return duplicate


def split_held_out(
    stored: StoredPairs, rows: Integers, count: int, num_splits: int, seed: int
) -> tuple[Integers, list[Integers]]:
    """Split off at most `count` pairs, and at most a twentieth of all, per split; equal sources stay in one split."""
    count = max(1, min(count, len(rows) // 20))
    _, group, sizes = np.unique(stored.hashes["source"][rows], return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    # A very frequent sentence would fill a split by itself.
    shuffled = shuffled[sizes[shuffled] <= count]
    ends = np.cumsum([0, *sizes[shuffled]])
    split_of_group, start = np.full(len(sizes), num_splits), 0
    for split in range(num_splits):
        stop = int(np.searchsorted(ends, ends[start] + count, side="right")) - 1
        if stop == start:
            raise UserError("data.validation: too few distinct sentences to hold any out; set data.validation")
        split_of_group[shuffled[start:stop]] = split
        start = stop
    split_of_row = split_of_group[group]
    return rows[split_of_row == num_splits], [rows[split_of_row == split] for split in range(num_splits)]


def _describe(stream: PairStream) -> str:
    first = stream.identity[0]
    return str(first[0] if isinstance(first, tuple) else first)
