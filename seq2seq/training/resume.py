"""The folder of a run: locked against a second training, and what changed since the training that it resumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from seq2seq.config import loading as configs
from seq2seq.config.loading import Change
from seq2seq.config.schema import DataConfig, TrainConfig, settled
from seq2seq.data.corpus import Corpus
from seq2seq.inference.checkpoint import CONFIG, read_plain_config, write_config
from seq2seq.training import environment
from seq2seq.training.checkpoint import Progress
from seq2seq.training.distributed import ProcessGroup
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run

PATH_KEYS = ("name", "outputs", "overwrite")  # the path of a run, not its training
# Settings that a resumed run cannot change.
FIXED_KEYS = ("model.", "tokenizer.", "data.source", "data.target", "optimizer.name", "init_from", "seed")


@contextmanager
def lock_run(run: Run, process_group: ProcessGroup) -> Iterator[None]:
    """Lock the run's folder against a second training process."""
    if not process_group.is_main:
        yield
        return
    lock = FileLock(run.folder.with_name(f".{run.folder.name}.lock"), timeout=0)
    created = [folder for folder in (run.folder.parent, *run.folder.parent.parents) if not folder.exists()]
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"name: another process is training {run.folder}; choose another name=…") from None
    except OSError as error:
        raise UserError(f"outputs: {run.folder} cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink()  # before another process can lock it
        lock.release()
        with suppress(OSError):  # a run that never began leaves no folder behind
            for folder in created:
                folder.rmdir()


def list_changes(run: Run, config: TrainConfig) -> list[Change]:
    """List the changes to the run being resumed; none for a new run."""
    if config.overwrite or not run.exists:
        return []
    stored = configs.with_defaults(read_plain_config(run.checkpoint("last") / CONFIG))
    changes = [change for change in configs.differences(stored, configs.to_dict(config)) if change.key not in PATH_KEYS]
    refused = [change for change in changes if change.key.startswith(FIXED_KEYS) and not change.key.endswith("dropout")]
    # Another model differs in every setting; its name suffices.
    refused = [change for change in refused if change.key == "model.name"] or refused
    if refused:
        raise UserError(
            *(f"{change}: a run's model, tokenizer, languages, optimizer and seed are fixed" for change in refused),
            f"{run.folder} exists; choose another name=…, or overwrite=true to start again",
            code=2,
        )
    return changes


def compare_validation_sets(run: Run, progress: Progress, data: DataConfig, validation: Corpus) -> str:
    """Forget the best score where the validation set is another than before → a note: two sets do not compare."""
    starts = [entry for entry in environment.read(run) if entry["update"] < progress.update]
    if not starts or starts[-1]["data"]["validation"] == environment.fingerprint(validation):
        return ""
    progress.best_score, progress.best_loss, progress.without_gain = -math.inf, math.inf, 0
    trained_on = "" if data.validation else "; the run may have trained on its pairs"
    return f"the validation set: the best checkpoint is chosen anew{trained_on}"


def prepare_run_folder(run: Run, config: TrainConfig, update: int) -> None:
    """Create the run's folder, only after its data, tokenizer and model are known to be good."""
    try:
        if not update:
            run.clear()
        run.folder.mkdir(parents=True, exist_ok=True)
        run.drop_metrics_after(update)
        if update < settled(config.training.updates):
            write_config(config, run.config)
    except OSError as error:
        raise UserError(f"outputs: {run.folder} cannot be written ({error.strerror or error})") from None
