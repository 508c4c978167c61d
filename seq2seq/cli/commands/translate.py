"""seq2seq translate: an interactive prompt on a terminal, a filter everywhere else."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from seq2seq.config.schema import TranslateConfig
from seq2seq.data.sources import raw_lines
from seq2seq.inference.prompt import converse, open_runs
from seq2seq.inference.streaming import Line, LineReader, decode_lines, sentences
from seq2seq.inference.translator import EMPTY, Translation, Translator
from seq2seq.utils.device import tune_cpu
from seq2seq.utils.errors import STOPPED, UserError
from seq2seq.utils.io import output_stream, partial_path, require_file
from seq2seq.utils.text import one_line

FIRST_LINES, MOST_LINES = 256, 4096  # per chunk: 4,096 sorted lines of real text are padded by 2 to 8 %


def translate(config: TranslateConfig) -> None:
    """Translate line by line: a prompt on a terminal, a filter everywhere else."""
    if config.input and config.output and Path(config.input).resolve() == Path(config.output).resolve():
        raise UserError(f"output: {config.output} is also the input; choose another file", code=2)
    if config.input:
        require_file("input", config.input)
    tune_cpu()
    if config.input is None and config.output is None and sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        converse(config)
        return
    opened = open_runs(config.run, config.checkpoint, config)
    if config.run is None:
        print(f"run        {opened.runs[0].folder} (the newest)", file=sys.stderr)
    translator = opened.translator.use_processes(config.processes)
    if config.engine != "torch":
        print(f"engine     {translator.engine_for(config.search)}", file=sys.stderr)
    lines = LineReader(decode_lines(raw_lines(Path(config.input))), pauses=False) if config.input else stdin_lines()
    line_filter = Filter(translator, config)
    try:
        with output_stream(config.output) as out:
            line_filter.run(lines, out)
    except KeyboardInterrupt:
        kept_in = f" are in {partial_path(config.output)}" if config.output else ""
        print(f"\nstopped: {line_filter.done:,} complete lines{kept_in}", file=sys.stderr)
        raise SystemExit(STOPPED) from None


class Filter:
    """One output line for each input line, in order; with n_best > 1 several, each with its line's number and score."""

    def __init__(self, translator: Translator, config: TranslateConfig) -> None:
        self.translator, self.config = translator, config
        self.done = 0  # lines read, translated, and written
        self.began = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        # If translations and progress would share a terminal, the translations alone show the progress.
        own_screen = self.terminal and (config.output is not None or not sys.stdout.isatty())
        self.progress = own_screen if config.progress is None else config.progress

    def run(self, lines: LineReader, out: TextIO) -> None:
        for chunk in lines.chunks(FIRST_LINES, MOST_LINES):
            self.require_text(chunk)
            results = self.translated([line.text for line in chunk])
            written = [self.written(self.done + i, translations) for i, translations in enumerate(results, 1)]
            with interrupts_wait():
                out.write("".join(written))
                out.flush()
                self.done += len(chunk)
            self.print_messages(chunk, results)
        if self.progress:
            print(self.speed(), file=sys.stderr)

    def translated(self, texts: list[str]) -> list[list[Translation]]:
        if not self.config.split_lines:
            return self.translator.translate(texts, self.config.search, probabilities=False)
        parts = [sentences(text, self.within_limit) for text in texts]
        pieces = [part for line in parts for part in line]
        results = iter(self.translator.translate(pieces, self.config.search, probabilities=False))
        return [[joined([next(results)[0] for _ in line])] for line in parts]

    def require_text(self, chunk: list[Line]) -> None:
        """Refuse a binary file; from standard input, every line has its translation."""
        if self.config.input and (wrong := [i for i, line in enumerate(chunk, self.done + 1) if "\0" in line.text]):
            raise UserError(f"{self.config.input}, line {wrong[0]}: a NUL byte; give a text file in UTF-8")

    def within_limit(self, text: str) -> bool:
        return len(self.translator.tokenizer.encode_source([text])[0]) <= self.translator.max_length

    def written(self, number: int, translations: list[Translation]) -> str:
        if self.config.search.n_best == 1:
            return f"{one_line(translations[0].text)}\n"
        return "".join(f"{number}\t{t.score:.3f}\t{one_line(t.text)}\n" for t in translations)

    def print_messages(self, chunk: list[Line], results: list[list[Translation]]) -> None:
        """Print warnings about the lines, then the speed."""
        clear = "\x1b[K" if self.terminal else ""
        file = f"{self.config.input}, " if self.config.input else ""
        for number, (line, translations) in enumerate(zip(chunk, results, strict=True), self.done - len(chunk) + 1):
            if line.invalid:
                print(f"{file}line {number}: not UTF-8; invalid bytes are replaced{clear}", file=sys.stderr)
            if translations[0].truncated:
                limit = f"source truncated to {self.translator.max_length} subwords; split_lines=true avoids this"
                print(f"{file}line {number}: {limit}{clear}", file=sys.stderr)
        if self.progress:
            # On a terminal each status overwrites the one before.
            print(self.speed() + clear, end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)

    def speed(self) -> str:
        seconds = time.perf_counter() - self.began
        return f"{self.done:,} lines in {seconds:,.1f} s, {self.done / seconds:,.0f} sentences/s"


def joined(parts: Sequence[Translation]) -> Translation:
    """Join the translations of a line's sentences into one."""
    text = " ".join(part.text for part in parts if part.text)
    return replace(EMPTY, text=text, truncated=any(part.truncated for part in parts))


def stdin_lines() -> LineReader:
    """Read the pipe or the file at standard input."""
    if sys.stdin is None:
        return LineReader(iter(()), pauses=False)
    descriptor = sys.stdin.fileno()
    # A separate reader: a thread that waits in sys.stdin would keep the program from exiting.
    lines = open(descriptor, "rb", closefd=False)  # noqa: SIM115 (it stays open as long as the program)
    return LineReader(decode_lines(lines), pauses=not stat.S_ISREG(os.fstat(descriptor).st_mode))


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Delay Ctrl-C until after the block, so that no line is left half-written."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
