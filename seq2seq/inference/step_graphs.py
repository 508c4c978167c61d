"""Decoding steps as CUDA graphs: one launch repeats what the host would launch kernel by kernel.

A graph repeats kernels on the same addresses with the same shapes, so it needs a state of fixed size: sentences and
steps are rounded up to one of a few sizes, and each combination has a graph.

Shapes: R rows (B × beam), X rows with room for more, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from threading import Lock
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from seq2seq.model.decoder_state import State, bucket
from seq2seq.utils.errors import reason_of

LEAST_SENTENCES, LEAST_STEPS = 16, 32  # of a graph: fewer take as long
MOST_ROWS = 512  # of a graph: the kernels of more take longer than their launches, and the logits much memory
MOST_GRAPHS = 32  # those that were used longest ago are dropped
ALIGNMENT = 256  # bytes between the tensors of a state, as torch allocates them
GROWTH = 1.5  # of the shared memory, as each growth drops all graphs
CAPTURE = Lock()  # a process can record one graph at a time


@dataclass(eq=False)
class Graph:
    """A step on tensors that stay where they are; its first run, the warm-up, is not recorded."""

    state: State
    target_X1: Tensor
    logits_X1V: Tensor | None = None  # the next step of any graph may overwrite them
    recording: torch.cuda.CUDAGraph | None = None


@dataclass(frozen=True, eq=False)
class GraphState(State):
    """Rows that lie in the tensors of a graph, until another state needs these."""

    graphs: StepGraphs
    graph: Graph
    rows: int
    steps: int  # that the graph has room for
    copied: list[State] = field(default_factory=list, init=False)  # at most one, which outlives the graph's tensors

    @property
    def value(self) -> State:
        """The plain state, a view of the graph's tensors as long as it lies there."""
        if self.copied:
            return self.copied[0]
        if self.graphs.resident() is not self:
            raise RuntimeError("a later step has overwritten this decoder state")
        return self.graph.state.plain(int(self.length))

    def independent(self) -> State:
        if not self.copied:
            rows_R = torch.arange(self.rows, device=self.graph.target_X1.device)
            self.copied.append(self.value.select(rows_R, self.beam))
        return self.copied[0]

    def select(self, rows_R: Tensor, beam: int) -> Any:
        return self.value.select(rows_R, beam)

    def join(self, other: State) -> Any:
        return self.independent().join(other.independent())

    def reorder(self, rows_R: Tensor) -> Any:
        if self.copied or self.graphs.resident() is not self:
            return self.independent().reorder(rows_R)
        state, rest_X = self.graph.state, torch.arange(self.rows, len(self.graph.target_X1), device=rows_R.device)
        assign(state, state.reorder(torch.cat((rows_R, rest_X))))
        return self.graphs.keep(self)


