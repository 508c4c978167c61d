"""Streams of sentence pairs from the toy grammar, the hub, folders, tables and plain files."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, NamedTuple

import numpy as np

from seq2seq.config.schema import DataConfig
from seq2seq.data.languages import language_columns, languages_of_files, name_and_language, name_words
from seq2seq.data.store import BLOCK, key_of
from seq2seq.utils.errors import UserError, nearest, reason_of

Pair = tuple[str, str]
Row = tuple[str, dict[str, Any]]  # its location, and its cells by column
Languages = tuple[str | None, str | None]  # of source and target; None: unknown
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ARCHIVES = (".gz", ".bz2", ".xz", ".zst")
FOREIGN = {  # what users try first, and what to do with it
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it, and give the files inside"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as .csv in UTF-8, separated by commas"),
}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}


class PairStream(NamedTuple):
    """A stream of pairs, the identity of its content (paths, sizes, times, columns), and its languages."""

    identity: tuple[object, ...]
    pairs: Callable[[], Iterator[Pair]]
    languages: Languages = (None, None)


def with_languages(config: DataConfig) -> DataConfig:
    """Return the config with the languages that the names of its files or columns show."""
    location = config.train or config.validation or config.test
    if location is None or (config.source and config.target):
        return config
    source, target = find_stream(config, location).languages
    return replace(config, source=source, target=target)


def find_stream(config: DataConfig, split_or_files: str | list[str]) -> PairStream:
    """Find the stream that `data.train` or a sibling names: two files, one table, or a split of `data.path`."""
    if isinstance(split_or_files, list):
        source, target = paths = [Path(file).expanduser() for file in split_or_files]
        _refuse_foreign(paths)
        if kind_of(source) or kind_of(target):
            raise UserError("data.train: a pair of files must be plain text; add further tables with data.extra")
        seen = languages_of_files(*split_or_files)
        languages = (config.source or seen[0], config.target or seen[1])
        return PairStream(_identity(paths), lambda: from_text(source, target), languages)
    if kind_of(Path(split_or_files)) or config.path is None:
        return from_tables([Path(split_or_files).expanduser()], config)
    if config.path == "toy":
        return from_grammar(split_or_files, config)
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return from_folder(folder, split_or_files, config)
    if folder.exists():
        raise UserError(f"data.path: {folder} is a file, not a folder; use data.train={folder}")
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise UserError(f"data.path: {config.path} is not a folder; give a folder or the name of a hub corpus")
    return from_hub(config.path, split_or_files, config)


def from_grammar(split: str, config: DataConfig) -> PairStream:
    """A split of the built-in English→German grammar."""
    from seq2seq.data import toy

    source = config.source or ("en" if config.target != "en" else "de")
    target = config.target or ("de" if source != "de" else "en")

    def pairs() -> Iterator[Pair]:
        for pair in toy.splits()[split]:
            yield (pair.source, pair.target) if source == "en" else (pair.target, pair.source)

    if {source, target} != {"en", "de"}:
        raise UserError(f"data.source, data.target: {source}→{target} is not in the toy corpus; possible: en→de, de→en")
    if split not in SPLITS:
        raise UserError(f"the toy corpus has no split {split}; possible: {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    files = sorted(path for path in Path(toy.__file__).parent.iterdir() if path.suffix in (".py", ".tsv"))
    key = key_of(*(path.read_bytes() for path in files))
    return PairStream(("toy", split, source, key), pairs, (source, target))


def from_folder(folder: Path, split: str, config: DataConfig) -> PairStream:
    """Sort data files into splits by the words in their paths below the folder.

    The folder's own path is ignored: not every file below /home/me/test/ is a test file.
    """
    below = folder / config.subset if config.subset and (folder / config.subset).is_dir() else folder
    files_by_split: dict[str, list[Path]] = {}
    for path in sorted(p for p in below.rglob("*") if p.is_file() and kind_of(p)):
        words = set(name_words(str(path.relative_to(below))))
        name = next((name for name, synonyms in SPLITS.items() if words & set(synonyms)), path.name.partition(".")[0])
        files_by_split.setdefault(name, []).append(path)
    if not files_by_split:
        return from_text_folder(below, split, config)
    # `val`, `dev` and the like all name the validation split.
    split = (
        split if split in files_by_split else next((name for name, words in SPLITS.items() if split in words), split)
    )
    if split not in files_by_split:
        raise UserError(
            f"{below} has no split {split}; possible: {', '.join(files_by_split)}{nearest(split, files_by_split)}"
        )
    counts = Counter(
        path.name.partition(".")[0] for path in files_by_split[split] if path.parent == files_by_split[split][0].parent
    )
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{below} contains {duplicates[0]} in several formats; keep one of them")
    return from_tables(files_by_split[split], config)


def from_text_folder(folder: Path, split: str, config: DataConfig) -> PairStream:
    """Find a split in a folder with two plain files for each, such as train.en and train.de."""
    by_split = text_files(folder)
    if not by_split:
        raise UserError(
            f"data.path: {folder} contains neither a table ({', '.join(TABLES)}) nor pairs of plain files such as "
            "train.en and train.de; for files of other names use data.train=[a,b]"
        )
    synonyms = next((words for words in SPLITS.values() if split in words), ())
    names = [name for name in by_split if split in (name, name.partition(".")[0])]
    names = names or [name for name in by_split if set(synonyms) & set(name_words(name))]
    if len(names) != 1:
        finding = f"several files for {split}" if names else f"no split {split}"
        raise UserError(
            f"{folder} has {finding}; possible: {', '.join(names or by_split)}{nearest(split, names or by_split)}"
        )
    files = by_split[names[0]]
    for side, language in (("source", config.source), ("target", config.target)):
        if language not in files:
            found = f"{folder} has no {names[0]}.{language}" if language else f"{folder} does not show a direction"
            raise UserError(f"{found}; choose data.{side} among {', '.join(files)}")
    return find_stream(config, [str(files[config.source or ""]), str(files[config.target or ""])])


def text_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the plain files of a folder by name and language, of each name that has at least two languages."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        name, language = name_and_language(path.name)
        if language:
            found.setdefault(name, {})[language] = path
    return {name: files for name, files in found.items() if len(files) > 1}


def from_hub(name: str, split: str, config: DataConfig) -> PairStream:
    """A split of a corpus on the Hugging Face hub; dataset scripts are never executed."""
    location = f"the hub corpus {name}"
    load = cache(lambda: _load_hub(name, config))

    def blocks() -> Iterator[dict[str, list[Any]]]:
        loaded = load()
        if split not in loaded:
            raise UserError(f"{name} has no split {split}; possible: {', '.join(loaded)}{nearest(split, loaded)}")
        yield from loaded[split].iter(BLOCK)

    def first_row() -> dict[str, Any] | None:
        return next(({column: cells[0] for column, cells in block.items()} for block in blocks()), None)

    config = with_columns(config, location, first_row)

    def pairs() -> Iterator[Pair]:
        for block in blocks():
            yield from zip(*_columns(block, location, config), strict=True)

    identity = ("hub", name, config.subset, config.revision, split, config.source, config.target)
    return PairStream(identity, pairs, (config.source, config.target))


def _load_hub(name: str, config: DataConfig) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(name, config.subset, revision=config.revision, cache_dir=config.cache)
    except Exception as error:  # `datasets` raises whatever its readers raise
        raise UserError(
            f"data.path: the hub corpus {name} cannot be loaded: {reason_of(error)}; "
            "without network access, give a folder with its files: data.path=FOLDER"
        ) from None


def from_tables(paths: list[Path], config: DataConfig) -> PairStream:
    """Concatenated tables with a column for each language."""
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
    _refuse_foreign(paths)
    kinds = [kind_of(path) or "" for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if not kind:
            raise UserError(
                f"{path}: a single file must be a table ({', '.join(TABLES)}); plain text needs two files: [a,b]"
            )

    def rows() -> Iterator[Row]:
        for path, kind in zip(paths, kinds, strict=True):
            yield from readers[kind](path)

    identity = _identity(paths)
    config = with_columns(config, str(paths[0]), lambda: next((row for _, row in rows()), None))

    def pairs() -> Iterator[Pair]:
        return (_pair(row, location, config) for location, row in rows())

    return PairStream((*identity, config.source, config.target), pairs, (config.source, config.target))


def with_columns(config: DataConfig, name: str, first_row: Callable[[], dict[str, Any] | None]) -> DataConfig:
    """Return the config with the columns of both languages; a column that is not given is chosen by its name."""
    if (config.source and config.target) or (row := first_row()) is None:
        return config
    nested = row.get("translation")
    columns = list(nested if isinstance(nested, dict) else row)
    for given in (config.source, config.target):
        if given and given not in columns:
            raise _no_column(given, columns, name)
    others = [column for column in language_columns(columns) if column not in (config.source, config.target)]
    if len(others) != (config.source, config.target).count(None):
        shown = ", ".join(shorten(column, 30, placeholder="…") for column in columns)
        finding = "name more than two languages" if len(others) > 1 else "do not name two languages"
        remedy = f"choose two with data.source=… data.target=…{_header_advice(name)}"
        raise UserError(f"{name}: its columns ({shown}) {finding}; {remedy}")
    return replace(config, source=config.source or others[0], target=config.target or others[-1])


def _header_advice(name: str) -> str:
    """Return a reminder for tables whose first line may be a pair of sentences."""
    separator = {".csv": "commas", ".tsv": "tabs"}.get(kind_of(Path(name)) or "")
    if separator is None:
        return ""
    return f"; the first line of a table must name its columns, such as en and de, separated by {separator}"


def _no_column(column: str, columns: Iterable[str], location: str) -> UserError:
    shown = [shorten(name, 30, placeholder="…") for name in columns]
    advice = _header_advice(location.partition(", line")[0])
    return UserError(f"{location}: no column {column}; possible: {', '.join(shown)}{nearest(column, shown)}{advice}")


def from_text(source: Path, target: Path) -> Iterator[Pair]:
    """Two plain files, one sentence per line; different lengths are an error, never a silent shift."""
    lengths = (array("i"), array("i"))
    for left, right in zip_longest(read_lines(source), read_lines(target)):
        for side, line in zip(lengths, (left, right), strict=True):
            if line is not None:
                side.append(len(line))
        if left is not None and right is not None:
            yield left, right
    if len(lengths[0]) != len(lengths[1]):
        first_difference = misaligned_line(*lengths)
        raise UserError(
            f"{source} has {len(lengths[0]):,} lines, {target} has {len(lengths[1]):,}; they seem to diverge "
            f"at line {first_difference:,}; line N of one file must be the translation of line N of the other"
        )


def misaligned_line(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the line where one side seems to miss lines: a shift from there makes the lengths of pairs fit best."""
    shorter, longer = sorted((np.log1p(np.array(side)) for side in (left, right)), key=len)
    if not len(shorter):
        return 1
    shift = len(longer) - len(shorter)
    unlike = [np.abs(shorter - part - np.median(shorter - part)) for part in (longer[: len(shorter)], longer[shift:])]
    before = np.concatenate(([0.0], np.cumsum(unlike[0])))
    after = np.concatenate((np.cumsum(unlike[1][::-1])[::-1], [0.0]))
    return int(np.argmin(before + after)) + 1


