"""Laws of the loop: when it logs, validates, saves and stops, what it skips, and what several processes do alike."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as over
from hypothesis import strategies as st
from torch import Tensor, nn

from seq2seq.config.schema import settled
from seq2seq.data.batching import RankBatches
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import Batch
from seq2seq.training import memory_check as memory_check_module
from seq2seq.training.checkpoint import Checkpoints, Progress
from seq2seq.training.distributed import SINGLE_PROCESS, ProcessGroup, join_processes
from seq2seq.training.loss import loss_sum
from seq2seq.training.memory_check import (
    MemoryCheck,
    check_memory,
    fits_in_memory,
    largest_budget,
    try_batch,
    try_search,
)
from seq2seq.training.meter import Meter, UpdateStats
from seq2seq.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer, advise_budget, graphs
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import random_corpus, tiny_batch
from tests.helpers.trainers import (
    Clock,
    Threads,
    given,
    make_trainer,
    rank_batches_of,
    small_tokenizer,
    updates_of,
    varied,
    weights,
)
from tests.reference.early_stopping import course

pytestmark = pytest.mark.usefixtures("fast")
MANY = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


class Events:
    """What a trainer does, in order; its updates cost nothing."""

    def __init__(self, made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = made
        self.seen: list[tuple[str, int]] = []
        self.at_update: dict[int, Callable[[], None]] = {}
        validate, monkey = made.validate, monkeypatch.setattr
        monkey(made, "update", self.update)
        monkey(made, "log", lambda _: self.seen.append(("log", made.state.progress.update)))
        monkey(made, "validate", lambda: self.validating(validate))
        monkey(made.checkpoints, "save", lambda _, best, validated: self.note_save(best, validated))

    def validating(self, validate: Callable[[], None]) -> None:
        self.seen.append(("validate", self.made.state.progress.update))
        validate()

    def update(self, rank_batches: RankBatches) -> UpdateStats:
        stats, n = counted(self.made), self.made.state.progress.update
        self.seen.append(("update", n))
        self.at_update.get(n, lambda: None)()
        return stats

    def note_save(self, best: bool, validated: bool) -> None:
        kind = ("best " if best else "") + ("validated" if validated else "save")
        self.seen.append((kind, self.made.state.progress.update))


def expected_events(
    updates: int, log_every: int, validate_every: int, patience: int, scores: list[float], begin: int, stop: int
) -> list[tuple[str, int]]:
    """A run from update `begin` on, with a request to stop during update `stop`."""
    events, saved, best, since = [], begin, -math.inf, 0
    left = list(scores)
    for n in range(begin + 1, updates + 1):
        events.append(("update", n))
        if n % log_every == 0 or n == updates:
            events.append(("log", n))
        if n % validate_every == 0 or n == updates:
            events.append(("validate", n))
            score = left.pop(0)
            since = 0 if score > best else since + 1
            events.append(("best validated" if score > best else "validated", n))
            best, saved = max(best, score), n
        if n == stop or (patience and since >= patience):
            if saved < n:
                events.append(("save", n))
            break
    return events


@settings(max_examples=20, **MANY)  # type: ignore[arg-type]
@over(
    updates=st.integers(1, 13),
    log_every=st.integers(1, 5),
    validate_every=st.integers(1, 5),
    patience=st.integers(0, 3),
    scores=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=13, max_size=13),
    begin=st.integers(0, 12),
    stop=st.sampled_from([0, 0, 1, 4, 7]),
)
def test_a_run_logs_validates_saves_and_ends_when_it_must(
    updates: int,
    log_every: int,
    validate_every: int,
    patience: int,
    scores: list[float],
    begin: int,
    stop: int,
    tmp_path: Path,
) -> None:
    """At every multiple and at the last update; a stop finishes its update and saves, once."""
    begin = min(begin, updates)
    config = varied(
        "lstm",
        training__updates=updates,
        training__log_every=log_every,
        training__validate_every=validate_every,
        training__patience=patience,
    )
    made = cached_trainer(tmp_path)
    made.state.config, made.state.progress.update, made.saved_update = config, begin, begin
    progress = made.state.progress
    progress.best_score, progress.best_loss, progress.best_update, progress.without_gain = -math.inf, math.inf, 0, 0
    made.validate_model, made.stop_reason, made.stopped_by_signal = given(scores), "", False
    with pytest.MonkeyPatch.context() as patch:
        events = Events(made, patch)
        events.at_update[stop] = lambda: made.stop("enough")
        made.fit()
    assert events.seen == expected_events(updates, log_every, validate_every, patience, scores, begin, stop)
    asked = begin < stop <= progress.update
    assert made.stop_reason == ("enough" if asked else "") and not made.stopped_by_signal


_cached: list[Trainer] = []


def cached_trainer(folder: Path) -> Trainer:
    if not _cached:
        _cached.append(make_trainer("lstm", folder))
    return _cached[0]


@pytest.mark.parametrize(("minutes", "last"), [(0.0, 9), (0.5, 4), (1.0, 7), (1.2, 8), (99.0, 9)])
def test_a_time_limit_ends_a_run_after_the_update_that_exceeds_it(
    minutes: float, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds an update: a limit of 30 s is exceeded by the fourth only, and 0 is no limit."""
    clock = Clock()
    config = varied("lstm", training__updates=9, training__max_minutes=minutes, training__validate_every=100)
    made = make_trainer(config, tmp_path, [0.0])
    events = Events(made, monkeypatch)
    events.at_update = {n: lambda: clock.sleep(10) for n in range(1, 10)}
    monkeypatch.setattr("time.monotonic", clock)
    made.fit()
    monkeypatch.undo()
    assert made.state.progress.update == last
    assert ("max_minutes" in made.stop_reason) == (last < 9) and not made.stopped_by_signal
    assert events.seen[-1] == (("save", last) if last < 9 else ("best validated", 9))


