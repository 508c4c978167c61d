"""Atomic writing: files and folders appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from filelock import FileLock

from seq2seq.utils.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically; an error names it, and leaves nothing."""
    tmp_path = temporary_path(path)
    try:
        tmp_path.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_file(tmp_path)
        tmp_path.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            tmp_path.unlink()


def temporary_path(path: Path) -> Path:
    """Return a hidden path beside another that no user's file and no other process has."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def require_file(key: str, path: str) -> None:
    """Refuse a path that cannot be read line by line; a pipe such as <(zcat a.gz) can."""
    if not Path(path).exists():
        raise UserError(f"{key}: {path} does not exist")
    if Path(path).is_dir():
        raise UserError(f"{key}: {path} is a folder; give a file")


def fsync_file(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


@contextmanager
def folder_written_atomically(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name of another when complete, and is removed after an error."""
    tmp_dir = temporary_path(folder)
    shutil.rmtree(tmp_dir, ignore_errors=True)  # left by a killed process of the same number
    try:
        tmp_dir.mkdir(parents=True)
        yield tmp_dir
        shutil.rmtree(folder, ignore_errors=True)
        tmp_dir.rename(folder)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Build a folder atomically, once for all processes; return whether it existed already."""
    if folder.is_dir():
        return True
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return True
            with folder_written_atomically(folder) as tmp_dir:
                build(tmp_dir)
    except OSError as error:  # what reads a corpus names its files itself
        reason = error.strerror or error
        raise UserError(f"data.cache: {folder.parent} cannot be written ({reason}); set another folder") from None
    return False


def partial_path(path: str) -> Path:
    """Return the file to write first: a .part beside the output, or beside a link's target; a pipe or device itself."""
    output = Path(path)
    if output.exists() and not output.is_file():
        return output
    return Path(f"{output.resolve() if output.is_symlink() else output}.part")


@contextmanager
def output_stream(path: str | None) -> Iterator[TextIO]:
    """Open standard output, or a file that appears when complete; Ctrl-C leaves a .part file beside it."""
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
        yield sys.stdout
        return
    written = partial_path(path)
    appears = written != Path(path)
    try:
        with open(written, "w", encoding="utf-8", newline="\n") as file:
            yield file
        if appears:
            written.replace(written.with_suffix(""))
    except Exception as error:
        with suppress(OSError):
            if appears:
                written.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
