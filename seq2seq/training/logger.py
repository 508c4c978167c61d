"""Logging: lines to the terminal and train.log, everything to TensorBoard, metrics as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

from seq2seq.utils.console import status
from seq2seq.utils.run import Run


class RunLogger:
    """Print from the start; after `open` also write to files, beginning with the lines printed before."""

    def __init__(self, silent: bool = False) -> None:
        self.silent = silent  # only one of several processes logs
        self._printed: list[str] = []
        self._files: tuple[Any, TextIO, TextIO] | None = None

    def open(self, run: Run, update: int) -> None:
        """Start writing into a run's folder, continuing after an update."""
        if self.silent:
            return
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.tensorboard), purge_step=update + 1)
        log, metrics = run.log.open("a", encoding="utf-8"), run.metrics.open("a", encoding="utf-8")
        self._files = (writer, log, metrics)
        log.write("".join(f"{line}\n" for line in self._printed))

    def info(self, text: str = "") -> None:
        """Log a permanent line."""
        if self.silent:
            return
        status("")
        print(text, flush=True)
        if self._files is None:
            self._printed.append(text)
        else:
            self._files[1].write(text + "\n")
            self._files[1].flush()

    def field(self, name: str, value: str) -> None:
        """Log one line of the summary at the start of a run."""
        self.info(f"{name:10} {value}")

    def status(self, text: str) -> None:
        """Show a line that the next one replaces, on a terminal only."""
        if not self.silent:
            status(text)

    def scalars(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Log numbers of an update to TensorBoard and the metrics file."""
        self.tensorboard(kind, update, values)
        if self._files is not None:
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            self._files[2].write(json.dumps({"kind": kind, "update": update, **rounded}) + "\n")
            self._files[2].flush()

    def tensorboard(self, kind: str, update: int, values: Mapping[str, float]) -> None:
        """Log numbers to TensorBoard only."""
        if self._files is not None:
            for name, value in values.items():
                self._files[0].add_scalar(f"{kind}/{name}", value, update)

    def text(self, name: str, update: int, text: str) -> None:
        if self._files is not None:
            self._files[0].add_text(name, text, update)

    def validation(
        self,
        update: int,
        scores: Mapping[str, float],
        examples: list[tuple[str, str, str]],
        images: Mapping[str, Any],
        note: str,
    ) -> None:
        """Log scores, translations beside their references, and attention images."""
        summary = f"loss {scores['loss']:.3f}  BLEU {scores['bleu']:.2f}  chrF {scores['chrf']:.2f}"
        self.info(f"validation after update {update:,}: {summary}  ({note})")
        for example in examples:
            self.example(*example)
        self.scalars("validation", update, scores)
        rows = "\n".join("|".join(["", *(text.replace("|", "\\|") for text in example), ""]) for example in examples)
        self.text("examples", update, f"|source|reference|output|\n|---|---|---|\n{rows}")
        for name, image in images.items():
            if self._files is not None:
                self._files[0].add_image(name, np.asarray(image), update, dataformats="HWC")

    def example(self, source: str, reference: str, output: str) -> None:
        for name, text in (("source", source), ("reference", reference), ("output", output)):
            self.info(f"    {name:10} {text}")

    def result(self, config: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Log settings and final scores for TensorBoard's table of runs."""
        if self._files is not None:
            values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
            self._files[0].add_hparams(values, dict(scores), run_name=".")

    def close(self) -> None:
        self.status("")
        for file in self._files or ():
            file.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
