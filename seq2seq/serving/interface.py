"""What a service returns and raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from seq2seq.inference.translator import Translation


@dataclass(frozen=True)
class ModelInfo:
    """A model that the service offers."""

    name: str
    source: str  # languages
    target: str
    runs: tuple[str, ...]  # several form an ensemble
    checkpoint: str  # folder; several are separated by commas
    update: int | None  # the oldest of an ensemble's; None for a folder without a number
    engine: str
    family: str
    parameters: int
    max_length: int  # of a source, in subwords with the end mark
    layers: int  # of the decoder's attention to the source
    heads: int
    scores: dict[str, float]  # of the checkpoint's validation
    config: dict[str, Any]  # of the (first) run


@dataclass(frozen=True)
class SentenceResult:
    source: str
    translations: tuple[Translation, ...]  # best first
    update: int | None = None  # of the checkpoint that translated it


@dataclass(frozen=True)
class TextResult:
    """The translation of a text; it is `gaps[0]`, the first sentence's translation, `gaps[1]`, and so on."""

    text: str
    sentences: tuple[SentenceResult, ...]
    gaps: tuple[str, ...]

    @property
    def update(self) -> int | None:
        """The newest update that translated a sentence of it."""
        return max((s.update for s in self.sentences if s.update is not None), default=None)


class Partial(NamedTuple):
    """The best hypothesis of a sentence so far."""

    sentence: int
    text: str


class Alternative(NamedTuple):
    """A subword that may follow a prefix, and the whole translation that continues with it."""

    piece: str
    probability: float
    text: str


class Histogram(NamedTuple):
    """Counts of values up to each bound, and above the last."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds
    total: float  # sum of the values


@dataclass(frozen=True)
class Stats:
    """Counters since the start, and the present state of the queue and the workers."""

    queued_sentences: int
    queued_characters: int
    running_sentences: int
    batches: int
    sentences: int  # translated or scored
    source_tokens: int
    target_tokens: int
    batch_sizes: Histogram  # sentences
    batch_seconds: Histogram
    workers: int  # alive
    restarts: int
    reloads: int


class ServiceError(Exception):
    """A request that the service cannot answer; the message is one line for the client."""


class Busy(ServiceError):
    """The queue is full."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class TooLarge(ServiceError):
    """The request exceeds a limit of the server."""


class Closing(ServiceError):
    """The server is shutting down."""

    def __init__(self, retry_after: float = 1.0) -> None:
        super().__init__("the server is shutting down; try again soon")
        self.retry_after = retry_after


class WorkerLost(ServiceError):
    """The process that worked on the request died, twice."""


class UnknownModel(ServiceError):
    """There is no model of this name."""


class TimedOut(ServiceError):
    """The request took longer than `timeout_s`."""
