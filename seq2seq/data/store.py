"""Lists of texts or ids in flat memory-mapped files, so that a corpus may exceed memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

Integers = NDArray[np.int64]
FORMAT = 1  # version of all stored files; a new number rebuilds them
BLOCK = 2**16  # rows processed together: one by one would be slow, all together too large


class Ragged:
    """Many lists of numbers in one flat array; `ends` marks the end of each list."""

    def __init__(self, flat: NDArray[Any], ends: NDArray[Any]) -> None:
        self.flat, self.ends = flat, ends

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], dtype: DTypeLike = np.int32) -> Ragged:
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        ends = np.cumsum(lengths)
        return cls(np.fromiter((i for row in rows for i in row), dtype, int(ends[-1]) if len(rows) else 0), ends)

    @classmethod
    def open(cls, folder: Path, name: str) -> Ragged:
        flat = next(folder.glob(f"{name}.flat.*"))
        return cls(open_array(flat), open_array(folder / f"{name}.ends.int64"))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.flat[self.ends[row - 1] if row else 0 : self.ends[row]]

    def lengths(self, rows: Integers | None = None) -> NDArray[np.int32]:
        """Return the lengths of all rows, or of the given ones."""
        if rows is None:
            return np.diff(self.ends, prepend=0).astype(np.int32)
        return (self.ends[rows] - self.starts(rows)).astype(np.int32)

    def starts(self, rows: Integers) -> Integers:
        return np.where(rows > 0, self.ends[rows - 1], 0)

    def padded(self, rows: Integers, filler: int) -> Integers:
        """Return the given rows as one matrix, padded on the right."""
        starts, lengths = self.starts(rows), self.lengths(rows)
        column = np.arange(lengths.max())
        inside = column < lengths[:, None]
        matrix = np.full(inside.shape, filler, np.int64)
        matrix[inside] = self.flat[(starts[:, None] + column)[inside]]
        return matrix


class Writer:
    """Writer that appends rows to the files of a Ragged."""

    def __init__(self, folder: Path, name: str, dtype: DTypeLike) -> None:
        self.dtype, self.total = np.dtype(dtype), 0
        self._flat: IO[bytes] = open(folder / f"{name}.flat.{self.dtype}", "wb")  # noqa: SIM115 (closed below)
        self._ends: IO[bytes] = open(folder / f"{name}.ends.int64", "wb")  # noqa: SIM115

    def extend(self, rows: Sequence[Any]) -> None:
        """Append lists of numbers, or bytes."""
        ends = np.cumsum(np.fromiter((len(row) for row in rows), np.int64, len(rows))) + self.total
        self._ends.write(ends.tobytes())
        if self.dtype == np.uint8:
            self._flat.write(b"".join(rows))
        else:
            self._flat.write(np.fromiter((i for row in rows for i in row), self.dtype).tobytes())
        self.total = int(ends[-1]) if len(ends) else self.total

    def close(self) -> None:
        self._flat.close()
        self._ends.close()


class Texts(Sequence[str]):
    """Sentences of a Ragged of UTF-8 bytes, or chosen rows of it, decoded on access."""

    def __init__(self, stored: Ragged, rows: Integers | None = None) -> None:
        self.stored, self.rows = stored, rows

    def __len__(self) -> int:
        return len(self.stored) if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return bytes(self.stored[index if self.rows is None else int(self.rows[index])]).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]


def open_array(path: Path) -> NDArray[Any]:
    """Open a flat file whose suffix names its dtype."""
    dtype = np.dtype(path.suffix[1:])
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def key_of(*parts: object) -> str:
    """Return a short name that changes with any of its parts."""
    digest = hashlib.blake2b(digest_size=10)
    for part in (FORMAT, *parts):
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def blocks(rows: Iterable[Any], size: int = BLOCK) -> Iterator[list[Any]]:
    """Yield lists of at most `size` rows."""
    block: list[Any] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
