"""The service: requests in, translations out; models run in worker processes, which get batches of sentences."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from seq2seq.config.schema import SearchConfig, ServeConfig
from seq2seq.inference.translator import Translation
from seq2seq.serving.interface import (
    Alternative,
    Busy,
    Closing,
    Histogram,
    ModelInfo,
    Partial,
    SentenceResult,
    ServiceError,
    Stats,
    TextResult,
    TimedOut,
    TooLarge,
    UnknownModel,
    WorkerLost,
)

__all__ = [
    "Alternative",
    "Busy",
    "Closing",
    "Histogram",
    "ModelInfo",
    "Partial",
    "SentenceResult",
    "Service",
    "ServiceError",
    "Stats",
    "TextResult",
    "TimedOut",
    "TooLarge",
    "UnknownModel",
    "WorkerLost",
]


class Service:
    """Answers requests of one event loop."""

    models: dict[str, ModelInfo]  # in the order given; the first is the default
    search: SearchConfig  # the default search

    @classmethod
    async def start(cls, config: ServeConfig) -> Service:
        """Start the worker processes and load every model."""
        raise NotImplementedError

    async def translate(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        search: SearchConfig | None = None,
        prefixes: Sequence[str] | None = None,
        attention: bool = False,
        split: bool = True,
    ) -> list[TextResult]:
        """Translate each text, sentence by sentence; a prefix begins the translation of its text's first sentence."""
        raise NotImplementedError

    def stream(
        self, text: str, *, model: str | None = None, search: SearchConfig | None = None, prefix: str = ""
    ) -> AsyncIterator[Partial | SentenceResult]:
        """Yield the best hypotheses as they grow, and each sentence's translations in order."""
        raise NotImplementedError

    async def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        model: str | None = None,
        search: SearchConfig | None = None,
        attention: bool = False,
    ) -> list[Translation]:
        """Score each target as a translation of its source."""
        raise NotImplementedError

    async def alternatives(
        self, source: str, prefix: str, *, model: str | None = None, search: SearchConfig | None = None, count: int = 6
    ) -> list[Alternative]:
        """Return the likeliest next subwords after a prefix, each with the translation that continues with it."""
        raise NotImplementedError

    async def reload(self, model: str | None = None) -> list[ModelInfo]:
        """Load newer checkpoints, if any, while requests go on."""
        raise NotImplementedError

    async def close(self) -> None:
        """Answer what was accepted, refuse what is new, and end the workers."""
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError
