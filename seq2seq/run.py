"""The folder of a run: what lies where, and how a run is found by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seq2seq.errors import UserError, nearest

# Read by the command line before torch is needed, so nothing here imports it.


class Run:
    """outputs/<name>/: config, checkpoints, tensorboard, log and metrics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.checkpoints = folder / "checkpoints"
        self.tensorboard = folder / "tensorboard"
        self.log = folder / "train.log"
        self.metrics = folder / "metrics.jsonl"
        self.result = folder / "result.json"
        self.evaluation = folder / "evaluation"

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    def write_result(self, result: dict[str, Any]) -> None:
        self.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def find(cls, name: str | None, outputs: str) -> Run:
        """A run by its name or folder; without a name the newest one."""
        runs = sorted(Path(outputs).glob("**/config.yaml"), key=lambda path: path.stat().st_mtime)
        found = [cls(path.parent) for path in runs if path.parent.parent.name != "checkpoints"]
        if name is None:
            if found:
                return found[-1]
            raise UserError(f"{outputs}: no run here yet; make one with seq2seq train, or name its folder: run=FOLDER")
        for run in (cls(Path(outputs) / name), cls(Path(name))):
            if run.exists:
                return run
        names = [str(run.folder.relative_to(outputs)) for run in found]
        known = f"; possible: {', '.join(names)}{nearest(name, names)}" if names else "; train one with seq2seq train"
        raise UserError(f"run: no run {name} in {outputs}{known}")
