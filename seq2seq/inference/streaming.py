"""Reading lines of files and pipes as they arrive, and splitting lines into sentences."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

CHARACTERS = 2**20  # of waiting lines: bounds memory for a file of any size
PAUSE = 0.02  # seconds to wait for a pipe to fill a chunk

# A stop, closing marks and space, unless a lowercase letter follows; scripts without spaces have their own stops.
# A full stop after one or two letters or a number marks an abbreviation or ordinal more often than an end.
STOP = re.compile(
    r"(?:(?<=[^\W\d_]{3})\.|(?<=[^\w\s])\.|[!?…؟۔।])[\"'»”’)\]]*\s+(?=\S)"
    r"|[。！？][」』”’）]*\s*(?=[^\s。！？」』”’）])"  # never between stops, or before a closing mark
)


class Line(NamedTuple):
    text: str
    invalid: bool  # not UTF-8; the invalid bytes are replaced


def decode_lines(lines: Iterable[bytes]) -> Iterator[Line]:
    """Decode lines; only a line feed ends a line, and a leading byte order mark is dropped."""
    for number, line in enumerate(lines):
        text = line.decode("utf-8", "replace").removeprefix("" if number else "\ufeff").rstrip("\r\n")
        yield Line(text, "\ufffd" in text and not _is_utf8(line))


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class LineReader:
    """Lines in chunks, read ahead by a thread; a pause of the input releases an incomplete chunk."""

    def __init__(self, lines: Iterator[Line], pauses: bool) -> None:
        self.lines, self.pauses = lines, pauses
        self.waiting: list[Line] = []
        self.characters, self.ended = 0, False
        self.error: Exception | None = None
        self.changed = threading.Condition()

    def chunks(self, first: int, most: int) -> Iterator[list[Line]]:
        """Yield chunks that double from `first` lines to `most`: early output first, better length sorting later."""
        threading.Thread(target=self._read, args=(most,), daemon=True).start()
        while chunk := self._take(first):
            yield chunk
            first = min(2 * first, most)
        if self.error:
            raise self.error

    def _read(self, most: int) -> None:
        try:
            for line in self.lines:
                with self.changed:
                    self.changed.wait_for(lambda: not self._full(most))
                    self.waiting.append(line)
                    self.characters += len(line.text)
                    self.changed.notify_all()
        except Exception as error:  # raised by the translating thread, after the lines before it
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _take(self, most: int) -> list[Line]:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.ended)
            self.changed.wait_for(lambda: self.ended or self._full(most), PAUSE if self.pauses else None)
            chunk, self.waiting = self.waiting[:most], self.waiting[most:]
            self.characters = sum(len(line.text) for line in self.waiting)
            self.changed.notify_all()
        return chunk

    def _full(self, lines: int) -> bool:
        return len(self.waiting) >= lines or self.characters >= CHARACTERS


def sentences(line: str, within_limit: Callable[[str], bool]) -> list[str]:
    """Split a line into sentences; one over the limit is halved, at a space if possible."""
    ends = [match.end() for match in STOP.finditer(line) if not line[match.end()].islower()]
    parts = [line[start:end] for start, end in zip([0, *ends], [*ends, len(line)], strict=True)]
    return [piece for part in parts for piece in _split_in_half(part.strip(), within_limit)]


def split_text(text: str, within_limit: Callable[[str], bool]) -> list[str]:
    """Split a text of any number of lines into sentences, none of them empty."""
    return [sentence for line in text.splitlines() for sentence in sentences(line, within_limit) if sentence]


def gaps_between(text: str, sentences: Iterable[str]) -> list[str]:
    """Return the spaces and line ends of a text before its first sentence, between sentences, and after the last."""
    gaps, end = [], 0
    for sentence in sentences:
        start = text.index(sentence, end)  # only space comes before it, and no sentence begins with space
        gaps.append(text[end:start])
        end = start + len(sentence)
    return [*gaps, text[end:]]


def _split_in_half(text: str, within_limit: Callable[[str], bool]) -> list[str]:
    if len(text) < 2 or within_limit(text):
        return [text]
    middle = len(text) // 2
    spaces = [match.start() for match in re.finditer(r"\s", text)]
    # Cut only in the middle third, which keeps repeated halving rare.
    near_middle = [position for position in spaces if len(text) / 3 < position < 2 * len(text) / 3]
    cut = min(near_middle, key=lambda position: abs(position - middle), default=middle)
    return [*_split_in_half(text[:cut].strip(), within_limit), *_split_in_half(text[cut:].strip(), within_limit)]
