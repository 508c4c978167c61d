"""Forked processes train as one does: the same batches, losses, weights and checkpoints, and none outlives another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seq2seq.config.schema import TrainConfig
from seq2seq.model import interface
from seq2seq.model.interface import Seq2Seq
from seq2seq.training import forked
from seq2seq.training.distributed import SINGLE_PROCESS, ProcessGroup
from seq2seq.training.forked import ForkedProcesses, Shards, divide_parameters, run_forked
from seq2seq.training.meter import UpdateStats
from seq2seq.training.pipeline import choose_count, stop_gracefully
from seq2seq.training.trainer import Trainer
from seq2seq.training.validation import Validation
from seq2seq.utils.errors import UserError
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import random_corpus
from tests.helpers.program import forks
from tests.helpers.trainers import Clock, cut_words, make_trainer, updates_of, varied, weights

pytestmark = [pytest.mark.usefixtures("fast"), forks]
Found = tuple[list[UpdateStats], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def together(made: Trainer, size: int, work: Callable[[Trainer], Any]) -> Any:
    """What `work` gives in the first of several processes that share a trainer."""

    def one(processes: ForkedProcesses) -> Any:
        made.join(processes)
        return work(made)

    return run_forked(size, Shards(made.state.model, made.working.model, size), one)


def trained(count: int) -> Callable[[Trainer], Found]:
    """The statistics of some updates, and the weights after them."""

    def work(made: Trainer) -> Found:
        stats = [made.update(rank_batches) for rank_batches in updates_of(made, count)]
        return stats, weights(made.state.model)

    return work


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"training__update_tokens": 60},
    "packed": {"training__packing": True},
    "R-Drop": {"training__r_drop": 3.0, "model__word_dropout": 0.3},
    "SimCut": {"training__simcut": 3.0, "training__simcut_cutoff": 0.3},
    "clipped": {"optimizer__clip_norm": 0.05},
    "averaged": {"training__average": "ema", "training__ema_decay": 0.9},
    "muon": {"optimizer__name": "muon"},
    "schedule-free": {"optimizer__name": "schedule_free"},
    "adafactor": {"optimizer__name": "adafactor"},
}


@pytest.mark.parametrize(("size", "options"), [(2, name) for name in OPTIONS] + [(3, "plain"), (4, "accumulated")])
@pytest.mark.parametrize("family", FAMILIES)
def test_forks_update_as_one_process_does(
    family: str, options: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, norms, weights and averages agree within rounding; the state of the batches is the same."""
    monkeypatch.setattr(interface, "drop_rows", cut_words)
    config = varied(family, training__label_smoothing=0.1, **OPTIONS[options])
    alone, made = (make_trainer(config, tmp_path, encoded=random_corpus(list(range(1, 12)) * 2)) for _ in range(2))
    expected, expected_weights = trained(4)(alone)

    def work(made: Trainer) -> tuple[Found, dict[str, Tensor], dict[str, int]]:
        found = trained(4)(made)
        parts = made.state.process_group.gather(made.state.part())
        return (
            found,
            {name: x for part in parts for name, x in part["average"].items()},
            made.state.batches.state_dict(),
        )

    (stats, found_weights), averages, position = together(made, size, work)
    for one, other in zip(stats, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)
    torch.testing.assert_close(found_weights, expected_weights, rtol=1e-3, atol=1e-4)
    assert position == alone.state.batches.state_dict()
    assert made.state.progress.target_tokens == alone.state.progress.target_tokens
    if alone.state.average:
        torch.testing.assert_close(averages, alone.state.average.weights(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("update_tokens", [0, 60])
@pytest.mark.parametrize("family", FAMILIES)
def test_forks_update_as_one_process_does_in_bfloat16(family: str, update_tokens: int, tmp_path: Path) -> None:
    """Gradients of the working copy add up in float32, and every process computes with the new weights."""
    config = varied(family, training__update_tokens=update_tokens)
    alone, made = (make_trainer(config, tmp_path, precision=torch.bfloat16) for _ in range(2))
    expected, expected_weights = trained(5)(alone)
    stats, found_weights = together(made, 2, trained(5))
    assert [one.loss for one in stats] == pytest.approx([one.loss for one in expected], rel=5e-3)
    torch.testing.assert_close(found_weights, expected_weights, rtol=0.05, atol=2e-3)
    working = dict(made.working.model.named_parameters())
    assert all(torch.equal(working[name], p.bfloat16()) for name, p in found_weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_without_rows_adds_nothing(family: str, tmp_path: Path) -> None:
    """Batches of one or two pairs among four processes."""
    config = varied(family, training__tokens=8)
    alone, made = (make_trainer(config, tmp_path, encoded=random_corpus([7, 3, 6, 2] * 2)) for _ in range(2))
    expected, expected_weights = trained(6)(alone)
    stats, found_weights = together(made, 4, trained(6))
    assert [one.loss for one in stats] == pytest.approx([one.loss for one in expected], rel=1e-4)
    torch.testing.assert_close(found_weights, expected_weights, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_training_is_imported_where_no_process_forks() -> None:
    """On Windows, whose multiprocessing has no such class."""
    code = "import multiprocessing.context as c, torch.distributed; del c.ForkProcess; import seq2seq.training.pipeline"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_every_parameter_belongs_to_one_process(size: int) -> None:
    """The largest share exceeds an even one by less than the largest parameter."""
    model = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(3, 12)))
    parameters = dict(model.named_parameters())
    shares = divide_parameters(parameters, size)
    assert len(shares) == size and sorted(name for share in shares for name in share) == sorted(parameters)
    numbers = [sum(parameters[name].numel() for name in share) for share in shares]
    assert max(numbers) < sum(numbers) / size + max(p.numel() for p in parameters.values())


# ------------------------------------------------------------------------------------------- resuming


def saved(made: Trainer) -> None:
    trained(3)(made)
    made.save()


@pytest.mark.parametrize(
    ("optimizer", "average"),
    [("adamw", "ema"), ("muon", "last"), ("adafactor", "none"), ("schedule_free", "none")],
)
def test_a_resumed_run_of_as_many_processes_has_the_same_bits(optimizer: str, average: str, tmp_path: Path) -> None:
    """Moments, averages and dropout continue, also those that only one process holds."""
    config = varied("transformer", optimizer__name=optimizer, training__average=average, model__dropout=0.3)
    together(make_trainer(config, tmp_path), 2, saved)
    resumed = together(make_trainer(config, tmp_path, resume=True), 2, trained(3))
    whole = together(make_trainer(config, tmp_path), 2, trained(6))
    assert resumed[0] == whole[0][3:]
    assert all(torch.equal(x, whole[1][name]) for name, x in resumed[1].items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_resumes_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    """Without dropout, it continues as if nothing had changed, within rounding."""
    config = varied("lstm", training__average="ema")
    together(make_trainer(config, tmp_path), before, saved)
    resumed = together(make_trainer(config, tmp_path, resume=True), after, trained(3))
    whole = trained(6)(make_trainer(config, tmp_path))
    assert [one.loss for one in resumed[0]] == pytest.approx([one.loss for one in whole[0][3:]], rel=1e-4)
    torch.testing.assert_close(resumed[1], whole[1], rtol=1e-3, atol=1e-4)


def test_a_validation_sees_the_averages_of_all_processes_and_training_continues_from_the_live_weights(
    tmp_path: Path,
) -> None:
    config = varied("lstm", training__average="ema", training__ema_decay=0.9, training__validate_every=2)
    seen: list[dict[str, Tensor]] = []

    def work(made: Trainer) -> Any:
        trained(2)(made)
        live = weights(made.state.model)
        averages = {
            name: x
            for part in made.state.process_group.all_gather(made.state.part())
            for name, x in part["average"].items()
        }
        validate = made.validate_model

        def noting(model: Seq2Seq) -> Validation:
            seen.append(weights(model))
            return validate(model)

        made.validate_model = noting
        made.validate()
        return averages, live, weights(made.state.model)

    averages, live, after = together(make_trainer(config, tmp_path, [1.0]), 2, work)
    assert all(torch.equal(x, averages[name]) for name, x in seen[0].items())
    assert all(torch.equal(x, live[name]) for name, x in after.items())


# ------------------------------------------------------------------------------ what goes wrong, and stops


def failing(error: Callable[[], Any], rank: int = 1) -> Callable[[Trainer], Any]:
    """Work in which one process fails before its second update."""

    def work(made: Trainer) -> Any:
        trained(1)(made)
        if made.state.process_group.rank == rank:
            error()
        return trained(1)(made)

    return work


def raising(error: BaseException) -> Callable[[], Any]:
    def raise_it() -> None:
        raise error

    return raise_it


def test_an_error_of_one_process_is_the_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        together(make_trainer("lstm", tmp_path), 3, failing(raising(UserError("first", "second", code=7))))
    assert (raised.value.problems, raised.value.code) == (("first", "second"), 7)
    assert raised.value.__suppress_context__


def test_an_unexpected_error_keeps_its_type_and_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        together(make_trainer("lstm", tmp_path), 2, failing(lambda: 1 // 0))
    assert "1 // 0" in str(raised.value.__cause__)


def test_an_error_that_cannot_be_sent_arrives_as_text(tmp_path: Path) -> None:
    class LocalError(Exception):
        pass

    with pytest.raises(RuntimeError, match="of a class that has no name"):
        together(make_trainer("lstm", tmp_path), 2, failing(raising(LocalError("of a class that has no name"))))


def test_an_error_too_long_to_be_sent_arrives_as_text(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"and its end$"):
        together(make_trainer("lstm", tmp_path), 2, failing(raising(ValueError("x" * 2**21 + " and its end"))))


@pytest.mark.parametrize("exchanged", [None, {"a": 1, "b": 2}, 3])
def test_a_process_that_leaves_no_error_is_named_with_its_exit_code(exchanged: Any, tmp_path: Path) -> None:
    """Whatever value it has exchanged before."""

    def work(made: Trainer) -> Any:
        if exchanged:
            made.state.process_group.all_gather(exchanged)
        return failing(lambda: os._exit(1))(made)

    with pytest.raises(UserError, match=r"^process 2 of 2 was killed \(exit code 1\)"):
        together(make_trainer("lstm", tmp_path), 2, work)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_killed_process_ends_the_run_in_one_line(rank: int, tmp_path: Path) -> None:
    made = make_trainer("lstm", tmp_path)
    with pytest.raises(
        UserError, match=rf"^process {rank + 1} of 3 was killed \(SIGKILL\); the last checkpoint is intact"
    ):
        together(made, 3, failing(lambda: os.kill(os.getpid(), signal.SIGKILL), rank))


def test_an_error_of_the_first_process_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        together(make_trainer("lstm", tmp_path), 3, failing(raising(KeyboardInterrupt()), 0))


def test_processes_end_when_the_first_one_is_killed() -> None:
    """Whatever they do: a pipe that all of them hold open is closed in the end."""
    reading, writing = os.pipe()
    first = os.fork()
    if not first:
        os.close(reading)
        model = nn.Linear(2, 2)
        run_forked(
            3, Shards(model, model, 3), lambda processes: time.sleep(60) if processes.rank else os.kill(os.getpid(), 9)
        )
    os.close(writing)
    os.waitpid(first, 0)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_one_stopped_process_stops_all_after_the_same_update(tmp_path: Path) -> None:
    """SIGTERM to any process is for all; Ctrl-C is for the first one, whose terminal sends it to all."""
    config = varied("lstm", training__updates=1000, training__validate_every=9999, training__log_every=9999)

    def work(made: Trainer) -> Any:
        rank, update = made.state.process_group.rank, made.update

        def interrupted(rank_batches: Any) -> UpdateStats:
            if made.state.progress.update == 2 and rank:
                os.kill(os.getpid(), signal.SIGINT)
            if made.state.progress.update == 4 and rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(rank_batches)

        made.update = interrupted  # type: ignore[method-assign]
        with stop_gracefully(made):
            made.fit()
        updates = made.state.process_group.all_gather(made.state.progress.update)
        return updates, made.stop_reason, made.stopped_by_signal

    updates, reason, by_signal = together(make_trainer(config, tmp_path), 2, work)
    assert updates == [5, 5] and "another process" in reason and by_signal


@pytest.mark.parametrize("seconds", [(10, 1000), (10, 1)])
def test_a_time_limit_stops_all_processes_and_is_no_signal(
    seconds: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute by the first process's clock, whatever that of another shows; all know after one more update."""
    config = varied("lstm", training__updates=99, training__max_minutes=0.5, training__validate_every=9999)
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)

    def work(made: Trainer) -> Any:
        update = made.update

        def timed(rank_batches: Any) -> UpdateStats:
            clock.sleep(seconds[made.state.process_group.rank])
            return update(rank_batches)

        made.update = timed  # type: ignore[method-assign]
        made.fit()
        return made.state.process_group.all_gather((made.state.progress.update, made.stopped_by_signal))

    made = make_trainer(config, tmp_path)
    assert together(made, 2, work) == [(5, False)] * 2 and made.stop_reason == "training.max_minutes=0.5"


def test_only_the_main_thread_handles_signals(tmp_path: Path) -> None:
    """A thread of a user's program trains without changing what the program does with signals."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def train() -> None:
        with stop_gracefully(make_trainer("lstm", tmp_path)):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_diagnosis_is_that_of_the_process_whose_rows_have_the_number(tmp_path: Path) -> None:
    """Only the longest pair, of the last process, has the word whose huge embedding overflows."""
    config = varied("lstm", model__tie_embeddings="none", training__tokens=400)
    corpus = random_corpus([3] * 9 + [20])
    longest = int(corpus.source.lengths().argmax())
    common = {word for i in range(len(corpus)) if i != longest for word in corpus.source[i].tolist()}
    made = make_trainer(config, tmp_path, encoded=corpus)
    with torch.no_grad():
        made.state.model.source_embedding.weight[min(set(corpus.source[longest].tolist()) - common)] = 3e38
    with pytest.raises(UserError) as raised:
        together(made, 2, trained(9))
    assert raised.value.problems[1].startswith("first non-finite number: the output of ")
    assert f"pair {longest + 1}: " in "".join(raised.value.problems)


# ------------------------------------------------------------------------------- waiting and exchanging


@pytest.mark.parametrize("size", [2, 3, 5])
def test_values_of_any_size_arrive_in_the_order_of_ranks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces where they are long; `gather` gives them to the first process alone."""
    monkeypatch.setattr(forked, "CHUNK", 64)
    model = nn.Linear(2, 2)

    def work(processes: ForkedProcesses) -> Any:
        values = processes.all_gather("x" * (50 * processes.rank) + str(processes.rank))
        gathered = processes.gather(processes.rank)
        return processes.all_gather((values, gathered))

    expected = ["x" * (50 * rank) + str(rank) for rank in range(size)]
    found = run_forked(size, Shards(model, model, size), work)
    assert found == [(expected, list(range(size)) if rank == 0 else []) for rank in range(size)]


def test_a_process_waits_for_all_others_with_one_thread(tmp_path: Path) -> None:
    """No process continues before the last one has arrived; the first one has its threads back in the end."""
    torch.set_num_threads(2)
    model, started = nn.Linear(2, 2), time.monotonic()

    def work(processes: ForkedProcesses) -> list[tuple[float, float, int]]:
        time.sleep(0.1 * processes.rank)
        arrived = time.monotonic() - started
        processes.barrier()
        left = time.monotonic() - started
        return processes.all_gather((arrived, left, torch.get_num_threads()))

    found = run_forked(3, Shards(model, model, 3), work)
    assert min(left for _, left, _ in found) >= max(arrived for arrived, _, _ in found)
    assert {threads for _, _, threads in found} == {1} and torch.get_num_threads() == 2


def test_memory_is_that_of_all_processes() -> None:
    """Memory of their own is added up, and memory that they share is counted once."""
    model, size = nn.Linear(2, 2), 20_000_000
    shared = forked.shared_zeros(size, dtype=torch.uint8).fill_(1)

    def work(own: int) -> Callable[[ForkedProcesses], int]:
        def one(processes: ForkedProcesses) -> int:
            held = torch.ones(own, dtype=torch.uint8), shared.sum()
            processes.barrier()
            used = processes.peak_memory(torch.device("cpu"))
            processes.barrier()
            return used * len(held) // len(held)

        return one

    little, much = (run_forked(3, Shards(model, model, 3), work(own)) for own in (1, size))
    assert 2.5 * size < much - little < 3.5 * size


# --------------------------------------------------------------------------------------------- choosing


def test_processes_are_as_many_as_cores_unless_batches_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a GPU, torchrun nor a compiled model starts any; a number that is given is taken as it is."""
    monkeypatch.setattr("seq2seq.inference.workers.usable_cores", lambda: 8)
    cpu = torch.device("cpu")

    def chosen(device: torch.device = cpu, group: ProcessGroup = SINGLE_PROCESS, **changes: Any) -> int:
        return choose_count(varied("lstm", processes="auto", **changes), device, group)

    assert [chosen(training__tokens=tokens) for tokens in (4096, 640, 100, "auto")] == [8, 5, 1, 8]
    assert chosen(torch.device("cuda"), training__tokens=4096) == 1
    assert chosen(group=ProcessGroup(0, 2), training__tokens=4096) == 1
    assert chosen(compile=True, training__tokens=4096) == 1
    given: TrainConfig = varied("lstm", processes=3, training__tokens=64)
    assert choose_count(given, cpu, SINGLE_PROCESS) == 3
    with pytest.raises(UserError, match="processes: 3 run in parallel only"):
        choose_count(given, torch.device("cuda"), SINGLE_PROCESS)
