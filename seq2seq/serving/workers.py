"""Worker processes: each loads every model, and answers one batch of sentences at a time through a pipe."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from seq2seq.config.loading import to_dict
from seq2seq.config.schema import SearchConfig, ServeConfig
from seq2seq.inference.checkpoint import CONFIG, count_parameters, read_config
from seq2seq.inference.prompt import LoadedRuns, continuations, open_runs
from seq2seq.inference.translator import Translation
from seq2seq.serving.interface import Alternative, ModelInfo
from seq2seq.utils.device import choose_device, choose_precision, tune_cpu
from seq2seq.utils.errors import UserError, reason_of
from seq2seq.utils.run import Run

PARTIALS_EVERY = 0.03  # seconds: what grows faster is sent together
UNDETERMINED = "und"  # BCP 47 for a language that is not known
PATIENCE = 5.0  # seconds that an idle process has to exit

Kind = Literal["translate", "stream", "score", "alternatives"]
OnPartial = Callable[[int, str], None]  # index within the batch, text so far
Version = tuple[tuple[str, int], ...]  # of a model: each checkpoint's folder, and when it was written


@dataclass(frozen=True)
class Task:
    """The work on a sentence; sentences with equal tasks may share a batch."""

    kind: Kind
    model: str
    search: SearchConfig
    attention: bool = False
    probabilities: bool = True  # of each subword

    def __hash__(self) -> int:
        return hash((self.kind, self.model, self.attention))  # equality compares the search too, which has lists


@dataclass(frozen=True)
class ModelSpec:
    """Runs that form a model, and the checkpoint folders to load; without folders, the newest."""

    name: str
    runs: tuple[str, ...]
    folders: tuple[str, ...] = ()

    def newest(self, checkpoint: str) -> Version:
        """Return the version that the checkpoints on disk are now."""
        return version_of([Run(Path(run)).checkpoint(checkpoint) for run in self.runs])


class Loaded(NamedTuple):
    """What the service needs to know of a loaded model."""

    info: ModelInfo
    version: Version
    tokenizers: dict[str, bytes]


def version_of(folders: Sequence[Path]) -> Version:
    """Return what differs between two checkpoints, even of the same name."""
    try:
        return tuple((str(folder), (folder / CONFIG).stat().st_mtime_ns) for folder in folders)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); restore it, or train again") from None


def folders_of(version: Version) -> tuple[str, ...]:
    return tuple(folder for folder, _ in version)


def model_specs(config: ServeConfig) -> list[ModelSpec]:
    """Return the models of a config: one for each run, or one of all."""
    names = config.run if isinstance(config.run, list) else [config.run]
    runs = [Run.find(name, config.outputs) for name in names]
    if config.ensemble:
        return [ModelSpec("+".join(run.folder.name for run in runs), tuple(map(folder_of, runs)))]
    specs = {run.folder.name: ModelSpec(run.folder.name, (folder_of(run),)) for run in runs}
    if len(specs) < len(runs) or not specs:
        raise UserError(f"run: {config.run} must name different runs, at least one", code=2)
    return list(specs.values())


def folder_of(run: Run) -> str:
    return str(run.folder.resolve())


# ----------------------------------------------------------------------------------- inside the process


class Models:
    """The models of a worker process, and what it does with them."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.loaded: dict[str, LoadedRuns] = {}
        self.known: dict[str, Loaded] = {}

    def load(self, spec: ModelSpec) -> Loaded:
        """Load a model, unless this version of it is loaded; after an error the former one stays."""
        known = self.known.get(spec.name)
        if known is None or not spec.folders or known.version != version_of([Path(f) for f in spec.folders]):
            loaded = open_runs(list(spec.runs), list(spec.folders) or self.config.checkpoint, self.config)
            self.known[spec.name] = described(spec, loaded, self.config)
            self.loaded[spec.name] = loaded
        return self.known[spec.name]

    def work(self, task: Task, items: Sequence[Any], on_partial: OnPartial) -> tuple[list[Any], int | None]:
        """Return the result of each item, and the update of the checkpoint that made them."""
        results = getattr(self, f"_{task.kind}")(task, items, on_partial)
        return results, self.known[task.model].info.update

    def _translate(self, task: Task, items: Sequence[tuple[str, str]], _: OnPartial) -> list[list[Translation]]:
        return self._search(task, items, None)

    def _stream(self, task: Task, items: Sequence[tuple[str, str]], on_partial: OnPartial) -> list[list[Translation]]:
        return self._search(task, items, on_partial)

    def _search(
        self, task: Task, items: Sequence[tuple[str, str]], on_step: OnPartial | None
    ) -> list[list[Translation]]:
        sources, prefixes = map(list, zip(*items, strict=True))
        return self.loaded[task.model].translator.translate(
            sources,
            task.search,
            prefixes=prefixes,
            attention=task.attention,
            on_step=on_step,
            probabilities=task.probabilities,
        )

    def _score(self, task: Task, items: Sequence[tuple[str, str]], _: OnPartial) -> list[Translation]:
        sources, targets = map(list, zip(*items, strict=True))
        return self.loaded[task.model].translator.score(sources, targets, task.search, attention=task.attention)

    def _alternatives(self, task: Task, items: Sequence[tuple[str, str, int]], _: OnPartial) -> list[list[Alternative]]:
        translator = self.loaded[task.model].translator
        return [
            [Alternative(*one) for one in continuations(translator, source, prefix, task.search, count)]
            for source, prefix, count in items
        ]