def test_the_first_reason_to_stop_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that arrives in the update that exceeds the time limit still decides the exit code."""
    clock = Clock()
    made = make_trainer(varied("lstm", training__updates=9, training__max_minutes=0.1), tmp_path)
    events = Events(made, monkeypatch)

    def signal_and_limit() -> None:
        made.stop("a signal", by_signal=True)
        clock.sleep(10)

    events.at_update[2] = signal_and_limit
    monkeypatch.setattr("time.monotonic", clock)
    made.fit()
    monkeypatch.undo()
    assert (made.state.progress.update, made.stop_reason, made.stopped_by_signal) == (2, "a signal", True)


def test_a_stopped_or_finished_run_does_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer(varied("lstm", training__updates=3), tmp_path)
    events = Events(made, monkeypatch)
    made.stop("a signal", by_signal=True)
    made.fit()
    assert events.seen == [] and made.stopped_by_signal
    made.stop_reason, made.state.progress.update, made.saved_update = "", 3, 3
    made.fit()
    assert events.seen == []


@settings(max_examples=25, **MANY)  # type: ignore[arg-type]
@over(
    found=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan]), st.sampled_from([1.0, 2.0])), min_size=1, max_size=7
    ),
    every=st.integers(1, 3),
    patience=st.integers(0, 4),
    plateau_patience=st.integers(1, 3),
    average_checkpoints=st.integers(1, 4),
    plateau=st.booleans(),
)
def test_early_stopping_and_the_kept_checkpoints_are_those_of_a_list(
    found: list[tuple[float, float]],
    every: int,
    patience: int,
    plateau_patience: int,
    average_checkpoints: int,
    plateau: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The best, the last and the recent checkpoints are kept, and nothing else; so often was the lr halved."""
    made = cached_trainer(tmp_path_factory.mktemp("first"))
    config = varied(
        "lstm",
        training__updates=len(found) * every,
        training__validate_every=every,
        training__patience=patience,
        training__average="last" if average_checkpoints > 1 else "none",
        training__average_checkpoints=average_checkpoints,
        optimizer__schedule="plateau" if plateau else "constant",
        optimizer__plateau_patience=plateau_patience,
    )
    fresh = make_shallow(made, config, tmp_path_factory.mktemp("run"))
    fresh.validate_model = given({"bleu": score, "loss": loss} for score, loss in found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "update", lambda _: counted(fresh))
        patch.setattr(fresh, "log", lambda _: None)
        patch.setattr(type(fresh.state), "write", lambda self, folder, random: (folder / "state").write_text("x"))
        fresh.fit()
    expected = course(
        [score for score, _ in found],
        [loss for _, loss in found],
        every,
        patience,
        plateau_patience,
        average_checkpoints - 1,
    )
    progress, index = fresh.state.progress, fresh.checkpoints.run.index()
    assert progress.update == expected.update
    assert (progress.best_update, progress.without_gain) == (expected.best_update, expected.without_gain)
    assert progress.halved == (expected.halved if plateau else 0)
    name = "update-{:07d}".format
    wanted: dict[str, Any] = {"last": name(expected.update)}
    if expected.best_update:
        wanted["best"] = name(expected.best_update)
    if average_checkpoints > 1:
        wanted["recent"] = [name(n) for n in expected.recent]
    assert index == wanted
    kept = {wanted["last"], wanted.get("best", wanted["last"]), *wanted.get("recent", [])}
    assert {path.name for path in fresh.checkpoints.folder.iterdir()} == {*kept, "index.json"}
    assert [path.parent.name for path in fresh.checkpoints.recent_weights()] == wanted.get("recent", [])


def counted(made: Trainer) -> UpdateStats:
    """An update that costs nothing."""
    made.state.progress.update += 1
    return UpdateStats(1.0, 1.0)


def make_shallow(made: Trainer, config: Any, folder: Path) -> Trainer:
    """Another run with the parts of a trainer that are costly to make."""
    state = replace(made.state, config=config, progress=Progress(), average=None)
    checkpoints = Checkpoints(Run(folder), config.training.recent)
    return Trainer(state, torch.float32, made.validate_model, checkpoints, made.logger)


# ------------------------------------------------------------------------------------ skipped updates


