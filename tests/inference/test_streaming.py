"""Laws of lines: bytes as text, chunks of what has arrived, and a line as its sentences."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.inference import streaming as module
from seq2seq.inference.streaming import Line, LineReader, decode_lines, gaps_between, sentences, split_text
from tests.reference.corpora import halved, sentence_ends

LAW = settings(max_examples=120, deadline=None, derandomize=True, database=None)
LETTERS = st.text("aabbBC1_. .  !?…\"')」。！ \t-é", max_size=30)
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\u2028", "\n \n"])  # of lines


def always(_: str) -> bool:
    return True


# ------------------------------------------------------------------------------------------ sentences


@LAW
@given(LETTERS)
def test_a_line_is_cut_where_a_plain_scan_sees_an_end(line: str) -> None:
    """Stops, what closes behind them, spaces, and no small letter after; all else of the line is kept."""
    ends = [0, *sentence_ends(line), len(line)]
    assert sentences(line, always) == [line[a:b].strip() for a, b in itertools.pairwise(ends)]


@LAW
@given(LETTERS, st.integers(1, 9))
def test_no_letter_is_lost_and_every_piece_fits(line: str, most: int) -> None:
    """Pieces hold all signs but the spaces between them; what does not fit is halved as a plain loop does it."""

    def within_limit(text: str) -> bool:
        return len(text) <= most

    found = sentences(line, within_limit)
    assert "".join("".join(found).split()) == "".join(line.split())
    assert all(within_limit(piece) for piece in found)
    assert all(piece for piece in found) or found == [""]
    parts = sentences(line, always)
    assert found == [piece for part in parts for piece in halved(part, within_limit)]


@LAW
@given(st.lists(st.one_of(LETTERS, ENDS)).map("".join), st.integers(2, 9))
def test_sentences_and_what_lies_between_them_are_the_text(text: str, most: int) -> None:
    """Lines are never joined, no sentence is empty, and nothing but space and line ends lies between them."""

    def within_limit(part: str) -> bool:
        return len(part) <= most

    found = split_text(text, within_limit)
    gaps = gaps_between(text, found)
    assert len(gaps) == len(found) + 1
    assert gaps[0] + "".join(part + gap for part, gap in zip(found, gaps[1:], strict=True)) == text
    assert not "".join(gaps).strip() and all(part == part.strip() != "" for part in found)
    assert found == [part for line in text.splitlines() for part in sentences(line, within_limit) if part]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("It ends. It begins.", ["It ends.", "It begins."]),
        ("It ends.\tIt begins. ", ["It ends.", "It begins."]),
        ("Dr. Who is no. 5. He left.", ["Dr. Who is no. 5. He left."]),
        ("The U.S. Army and the 3. Armee", ["The U.S. Army and the 3. Armee"]),
        ("the end. and on", ["the end. and on"]),
        ("the end. 12 dogs", ["the end.", "12 dogs"]),
        ("He said: “Go.” Then left.", ["He said: “Go.” Then left."]),
        ("He said: “Gone.” Then left.", ["He said: “Gone.”", "Then left."]),
        ("(It rains.) (It pours.)", ["(It rains.)", "(It pours.)"]),
        ("No!? Yes… Or? Fine", ["No!?", "Yes…", "Or?", "Fine"]),
        ("So... He left.", ["So...", "He left."]),
        ("abc_. He", ["abc_. He"]),
        ("x1y. He", ["x1y. He"]),
        ("「日本。」", ["「日本。」"]),
        ("「日本。」犬。", ["「日本。」", "犬。"]),
        ("何？！本。 犬", ["何？！", "本。", "犬"]),
        ("यह है। वह है", ["यह है।", "वह है"]),
        ("هل؟ نعم", ["هل؟", "نعم"]),
        ("Seite.Nächste", ["Seite.Nächste"]),
        ("", [""]),
        ("  ", [""]),
    ],
)
def test_sentences_of_several_scripts(line: str, parts: list[str]) -> None:
    """Abbreviations, ordinals, quotation marks and scripts without spaces."""
    assert sentences(line, always) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("aaaa bbbb", ["aaaa", "bbbb"]),
        ("aa bbbbbbbbb", ["aa bbb", "bbbbbb"]),  # the only space lies in the first third
        ("aaaaa bb ccccc", ["aaaaa bb", "ccccc"]),  # the later of two spaces is nearer to the middle
        ("aaaaa b ccccc", ["aaaaa", "b ccccc"]),  # both are as near: the first
        ("aaaa bbbbbbb", ["aaaa b", "bbbbbb"]),  # a third of the text is not within its middle third
        ("aaaaaaaa bbb", ["aaaaaa", "aa bbb"]),
        ("abcdefg", ["abc", "defg"]),
        ("aaa\u3000bbb", ["aaa", "bbb"]),
    ],
)
def test_a_sentence_is_halved_at_the_space_nearest_to_its_middle(text: str, parts: list[str]) -> None:
    """Within the middle third; in the middle itself where there is none."""
    assert sentences(text, lambda piece: len(piece) < len(text)) == parts


# ----------------------------------------------------------------------------------------- bytes as text


@LAW
@given(st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"")), max_size=5))
def test_bytes_are_decoded_line_by_line_and_broken_ones_are_marked(raw: list[bytes]) -> None:
    """A line that is not UTF-8 is marked and replaced, one that only contains the replacement sign is not."""
    found = list(decode_lines(line + b"\n" for line in raw))
    for number, (line, result) in enumerate(zip(raw, found, strict=True)):
        try:
            text, broken = (line + b"\n").decode("utf-8"), False
        except UnicodeDecodeError:
            text, broken = (line + b"\n").decode("utf-8", "replace"), True
        text = text[1:] if number == 0 and text.startswith("\ufeff") else text
        while text.endswith(("\r", "\n")):
            text = text[:-1]
        assert result == Line(text, broken)


def test_a_byte_order_mark_and_line_ends_are_no_text() -> None:
    """The mark counts at the beginning of the first line alone; other separators stay inside a line."""
    raw = ["\ufeffa\r\n", "\ufeffb\n", "c\u2028\x0bd \n", "\ufffd\n", "e"]
    found = list(decode_lines(line.encode() for line in raw))
    assert [line.text for line in found] == ["a", "\ufeffb", "c\u2028\x0bd ", "\ufffd", "e"]
    assert not any(line.invalid for line in found)
    assert [line.invalid for line in decode_lines([b"\xe9\n", b"fine\n", b"\xef\xbf\xbd\xff\n"])] == [True, False, True]


# ------------------------------------------------------------------------------------------- chunks


def numbered(count: int, text: str = "") -> list[Line]:
    return [Line(f"{i}{text}", False) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "first", "most", "sizes"),
    [
        (0, 2, 8, []),
        (1, 2, 8, [1]),
        (2, 2, 8, [2]),
        (3, 2, 8, [2, 1]),
        (30, 2, 8, [2, 4, 8, 8, 8]),
        (30, 3, 8, [3, 6, 8, 8, 5]),
        (12, 4, 4, [4, 4, 4]),
        (5, 1, 1, [1] * 5),
    ],
)
@pytest.mark.parametrize("pauses", [False, True])
def test_chunks_double_up_to_the_largest(pauses: bool, count: int, first: int, most: int, sizes: list[int]) -> None:
    """A file is read in full chunks, the last one excepted; a pipe that never pauses as well."""
    arrived = numbered(count)
    chunks = list(LineReader(iter(arrived), pauses).chunks(first, most))
    assert list(itertools.chain(*chunks)) == arrived
    if not pauses:
        assert [len(chunk) for chunk in chunks] == sizes
    assert all(len(chunk) <= most for chunk in chunks)


def settle(reached: Callable[[], bool]) -> None:
    """Wait until a thread has got so far, and a moment longer in case it goes too far."""
    end = time.monotonic() + 5
    while not reached() and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.003)


def test_a_pipe_that_pauses_hands_on_what_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not held back until a chunk is full, and those that come later follow."""
    monkeypatch.setattr(module, "PAUSE", 0.005)
    more = [threading.Event(), threading.Event()]

    def lines() -> Iterator[Line]:
        yield from numbered(3)
        more[0].wait(5)
        yield from numbered(2, "b")
        more[1].wait(5)

    chunks = LineReader(lines(), pauses=True).chunks(8, 64)
    assert next(chunks) == numbered(3)
    threading.Timer(0.03, more[0].set).start()
    assert next(chunks) == numbered(2, "b"), "a pause is no end"
    threading.Timer(0.03, more[1].set).start()
    assert list(chunks) == []


