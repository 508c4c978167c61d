"""The compiled part of inference on a CPU: `native.cpp`, built at first use and kept in the user's cache folder.

It needs a C++ compiler (c++, or $CXX); without one, `load` returns the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("native.cpp")
# Sums may be reordered, so that they are vectorised; NaN and infinity keep their meaning.
FLAGS = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -shared -fPIC -pthread"
# What the instructions of each level need, best first; every level but the last has a product of bytes or wide vectors.
LEVELS = {
    "avx512_vnni": "-march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512",
    "avx2": "-march=x86-64-v3",
    "any": "",
}


class Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale_O", "offset_O", "bias_O")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "relu")),
    ]


class Norm(ctypes.Structure):
    _fields_ = [("gain_D", ctypes.c_void_p), ("bias_D", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Linear) for name in ("self_in", "self_out", "cross_in", "cross_out", "inner", "outer")),
        *((name, Norm) for name in ("self_norm", "cross_norm", "feed_forward_norm")),
    ]


class Stack(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("slope_N", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "width", "heads", "hidden", "pre_norm", "activation", "rotary")),
        ("last", Norm),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "input_RD",
                "levels",
                "ancestor_RP",
                "memory",
                "sentence_R",
                "first_B",
                "length_B",
                "features_RD",
                "weights_RLNS",
            )
        ),
        *((name, ctypes.c_int64) for name in ("rows", "position", "source", "threads")),
    ]


class Search(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("embedding_VD", "position_TD", "memory", "first_B", "length_B", "longest_B", "penalty_T", "banned_X"),
                *("listed_BU", "rows_OI", "ids_BNT", "log_probability_BNT", "score_BN", "count_BN"),
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("sentences", "beam", "wanted", "columns", "words", "bans", "begin", "end", "threads")
        ),
        ("scale", ctypes.c_float),
    ]


class Source(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_MD", "length_B", "states_MD")),
        *((name, ctypes.c_int64) for name in ("sentences", "threads")),
    ]


class Loaded(NamedTuple):
    library: ctypes.CDLL | None
    problem: str  # why there is none


POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, list[type]] = {
    "linear": [ctypes.POINTER(Linear), POINTER, COUNT, POINTER, COUNT],
    "shortlisted": [ctypes.POINTER(Linear), *[POINTER] * 3, *[COUNT] * 3, POINTER, COUNT],
    "decoder_step": [ctypes.POINTER(Stack), ctypes.POINTER(Step)],
    "encode": [ctypes.POINTER(Stack), ctypes.POINTER(Source)],
    "log_sum_exp": [POINTER, COUNT, COUNT, POINTER, COUNT],
    "search": [ctypes.POINTER(Stack), ctypes.POINTER(Linear), ctypes.POINTER(Search)],
    "top": [*[POINTER] * 3, *[COUNT] * 4, *[POINTER] * 3, COUNT],
}


def level() -> str:
    """Return the best set of instructions that this CPU has."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "avx512_vnni"
    return "avx2" if capability in ("AVX2", "AVX512") else "any"


@lru_cache
def load(level_name: str | None = None) -> Loaded:
    command = compile_command(level_name or level())
    if command is None:
        return Loaded(None, "no C++ compiler found; install one, or set CXX")
    try:
        library = ctypes.CDLL(str(build(command)))
    except (OSError, subprocess.SubprocessError) as error:
        return Loaded(None, f"{command[0]} does not compile {SOURCE.name} ({compile_problem(error)})")
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"seq2seq_{name}")
        function.argtypes, function.restype = arguments, None
    return Loaded(library, "")


def compile_command(level_name: str) -> list[str] | None:
    """Return the compiler and its flags, or None without a compiler."""
    chosen = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if sys.platform == "win32" or shutil.which(chosen[0]) is None:
        return None
    return [*chosen, *FLAGS.split(), *LEVELS[level_name].split()]


def build(command: list[str]) -> Path:
    """Compile the source unless that has been done, by one process at a time, and return the library's path."""
    key = SOURCE.read_bytes() + "\n".join(command).encode()
    folder = cache_folder()
    path = folder / f"native-{hashlib.blake2b(key, digest_size=8).hexdigest()}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                compile_to(path, command)
    return path


def compile_to(path: Path, command: list[str]) -> None:
    unfinished = path.with_suffix(".unfinished")
    try:
        words = [*command, str(SOURCE), "-o", str(unfinished)]
        subprocess.run(words, check=True, capture_output=True, timeout=120)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seq2seq"


def compile_problem(error: Exception) -> str:
    """Return the compiler's first error, or what kept it from running."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line for line in error.stderr.decode(errors="replace").splitlines() if "error" in line]
    return lines[0] if lines else f"exit status {error.returncode}"
