"""Training checkpoints: everything needed to resume, written to a temporary folder, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import Batches
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.inference.checkpoint import (
    AVERAGED,
    CONFIG,
    TRAINING,
    WEIGHTS,
    damaged_error,
    inference_weights,
    read_weights,
    write_config,
    write_weights,
)
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.averaging import Average
from seq2seq.training.distributed import SINGLE_PROCESS, ProcessGroup
from seq2seq.training.forked import ForkedProcesses
from seq2seq.training.optimizers import Optimizers
from seq2seq.utils.errors import UserError, reason_of
from seq2seq.utils.io import folder_written_atomically, fsync_file, write_atomically
from seq2seq.utils.run import INDEX, Run


@dataclass
class Progress:
    """The progress of a run."""

    update: int = 0
    best_score: float = float("-inf")
    best_loss: float = float("inf")  # decides between equal scores
    best_update: int = 0
    without_gain: int = 0  # validations since the best one
    halved: int = 0  # how often the plateau schedule has halved the learning rate
    skipped: int = 0  # updates with a non-finite loss or gradient norm
    skipped_in_a_row: int = 0
    target_tokens: int = 0
    line_loss: float = 0.0  # summed over `line_tokens` since the last logged line
    line_tokens: int = 0
    seconds: float = 0.0  # of training, without validation


@dataclass
class RunState:
    """Everything that a run needs to resume as if uninterrupted."""

    config: TrainConfig
    tokenizer: Tokenizer
    model: Seq2Seq
    optimizer: Optimizers
    batches: Batches
    progress: Progress
    average: Average | None = None
    process_group: ProcessGroup = SINGLE_PROCESS
    stored_rng_states: list[dict[str, Tensor]] = field(default_factory=list)  # of every process of a resumed run

    def join(self, processes: ForkedProcesses) -> None:
        """Become one of several processes: with its rows, its parameters and its random numbers."""
        self.process_group = processes
        self.batches.divide_among(processes.rank, processes.world_size)
        self.optimizer.keep(processes.owned)
        if self.average:
            self.average.keep(processes.owned)
        torch.manual_seed(self.config.seed + processes.rank)
        self.restore_rng_states()

    def set_budget(self, tokens: int) -> None:
        """Train with batches of this many tokens."""
        self.config = replace(self.config, training=replace(self.config.training, tokens=tokens))
        self.batches.tokens = tokens

    def part(self) -> dict[str, Any]:
        """Return what only this process knows: its random generators, moments and averages.

        Sharded weights, moments and averages are gathered from all processes.
        """
        group, part = self.process_group, {"random": self.rng_states()}
        if not (group.is_main or group.shares_weights or group.shards_weights):
            return part
        averages = self.average.weights() if self.average else {}
        tensors: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(group.whole),
            "average": {name: group.whole(mean) for name, mean in averages.items()},
        }
        if group.shards_weights:
            tensors["weights"] = {name: group.whole(p) for name, p in self.model.named_parameters()}
        return {**part, **tensors} if group.is_main or group.shares_weights else part

    def write(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        """Write everything into a folder, with the parts of all processes."""
        optimizer, average = join_parts([part for part in parts if "optimizer" in part])
        write_config(self.config, folder / CONFIG)
        self.tokenizer.save(folder)
        # By parameter, so that tied tables are stored once, and cuDNN's packed LSTM weights separately.
        write_weights(parts[0].get("weights") or dict(self.model.named_parameters()), folder / WEIGHTS)
        if self.average:
            write_weights(average, folder / AVERAGED)
        training = {
            "optimizer": optimizer,
            "batches": self.batches.state_dict(),
            "progress": asdict(self.progress),
            "random": [part["random"] for part in parts],
        }
        torch.save(training, folder / TRAINING)

    def read(self, folder: Path) -> None:
        """Restore the state of a checkpoint."""
        part_like = self.process_group.part_like
        read_weights(self.model, folder / WEIGHTS, part_like)
        try:
            training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(training["optimizer"], part_like)
            self.batches.load_state_dict(training["batches"])
            if missing := asdict(self.progress).keys() - training["progress"].keys():
                raise ValueError(f"progress.{min(missing)} is missing")
            self.progress = Progress(**training["progress"])
            self.stored_rng_states = training["random"]
            self.restore_rng_states()
        except Exception as error:  # torch raises many types for a damaged file, or for another optimizer's
            raise damaged_error(folder / TRAINING, error) from None
        if self.average:
            path = inference_weights(folder)  # the live ones if the run had no average so far
            try:
                averages, live = load_file(path), self.average.live
                self.average.load({name: part_like(averages[name], p) for name, p in live.items()})
            except (OSError, SafetensorError) as error:
                raise damaged_error(path, error) from None

    def restore_rng_states(self) -> None:
        """Continue the random numbers of a resumed run; of another number of processes, each draws others anyway."""
        if len(self.stored_rng_states) == self.process_group.world_size:
            self.set_rng_states(self.stored_rng_states[self.process_group.rank])

    def rng_states(self) -> dict[str, Tensor]:
        """Return the states of this process's random generators: the CPU's and its device's."""
        return {kind: module.get_rng_state(*device) for kind, module, device in self._generators()}

    def set_rng_states(self, states: dict[str, Tensor]) -> None:
        for kind, module, device in self._generators():
            if kind in states:
                module.set_rng_state(states[kind], *device)

    def _generators(self) -> list[tuple[str, ModuleType, list[torch.device]]]:
        """List the generators by kind; of several GPUs, the one that trains must be named."""
        device = next(self.model.parameters()).device
        own = (device.type, getattr(torch, device.type), [device] if device.type == "cuda" else [])
        return [("cpu", torch, []), *([] if device.type == "cpu" else [own])]


