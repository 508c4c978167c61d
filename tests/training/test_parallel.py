"""Processes of torchrun train as one does: whole weights in each (ddp) or a part of every weight (fsdp)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import RankBatches
from seq2seq.model import interface
from seq2seq.training.checkpoint import Checkpoints
from seq2seq.training.distributed import ProcessGroup
from seq2seq.training.meter import UpdateStats
from seq2seq.training.trainer import Trainer
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import random_corpus
from tests.helpers.processes import joined
from tests.helpers.program import forks, shards
from tests.helpers.trainers import cut_words, make_trainer, updates_of, varied, weights

pytestmark = [pytest.mark.usefixtures("fast"), forks]
KINDS = ["ddp", pytest.param("fsdp", marks=shards)]
LENGTHS = list(range(1, 12)) * 4
Found = tuple[list[UpdateStats], dict[str, Tensor]]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"training__update_tokens": 300},
    "packed": {"training__packing": True},
    "recomputed": {"training__recompute": True},
    "R-Drop": {"training__r_drop": 3.0, "model__word_dropout": 0.3, "training__update_tokens": 300},
    "SimCut": {"training__simcut": 3.0, "training__simcut_cutoff": 0.3},
    "clipped": {"optimizer__clip_norm": 0.05},
    "tied": {"model__tie_embeddings": "output"},
    "ema": {"training__average": "ema", "training__ema_decay": 0.9},
    "last": {"training__average": "last", "training__average_checkpoints": 3},
    "schedule-free": {"optimizer__name": "schedule_free"},
}


def trainer(config: TrainConfig, folder: Path, group: ProcessGroup, **rest: Any) -> Trainer:
    return make_trainer(config, folder, process_group=group, encoded=random_corpus(LENGTHS), **rest)


def updates_of_all(config: TrainConfig, folder: Path, size: int) -> Iterator[RankBatches]:
    """The updates of several processes, as one process would take them."""
    ranks = [iter(trainer(config, folder, ProcessGroup(rank, size)).state.batches) for rank in range(size)]
    for parts in zip(*ranks, strict=True):
        yield RankBatches([batch for part in parts for batch in part.micro_batches], parts[0].target_tokens)


def whole_weights(made: Trainer) -> dict[str, Tensor]:
    with made.working.with_weights(None) as model:
        return weights(model)


def together(config: TrainConfig, folder: Path, kind: str, size: int, count: int, **rest: Any) -> list[Found]:
    def work(group: ProcessGroup) -> Found:
        made = trainer(config, folder, group, **rest)
        stats = [made.update(rank_batches) for rank_batches in updates_of(made, count)]
        return stats, whole_weights(made)

    return joined(kind, size, work)


@pytest.mark.parametrize(
    ("family", "options", "size"),
    [
        *((family, "plain", 2) for family in FAMILIES),
        *(pytest.param("transformer", name, 2, marks=pytest.mark.slow) for name in OPTIONS if name != "plain"),
        pytest.param("transformer", "accumulated", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_update_as_one_does(
    family: str, kind: str, options: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, norms and weights agree within rounding, and those of all processes are equal."""
    monkeypatch.setattr(interface, "drop_rows", cut_words)
    config = varied(family, training__label_smoothing=0.1, **OPTIONS[options])
    alone = trainer(config, tmp_path, ProcessGroup(0, 1))
    updates = updates_of_all(config, tmp_path, size)
    expected = [alone.update(next(updates)) for _ in range(3)]
    found = together(config, tmp_path, kind, size, 3)
    for stats, found_weights in found:
        for one, other in zip(stats, expected, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-4)
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
        torch.testing.assert_close(found_weights, weights(alone.state.model), rtol=1e-3, atol=1e-4)
        assert all(torch.equal(weight, found[0][1][name]) for name, weight in found_weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_update_as_one_does_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """Gradients add up in float32, of batches and of processes; every process computes with the new weights."""
    config = varied("transformer", training__update_tokens=300)
    alone = trainer(config, tmp_path, ProcessGroup(0, 1), precision=torch.bfloat16)
    updates = updates_of_all(config, tmp_path, 2)
    expected = [alone.update(next(updates)) for _ in range(4)]
    for stats, found_weights in together(config, tmp_path, kind, 2, 4, precision=torch.bfloat16):
        assert [one.loss for one in stats] == pytest.approx([one.loss for one in expected], rel=5e-3)
        master = {name: weight.bfloat16() for name, weight in weights(alone.state.model).items()}
        torch.testing.assert_close(
            {name: weight.bfloat16() for name, weight in found_weights.items()}, master, rtol=0.05, atol=4e-3
        )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_are_summed_over_processes_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update of several batches sends as many messages of gradients as one of a single batch."""
    config = varied("transformer")
    names = {"ddp": ["all_reduce"], "fsdp": ["reduce_scatter_tensor", "reduce_scatter_single"]}[kind]

    def work(group: ProcessGroup) -> list[int]:
        made, calls = trainer(config, tmp_path, group), [0]

        def counted(send: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                calls[-1] += 1
                return send(*arguments, **named)

            return call

        for name in names:  # the name differs between versions of torch
            monkeypatch.setattr(dist, name, counted(getattr(dist, name, None)), raising=False)
        batches = [batch for update in updates_of(made, 4) for batch in update.micro_batches]
        for micro_batches in (batches[:1], batches[1:4]):
            made.update(RankBatches(micro_batches, 30))
            calls.append(0)
        return calls

    for one, several, _ in joined(kind, 2, work):
        assert one == several > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, size: int, tmp_path: Path) -> None:
    """Of as many processes, with dropout, moments and averages."""
    config = varied("transformer", model__dropout=0.2, training__average="ema", training__ema_decay=0.9)

    def work(group: ProcessGroup) -> list[dict[str, Tensor]]:
        found = []
        for saves in (False, True):
            made = trainer(config, tmp_path, group)
            for rank_batches in updates_of(made, 2):
                made.update(rank_batches)
            if saves:
                made.save()
                made = trainer(config, tmp_path, group, resume=True)
            for rank_batches in updates_of(made, 2):
                made.update(rank_batches)
            assert made.state.average
            averages = made.state.average.weights()
            found += [whole_weights(made), {name: group.own_part(mean) for name, mean in averages.items()}]
        return found

    for live, average, live_again, average_again in joined(kind, size, work):
        assert all(torch.equal(weight, live_again[name]) for name, weight in live.items())
        assert all(torch.equal(weight, average_again[name]) for name, weight in average.items())


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_does_not_depend_on_the_processes_that_write_it(kind: str, size: int, tmp_path: Path) -> None:
    """That of one process, read and written by several, has the same names, weights, moments and averages."""
    config = varied("transformer", training__average="ema", training__ema_decay=0.9)
    alone = trainer(config, tmp_path / "one", ProcessGroup(0, 1))
    for rank_batches in updates_of(alone, 2):
        alone.update(rank_batches)
    alone.save()

    def work(group: ProcessGroup) -> None:
        made = trainer(config, tmp_path / "one", group, resume=True)
        made.checkpoints = Checkpoints(Run(tmp_path / "several"))
        made.save()

    joined(kind, size, work)
    folders = [Run(tmp_path / name).checkpoint("last") for name in ("one", "several")]
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(path.name for path in folders[1].iterdir())
    for name in ("model.safetensors", "averaged.safetensors"):
        one, several = (load_file(folder / name) for folder in folders)
        assert one.keys() == several.keys() and all(torch.equal(one[key], several[key]) for key in one)
    one, several = (torch.load(folder / "training.pt", weights_only=True) for folder in folders)
    assert len(several["random"]) == size and one["batches"] == several["batches"]
    for state, other in zip(one["optimizer"], several["optimizer"], strict=True):
        assert [group["params"] for group in state["param_groups"]] == [
            group["params"] for group in other["param_groups"]
        ]
        torch.testing.assert_close(other["state"], state["state"], rtol=0, atol=0)


@pytest.mark.parametrize("by_signal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_stopped_process_stops_all_after_the_same_update(kind: str, by_signal: bool, tmp_path: Path) -> None:
    """All know by the end of that update whether the reason was a signal, which decides exit codes; one saves."""
    config = varied("lstm", training__updates=9, training__validate_every=100, training__log_every=2)

    def work(group: ProcessGroup) -> tuple[int, str, bool]:
        made = trainer(config, tmp_path / str(group.rank), group)
        update = made.update

        def stopping(rank_batches: RankBatches) -> UpdateStats:
            if group.rank == 1 and made.state.progress.update == 2:
                made.stop("its own reason", by_signal)
            return update(rank_batches)

        made.update = stopping  # type: ignore[method-assign]
        made.fit()
        return made.state.progress.update, made.stop_reason, made.stopped_by_signal

    first, second = joined(kind, 2, work)
    reason = "another process received a signal" if by_signal else "another process stopped"
    assert first == (3, reason, by_signal) and second == (3, "its own reason", by_signal)
    assert Run(tmp_path / "0").index() == {"last": "update-0000003"}
    assert not Run(tmp_path / "1").checkpoints.exists(), "the first process alone writes"


def test_only_what_others_lack_is_sent_to_the_main_process() -> None:
    """The moments that the first process saves stay in it."""

    class Unsendable:
        def __reduce__(self) -> Any:
            raise AssertionError("was sent")

    def work(group: ProcessGroup) -> list[str]:
        values = group.gather(Unsendable() if group.is_main else f"rank {group.rank}")
        return [type(value).__name__ for value in values]

    assert joined("ddp", 2, work) == [["Unsendable", "str"], []]
