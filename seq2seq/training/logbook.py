"""What a run tells: lines on the terminal and in train.log, scalars and texts in TensorBoard, metrics as JSON."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

from seq2seq.run import Run


class Logbook:
    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.folder.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(run.tensorboard))
        self._log = open(run.log, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)
        self._metrics = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115
        self._status = False

    def say(self, text: str = "") -> None:
        """A line that stays."""
        self._clear()
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()

    def fact(self, name: str, value: str) -> None:
        """One line of the page that a run begins with."""
        self.say(f"{name:10} {value}")

    def status(self, text: str) -> None:
        """A line that the next one replaces, on a terminal only."""
        if sys.stdout.isatty():
            self._clear()
            print(text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
            self._status = True

    def scalars(self, kind: str, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, update)
        rounded = {name: round(value, 6) for name, value in values.items()}
        self._metrics.write(json.dumps({"kind": kind, "update": update, **rounded}) + "\n")
        self._metrics.flush()

    def text(self, name: str, update: int, text: str) -> None:
        self._board.add_text(name, text, update)

    def close(self) -> None:
        self._clear()
        self._board.close()
        self._log.close()
        self._metrics.close()

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _clear(self) -> None:
        if self._status:
            print("\r\033[K", end="")
            self._status = False