def join_parts(parts: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Join the moments and averages that several processes hold for different parameters."""
    optimizers = []
    for states in zip(*(part["optimizer"] for part in parts), strict=True):
        moments = {i: moment for state in states for i, moment in state["state"].items()}
        optimizers.append({**states[0], "state": dict(sorted(moments.items()))})
    averages = {name: mean for part in parts for name, mean in part["average"].items()}
    return optimizers, averages


class Checkpoints:
    """The checkpoints of a run; an index names those to keep: the last, the best, and those to average."""

    def __init__(self, run: Run, recent: int = 0) -> None:
        self.run, self.folder, self.recent = run, run.checkpoints, recent

    def save(self, state: RunState, best: bool = False, validated: bool = False) -> None:
        """Save a complete checkpoint atomically, then update the index."""
        parts = state.process_group.gather(state.part())
        if state.process_group.is_main:
            try:
                self._write(state, parts, best, validated)
            except (OSError, SafetensorError, RuntimeError) as error:  # each library raises its own for a full disk
                reason = getattr(error, "strerror", None) or reason_of(error)
                raise UserError(
                    f"{self.folder}: the checkpoint of update {state.progress.update:,} cannot be written "
                    f"({reason}); {self.describe_last()}; free some space, then repeat the command"
                ) from None
        state.process_group.barrier()

    def describe_last(self) -> str:
        """Describe the checkpoint that a run can resume from."""
        index = self.run.index()
        return f"the last checkpoint is {self.folder / index['last']}" if index else "there is no earlier checkpoint"

    def recent_weights(self) -> list[Path]:
        """Return the weight files of the last validations, newest first."""
        names = self.run.index().get("recent", [])[: self.recent]
        return [self.folder / name / WEIGHTS for name in names]

    def _write(self, state: RunState, parts: list[dict[str, Any]], best: bool, validated: bool) -> None:
        name = _name(state)
        with folder_written_atomically(self.folder / name) as tmp_dir:
            state.write(tmp_dir, parts)
            for file in tmp_dir.iterdir():
                fsync_file(file)
        if os.name == "posix":  # elsewhere a folder cannot be synced
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        index = {**self.run.index(), "last": name, **({"best": name} if best else {})}
        if self.recent and validated:
            index["recent"] = [name, *index.get("recent", [])][: self.recent]
        write_atomically(self.folder / INDEX, json.dumps(index, indent=1) + "\n")
        to_keep = {index["last"], index.get("best"), *index.get("recent", [])}
        for old in self.folder.iterdir():
            if old.is_dir() and old.name not in to_keep:
                shutil.rmtree(old, ignore_errors=True)  # the new one is complete; the next save tries again


def _name(state: RunState) -> str:
    return f"update-{state.progress.update:07d}"


def load_initial_weights(model: nn.Module, folder: Path, processes: ProcessGroup = SINGLE_PROCESS) -> None:
    """Load another run's weights into a new model; every parameter must exist, in the same shape."""
    path, parameters = inference_weights(folder), dict(model.named_parameters())
    try:
        stored = {name: tuple(weight.shape) for name, weight in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise damaged_error(path, error) from None
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    different = [name for name in {**expected, **stored} if expected.get(name) != stored.get(name)]
    if different:
        problems = [
            f"init_from: {name} is {stored.get(name)} in the checkpoint, {expected.get(name)} in this model"
            for name in different[:4]
        ]
        more = [f"… and {len(different) - 4} more"] if len(different) > 4 else []
        raise UserError(*problems, *more, f"use the model settings of {folder / CONFIG}", code=2)
    read_weights(model, path, processes.part_like)
