"""Shared by the tests of training: small trainers, given validations, a clock, and processes that are threads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seq2seq.cli.main import load_config
from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import Batches, RankBatches
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import Batch, EncodedCorpus
from seq2seq.data.tokenizer import Tokenizer, train_tokenizer
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.averaging import build_average
from seq2seq.training.checkpoint import Checkpoints, Progress, RunState
from seq2seq.training.distributed import SINGLE_PROCESS, ProcessGroup
from seq2seq.training.logger import RunLogger
from seq2seq.training.optimizers import build_optimizer
from seq2seq.training.sharding import shard_weights
from seq2seq.training.trainer import Trainer
from seq2seq.training.validation import Validation
from seq2seq.utils.run import Run
from tests.helpers.configs import tiny_config
from tests.helpers.corpora import random_corpus

LENGTHS = [3, 5, 2, 7, 4, 6, 1, 8]
SMALL = {
    "transformer": ["model.width=8", "model.feed_forward=16", "model.encoder_layers=1", "model.decoder_layers=1"],
    "lstm": ["model.width=8", "model.embedding=6", "model.encoder_layers=1", "model.decoder_layers=1"],
}


@lru_cache
def base_config(family: str) -> TrainConfig:
    return tiny_config(
        family, *SMALL[family], "training.tokens=24", "optimizer.warmup=3", "optimizer.schedule=constant"
    )


def cut_words(x_RTD: Tensor, p: float, training: bool, *, words: bool) -> Tensor:
    """Words chosen by their embeddings, not at random: the same ones, however rows are divided."""
    return x_RTD * (x_RTD[..., :1] > 0) if training and p else x_RTD


def varied(config: TrainConfig | str, **changes: Any) -> TrainConfig:
    """A config, or a family's small one, with other values: `training__patience=2` changes training.patience."""
    made = base_config(config) if isinstance(config, str) else config
    for key, value in changes.items():
        made = _replaced(made, key.split("__"), value)
    return made


def _replaced(part: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(part, **{name: _replaced(getattr(part, name), rest, value) if rest else value})


@lru_cache
def small_tokenizer() -> Tokenizer:
    words = Corpus(["the old dog sees a red bird"] * 4, ["der alte Hund sieht einen roten Vogel"] * 4)
    return train_tokenizer(words, load_config("train", "tokenizer=bpe", "tokenizer.vocabulary=40").tokenizer)[0]


def given(scores: Iterable[float | dict[str, float]], monitor: str = "bleu") -> Callable[[Seq2Seq], Validation]:
    """Validations with these scores, one after the other."""
    waiting = iter(scores)

    def validate(model: Seq2Seq) -> Validation:
        score = next(waiting)
        scores = score if isinstance(score, dict) else {monitor: score}
        return Validation({"loss": 1.0, "bleu": 0.0, "chrf": 0.0, **scores}, [])

    return validate


class Quiet(RunLogger):
    """A silent logger that records everything it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.notes: list[tuple[str, int, dict[str, float]]] = []
        self.validations: list[tuple[Any, ...]] = []

    def info(self, text: str = "") -> None:
        self.lines.append(text)

    def status(self, text: str) -> None:
        pass

    def scalars(self, kind: str, update: int, values: Any) -> None:
        self.notes.append((kind, update, dict(values)))

    def tensorboard(self, kind: str, update: int, values: Any) -> None:
        self.notes.append((f"board {kind}", update, dict(values)))

    def validation(self, *arguments: Any) -> None:
        self.validations.append(arguments)


def make_state(
    config: TrainConfig,
    checkpoints: Checkpoints,
    process_group: ProcessGroup = SINGLE_PROCESS,
    tokenizer: Tokenizer | None = None,
    encoded: EncodedCorpus | None = None,
    precision: torch.dtype = torch.float32,
) -> RunState:
    tokenizer = tokenizer or small_tokenizer()
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer.vocabulary)
    if process_group.shards_weights:
        shard_weights(model, precision)
    torch.manual_seed(config.seed + process_group.rank)
    encoded = encoded or random_corpus(LENGTHS * 2)
    batches = Batches(
        encoded,
        64 if config.training.tokens == "auto" else config.training.tokens,
        config.seed,
        update_tokens=config.training.update_tokens,
        rank=process_group.rank,
        world_size=process_group.world_size,
    )
    optimizer = build_optimizer(model, config.optimizer)
    average = build_average(config, model, optimizer, checkpoints.recent_weights, process_group)
    return RunState(config, tokenizer, model, optimizer, batches, Progress(), average, process_group)


def make_trainer(
    config: TrainConfig | str,
    folder: Path,
    scores: Iterable[float | dict[str, float]] = (),
    *,
    resume: bool = False,
    precision: torch.dtype = torch.float32,
    logger: RunLogger | None = None,
    **rest: Any,
) -> Trainer:
    """A trainer whose validations find the given scores; `resume` continues from the folder's last checkpoint."""
    config = base_config(config) if isinstance(config, str) else config
    checkpoints = Checkpoints(Run(folder), config.training.recent)
    state = make_state(config, checkpoints, precision=precision, **rest)
    if resume:
        state.read(checkpoints.run.checkpoint("last"))
    return Trainer(state, precision, given(scores, config.training.monitor), checkpoints, logger or Quiet())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rank_batches_of(*batches: Batch, target_tokens: int | None = None) -> RankBatches:
    return RankBatches(list(batches), target_tokens or sum(batch.target_tokens for batch in batches))


class Clock:
    """A clock that advances only by `sleep`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Threads:
    """Processes that are threads: torch's collectives, as each rank of them calls these."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.calls = size, 0
        self.barrier, self.own = threading.Barrier(size, timeout=20), threading.local()
        self.values: list[Any] = [None] * size
        monkeypatch.setattr("torch.distributed.all_reduce", self.all_reduce)
        monkeypatch.setattr("torch.distributed.all_gather_object", self.all_gather_object)

    def _exchange(self, value: Any) -> list[Any]:
        self.values[self.own.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def all_reduce(self, tensor: Tensor) -> None:
        self.calls += 1
        total = torch.stack(self._exchange(tensor.clone())).sum(0)
        tensor.copy_(total)

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        for rank, each in enumerate(self._exchange(value)):
            values[rank] = each  # into the list that is given, as torch does

    def run(self, work: Callable[[ProcessGroup], Any]) -> list[Any]:
        """What `work` gives in each process, in the order of ranks."""
        found: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self.own.rank = rank
            try:
                found[rank] = work(ProcessGroup(rank, self.size))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return found


def updates_of(made: Trainer, count: int) -> Iterator[RankBatches]:
    """The batches of the next updates."""
    updates = iter(made.state.batches)
    for _ in range(count):
        yield next(updates)
