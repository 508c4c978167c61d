"""What a run tells: lines on the terminal and in train.log, scalars and texts in TensorBoard, metrics as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any, TextIO

from seq2seq.run import Run


class Logbook:
    """Speaks from the start; from `open` on it writes as well, beginning with what was said before."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._files: tuple[Any, TextIO, TextIO] | None = None

    def open(self, run: Run, update: int) -> None:
        """Write into a run's folder, going on after an update."""
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run.tensorboard), purge_step=update + 1)
        log, metrics = run.log.open("a", encoding="utf-8"), run.metrics.open("a", encoding="utf-8")
        self._files = (board, log, metrics)
        log.write("".join(f"{line}\n" for line in self._said))

    def say(self, text: str = "") -> None:
        """A line that stays."""
        status("")
        print(text, flush=True)
        if self._files is None:
            self._said.append(text)
        else:
            self._files[1].write(text + "\n")
            self._files[1].flush()

    def fact(self, name: str, value: str) -> None:
        """One line of the page that a run begins with."""
        self.say(f"{name:10} {value}")

    def status(self, text: str) -> None:
        """A line that the next one replaces, on a terminal only."""
        status(text)

    def scalars(self, kind: str, update: int, values: dict[str, float]) -> None:
        if self._files is not None:
            board, _, metrics = self._files
            for name, value in values.items():
                board.add_scalar(f"{kind}/{name}", value, update)
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            metrics.write(json.dumps({"kind": kind, "update": update, **rounded}) + "\n")
            metrics.flush()

    def text(self, name: str, update: int, text: str) -> None:
        if self._files is not None:
            self._files[0].add_text(name, text, update)

    def close(self) -> None:
        status("")
        for file in self._files or ():
            file.close()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def status(text: str) -> None:
    """A line that the next one replaces, on a terminal only."""
    if sys.stdout.isatty():
        print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