def test_a_slow_file_is_waited_for() -> None:
    """Only a pipe pauses: chunks of a file are full, however long reading takes."""

    def lines() -> Iterator[Line]:
        for line in numbered(4):
            time.sleep(0.025)
            yield line

    assert [len(chunk) for chunk in LineReader(lines(), pauses=False).chunks(4, 4)] == [4]


def test_long_lines_fill_a_chunk_by_their_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting lines stop at the first one that reaches the limit of characters, so memory stays small."""
    monkeypatch.setattr(module, "CHARACTERS", 10)
    pulled = 0

    def lines() -> Iterator[Line]:
        nonlocal pulled
        for _ in range(12):
            pulled += 1
            yield Line("abcde", False)

    sizes, taken = [], 0
    for chunk in LineReader(lines(), pauses=False).chunks(6, 6):
        taken += len(chunk)
        sizes.append(len(chunk))
        settle(lambda taken=taken: pulled >= min(12, taken + 3))  # type: ignore[misc]
        assert pulled == min(12, taken + 3), "two lines wait, and one more was read"
    assert sizes == [2] * 6


def test_a_reader_stays_one_chunk_ahead_and_no_more() -> None:
    """Of a file of any size, memory holds the largest chunk and one line."""
    pulled = 0

    def lines() -> Iterator[Line]:
        nonlocal pulled
        for line in numbered(60):
            pulled += 1
            yield line

    taken = 0
    for chunk in LineReader(lines(), pauses=False).chunks(2, 8):
        taken += len(chunk)
        settle(lambda taken=taken: pulled >= min(60, taken + 9))  # type: ignore[misc]
        assert pulled == min(60, taken + 9)


def test_an_error_of_the_input_comes_after_the_lines_before_it() -> None:
    """No line that was read is lost to an error behind it."""

    def lines() -> Iterator[Line]:
        yield from numbered(5)
        raise OSError("gone")

    found: list[Line] = []
    with pytest.raises(OSError, match="gone"):
        for chunk in LineReader(lines(), pauses=False).chunks(2, 2):
            found += chunk
    assert found == numbered(5)