def poison(model: nn.Module, value: float) -> Any:
    """Gradients of one weight become no numbers, while the loss stays one."""
    p = next(iter(model.parameters()))
    return p.register_hook(lambda g: g + value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("adamw", math.inf), ("muon", math.nan), ("schedule_free", math.nan), ("adafactor", math.inf)],
)
def test_a_skipped_update_is_as_if_it_had_not_been(name: str, value: float, tmp_path: Path) -> None:
    """No weight and no moment changes; the update is counted, its tokens are, and its batch is used up."""
    config = varied("transformer", optimizer__name=name, training__label_smoothing=0.1)
    made, other = (make_trainer(config, tmp_path, ()) for _ in range(2))
    updates = list(updates_of(made, 4))
    for n, rank_batches in enumerate(updates):
        if n == 2:
            hook = poison(made.working.model, value)
            before = copy.deepcopy(made.state.optimizer.state_dict())
            stats = made.update(rank_batches)
            hook.remove()
            assert stats.skipped and math.isfinite(stats.loss) and not math.isfinite(stats.gradient_norm)
            assert same(before, made.state.optimizer.state_dict())
            assert (made.state.progress.skipped, made.state.progress.skipped_in_a_row) == (1, 1)
            other.state.progress.update += 1
        else:
            assert not made.update(rank_batches).skipped
            other.update(rank_batches)
            assert made.state.progress.skipped_in_a_row == 0
    assert made.state.progress.skipped == 1 and made.state.progress.update == 4
    assert made.state.progress.target_tokens == sum(rank_batches.target_tokens for rank_batches in updates)
    for name_, p in other.state.model.named_parameters():
        assert torch.equal(p, dict(made.state.model.named_parameters())[name_])
    assert "update 3: loss" in made.logger.lines[0] and "skipped" in made.logger.lines[0]  # type: ignore[attr-defined]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_a_running_mean_goes_on_through_a_skipped_update(tmp_path: Path) -> None:
    """It takes the unchanged weights once more, as its number of the update counts on."""
    made = make_trainer(varied("lstm", training__average="ema", training__ema_decay=0.998), tmp_path)
    [first, second] = updates_of(made, 2)
    made.update(first)
    assert made.state.average is not None
    before = {name: mean.clone() for name, mean in made.state.average.weights().items()}
    poison(made.working.model, math.nan)
    assert made.update(second).skipped
    live = dict(made.state.model.named_parameters())
    for name, mean in made.state.average.weights().items():
        torch.testing.assert_close(mean, before[name].lerp(live[name].detach(), 9 / 11))


@pytest.mark.parametrize("kind", ["weight", "output", "gradient"])
def test_numbers_that_stay_wrong_end_a_run_with_their_origin(kind: str, tmp_path: Path) -> None:
    """The fifth in a row, not one earlier; with the first weight or output that is no number, and the pairs."""
    corpus = random_corpus([2] * 12)
    made = make_trainer("transformer", tmp_path, encoded=corpus)
    model = made.state.model
    if kind == "weight":
        with torch.no_grad():
            model.get_parameter("decoder.layers.0.feed_forward.outer.weight")[1, 1] = math.nan
    elif kind == "output":
        model.get_submodule("encoder.layers.0").register_forward_hook(lambda _, __, output: output + math.inf)
    else:
        poison(model, math.inf)
    rank_batches = rank_batches_of(corpus.batch(np.arange(11)), corpus.batch(np.array([11])))
    for n in range(1, MAX_SKIPPED_IN_A_ROW):
        assert made.update(rank_batches).skipped and made.state.progress.skipped_in_a_row == n
    with pytest.raises(UserError) as raised:
        made.update(rank_batches)
    first, origin, pairs, *rest, last = raised.value.problems
    assert first.startswith("update 5: 5 consecutive non-finite updates (loss ")
    assert {
        "weight": "the weight decoder.layers.0.feed_forward.outer.weight",
        "output": "the output of encoder.layers.0 (",
        "gradient": "a gradient; every output is finite",
    }[kind] in origin
    assert pairs == "batch: 11 pairs, numbers 1, 2, 3, 4, 5, 6, 7, 8, … of the training corpus"
    tokenizer = small_tokenizer()
    for i, line in enumerate(rest):
        texts = tokenizer.decode_source(corpus.source[i].tolist()), tokenizer.decode(corpus.target[i].tolist())
        assert line == f"pair {i + 1}: " + " → ".join(" ".join(text.split()) for text in texts)
    assert len(rest) == 3 and last == "there is no earlier checkpoint"
    assert all(not module._forward_hooks for name, module in model.named_modules() if name != "encoder.layers.0")


def test_only_updates_in_a_row_that_are_skipped_end_a_run(tmp_path: Path) -> None:
    """A single one that works forgives all before it."""
    made = make_trainer("lstm", tmp_path)
    for rank_batches in updates_of(made, 3):
        hook = poison(made.state.model, math.nan)
        for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
            assert made.update(rank_batches).skipped
        hook.remove()
        assert not made.update(rank_batches).skipped
    assert made.state.progress.skipped == 3 * (MAX_SKIPPED_IN_A_ROW - 1)


def test_a_batch_of_eight_pairs_is_named_in_full(tmp_path: Path) -> None:
    corpus = random_corpus([2] * 8)
    made = make_trainer("transformer", tmp_path, encoded=corpus)
    poison(made.state.model, math.inf)
    with pytest.raises(UserError) as raised:
        for _ in range(5):
            made.update(rank_batches_of(corpus.batch(np.arange(8))))
    assert "8 pairs, numbers 1, 2, 3, 4, 5, 6, 7, 8 of the training corpus" in raised.value.problems[2]


# ------------------------------------------------------------------------------------- several processes


def test_a_sum_over_processes_replaces_each_ones_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """And values come by rank."""

    def work(process_group: ProcessGroup) -> tuple[list[float], list[Any]]:
        own = torch.arange(3.0) + 10 * process_group.rank
        process_group.all_reduce(own)
        process_group.barrier()
        return own.tolist(), process_group.all_gather(f"rank {process_group.rank}")

    found = Threads(3, monkeypatch).run(work)
    assert found == [([30.0, 33.0, 36.0], ["rank 0", "rank 1", "rank 2"])] * 3


