"""Laws of what happens beside a GPU's computation: the same batches in the same order, copied once, and few kernels."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seq2seq.data.batching import Batches, RankBatches
from seq2seq.training import trainer as trainer_module
from seq2seq.training.prefetch import Upload, iterate, prefetch
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import random_corpus
from tests.helpers.trainers import LENGTHS, make_trainer, updates_of, varied, weights

pytestmark = pytest.mark.usefixtures("fast")


def plain(rank_batches: RankBatches) -> RankBatches:
    return rank_batches


def prefetched(batches: Batches, upload: Callable[[RankBatches], RankBatches] = plain) -> Any:
    return prefetch(batches, upload, lambda _: None)


def small_batches(**part: Any) -> Batches:
    return Batches(random_corpus(LENGTHS * 4), 24, 1, **part)


def ids_of(rank_batches: RankBatches) -> list[Any]:
    return [rank_batches.target_tokens, *(list(map(Tensor.tolist, b.tensors.values())) for b in rank_batches[0])]


@pytest.mark.parametrize("part", [{}, {"update_tokens": 60}, {"rank": 1, "world_size": 3}])
def test_batches_prepared_ahead_are_those_of_the_plain_iterator(
    part: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs and pools; after each update the state is that of batches which are not prepared ahead."""
    monkeypatch.setattr(Batches, "POOL", 16)
    ahead, behind = small_batches(**part), small_batches(**part)
    count = 0
    for found, expected in zip(islice(prefetched(ahead), 40), behind, strict=False):
        assert ids_of(found) == ids_of(expected)
        assert ahead.state_dict() == behind.state_dict() and ahead.epochs_done(9) == behind.epochs_done(9)
        count += 1
    assert count == 40 and ahead.epoch > 1


def test_the_next_update_is_prepared_while_one_computes_and_no_more() -> None:
    uploaded, second = [], threading.Event()

    def upload(rank_batches: RankBatches) -> RankBatches:
        uploaded.append(threading.current_thread())
        if len(uploaded) == 2:
            second.set()
        return rank_batches

    updates = prefetched(small_batches(), upload)
    next(updates)
    assert second.wait(10), "prepared although nobody asked for it yet"
    updates.close()
    assert len(uploaded) == 2 and threading.main_thread() not in uploaded
    assert not any(thread.is_alive() for thread in uploaded)


def test_an_error_in_the_thread_is_raised_where_the_batch_is_needed() -> None:
    def upload(rank_batches: RankBatches) -> RankBatches:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        next(prefetched(small_batches(), upload))


def test_on_a_cpu_nothing_is_prepared_ahead() -> None:
    batches = small_batches()
    before = threading.active_count()
    next(iterate(batches, torch.device("cpu")))
    assert threading.active_count() == before and batches.position == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_batches_prepared_ahead_resumes_to_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal between two validations; compared with a run of the plain iterator without a stop."""
    config = varied(family, training__updates=9, training__validate_every=9, model__dropout=0.2)
    whole = make_trainer(config, tmp_path / "whole", [0.0])
    whole.fit()
    monkeypatch.setattr(trainer_module, "iterate", lambda batches, _: prefetched(batches))
    cut = make_trainer(config, tmp_path / "cut", [0.0])
    monkeypatch.setattr(
        cut.logger, "status", lambda _: cut.stop("signal", True) if cut.state.progress.update == 4 else None
    )
    cut.fit()
    assert cut.state.progress.update == 4
    resumed = make_trainer(config, tmp_path / "cut", [0.0], resume=True)
    resumed.fit()
    assert resumed.state.progress.update == 9 and resumed.state.batches.state_dict() == whole.state.batches.state_dict()
    for name, weight in weights(whole.state.model).items():
        assert torch.equal(weight, weights(resumed.state.model)[name]), name


class Stream:
    """Notes what waits for what, and what was copied on which stream."""

    def __init__(self, name: Any) -> None:
        self.name = str(name)
        self.waited_for: list[str] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other.name)


def test_a_batch_is_copied_from_pinned_memory_on_a_stream_that_the_computation_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All tensors of all batches, none of them by a copy that waits, and each kept until the computation used it."""
    computation, current, pinned, copied, kept = Stream("computation"), [""], [], [], []

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        current[0] = stream.name
        yield
        current[0] = ""

    def pin(x: Tensor) -> Tensor:
        pinned.append(current[0])
        return x.clone()

    def to(x: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        copied.append((current[0], str(device), non_blocking))
        return x

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", on)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: computation)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: kept.append((id(x), stream.name)))
    upload = Upload(torch.device("cuda", 1))
    rank_batches = next(iter(small_batches(update_tokens=60)))
    tensors = sum(len(batch.tensors) for batch in rank_batches.micro_batches)
    moved = upload(rank_batches)
    assert pinned == ["cuda:1"] * tensors and copied == [("cuda:1", "cuda:1", True)] * tensors
    assert computation.waited_for == [] and moved.target_tokens == rank_batches.target_tokens
    upload.receive(moved)
    assert computation.waited_for == ["cuda:1"]
    assert kept == [(id(x), "computation") for batch in moved.micro_batches for x in batch.tensors.values()]


# ------------------------------------------------------------------------------------------- kernels


class Operations(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_all_parameters_are_transferred_by_a_few_operations(family: str, tmp_path: Path) -> None:
    """One cast for the first batch of an update, one cast and one sum for each further one."""
    made = make_trainer(family, tmp_path, precision=torch.bfloat16)
    for expected in (["_foreach_copy_"], ["_foreach_copy_", "_foreach_add_"]):
        for p in made.working.model.parameters():
            p.grad = torch.ones_like(p)
        with Operations() as operations:
            made.working.transfer_gradients()
        assert [name for name in operations.seen if name not in ("empty_like", "detach")] == expected


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
@pytest.mark.parametrize("average", ["none", "ema"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_reads_no_number_on_its_way(family: str, average: str, name: str, tmp_path: Path) -> None:
    """A host that waits for a GPU's number leaves it idle; loss, norm and stop requests are read once, as a list."""
    average = "none" if name == "schedule_free" else average
    made = make_trainer(varied(family, optimizer__name=name, training__average=average), tmp_path)
    first, second = updates_of(made, 2)
    made.update(first)
    with Operations() as operations:
        made.update(second)
        made.norms()
    assert "_local_scalar_dense" not in operations.seen
