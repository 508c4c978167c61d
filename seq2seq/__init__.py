"""Train a translator from scratch, measure it, and use it.

    from seq2seq import Translator, evaluate, train

The names below are imported when they are first used, so that `import seq2seq` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seq2seq.api import evaluate, train
    from seq2seq.inference.translator import Translation, Translator

__version__ = "0.1.0"
__all__ = ["Translation", "Translator", "__version__", "evaluate", "train"]

_MODULES = {
    "evaluate": "seq2seq.api",
    "train": "seq2seq.api",
    "Translation": "seq2seq.inference.translator",
    "Translator": "seq2seq.inference.translator",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
