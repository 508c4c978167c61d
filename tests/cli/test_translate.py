"""Laws of the filter: one line out for one line in, in order, whatever comes in and whatever interrupts it."""

from __future__ import annotations

import io
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from seq2seq.cli.commands.translate import Filter, interrupts_wait
from seq2seq.cli.main import load_config
from seq2seq.inference.streaming import Line, LineReader, decode_lines, sentences
from seq2seq.inference.translator import Translator
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import output_stream
from seq2seq.utils.run import Run
from seq2seq.utils.text import one_line
from tests.helpers.program import Program, forks
from tests.helpers.runs import saved_run

SHORT = ["model.max_length=24"]  # an untrained model never ends a sentence


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return saved_run(tmp_path_factory.mktemp("filter") / "outputs" / "any", "transformer", *SHORT)


@pytest.fixture(scope="module")
def translator(run: Run) -> Translator:
    return Translator.from_checkpoint(run.checkpoint("best"), "cpu", "float32")


def filtered(translator: Translator, given: bytes, *overrides: str) -> str:
    work, out = Filter(translator, load_config("translate", "search=greedy", *overrides)), io.StringIO(newline="\n")
    work.run(LineReader(decode_lines(io.BytesIO(given)), pauses=False), out)
    assert work.done == given.count(b"\n")
    return out.getvalue()


def anything(chance: random.Random) -> bytes:
    """A line unlike those of any corpus."""
    alphabets = [
        "abc .,!?",
        "אבגד ה",
        "العربية ",
        "日本語。！",
        "🙂👩‍👩‍👧🏳️‍🌈",
        "\0\x01\x07\x1b\x7f\t\r\v\f",
        "\u2028\u2029\x85\u200b\ufeff",
        "e\u0301\u0327",
    ]
    kind, length = chance.randrange(len(alphabets) + 5), chance.choice([1, 3, 10, 40])
    if kind == 0:
        return chance.randbytes(length).replace(b"\n", b"")
    if kind == 1:
        return b"x" * chance.choice([100, 50_000] if chance.random() < 0.1 else [100])
    if kind == 2:
        signs = (chr(chance.randrange(0x110000)) for _ in range(length))
        return "".join(signs).replace("\n", "").encode("utf-8", "replace")
    if kind == 3:
        return b" " * length
    if kind == 4:
        return "".join(chance.choices("".join(alphabets), k=length)).encode()
    return "".join(chance.choices(alphabets[kind - 5], k=length)).encode()


def test_a_binary_file_is_refused(translator: Translator) -> None:
    """By file and line; from standard input every line has its translation."""
    config = load_config("translate", "search=greedy", "input=some/file")
    lines = [line for line in decode_lines([b"a\n", b"b\0\n"])]
    with pytest.raises(UserError, match=r"^some/file, line 2: a NUL byte"):
        Filter(translator, config).require_text(lines)
    assert len(filtered(translator, b"a\nb\0\n").splitlines()) == 2


