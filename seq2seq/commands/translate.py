"""seq2seq translate: a prompt on a terminal, a filter everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TextIO

from seq2seq.config import TranslateConfig
from seq2seq.device import tune_cpu
from seq2seq.errors import UserError
from seq2seq.run import Run
from seq2seq.text.sources import read_lines
from seq2seq.translator import Translator

FILTER_LINES = 256  # sentences that a filter reads before it writes


def translate(config: TranslateConfig) -> None:
    """Lines in, lines out: a prompt where a person types, a filter everywhere else."""
    run = Run.find(config.run, config.outputs)
    if config.run is None:
        print(f"run        {run.folder} (the newest)", file=sys.stderr)
    if config.input and config.output and Path(config.input).resolve() == Path(config.output).resolve():
        raise UserError(f"output: {config.output} is the input as well; name another file", code=2)
    if config.input and not Path(config.input).is_file():
        raise UserError(f"input: {config.input} is no file here")
    tune_cpu()
    folder = run.checkpoint(config.checkpoint)
    translator = Translator.from_checkpoint(folder, config.device, config.precision)
    if config.input is None and config.output is None and sys.stdin and sys.stdin.isatty():
        prompt(translator, config, run)
        return
    lines = read_lines(Path(config.input)) if config.input else read_stream(sys.stdin)
    with output_stream(config.output) as out:
        translate_lines(translator, lines, out, config)


def translate_lines(translator: Translator, lines: Iterable[str], out: TextIO, config: TranslateConfig) -> None:
    """One output line for each input line, in order; with n_best > 1 several, each with its line's number and score."""
    lines, number = iter(lines), 0
    while chunk := list(islice(lines, FILTER_LINES)):
        for translations in translator.translate(chunk, config.search):
            number += 1
            if translations[0].cut:
                print(f"line {number}: over {translator.max_length} subwords; its end is left out", file=sys.stderr)
            if config.search.n_best == 1:
                out.write(f"{translations[0].text}\n")
            else:
                out.writelines(f"{number}\t{t.score:.3f}\t{t.text}\n" for t in translations)
        out.flush()


def prompt(translator: Translator, config: TranslateConfig, run: Run) -> None:
    """Type a sentence, read its translation, until Ctrl-D."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (gives `input` its history and editing)
    print(f"{run.folder} on {translator.device}, beam {config.search.beam}. Type a sentence; Ctrl-D ends.")
    while True:
        try:
            # What is no UTF-8 arrives as lone surrogates, which no tokenizer takes.
            sentence = input("> ").encode("utf-8", "replace").decode()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if sentence.strip():
            began = time.perf_counter()
            translations = translator.translate([sentence], config.search)[0]
            seconds = time.perf_counter() - began
            for rank, translation in enumerate(translations):
                print(translation.text, f"  [{translation.score:.3f}" + ("]" if rank else f", {seconds:.2f} s]"))


def read_stream(stream: TextIO | None) -> Iterator[str]:
    """Lines of a pipe; only a line feed ends a line, and what is not UTF-8 is named by its line."""
    for number, line in enumerate(stream.buffer if stream else (), 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            print(f"line {number}: not UTF-8; the broken bytes are replaced", file=sys.stderr)
            text = line.decode("utf-8", "replace")
        yield text.removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")


@contextmanager
def output_stream(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
        yield sys.stdout
        return
    aside = Path(f"{path}.part")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            yield file
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
