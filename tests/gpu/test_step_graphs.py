"""Laws of decoding steps as CUDA graphs, on the pretend GPU: the translations of plain steps, with few launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from seq2seq.decoding import beam as search_module
from seq2seq.decoding.scoring import DecodingTask, Hypothesis
from seq2seq.inference import step_graphs
from seq2seq.inference.ensemble import Ensemble, EnsembleState
from seq2seq.inference.step_graphs import GraphState, StepGraphs
from seq2seq.inference.translator import SPECIALS, Translation, Translator
from seq2seq.model import attention
from seq2seq.model.decoder_state import State, bucket
from tests.helpers.configs import FAMILIES
from tests.helpers.gpu_searches import SEARCHES, SOURCES, same, searches, translate, translator
from tests.helpers.pretend_gpu import Count, PretendGPU, pretend_gpu

pytestmark = pytest.mark.slow
families = pytest.mark.parametrize("family", FAMILIES)
MANY = [*SOURCES, *(f"{text} dogs" for text in SOURCES)]
# Limits that differ, so that sentences end one after the other, and the last ones of a batch wait for the next.
OPTIONS: dict[str, Any] = {"tokens": 150, "length_factor": 1.0, "length_extra": 2, "min_length_extra": 0}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """With graphs of the least sizes, so that a few sentences need several."""
    monkeypatch.setattr(step_graphs, "LEAST_SENTENCES", 1)
    monkeypatch.setattr(step_graphs, "LEAST_STEPS", 4)
    monkeypatch.setattr(attention, "LEAST_SOURCE", 4)
    with pretend_gpu() as made:
        yield made


def captures(count: Count) -> int:
    return sum(n for (_, reason), n in count.syncs.items() if reason == "capture")


# ------------------------------------------------------------------------------------------------- the pretend graph


def record(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda _: torch.tensor([1, 2], device="cuda"),
        lambda _: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        lambda _: torch.cuda.synchronize(),
    ],
)
def test_a_capture_refuses_what_its_driver_refuses(gpu: PretendGPU, refused: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="captur"):
        record(lambda: refused(x))
    assert x.tolist() == [1, 1, 1]


@torch.inference_mode()
def test_a_graph_repeats_its_kernels_on_the_same_memory(gpu: PretendGPU) -> None:
    x = torch.ones(3, device="cuda")
    made: list[Tensor] = []
    graph = record(lambda: made.extend((x.mul_(2), x + 1)))
    assert x.tolist() == [1, 1, 1] and made[1].isnan().all()
    for expected in (2, 4):
        graph.replay()
        assert x.tolist() == [expected] * 3 and made[1].tolist() == [expected + 1] * 3
    x.fill_(5)
    with gpu.counting() as count:
        graph.replay()
    assert made[1].tolist() == [11] * 3 and count.launches.total() == 1
    record(lambda: x + 2).replay()
    assert made[1].isnan().all()


# ------------------------------------------------------------------------------------------------------ translations


def compare(found: list[list[Translation]], expected: list[list[Translation]]) -> None:
    for some, others in zip(found, expected, strict=True):
        same(some, others)


@searches
def test_translations_with_graphs_are_those_without(kind: str, family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    """In several batches, whose last sentences join the next one; the second time with fewer captures."""
    made, found = translator(tmp_path, family, "cuda"), []
    expected = translate(made, kind, MANY, **OPTIONS)
    for _ in range(2):
        with gpu.counting() as count:
            compare(translate(made, kind, MANY, **OPTIONS, graphs=True), expected)
        found.append((captures(count), count.launches["replay"]))
    if kind == "coverage":  # no graph returns attention weights
        assert found == [(0, 0)] * 2
    else:
        assert found[0][0] >= found[1][0] and found[1][1] > found[0][1] > 0


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_an_ensemble_replays_one_graph_for_all_its_models(kind: str, tmp_path: Path, gpu: PretendGPU) -> None:
    parts = [translator(tmp_path / family, family, "cuda") for family in ("transformer", "lstm")]
    made = Translator.ensemble(parts, ["a", "b"])
    expected = translate(made, kind, MANY, **OPTIONS)
    with gpu.counting() as count:
        compare(translate(made, kind, MANY, **OPTIONS, graphs=True), expected)
    assert count.launches["replay"]


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_graphs_that_were_dropped_are_recorded_again(
    kind: str, tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = translator(tmp_path, "transformer", "cuda")
    expected = translate(made, kind, MANY, **OPTIONS)
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 1)
    compare(translate(made, kind, MANY, **OPTIONS, graphs=True), expected)
    assert len(made.graphs.graphs) == 1


# ----------------------------------------------------------------------------------------------------------- budgets


@families
@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_captures_are_no_more_than_sizes(kind: str, family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    """Of one batch: the sizes of its sentences times those of its steps."""
    made = translator(tmp_path, family, "cuda")
    with gpu.counting() as count:
        found = translate(made, kind, MANY, **{**OPTIONS, "tokens": 10_000}, graphs=True)
    longest = [len(best.source_pieces) + OPTIONS["length_extra"] for best, *_ in found]
    sentences = {bucket(n, 1) for n in range(1, len(MANY) + 1)}
    steps = {bucket(n, 4) for n in range(1, max(longest) + 1)}
    assert 0 < captures(count) <= len(sentences) * len(steps)


def launches(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """The launches of each call of a method from now on."""
    method, each = getattr(owner, name), []

    def counted(*given: Any) -> Any:
        before = gpu.count.launches.total()
        result = method(*given)
        each.append(gpu.count.launches.total() - before)
        return result

    monkeypatch.setattr(owner, name, counted)
    return each


@families
@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_a_quiet_step_launches_a_handful(
    kind: str, family: str, tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the tokens and a replay, instead of all kernels; for a beam also what reorders its hypotheses."""
    monkeypatch.setattr(step_graphs, "LEAST_STEPS", 32)
    made, quiet = translator(tmp_path, family, "cuda"), slice(2, 9)
    plain = launches(gpu, monkeypatch, Ensemble, "step")
    translate(made, kind, min_length_extra=9)
    assert min(plain[quiet]) > 10 * 2
    translate(made, kind, min_length_extra=9, graphs=True)
    steps, reorders = (
        launches(gpu, monkeypatch, *method) for method in ((StepGraphs, "step"), (GraphState, "reorder"))
    )
    with gpu.counting() as count:
        translate(made, kind, min_length_extra=9, graphs=True)
    assert set(steps[quiet]) == {2} and bool(reorders) == (kind == "beam") and not count.unpinned
    assert max(reorders, default=0) <= {"transformer": 5, "lstm": 3 + 4 * 2}[family]  # the LSTM's for each layer