def described(spec: ModelSpec, loaded: LoadedRuns, config: ServeConfig) -> Loaded:
    """Describe a model, after a first run of it, which shows its attention and warms it up."""
    translator, folders = loaded.translator, loaded.checkpoints
    if config.search.shortlist and translator.engine_for(config.search) == "torch":
        translator.require_shortlist()  # no request may be the first to miss it
    run_config = read_config(folders[0] / CONFIG)
    weights_LNTS = translator.score(["a"], ["a"], attention=True)[0].weights_LNTS
    assert weights_LNTS is not None
    chosen, _ = choose_precision(config.precision, choose_device(config.device)[0])
    precision = "int8" if config.precision == "int8" else str(chosen).removeprefix("torch.")
    updates = [update_of(folder) for folder in folders]
    info = ModelInfo(
        name=spec.name,
        source=run_config.data.source or UNDETERMINED,
        target=run_config.data.target or UNDETERMINED,
        runs=tuple(run.folder.name for run in loaded.runs),
        checkpoint=", ".join(folder.name for folder in folders),
        update=min((update for update in updates if update is not None), default=None),
        engine=name if (name := translator.engine_for(config.search)) != "torch" else f"torch {precision}",
        family=run_config.model.family,
        parameters=sum(map(count_parameters, folders)),
        max_length=translator.max_length,
        layers=weights_LNTS.shape[0],
        heads=weights_LNTS.shape[1],
        scores=validation_scores(loaded.runs[0], updates[0]) if len(folders) == 1 else {},
        config=to_dict(run_config),
    )
    return Loaded(info, version_of(folders), translator.tokenizer.models)


def update_of(folder: Path) -> int | None:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def validation_scores(run: Run, update: int | None) -> dict[str, float]:
    """Return loss, BLEU and chrF of the validation at an update, from the run's metrics."""
    scores: dict[str, float] = {}
    with suppress(OSError, ValueError, KeyError):
        for line in run.metrics.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values["kind"] == "validation" and values["update"] == update:
                scores = {name: values[name] for name in ("loss", "bleu", "chrf") if name in values}
    return scores


