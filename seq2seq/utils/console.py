"""Terminal output of a translation: subwords with their probabilities, and attention as a heat map."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from torch import Tensor

# From improbable to certain, in a terminal's 256 colours: red, orange, yellow, green.
PROBABILITIES = ((0.1, 196), (0.3, 208), (0.6, 220), (1.01, 76))
SHADES = ((0.6, "█", 33), (0.35, "▓", 33), (0.15, "▒", 39), (0.05, "░", 117), (0.0, " ", 117))


class Screen:
    """An output stream, coloured if it supports and permits colour (no-color.org)."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.colours = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def print(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    def paint(self, text: str, colour: int) -> str:
        return f"\x1b[38;5;{colour}m{text}\x1b[0m" if self.colours else text

    def dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self.colours else text

    def print_columns(self, entries: Sequence[str]) -> None:
        """Print entries in as many columns as fit."""
        column_width = max(map(width, entries)) + 2
        per_row = max(1, shutil.get_terminal_size().columns // column_width)
        for start in range(0, len(entries), per_row):
            self.print("".join(pad(entry, column_width) for entry in entries[start : start + per_row]).rstrip())

    def print_tokens(self, pieces: Sequence[str], log_probabilities: Sequence[float]) -> None:
        """Print each subword above its probability, in as many rows as needed."""
        available = shutil.get_terminal_size().columns
        above, below, used = "", "", 0
        for piece, log in zip([*pieces, "</s>"], log_probabilities, strict=True):
            probability = math.exp(log)
            column_width = max(width(piece), 4) + 2
            if used and used + column_width > available:
                self.print(above.rstrip() + "\n" + below.rstrip())
                above, below, used = "", "", 0
            colour = next(colour for limit, colour in PROBABILITIES if probability < limit)
            above += self.paint(pad(piece, column_width), colour)
            below += self.dim(pad(f"{probability:.2f}", column_width))
            used += column_width
        self.print(above.rstrip() + "\n" + below.rstrip())

    def heat_map(self, weights_TS: Tensor, sources: Sequence[str], targets: Sequence[str]) -> None:
        """Print a row per target subword and two columns per source subword, whose names read downwards."""
        margin = max(map(width, targets)) + 1
        names = [piece.removeprefix("▁") for piece in sources]
        height = max(map(len, names))
        for row in range(height):
            letters = (name.rjust(height)[row] for name in names)
            self.print((" " * margin + "".join(pad(sign, 2) for sign in letters)).rstrip())
        for name, weights in zip(targets, weights_TS.tolist(), strict=True):
            self.print(" " * (margin - 1 - width(name)) + name + " " + "".join(map(self._cell, weights)))
        legend = "  ".join(f"{sign * 2} over {limit:.0%}" for limit, sign, _ in reversed(SHADES[:-1]))
        self.print(self.dim(" " * margin + legend))

    def _cell(self, weight: float) -> str:
        _, sign, colour = next(shade for shade in SHADES if not weight < shade[0])
        return self.paint(sign * 2, colour)


def width(text: str) -> int:
    """Return the terminal columns that a text occupies."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def status(text: str) -> None:
    """Print a line that the next one overwrites, on a terminal only."""
    if sys.stdout.isatty():
        print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def hint(command: str, **values: str) -> str:
    """Return a command line to copy, without keys at their defaults."""
    words = [f"{key}={value}" for key, value in values.items() if (key, value) != ("outputs", "outputs")]
    return shlex.join(["seq2seq", command, *words])
