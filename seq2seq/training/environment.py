"""Record what a run depends on besides its config: code, packages, data, tokenizer and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from seq2seq import __version__
from seq2seq.config.loading import differences
from seq2seq.config.paths import PACKAGE
from seq2seq.data.corpus import Corpora, Corpus
from seq2seq.data.store import key_of
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.utils.io import write_atomically
from seq2seq.utils.run import Run

PACKAGES = ("torch", "numpy", "sentencepiece", "datasets", "sacrebleu", "hydra-core", "safetensors")


def record(run: Run, update: int, seed: int, corpora: Corpora, tokenizer: Tokenizer) -> None:
    """Add an entry to environment.json for a run that starts, or resumes after an update."""
    entry = {
        "update": update,
        "seed": seed,
        "code": code(),
        "packages": packages(),
        "data": {split: fingerprint(getattr(corpora, split)) for split in ("train", "validation", "test")},
        "tokenizer": hashlib.sha256(b"".join(tokenizer.models.values())).hexdigest()[:20],
        "hardware": hardware(),
    }
    entries = [entry for entry in read(run) if entry["update"] < update]
    write_atomically(run.environment, json.dumps([*entries, entry], indent=1, ensure_ascii=False) + "\n")


def read(run: Run) -> list[dict[str, Any]]:
    """Return every recorded start of a run; empty if there is none."""
    try:
        entries: list[dict[str, Any]] = json.loads(run.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return entries


def code() -> dict[str, str | bool]:
    """Return the version of this package and, in a git checkout, its commit and whether files differ from it."""
    info: dict[str, str | bool] = {"seq2seq": __version__}
    checkout = PACKAGE.parent
    if (checkout / ".git").exists():
        commit, changes = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain")
        if commit:
            info |= {"commit": commit, "changed": bool(changes)}
    return info


def _git(folder: Path, *arguments: str) -> str:
    try:
        process = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def packages() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def fingerprint(corpus: Corpus | None) -> str | None:
    """Return a fingerprint of all sentences of a corpus."""
    if corpus is None:
        return None
    return corpus.fingerprint or key_of(*corpus.source, *corpus.target)


def hardware() -> dict[str, Any]:
    info: dict[str, Any] = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        info["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def processor() -> str:
    """Return the name of the CPU, which Linux has only in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List the differences between two starts, such as "packages.torch: 2.6 → 2.7"."""
    parts = ("code", "packages", "data", "hardware", "tokenizer")
    old, new = ({part: entry[part] for part in parts} for entry in (before, after))
    return [str(change) for change in differences(old, new)]
