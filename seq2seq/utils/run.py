"""The folder of a run: its paths, and finding a run by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from seq2seq.utils.errors import UserError, nearest
from seq2seq.utils.io import write_atomically

# The command line imports this before it needs torch, so nothing here imports torch.


INDEX = "index.json"


class Run:
    """`outputs/<name>/`: config, checkpoints, tensorboard, log and metrics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.checkpoints = folder / "checkpoints"
        self.tensorboard = folder / "tensorboard"
        self.log = folder / "train.log"
        self.metrics = folder / "metrics.jsonl"
        self.result = folder / "result.json"
        self.evaluation = folder / "evaluation"
        self.environment = folder / "environment.json"

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint to resume or to translate with."""
        return bool(self.index())

    def index(self) -> dict[str, Any]:
        """Return the names of the last and the best checkpoint; without an index, the newest checkpoint is the last."""
        try:
            return {**json.loads((self.checkpoints / INDEX).read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError):
            complete = sorted(path.name for path in self.checkpoints.glob("update-*"))
            return {"last": complete[-1]} if complete else {}

    def checkpoint(self, which: str) -> Path:
        """Return the checkpoint folder for "last", "best", or a path."""
        index = self.index()
        if which in ("last", "best"):
            if "last" not in index:
                raise UserError(f"{self.folder}: no checkpoint yet; the run saves one at each validation")
            # If every score was NaN, there is no best checkpoint.
            return self.checkpoints / str(index.get(which, index["last"]))
        for folder in (Path(which), self.checkpoints / which):
            if (folder / "config.yaml").is_file():
                return folder
        raise UserError(f"checkpoint: {which} is not a checkpoint; possible: best, last, or a checkpoint's folder")

    def clear(self) -> None:
        """Remove the files of the run, and nothing else in its folder."""
        for path in (self.checkpoints, self.tensorboard, self.evaluation):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.config, self.log, self.metrics, self.result, self.environment):
            path.unlink(missing_ok=True)

    def drop_metrics_after(self, update: int) -> None:
        """Drop metrics that a killed run logged after its last checkpoint: resuming repeats those updates."""
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            remaining = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update]
            write_atomically(self.metrics, "".join(remaining))

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.result, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def all(cls, outputs: str) -> list[Run]:
        """Return every run in a folder that has a checkpoint, the newest last."""
        indices = Path(outputs).glob(f"**/checkpoints/{INDEX}")
        return [cls(path.parent.parent) for path in sorted(indices, key=lambda path: path.stat().st_mtime)]

    @classmethod
    def find(cls, name: str | None, outputs: str, key: str = "run") -> Run:
        """Find a run by its name or folder, which errors call `key`; without a name, the newest one."""
        runs = cls.all(outputs)
        if name is None:
            if runs:
                return runs[-1]
            raise UserError(f"{outputs}: no runs found; train one with seq2seq train, or give its folder: run=FOLDER")
        for run in (cls(Path(outputs) / name), cls(Path(name))):
            if run.exists:
                return run
            if run.config.is_file():
                raise UserError(f"{key}: {run.folder} has no checkpoint yet; the run saves one at each validation")
        names = [str(run.folder.relative_to(outputs)) for run in runs]
        newest = ", ".join(names[:-11:-1]) + (", …" if len(names) > 10 else "")
        known = f"; possible: {newest}{nearest(name, names)}" if names else "; train one with seq2seq train"
        if Path(name).is_file():
            known = "; it is a file: write input=FILE to translate or score one"
        raise UserError(f"{key}: no run {name} in {outputs}{known}")