class Partials:
    """Texts that grow, sent when enough time has passed since the last time."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self.send, self.sent, self.texts = send, time.monotonic(), dict[int, str]()

    def __call__(self, index: int, text: str) -> None:
        self.texts[index] = text
        if time.monotonic() - self.sent >= PARTIALS_EVERY:
            self.send(self.texts)
            self.sent, self.texts = time.monotonic(), {}


def run_worker(pipe: Connection, config: ServeConfig, specs: Sequence[ModelSpec]) -> None:
    """Load the models and answer requests until the pipe closes, also because the server was killed."""
    # The server ends its workers, after they have answered what it accepted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    tune_cpu()
    models = Models(config)

    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, value)))  # without multiprocessing's shared memory for tensors

    def answer(method: Callable[..., Any], *arguments: Any) -> None:
        try:
            result = method(*arguments)
        except UserError as error:
            send("error", error)
        except Exception as error:
            traceback.print_exc()
            send("error", RuntimeError(reason_of(error)))
        else:
            send("done", result)

    with suppress(EOFError, OSError):
        answer(lambda: [models.load(adapted(spec)) for spec in specs])
        while True:
            name, *arguments = pickle.loads(pipe.recv_bytes())
            if name == "work":
                arguments.append(Partials(lambda texts: send("partial", texts)))
            answer(getattr(models, name), *arguments)


def adapted(spec: ModelSpec) -> ModelSpec:
    """Load the newest checkpoint where training has deleted the one that a lost worker had."""
    return spec if all((Path(folder) / CONFIG).is_file() for folder in spec.folders) else replace(spec, folders=())


# --------------------------------------------------------------------------------- inside the service


class WorkerDiedError(Exception):
    """The process ended before it answered."""


class Worker:
    """A worker process, as the service sees it; its methods block, and one thread at a time may call them."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.process: Any = None
        self.pipe: Connection | None = None
        self.guard, self.ended = threading.Lock(), False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def start(self, specs: Sequence[ModelSpec]) -> list[Loaded]:
        """Start the process, in place of one that died, and wait until it has loaded the models."""
        context = start_method()
        with self.guard:  # another thread may end the service meanwhile
            if self.ended:
                raise WorkerDiedError
            self._kill()
            self.pipe, child_end = context.Pipe()
            arguments = (child_end, self.config, list(specs))
            process = context.Process(target=run_worker, args=arguments, daemon=True)
            process.start()
            self.process = process  # one that could not be started cannot be killed either
            child_end.close()
        result: list[Loaded] = self._receive()
        return result

    def load(self, spec: ModelSpec) -> Loaded:
        result: Loaded = self._call("load", spec)
        return result

    def work(self, task: Task, items: Sequence[Any], on_partial: OnPartial) -> tuple[list[Any], int | None]:
        result: tuple[list[Any], int | None] = self._call("work", task, items, on_partial=on_partial)
        return result

    def close(self) -> None:
        """End an idle process, which exits when its pipe closes."""
        if self.pipe:
            self.pipe.close()
        if self.process is not None:
            self.process.join(PATIENCE)
        self.kill()

    def stop(self) -> None:
        """End the process at once, without waiting for its end; it may be started again."""
        with self.guard:
            self.process.kill()

    def kill(self) -> None:
        """End the process at once and for ever; a thread that waits for its answer gets a WorkerDiedError."""
        with self.guard:
            self.ended = True
            self._kill()

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def _call(self, *request: Any, on_partial: OnPartial | None = None) -> Any:
        assert self.pipe is not None
        try:
            self.pipe.send_bytes(pickle.dumps(request))
        except OSError:
            raise WorkerDiedError from None
        return self._receive(on_partial)

    def _receive(self, on_partial: OnPartial | None = None) -> Any:
        assert self.pipe is not None
        while True:
            try:
                kind, value = pickle.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                raise WorkerDiedError from None
            if kind == "error":
                raise value
            if kind == "done":
                return value
            for index, text in value.items():
                if on_partial:
                    on_partial(index, text)


def start_method() -> Any:
    """Return how processes start: from a server that has imported torch already, where the system has `fork`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