@pytest.mark.slow
def test_as_many_lines_out_as_in(translator: Translator, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is the translation of its line alone, and lines that are not UTF-8 are named."""
    chance = random.Random(1)
    given = [anything(chance) for _ in range(400)]
    out = filtered(translator, b"".join(line + b"\n" for line in given)).split("\n")
    assert len(out) == len(given) + 1 and out[-1] == ""
    for number in chance.sample(range(1, len(given)), 20):
        text = [line.text for line in decode_lines([b"", given[number]])][1]
        alone = translator.translate([text], load_config("translate", "search=greedy").search)
        assert out[number] == one_line(alone[0][0].text)
    errors = capsys.readouterr().err
    for number, line in enumerate(given, 1):
        try:
            line.decode()
            assert f"line {number}: not UTF-8" not in errors
        except UnicodeDecodeError:
            assert f"line {number}: not UTF-8" in errors
    assert "truncated to 24 subwords" in errors and "\r" not in errors, "no progress where nobody watches"


def test_a_translation_is_one_line() -> None:
    """Subwords made of bytes can spell line feeds."""
    assert one_line("a\nb\r\nc\u2028d\x0b\x85e f") == "a b c d  e f"
    assert one_line("unchanged  text ") == "unchanged  text "


def test_ranked_lines_carry_the_number_of_their_line(translator: Translator) -> None:
    out = filtered(translator, b"two cats\n\nthe dog\n", "search.beam=3", "search.n_best=3")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == ["1", "1", "1", "2", "3", "3", "3"] and rows[3][2] == ""
    assert all(float(a[1]) >= float(b[1]) for a, b in itertools.pairwise(rows) if a[0] == b[0])


# ------------------------------------------------------------------------------------ arriving lines


def lines(count: int) -> list[Line]:
    return [Line(str(i), False) for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000])
def test_chunks_hold_all_lines_in_order(count: int) -> None:
    chunks = list(LineReader(iter(lines(count)), pauses=False).chunks(4, 32))
    assert [line for chunk in chunks for line in chunk] == lines(count)
    sizes = [len(chunk) for chunk in chunks]
    assert all(size == min(4 * 2**i, 32) for i, size in enumerate(sizes[:-1])), "a file's chunks depend on nothing else"


def test_what_has_arrived_is_handed_on_when_the_input_pauses() -> None:
    """The input continues only after its first lines are translated: waiting for more would never end."""
    came_out = threading.Event()

    def pausing() -> Iterator[Line]:
        yield from lines(3)
        assert came_out.wait(timeout=60)
        yield from lines(2)

    found = []
    for chunk in LineReader(pausing(), pauses=True).chunks(64, 64):
        found += chunk
        if len(found) == 3:
            came_out.set()
    assert found == [*lines(3), *lines(2)]


def test_no_more_is_read_than_fits() -> None:
    """A file of any size takes the same memory: the reader waits for the translator."""
    read: list[int] = []

    def long_lines() -> Iterator[Line]:
        for number in range(64):
            read.append(number)
            yield Line("x" * 2**18, False)

    for taken, chunk in enumerate(LineReader(long_lines(), pauses=False).chunks(4, 4), 1):
        assert len(chunk) == 4
        assert len(read) <= 4 * taken + 4 + 1, "at most a chunk that waits, and a line in hand"
    assert len(read) == 64


def test_lines_before_a_read_error_are_still_translated() -> None:
    def breaking() -> Iterator[Line]:
        yield from lines(5)
        raise UserError("the archive is cut off")

    found: list[Line] = []
    with pytest.raises(UserError, match="cut off"):
        for chunk in LineReader(breaking(), pauses=False).chunks(2, 4):
            found += chunk
    assert found == lines(5)


def test_only_a_line_feed_ends_a_line() -> None:
    given = "\ufeffone\r\ntwo\u2028still\x0btwo\rand\n\ufeff\nlast".encode()
    texts = [line.text for line in decode_lines(io.BytesIO(given))]
    assert texts == ["one", "two\u2028still\x0btwo\rand", "\ufeff", "last"]
    assert [line.invalid for line in decode_lines([b"a\xffb\n", "\ufffd\n".encode(), b"ok\n"])] == [True, False, False]


# ----------------------------------------------------------------------------------------- sentences


def within_limit(text: str) -> bool:
    return len(text) <= 60


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("A dog runs. A cat sleeps.", ["A dog runs.", "A cat sleeps."]),
        ("Wirklich? „Ja!“ Gut so...  Ende", ["Wirklich?", "„Ja!“ Gut so...", "Ende"]),
        ("Mr. Smith met Dr. No on the 3. of May.", ["Mr. Smith met Dr. No on the 3. of May."]),
        ("It costs 3.50 at example.com, e.g. there.", ["It costs 3.50 at example.com, e.g. there."]),
        ("昨日は雨だった。今日は晴れだ！", ["昨日は雨だった。", "今日は晴れだ！"]),
        ("هل هذا كلب؟ نعم هذا كلب.", ["هل هذا كلب؟", "نعم هذا كلب."]),
        ("", [""]),
    ],
)
def test_a_line_is_split_into_sentences(line: str, parts: list[str]) -> None:
    assert sentences(line, within_limit) == parts


def test_nothing_of_a_long_line_is_lost() -> None:
    chance = random.Random(2)
    for _ in range(200):
        line = anything(chance).decode("utf-8", "replace")
        parts = sentences(line, within_limit)
        assert "".join("".join(parts).split()) == "".join(line.split())
        assert all(within_limit(part) or len(part) < 2 for part in parts)


def test_split_lines_translate_as_their_sentences(translator: Translator, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["The old dog runs. A man sees two cats.", "", "cat " * 40]
    split = [sentences(line, Filter(translator, load_config("translate")).within_limit) for line in given]
    assert len(split[0]) == 2 and len(split[2]) > 1
    search = load_config("translate", "search=greedy").search
    wanted = [" ".join(t[0].text for t in translator.translate(parts, search) if t[0].text) for parts in split]
    assert filtered(translator, "".join(f"{line}\n" for line in given).encode(), "split_lines=true") == "".join(
        f"{one_line(line)}\n" for line in wanted
    )
    assert "truncated" not in capsys.readouterr().err
    with pytest.raises(UserError, match="split_lines"):
        load_config("translate", "split_lines=true", "search.n_best=2")


# ---------------------------------------------------------------------------------------- interrupts


def test_an_output_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(UserError), output_stream(str(path)) as out:
        out.write("half\n")
        raise UserError("no more input")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), output_stream(str(path)) as out:
        out.write("line\n")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.part", "line\n")], (
        "Ctrl-C keeps the complete lines"
    )
    with output_stream(str(path)) as out:
        out.write("all\n")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out", "all\n")]
    for refused in (path / "below", tmp_path):
        with pytest.raises(UserError, match="cannot be written"), output_stream(str(refused)):
            pass


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    for text in ("new\n", "newer\n"):
        with output_stream(str(tmp_path / "link")) as out:
            out.write(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder/file").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "link"]


def test_an_output_that_is_a_pipe_is_written_to(tmp_path: Path) -> None:
    """And stays one, whatever happens."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with output_stream(str(pipe)) as out:
        out.write("line\n")
    assert os.read(reader, 100) == b"line\n"
    with pytest.raises(UserError), output_stream(str(pipe)):
        raise UserError("no more input")
    os.close(reader)
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


@forks
def test_a_file_is_divided_among_processes(run: Run, program: Program, tmp_path: Path) -> None:
    """The same lines in the same order as from one process."""
    (tmp_path / "in.txt").write_text("".join(f"{'the dog ' * (i % 9)}\n" for i in range(90)), encoding="utf-8")
    overrides = [f"run={run.folder}", f"input={tmp_path / 'in.txt'}", "search=greedy", "precision=float32"]
    for processes in (1, 3):
        program("translate", *overrides, f"processes={processes}", f"output={tmp_path / str(processes)}")
    assert (tmp_path / "3").read_text("utf-8") == (tmp_path / "1").read_text("utf-8")


def test_ctrl_c_waits_for_the_line() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_leaves_complete_lines(run: Run) -> None:
    """Output begins while the input is open, and an interrupted program reports how far it got."""
    command = [sys.executable, "-m", "seq2seq", "translate", f"run={run.folder}", "search=greedy"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as program:
        assert program.stdin and program.stdout and program.stderr
        program.stdin.write(b"the dog\nthe cat\n")
        program.stdin.flush()
        first = program.stdout.readline() + program.stdout.readline()
        program.send_signal(signal.SIGINT)
        rest, errors = program.stdout.read(), program.stderr.read().decode()
        assert program.wait() == 130
    assert (first + rest).count(b"\n") == 2 and rest == b""
    assert errors.strip() == "stopped: 2 complete lines"
