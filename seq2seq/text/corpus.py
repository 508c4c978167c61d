"""Parallel text from the toy grammar, the hub, a folder or plain files → sentence pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq2seq.config import DataConfig
from seq2seq.errors import UserError, nearest


@dataclass(frozen=True)
class Corpus:
    """One split: sentence i of the source is translated by sentence i of the target."""

    source: Sequence[str]
    target: Sequence[str]

    def __len__(self) -> int:
        return len(self.source)


def load_corpus(config: DataConfig, split: str) -> Corpus | None:
    """The pairs of "train", "validation" or "test"; None where the config names no test set."""
    where = getattr(config, split)
    if where is None:
        return None
    if isinstance(where, list):
        return from_files(where[0], where[1])
    if config.path == "toy":
        return from_grammar(where)
    return from_datasets(config, where)


def from_grammar(split: str) -> Corpus:
    """A split of the embedded English→German grammar."""
    from seq2seq.text.toy import splits

    corpora = splits()
    if split not in corpora:
        raise UserError(f"the toy corpus has no split {split}; possible: {', '.join(corpora)}{nearest(split, corpora)}")
    pairs = corpora[split]
    return Corpus([pair.source for pair in pairs], [pair.target for pair in pairs])


def from_files(source: str, target: str) -> Corpus:
    """Two plain files, one sentence a line; different lengths are an error, never a silent shift."""
    sides = [list(read_lines(source)), list(read_lines(target))]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{source} has {len(sides[0]):,} lines, {target} has {len(sides[1]):,}; "
            "each line of one must be the translation of the same line of the other"
        )
    if not sides[0]:
        raise UserError(f"{source} is empty; it must hold one sentence a line")
    return Corpus(*sides)


def read_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file; only a line feed ends a line, so that both sides stay parallel."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}, byte {error.start + 1}: not UTF-8 "
                        f"(0x{line[error.start]:02x}); convert it, for instance with iconv -t UTF-8"
                    ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def from_datasets(config: DataConfig, split: str) -> Corpus:
    """A split of a hub corpus, or of a local folder in the same layout, through `datasets`."""
    name = config.path
    assert name is not None  # a config without a path names files
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise UserError(f"data.path: {name} is no folder here; give a folder, or a hub corpus as owner/name")
    folder = Path(name).expanduser()
    try:
        loaded = _load_folder(folder, config) if folder.is_dir() else _load_hub(name, config)
    except Exception as error:  # `datasets` raises whatever its readers raise
        raise UserError(_load_problem(config, folder, error)) from None
    if split not in loaded:
        raise UserError(f"{config.path} has no split {split}; possible: {', '.join(loaded)}{nearest(split, loaded)}")
    table = loaded[split]
    return Corpus(_column(table, config.source, config), _column(table, config.target, config))


SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def _load_folder(folder: Path, config: DataConfig) -> Any:
    """Data files sorted into splits by their names below the folder.

    `datasets` would look at the folder's own path as well: below /home/me/test/ every file is a test file.
    """
    below = folder / config.subset if config.subset and (folder / config.subset).is_dir() else folder
    found: dict[str, list[str]] = {}
    suffixes = set()
    for path in sorted(below.rglob("*")):
        reader = next((suffix for suffix in path.suffixes if suffix in READERS), None)
        words = set(re.split(r"[^a-z]+", str(path.relative_to(below)).lower()))
        split = next((split for split, names in SPLITS.items() if words & set(names)), None)
        if path.is_file() and reader and split:
            found.setdefault(split, []).append(str(path))
            suffixes.add(reader)
    if not found:
        return _load_hub(str(folder), config)
    if len(suffixes) > 1:
        raise UserError(f"{below} mixes {' and '.join(sorted(suffixes))} files; keep one kind")
    suffix = suffixes.pop()
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return _datasets().load_dataset(READERS[suffix], data_files=found, cache_dir=config.cache, **options)


def _load_hub(name: str, config: DataConfig) -> Any:
    return _datasets().load_dataset(name, config.subset, revision=config.revision, cache_dir=config.cache)


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _load_problem(config: DataConfig, folder: Path, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    if folder.is_dir():
        return f"data.path: {config.path} cannot be read as a corpus: {reason}"
    return (
        f"data.path: the hub corpus {config.path} cannot be loaded: {reason}; "
        "where there is no network, give a folder that holds its files: data.path=FOLDER"
    )


def _column(table: Any, name: str, config: DataConfig) -> list[str]:
    """A language, whether it is a column of its own or an entry of a `translation` column."""
    if name in table.column_names:
        values = list(table[name])
    elif "translation" in table.column_names and name in (table[0]["translation"] if len(table) else {}):
        values = [pair[name] for pair in table["translation"]]
    else:
        there = table.column_names
        if "translation" in there and len(table):
            there = list(table[0]["translation"])
        raise UserError(f"{config.path} has no column {name}; possible: {', '.join(there)}{nearest(name, there)}")
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{config.path}, row {place + 1}, column {name}: {value!r} is not text")
    return values