def test_a_process_waits_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process continues before the last one has arrived."""
    seen: list[str] = []
    last_comes = threading.Event()

    def work(process_group: ProcessGroup) -> None:
        if process_group.rank == 2:
            last_comes.wait(0.05)
            seen.append("last")
        process_group.barrier()
        seen.append("on")

    Threads(3, monkeypatch).run(work)
    assert seen == ["last", "on", "on", "on"]


def test_a_single_process_communicates_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.delattr(f"torch.distributed.{name}")
    x = torch.ones(3)
    SINGLE_PROCESS.all_reduce(x)
    SINGLE_PROCESS.barrier()
    assert torch.equal(x, torch.ones(3)) and SINGLE_PROCESS.all_gather("a") == ["a"]
    assert (SINGLE_PROCESS.rank, SINGLE_PROCESS.world_size, SINGLE_PROCESS.is_main) == (0, 1, True)
    assert ProcessGroup(0, 2).is_main and not ProcessGroup(1, 2).is_main


class Group:
    """Notes how a group of processes is joined and left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name in ("TCPStore", "PrefixStore", "init_process_group", "destroy_process_group"):
            monkeypatch.setattr(f"torch.distributed.{name}", self.note(name))
        self.values = {"WORLD_SIZE": "3", "RANK": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}
        for name, value in self.values.items():
            monkeypatch.setenv(name, value)

    def note(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> str:
            self.calls.append((name, arguments, named))
            return name

        return call

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_join_under_their_rank_and_leave(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each restart of torchrun has addresses of its own; gradients of GPUs travel by NCCL."""
    group = Group(monkeypatch)
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "4")
    with join_processes(torch.device(device)) as process_group:
        assert (process_group.rank, process_group.world_size) == (2, 3)
        assert group.names() == ["TCPStore", "PrefixStore", "init_process_group"]
    assert group.names()[-1] == "destroy_process_group"
    named = {name: (arguments, keywords) for name, arguments, keywords in group.calls}
    assert named["TCPStore"][0] == ("host", 1234) and named["TCPStore"][1]["is_master"] is False
    assert named["PrefixStore"][0] == ("seq2seq-4", "TCPStore")
    arguments, keywords = named["init_process_group"]
    assert arguments == ("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",)
    assert (keywords["store"], keywords["rank"], keywords["world_size"]) == ("PrefixStore", 2, 3)
    assert keywords["timeout"].total_seconds() == named["TCPStore"][1]["timeout"].total_seconds() >= 600
    assert chosen == ([torch.device("cuda")] if device == "cuda" else [])


@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_process_is_one_line_and_other_errors_stay(lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    error = RuntimeError("[gloo] Connection closed by peer" if lost else "size mismatch")
    with pytest.raises(UserError if lost else RuntimeError) as raised, join_processes(torch.device("cpu")):
        raise error
    assert ("process 2 of 3 lost the connection to another process" in str(raised.value)) == lost
    assert group.names()[-1] == "destroy_process_group"
    assert ("PrefixStore", ("seq2seq-0", "TCPStore"), {}) in group.calls


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    for value in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if value:
            monkeypatch.setenv("WORLD_SIZE", value)
        with join_processes(torch.device("cpu")) as process_group:
            assert process_group == SINGLE_PROCESS
    assert group.calls == []


# ------------------------------------------------------------------------------------------- progress


class Watched:
    """A model around another, as torch.compile makes one, which calls back before each pass."""

    def __init__(self, model: nn.Module, before: Callable[[Batch], None]) -> None:
        self.model, self.before = model, before

    def __call__(self, batch: Batch, *rest: Any, **options: Any) -> Any:
        self.before(batch)
        return self.model(batch, *rest, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_norms_are_those_of_each_part(tmp_path: Path) -> None:
    """All weights of a part together, and its gradients; three names deep at most."""
    made = make_trainer("transformer", tmp_path)
    [rank_batches] = updates_of(made, 1)
    made.update(rank_batches)
    expected: dict[str, list[Tensor]] = {}
    for name, p in made.state.model.named_parameters():
        assert p.grad is not None
        path = name.split(".")[:-1]
        part = path[0] if len(path) == 1 else ".".join(path[:2]) if len(path) == 2 else ".".join(path[:3])
        expected.setdefault(f"norms/{part}", []).append(p.detach().flatten())
        expected.setdefault(f"gradients/{part}", []).append(p.grad.flatten())
    found = made.norms()
    assert found == pytest.approx({name: float(torch.cat(xs).norm()) for name, xs in expected.items()}, rel=1e-5)
    assert {name.count(".") for name in found} == {0, 1, 2}
    made.state.model.zero_grad()
    assert all(name.startswith("norms/") for name in made.norms())


@pytest.mark.parametrize(("factor", "warned"), [(1.49, False), (1.51, True)])
def test_a_line_reports_its_numbers_and_warns_of_a_loss_above_a_uniform_guess(
    factor: float, warned: bool, tmp_path: Path
) -> None:
    """Guessing costs ln V a word; a tenth of uncertainty more is no reason, half as much again is."""
    made = make_trainer("transformer", tmp_path)
    meter = Meter(made.state, torch.float32)
    [rank_batches] = updates_of(made, 1)
    guess = math.log(small_tokenizer().vocabulary.target)
    made.state.progress.update = 7
    meter.count(UpdateStats(factor * guess, 2.0), rank_batches)
    made.log(meter)
    lines, notes = made.logger.lines, made.logger.notes  # type: ignore[attr-defined]
    assert (len(lines) == 2) == warned and (not warned or f"{guess:.1f}" in lines[1])
    [(kind, update, values), (board, at, norms)] = notes
    assert (kind, update, board, at) == ("train", 7, "board weights", 7)
    assert values["loss"] == pytest.approx(factor * guess) and values["rate"] == made.lr()
    assert "graphs" not in values and norms == made.norms()
    assert made.state.progress.line_tokens == 0, "the next line begins anew"


def test_the_status_line_of_each_update_has_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the terminal shows during a run: a bar, the update, and what it found."""
    made = make_trainer(varied("lstm", training__updates=4, training__validate_every=4), tmp_path, [0.0])
    shown: list[str] = []
    monkeypatch.setattr(made.logger, "status", shown.append)
    made.fit()
    assert [re.findall(r"update (\d)/4", line) for line in shown[:4]] == [["1"], ["2"], ["3"], ["4"]]
    assert all(line.startswith("━" * (4 * n)) for n, line in enumerate(shown[:4], 1))


@pytest.mark.parametrize(
    ("updates", "expected"), [(30, ["2 s per update: about 0:40 left, without validations"]), (12, [])]
)
def test_the_time_of_a_run_is_estimated_once_from_its_first_updates(
    updates: int, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the very first one, which takes longer; a run that is about to end needs no estimate."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    config = varied("lstm", training__updates=updates, training__validate_every=100)
    made = make_trainer(config, tmp_path, [0.0])
    lines = made.logger.lines  # type: ignore[attr-defined]
    take, slow = made.update, iter([50.0])

    def update(rank_batches: RankBatches) -> Any:
        clock.sleep(next(slow, 2.0))
        return take(rank_batches)

    monkeypatch.setattr(made, "update", update)
    made.fit()
    assert [line.removeprefix("time").strip() for line in lines if line.startswith("time")] == expected


@pytest.mark.parametrize("broken", [False, True])
def test_a_compiler_that_fails_is_left_out(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled model runs the updates, or, where it fails, the plain one; both are reported."""
    made = make_trainer("lstm", tmp_path)
    seen: list[Any] = []

    def compile(model: nn.Module, dynamic: bool) -> Any:
        seen.append(("compiled", dynamic))
        return Watched(model, run)

    def run(_: Batch) -> None:
        seen.append("run")
        if broken:
            raise ValueError("no compiler\n here")

    monkeypatch.setattr("torch.compile", compile)
    report = made.compile(try_batch)
    assert seen[0] == ("compiled", True) and "run" in seen
    assert ("failed (no compiler here)" in report) == broken
    assert ("recurrences stay uncompiled" in report) != broken
    assert (made.forward_model is made.working.model) == broken
    seen.clear()
    [rank_batches] = updates_of(made, 1)
    made.update(rank_batches)
    assert seen == ([] if broken else ["run"] * len(rank_batches.micro_batches))
    meter = Meter(made.state, torch.float32)
    meter.count(UpdateStats(1.0, 1.0), rank_batches)
    made.log(meter)
    assert ("graphs" in made.logger.notes[0][2]) != broken  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------- the longest batch first


@settings(max_examples=12, **MANY)  # type: ignore[arg-type]
@over(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), tokens=st.integers(1, 60), seed=st.integers(0, 9))
def test_the_batch_that_is_tried_is_the_largest_that_can_come(
    lengths: list[int], tokens: int, seed: int, tmp_path: Path
) -> None:
    """As many rows as fit of the longest side of all, on both sides, with no padding."""
    made = cached_trainer(tmp_path)
    encoded, before = random_corpus(lengths, seed), made.state.batches.encoded
    seen: list[Batch] = []
    model = made.working.model

    def note(batch: Batch) -> None:
        assert all(part.training for part in model.modules()), "with everything that training computes"
        seen.append(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "forward_model", Watched(model, note))
        patch.setattr(made.state.batches, "encoded", encoded)
        assert fits_in_memory(made, tokens)
    assert made.state.batches.encoded is before
    [batch] = seen
    longest = max(len(side[i]) for side in (encoded.source, encoded.target) for i in range(len(lengths)))
    rows = max(1, tokens // longest)
    for side in (batch.source_BS, batch.target_out_BT):
        assert side.shape == (rows, longest)
    assert batch.source_mask_BS.all() and batch.target_mask_BT.all()
    assert batch.target_tokens == rows * longest


@pytest.mark.parametrize("fails", ["", "forward", "backward", "step"])
@pytest.mark.parametrize("update", [0, 3])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_trying_a_batch_leaves_no_trace(
    precision: torch.dtype, update: int, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients, moments and random numbers are as before, at a start and later, also if memory ran out."""
    made = make_trainer(varied("transformer", model__dropout=0.5), tmp_path, precision=precision)
    for rank_batches in updates_of(made, update):
        made.update(rank_batches)
    made.state.model.zero_grad()
    model, optimizer = made.state.model, made.state.optimizer
    steps: list[float] = []
    step = optimizer.step

    def full(*_: Any, **options: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    def noting(lr: float) -> None:
        steps.append(lr)
        full() if fails == "step" else step(lr)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        assert all(optimizer.optimizers[0].state[p] for p in model.parameters()), "moments take memory as well"

    monkeypatch.setattr(optimizer, "step", noting)
    if fails == "forward":
        monkeypatch.setattr(made, "forward_model", full)
    if fails == "backward":
        next(made.working.model.parameters()).register_hook(full)
    before, moments = (weights(model), weights(made.working.model)), moments_of(optimizer)
    random, progress = torch.get_rng_state(), asdict(made.state.progress)
    fitting = not (fails and (fails != "step" or update == 0))
    assert fits_in_memory(made, 30) == fitting
    assert steps == ([0.0] if update == 0 else [])
    for one, kept in zip((model, made.working.model), before, strict=True):
        assert all(torch.equal(p, kept[name]) for name, p in one.named_parameters())
        assert all(p.grad is None for p in one.parameters())
    assert same(moments, moments_of(optimizer)) and torch.equal(random, torch.get_rng_state())
    assert progress == asdict(made.state.progress)


def moments_of(optimizer: Any) -> list[Any]:
    return [copy.deepcopy(part["state"]) for part in optimizer.state_dict()]


def test_only_a_lack_of_memory_is_a_reason_for_a_smaller_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer("lstm", tmp_path)
    for error, passes in (
        (MemoryError(), False),
        (RuntimeError("not enough memory"), False),
        (RuntimeError("x"), True),
    ):

        def failing(*_: Any, error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(made, "forward_model", failing)
        if passes:
            with pytest.raises(RuntimeError, match="x"):
                fits_in_memory(made, 30)
        else:
            assert not fits_in_memory(made, 30)


def limited(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that holds batches of `limit` tokens → what was tried on it."""
    tried: list[int] = []

    def fits_in_memory(_: Trainer, tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    monkeypatch.setattr(memory_check_module, "fits_in_memory", fits_in_memory)
    return tried


@settings(max_examples=30, **MANY)  # type: ignore[arg-type]
@over(below=st.sampled_from([65, 64, 128, 129, 1000, 1024, 4097, 50]), limit=st.integers(0, 5000))
def test_the_largest_budget_is_found(below: int, limit: int) -> None:
    """The largest power of two below a budget, 64 at least, that fits; each is tried once, large ones first."""
    with pytest.MonkeyPatch.context() as patch:
        tried = limited(limit, patch)
        found = largest_budget(None, below)  # type: ignore[arg-type]
    possible = [2**n for n in range(6, 20) if 2**n < below]
    assert found == max((n for n in possible if n <= limit), default=0)
    assert tried == [n for n in reversed(possible) if n >= found]


@pytest.mark.parametrize("limit", [100, 300, 4096, 10**6])
def test_an_automatic_budget_becomes_the_runs(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that fits, at most 4,096 on a CPU; config and batches have it once it is set, and not before."""
    made = make_trainer(varied("lstm", training__tokens="auto"), tmp_path)
    before = made.state.config
    limited(limit, monkeypatch)
    check = check_memory(made, Corpus(["a"], ["b"]))
    budget = {100: 64, 300: 256, 4096: 4096, 10**6: 4096}[limit]
    assert made.state.config == before and check.tokens == budget
    assert f"training.tokens={budget:,} " in check.summary
    assert ("do not fit" in check.summary) == (limit < 4096) and ("no faster" in check.summary) == (limit >= 4096)
    made.state.set_budget(budget)
    assert made.state.config == varied(before, training__tokens=budget) and made.state.batches.tokens == budget


def test_a_configured_budget_that_fits_is_tried_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer(varied("lstm", training__tokens=500), tmp_path)
    tried = limited(500, monkeypatch)
    assert check_memory(made, Corpus(["a"], ["b"])) == MemoryCheck(500, "the longest batch fits")
    assert tried == [500] and made.state.batches.tokens == 500


def test_a_budget_too_large_is_refused_with_one_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer(varied("lstm", training__tokens=512), tmp_path)
    limited(511, monkeypatch)
    with pytest.raises(UserError, match=r"of 512 does not fit .*but 256 does; set training.tokens=256 .*tokens=512"):
        check_memory(made, Corpus(["a"], ["b"]))
    limited(63, monkeypatch)
    with pytest.raises(UserError, match="not even a batch of 64"):
        check_memory(made, Corpus(["a"], ["b"]))


def test_processes_take_the_budget_that_fits_into_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = varied("lstm", training__tokens="auto")
    made = [make_trainer(config, tmp_path, process_group=ProcessGroup(rank, 3)) for rank in range(3)]
    limits = [1000, 300, 5000]

    def fits_in_memory(one: Trainer, tokens: int) -> bool:
        return tokens <= limits[one.state.process_group.rank]

    monkeypatch.setattr(memory_check_module, "fits_in_memory", fits_in_memory)
    checks = Threads(3, monkeypatch).run(
        lambda process_group: check_memory(made[process_group.rank], Corpus(["a"], ["b"]))
    )
    assert [check.tokens for check in checks] == [256, 256, 256]


class Searcher:
    """A translator that notes what it is given, and may have too little memory for it."""

    error: Exception | None = None
    seen: list[Any] = []  # noqa: RUF012

    def __init__(self, model: nn.Module, tokenizer: Any, device: Any, max_length: int) -> None:
        assert not any(part.training for part in model.modules())
        self.seen.append((model, tokenizer, device, max_length))

    def translate(self, sentences: list[str], search: Any) -> None:
        self.seen.append((sentences, search))
        if self.error:
            raise self.error


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("full"), RuntimeError("else")])
def test_on_a_gpu_the_longest_sentence_fills_a_batch_of_the_search(
    beam: int, error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as its subwords times the beam fit into search.tokens, and without graphs; on a CPU nothing is tried."""
    made = make_trainer(varied("lstm", search__beam=beam, search__tokens=90, search__graphs=True), tmp_path)
    made.state.model.train()
    monkeypatch.setattr(memory_check_module, "Translator", Searcher)
    monkeypatch.setattr(Searcher, "error", error)
    monkeypatch.setattr(Searcher, "seen", [])
    corpus = Corpus(["the old", "the old dog sees a", "old"], ["a", "b", "c" * 99])
    try_search(made, corpus)
    assert Searcher.seen == []
    monkeypatch.setattr(memory_check_module, "fits_in_memory", lambda *_: True)
    made.device = torch.device("cuda")
    if error is None:
        check_memory(made, corpus)
    else:
        with pytest.raises(UserError if isinstance(error, torch.OutOfMemoryError) else RuntimeError) as raised:
            check_memory(made, corpus)
        if isinstance(error, torch.OutOfMemoryError):
            assert re.search(rf"90 tokens with a beam of {beam} .*search.tokens=45$", str(raised.value))
    width = len(small_tokenizer().encode_source(["the old dog sees a"])[0])
    [(model, tokenizer, device, longest), (sentences, search)] = Searcher.seen
    assert sentences == ["the old dog sees a"] * max(1, 90 // (width * beam))
    assert search == replace(made.state.config.search, graphs=False)
    assert model is made.working.model and tokenizer is made.state.tokenizer
    assert device == made.device and longest == made.state.config.model.max_length


# ------------------------------------------------------------------------------ memory while training


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError(), RuntimeError("size mismatch")])
def test_memory_that_runs_out_in_an_update_is_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the update, half the batch for updates of the same size, and the checkpoint to continue from."""
    made = make_trainer(varied("lstm", training__updates=9, training__validate_every=2), tmp_path, [0.0] * 4)
    update = made.update

    def failing(rank_batches: RankBatches) -> UpdateStats:
        if made.state.progress.update == 3:
            raise error
        return update(rank_batches)

    monkeypatch.setattr(made, "update", failing)
    if "size" in str(error):
        with pytest.raises(RuntimeError, match="size mismatch"):
            made.fit()
        return
    with pytest.raises(UserError) as raised:
        made.fit()
    [line] = raised.value.problems
    assert "update 4: out of memory with training.tokens=24" in line
    assert "set training.tokens=12 training.update_tokens=24 " in line
    assert line.endswith(f"the last checkpoint is {tmp_path / 'checkpoints' / 'update-0000002'}")


@pytest.mark.parametrize(("update_tokens", "world", "expected"), [(0, 1, 24), (0, 3, 72), (50, 1, 50), (50, 3, 72)])
def test_smaller_batches_add_up_to_the_same_updates(
    update_tokens: int, world: int, expected: int, tmp_path: Path
) -> None:
    """As many tokens as configured, or as the batches of all processes have."""
    config = varied("lstm", training__update_tokens=update_tokens)
    made = make_trainer(config, tmp_path, process_group=ProcessGroup(0, world))
    assert f"training.tokens=8 training.update_tokens={expected} " in advise_budget(made.state, 8)


@pytest.mark.parametrize("update_tokens", [0, 60])
def test_the_largest_batch_is_tried_beside_all_that_later_updates_keep(
    update_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments of every parameter, and gradients where batches are accumulated."""
    made = make_trainer(varied("transformer", training__update_tokens=update_tokens), tmp_path)
    parameters, seen = list(made.state.model.parameters()), []

    def note(_: Batch) -> None:
        moments = made.state.optimizer.optimizers[0].state
        seen.append((all(p in moments for p in parameters), all((p.grad is not None) for p in parameters)))

    monkeypatch.setattr(made, "forward_model", Watched(made.working.model, note))
    assert fits_in_memory(made, 30) and seen == [(True, update_tokens > 0)]


def test_a_budget_that_was_found_cuts_every_batch(tmp_path: Path) -> None:
    """Also those of the pool that was cut before, to estimate its padding."""
    made, expected = make_trainer("lstm", tmp_path), make_trainer(varied("lstm", training__tokens=48), tmp_path)
    made.state.batches.estimate_padding()
    made.state.set_budget(48)
    assert [b.index_B.tolist() for u in updates_of(made, 9) for b in u.micro_batches] == [
        b.index_B.tolist() for u in updates_of(expected, 9) for b in u.micro_batches
    ]


# ------------------------------------------------------------------------- recomputation, compilation


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", [False, True])
def test_recomputed_layers_give_the_same_losses_and_gradients(
    packing: bool, precision: torch.dtype, tmp_path: Path
) -> None:
    """To the bit, with every dropout; the random numbers that follow are the same as well."""
    seen = []
    for recompute in (False, True):
        config = varied("transformer", training__recompute=recompute, training__packing=packing)
        config = varied(config, model__dropout=0.3, model__attention__dropout=0.3, model__encoder_layers=2)
        made = make_trainer(config, tmp_path / str(recompute), precision=precision)
        torch.manual_seed(5)
        losses = [made.update(rank_batches).loss for rank_batches in updates_of(made, 3)]
        gradients = [p.grad for p in made.state.model.parameters()]
        seen.append((losses, gradients, weights(made.state.model), torch.get_rng_state()))
    (losses, gradients, trained, random), other = seen
    assert losses == other[0] and torch.equal(random, other[3])
    assert all(torch.equal(a, b) for a, b in zip(gradients, other[1], strict=True))  # type: ignore[arg-type]
    assert all(torch.equal(weight, other[2][name]) for name, weight in trained.items())


@pytest.mark.parametrize("recompute", [False, True])
def test_only_the_backward_pass_of_training_recomputes(recompute: bool, tmp_path: Path) -> None:
    """Every layer once more, and none for a loss without gradients."""
    made = make_trainer(varied("transformer", training__recompute=recompute), tmp_path)
    model, calls = made.working.model, []
    for name, part in model.named_modules():
        if name.endswith("feed_forward"):
            part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    layers = ["encoder.layers.0.feed_forward", "decoder.layers.0.feed_forward"]
    [rank_batches] = updates_of(made, 1)
    [batch] = rank_batches.micro_batches
    with torch.no_grad():
        loss_sum(model, batch, 0.1)
    assert calls == layers
    calls.clear()
    loss_sum(model, batch, 0.1).backward()
    assert calls == layers + (layers[::-1] if recompute else [])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_that_recomputes_decodes_step_by_step_as_at_once(recompute: bool, tmp_path: Path) -> None:
    """The cache of a search is that of the layers, and no copy of it."""
    made = make_trainer(varied("transformer", training__recompute=recompute), tmp_path)
    model = made.working.model.eval()
    [rank_batches] = updates_of(made, 1)
    [batch] = rank_batches.micro_batches
    with torch.no_grad():
        state = model.start(batch.source_BS, batch.source_mask_BS)
        whole_BTV, _ = model.step(batch.target_in_BT[:, :3], state)
        for t in range(3):
            step_B1V, state = model.step(batch.target_in_BT[:, t : t + 1], state)
            torch.testing.assert_close(step_B1V[:, 0], whole_BTV[:, t], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_recurrence_makes_no_graph_for_each_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as torch traces them, without a compiler's code; the two batches that are tried have several sentences."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    shapes: list[tuple[torch.Size, torch.Size]] = []
    made = make_trainer("lstm", tmp_path)

    def noted(one: Trainer, batch: Batch) -> None:
        shapes.append((batch.source_BS.shape, batch.target_out_BT.shape))
        try_batch(one, batch)

    assert "recurrences stay uncompiled" in made.compile(noted)
    [(sources, _), (more_sources, _)] = shapes
    assert 2 <= sources[0] < more_sources[0] and all(source[1] != target[1] for source, target in shapes)
    before, lengths = graphs(), set()
    for rank_batches in updates_of(made, 8):
        B, T = rank_batches.micro_batches[0].target_out_BT.shape
        if B > 1:  # torch.compile specialises on a size of one
            lengths.add(T)
            made.update(rank_batches)
    assert len(lengths) > 2 and graphs() == before > 0


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_compiled_transformer_is_one_graph_for_all_shapes(
    packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch traces it, so that batches need no buckets of lengths; a single sentence would be another one."""
    torch._dynamo.reset()
    before = graphs()
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    made, shapes = make_trainer(varied("transformer", training__packing=packing), tmp_path), set()
    assert "failed" not in made.compile(try_batch)
    for rank_batches in updates_of(made, 12):
        [batch] = rank_batches.micro_batches
        if len(batch.source_BS) > 1:
            shapes.add((batch.source_BS.shape, batch.target_out_BT.shape))
            made.update(rank_batches)
    assert len(shapes) > 3 and graphs() - before == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_loss_is_without_regularisers(family: str, tmp_path: Path) -> None:
    """With words cut out of a second pass, whose divergence the objective contains."""
    made = make_trainer(varied(family, training__simcut=3.0, training__simcut_cutoff=0.5), tmp_path)
    batch = tiny_batch()
    expected = loss_sum(made.state.model, batch, made.state.config.training.label_smoothing).item()
    assert made.update(rank_batches_of(batch)).loss == pytest.approx(expected / batch.target_tokens, rel=1e-5)


def test_a_plateau_halves_the_lr_after_every_few_validations_without_gain(tmp_path: Path) -> None:
    """Every second one here; a gain begins the count anew."""
    config = varied("lstm", optimizer__schedule="plateau", optimizer__plateau_patience=2, optimizer__warmup=1)
    scores = [2.0, 1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0]
    made = make_trainer(config, tmp_path, scores)
    made.state.progress.update = 5
    halvings = []
    for _ in scores:
        made.validate()
        halvings.append(math.log2(settled(config.optimizer.lr) / made.lr()))
    assert halvings == pytest.approx([0, 0, 1, 1, 2, 2, 2, 3])


def test_speeds_leave_validations_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the meter starts again after each, so that the next line counts updates alone."""
    made = make_trainer(varied("lstm", training__updates=4, training__validate_every=2), tmp_path, [1.0, 2.0])
    events: list[str] = []
    calibrate, validate = Meter.calibrate, made.validate

    def calibrated(meter: Meter) -> None:
        events.append("calibrate")
        calibrate(meter)

    def validated() -> None:
        events.append("validate")
        validate()

    monkeypatch.setattr(Meter, "calibrate", calibrated)
    monkeypatch.setattr(made, "validate", validated)
    made.fit()
    assert "".join(event[0] for event in events).count("vc") == 2