class StepGraphs:
    """A step that replays graphs on CUDA; elsewhere, and after a capture or an allocation failed, the plain step.

    One state at a time lies in the memory that all graphs share. Whoever searches holds the lock: two searches at once
    would overwrite each other's logits.
    """

    def __init__(self, step: Callable[[Tensor, State], tuple[Tensor, State]], device: torch.device) -> None:
        self.plain_step, self.device, self.works = step, device, device.type == "cuda"
        self.stream: Any = capture_stream(device) if self.works else None
        self.graphs: dict[tuple[torch.Size, ...], Graph] = {}  # used longest ago first
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.resident: Callable[[], GraphState | None] = lambda: None
        self.lock = Lock()

    def step(self, target_R1: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits after each row's token, valid until the next step, and the next state."""
        if not isinstance(state, GraphState) or self.resident() is not state or state.length == state.steps:
            state = self._loaded(state.independent(), len(target_R1))
        if not isinstance(state, GraphState):
            return self.plain_step(target_R1, state)
        state.graph.target_X1[: state.rows].copy_(target_R1)
        try:
            logits_X1V = self._run(state.graph)
        except torch.OutOfMemoryError as error:  # before the step changed the state
            self._give_up(error)
            return self.plain_step(target_R1, state.independent())
        return logits_X1V[: state.rows], self.keep(replace(state, length=state.length + 1))

    def keep(self, state: GraphState) -> GraphState:
        """Let this state be the one that lies in the shared memory; no earlier one does any more."""
        state = replace(state)
        self.resident = ref(state)
        return state

    def _loaded(self, state: State, rows: int) -> State:
        """Copy a plain state into the tensors of the smallest graph that has room, if graphs work and it is small."""
        if not self.works or rows > MOST_ROWS:
            return state
        try:
            if evicted := self.resident():
                evicted.independent()
            sentences, steps = bucket(rows // state.beam, LEAST_SENTENCES), bucket(int(state.length) + 1, LEAST_STEPS)
            graph = self._filled(state.fixed(sentences, steps), sentences * state.beam)
        except torch.OutOfMemoryError as error:
            self._give_up(error)
            return state
        return self.keep(GraphState(self, graph, rows, steps, length=state.length, beam=state.beam))

    def _filled(self, fixed: State, rows: int) -> Graph:
        """Return the graph for a fixed state's shapes, with its numbers in the graph's tensors."""
        shapes = tuple(x.shape for x in tensors(fixed))
        graph = self.graphs.pop(shapes, None) or self._graph(fixed, rows)
        self.graphs[shapes] = graph
        if len(self.graphs) > MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        assign(graph.state, fixed)
        return graph

    def _graph(self, fixed: State, rows: int) -> Graph:
        """Return a new graph, whose state begins where the shared memory does."""
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors(fixed)]
        if sum(sizes) > len(self.memory):
            self.graphs.clear()  # their states would keep the old memory
            size = max(sum(sizes), int(GROWTH * len(self.memory)))
            self.memory = self.memory.new_empty(0)
            self.memory = self.memory.new_empty(size)
        parts = iter(self.memory[: sum(sizes)].split(sizes))
        state = rebuilt(fixed, lambda x: next(parts)[: x.nbytes].view(x.dtype).view(x.shape))
        return Graph(state, torch.zeros(rows, 1, dtype=torch.int64, device=self.device))

    def _run(self, graph: Graph) -> Tensor:
        """Run the step of a graph: the first time plainly, then recorded."""
        if graph.logits_X1V is not None and graph.recording is None and self.works and CAPTURE.acquire(blocking=False):
            try:
                self._record(graph)
            finally:
                CAPTURE.release()
        if graph.recording is not None:
            graph.recording.replay()
        else:
            self._warm_up(graph)
        assert graph.logits_X1V is not None
        return graph.logits_X1V

    def _warm_up(self, graph: Graph) -> None:
        """Run a step plainly, on the stream of the captures: libraries allocate what they need there."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            graph.logits_X1V = self._step_in_place(graph)
        current.wait_stream(self.stream)

    def _record(self, graph: Graph) -> None:
        """Capture the step, which runs nothing."""
        recording = torch.cuda.CUDAGraph()
        recorded = [g.recording for g in self.graphs.values() if g.recording is not None]
        pool = recorded[0].pool() if recorded else None
        try:
            # The outer stream is selected again even where the end of a failed capture leaves its own.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(recording, pool, self.stream, "thread_local"),
            ):
                graph.logits_X1V = self._step_in_place(graph)
        except RuntimeError as error:
            self._give_up(error)
        else:
            graph.recording = recording

    def _step_in_place(self, graph: Graph) -> Tensor:
        logits_X1V, after = self.plain_step(graph.target_X1, graph.state)
        assign(graph.state, after)
        return logits_X1V

    def _give_up(self, error: Exception) -> None:
        """Go on without graphs: with the fixed state until the search changes its size, then plainly."""
        self.works = False
        self.graphs.clear()
        self.memory = self.memory.new_empty(0)
        print(f"search.graphs=true has no effect any more: {reason_of(error)}", file=sys.stderr)


@cache
def capture_stream(device: torch.device) -> Any:
    """Return the stream of all captures on a device: libraries keep a workspace for each stream, for ever."""
    return torch.cuda.Stream(device)


def tensors(x: Any) -> list[Tensor]:
    """Return the tensors of a state, in order."""
    if isinstance(x, Tensor):
        return [x]
    parts = x if isinstance(x, tuple) else [getattr(x, f.name) for f in fields(x)] if is_dataclass(x) else []
    return [tensor for part in parts for tensor in tensors(part)]


def rebuilt(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a state with other tensors."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple):
        parts = [rebuilt(part, change) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: rebuilt(getattr(x, f.name), change) for f in fields(x)})
    return x


def assign(state: State, new: State) -> None:
    """Write a state of the same shapes into the tensors of another, where these differ."""
    for old, x in zip(tensors(state), tensors(new), strict=True):
        if old is not x:
            old.copy_(x)