# -------------------------------------------------------------------------------------------- readers


def kind_of(path: Path) -> str | None:
    """Return the table format that a file's suffix names, ignoring archive suffixes."""
    return suffix if (suffix := _inner_suffix(path)) in TABLES else None


def _inner_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in ARCHIVES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _refuse_foreign(paths: list[Path]) -> None:
    for path in paths:
        if advice := FOREIGN.get(suffix := _inner_suffix(path)):
            raise UserError(f"{path}: {suffix} files cannot be read; {advice}")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed if its suffix names an archive format."""
    try:
        if path.suffix.lower() == ".zst":
            return io.BufferedReader(Zstandard(path), 2**17)
        return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix.lower(), open)(path, "rb")  # type: ignore[operator]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


class Zstandard(io.RawIOBase):
    """A decompressed .zst file; unlike the library's own reader it detects a truncated file."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._compressed = open(path, "rb")  # noqa: SIM115 (closed with this file)
        self._begin, self._error = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame, self._ready, self._in_frame = self._begin(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._begin()
            compressed = compressed or self._compressed.read(2**17)
            if not compressed:
                if self._in_frame:
                    raise EOFError("the file ends inside a frame")
                return 0
            try:
                self._ready = self._frame.decompress(compressed)
            except self._error as error:
                raise OSError(str(error)) from None
            self._in_frame = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._compressed.close()
        super().close()


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file as bytes; only a line feed ends a line, so that both sides stay parallel."""
    number = 0
    try:
        with open_bytes(path) as file:
            for line in file:
                number += 1
                yield line
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        _unreadable(path, number, error)


def _unreadable(path: Path, number: int, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or reason_of(error)
    what = "the archive is truncated or damaged" if path.suffix.lower() in ARCHIVES else "cannot be read"
    raise UserError(f"{path}: {what} after line {number:,} ({reason})") from None


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file."""
    for number, line in enumerate(raw_lines(path), 1):
        try:
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode("utf-8")) + 1
            raise UserError(
                f"{path}, line {number}, column {column}: not UTF-8 (byte 0x{line[error.start]:02x}); "
                "convert the file, for instance with iconv -f WINDOWS-1252 -t UTF-8"
            ) from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, column {error.colno}: not one JSON object per line ({error.msg})"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object with columns, got {type(row).__name__}")
        yield f"{path}, line {number}", row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**30)
    # The reader needs line ends, which a quoted field may contain; strict: an unclosed quote is an error.
    reader = csv.reader((f"{line}\n" for line in read_lines(path)), strict=True)
    first_line = 1
    try:
        header = next(reader, [])
        first_line = reader.line_num + 1
        for row in reader:
            first_line, number = reader.line_num + 1, first_line
            if row:
                yield _row(row, header, path, number)
    except csv.Error as error:
        raise UserError(f"{path}, line {first_line}: invalid CSV ({error})") from None