# ---------------------------------------------------------------------------------------------------------- fallback


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Let every capture fail at its end, as a driver does; return a list that grows with each."""
    tried: list[int] = []
    capture = torch.cuda.graph

    @contextmanager
    def graph(*given: Any) -> Iterator[None]:
        tried.append(1)
        with capture(*given):
            yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return tried


@families
@pytest.mark.parametrize("kind", ["greedy", "beam", "sample"])
def test_after_a_capture_that_fails_steps_are_plain(
    kind: str,
    family: str,
    tmp_path: Path,
    gpu: PretendGPU,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = translator(tmp_path, family, "cuda")
    expected = translate(made, kind, MANY, **OPTIONS)
    tried = failing(monkeypatch, RuntimeError("CUDA error: operation not permitted\nCompile with a flag."))
    for _ in range(2):
        with gpu.counting() as count:
            compare(translate(made, kind, MANY, **OPTIONS, graphs=True), expected)
        assert not count.launches["replay"]
    lines = capsys.readouterr().err.splitlines()
    assert len(tried) == len(lines) == 1 and "operation not permitted Compile" in lines[0]


def test_without_memory_for_its_state_a_search_is_plain(
    tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = translator(tmp_path, "transformer", "cuda")
    expected = translate(made, "beam", MANY, **OPTIONS)
    monkeypatch.setattr(StepGraphs, "_graph", MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    compare(translate(made, "beam", MANY, **OPTIONS, graphs=True), expected)
    assert not made.graphs.works


def test_without_memory_for_a_step_a_search_goes_on_plainly(
    tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = translator(tmp_path, "transformer", "cuda")
    expected = translate(made, "beam", MANY, **OPTIONS)
    translate(made, "beam", MANY, **OPTIONS, graphs=True)
    monkeypatch.setattr(StepGraphs, "_run", MagicMock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    compare(translate(made, "beam", MANY, **OPTIONS, graphs=True), expected)
    assert not made.graphs.works and not len(made.graphs.memory)


def test_steps_of_many_rows_are_plain(tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    made = translator(tmp_path, "transformer", "cuda")
    expected = translate(made, "beam", MANY, **OPTIONS)
    monkeypatch.setattr(step_graphs, "MOST_ROWS", 8)
    with gpu.counting() as count:
        compare(translate(made, "beam", MANY, **OPTIONS, graphs=True), expected)
    assert count.launches["replay"] and all(len(graph.target_X1) <= 8 for graph in made.graphs.graphs.values())


def test_while_another_graph_is_recorded_steps_are_plain(tmp_path: Path, gpu: PretendGPU) -> None:
    made = translator(tmp_path, "transformer", "cuda")
    expected = translate(made, "beam", MANY, **OPTIONS)
    with step_graphs.CAPTURE, gpu.counting() as count:
        compare(translate(made, "beam", MANY, **OPTIONS, graphs=True), expected)
    assert not captures(count) and made.graphs.works and not step_graphs.CAPTURE.locked()


def test_a_second_search_at_the_same_time_is_plain(tmp_path: Path, gpu: PretendGPU) -> None:
    made = translator(tmp_path, "transformer", "cuda")
    expected = translate(made, "beam")
    with made.graphs.lock, gpu.counting() as count:
        compare(translate(made, "beam", graphs=True), expected)
    assert not count.launches["replay"] and not made.graphs.lock.locked()


def started(made: Translator, *ids: int) -> State:
    """The state of a sentence for each of these ids, which is all that it consists of."""
    source_BS = torch.tensor([[id_] * 3 for id_ in ids], device="cuda")
    return made.models.start([(source_BS, source_BS > 0)])


@families
@torch.inference_mode()
def test_two_states_take_turns_and_join(family: str, tmp_path: Path, gpu: PretendGPU) -> None:
    """The one that does not lie in the graphs' memory lives on as a copy, and may be reordered."""
    made = translator(tmp_path, family, "cuda")
    token_11 = torch.tensor([[7]], device="cuda")

    def walk(step: Callable[[Tensor, State], tuple[Tensor, State]]) -> Iterator[Tensor]:
        both = [started(made, 5), started(made, 9)]
        for turn in (0, 1, 0, 0, 1, 1):
            logits, both[turn] = step(token_11, both[turn])
            yield logits.cpu()
        left, right = (state.reorder(torch.tensor([0], device="cuda")) for state in both)
        yield step(token_11.repeat(2, 1), left.join(right.independent()))[0].cpu()

    for found, expected in zip(walk(made.graphs.step), walk(made.models.step), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ending", [4, 8])
@pytest.mark.parametrize("beam", [1, 2])
def test_a_batch_that_waits_is_joined(
    beam: int, ending: int, tmp_path: Path, gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 sentences 4 end and the others wait, too many to be copied for it; of the next batch 4 or 8 end."""
    made = translator(tmp_path, "transformer", "cuda")
    monkeypatch.setattr(search_module, "WAIT_FRACTION", 0.9)
    joins: list[type] = []
    join = search_module.LiveBatch.join

    def noted(live: search_module.LiveBatch, other: search_module.LiveBatch) -> search_module.LiveBatch:
        joins.extend((type(live.state), type(other.state)))
        return join(live, other)

    monkeypatch.setattr(search_module.LiveBatch, "join", noted)

    def found(step: Any) -> list[list[Hypothesis]]:
        batches = []
        for first, few in ((5, 4), (11, ending)):
            limit_B = torch.tensor([3] * few + [6] * (40 - few), device="cuda")
            task = DecodingTask(limit_B, limit_B, limit_B, [0] * 40)
            batches.append((started(made, *(4 + (first + i) % 20 for i in range(40))), task))
        return search_module.beam_search(step, batches, replace(SEARCHES["beam"], beam=beam, n_best=1), SPECIALS)

    for some, others in zip(found(made.graphs.step), found(made.models.step), strict=True):
        assert [one.ids for one in some] == [one.ids for one in others]
        for one, other in zip(some, others, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
    assert joins[:2] == [GraphState if ending == 4 else EnsembleState, GraphState]


@torch.inference_mode()
def test_a_state_that_a_step_has_overwritten_is_refused(tmp_path: Path, gpu: PretendGPU) -> None:
    made, target_R1 = translator(tmp_path, "transformer", "cuda"), torch.tensor([[7], [8]], device="cuda")
    first = made.graphs.step(target_R1, started(made, 5, 9))[1]
    made.graphs.step(target_R1, first)
    for use in (lambda: made.graphs.step(target_R1, first), lambda: first.reorder(target_R1[:, 0])):
        with pytest.raises(RuntimeError, match="overwritten"):
            use()


def test_on_a_cpu_graphs_have_no_effect(tmp_path: Path) -> None:
    made = translator(tmp_path, "transformer", "cpu")
    compare(translate(made, "beam", graphs=True), translate(made, "beam"))
    assert not made.graphs.graphs