def _tsv(path: Path) -> Iterator[Row]:
    rows = (line.split("\t") for line in read_lines(path))
    header = next(rows, [])
    for number, row in enumerate(rows, 2):
        if row != [""]:
            yield _row(row, header, path, number)


def _row(row: list[str], header: list[str], path: Path, number: int) -> Row:
    location = f"{path}, line {number}"
    if len(row) != len(header):
        advice = _header_advice(str(path)) if len(header) == 1 else ""
        raise UserError(
            f"{location}: {len(row)} columns, but the header has {len(header)}: {', '.join(header)}{advice}"
        )
    return location, dict(zip(header, row, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(path) as file:
            # Its index is at the end, to which an archive cannot seek.
            seekable = io.BytesIO(file.read()) if path.suffix.lower() in ARCHIVES else file
            for batch in parquet.ParquetFile(pyarrow.PythonFile(seekable, "r")).iter_batches(BLOCK):
                yield from ((str(path), row) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: truncated or damaged ({reason_of(error)})") from None


def _pair(row: dict[str, Any], location: str, config: DataConfig) -> Pair:
    assert config.source and config.target  # chosen with the first row
    return _cell(row, config.source, location), _cell(row, config.target, location)


def _cell(row: dict[str, Any], column: str, location: str) -> str:
    """Return one language's text, from its own column or from a `translation` column."""
    nested = row.get("translation")
    cells = nested if column not in row and isinstance(nested, dict) else row
    if column not in cells:
        raise _no_column(column, cells, location)
    value = cells[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{location}, column {column}: {value!r} is not text")
    return value.replace("\n", " ")


def _columns(block: dict[str, list[Any]], location: str, config: DataConfig) -> list[list[str]]:
    assert config.source and config.target
    names = list(block)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*block.values(), strict=True)]
    return [[_cell(row, column, location) for row in rows] for column in (config.source, config.target)]


def _identity(paths: list[Path]) -> tuple[object, ...]:
    """Return path, size and times of files, without opening them."""
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: this is a folder; give a file, or a corpus folder with data.path={path}")
    return tuple(
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in zip(paths, stats, strict=True)
    )
