"""A search waits for its device once a step: counted on a CPU, where each wait is a call that a GPU would wait for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.constraints import Rules
from seq2seq.decoding.sampling import sample
from seq2seq.decoding.scoring import DecodingTask, Specials
from seq2seq.inference.ensemble import Ensemble
from seq2seq.model.decoder_state import State
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import padded, random_sentences
from tests.helpers.models import tiny_model

SPECIALS = Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN))
PIECES = [f"▁w{i}" if i % 3 else f"x{i}" for i in range(40)]
LENGTH, QUIET = 6, 1  # tokens of each translation; synchronisations of a step that decides no sentence
aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts operators whose result a GPU hands to Python, or whose input Python hands to a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        waits = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.lift_fresh, aten._unique2)
        tensor_repeats = function == aten.repeat_interleave.Tensor
        self.count += by_mask or tensor_repeats or packet in waits
        return function(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter]:
    """Also counts the calls that no operator shows on a CPU."""
    counter = Counter()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            if not getattr(x, "on_host", False):
                counter.count += 1
            return function(x, *args, **kwargs)

        return call

    def to_host(x: Tensor) -> Tensor:
        host = x.detach()
        host.on_host = True  # type: ignore[attr-defined]
        return host

    with pytest.MonkeyPatch.context() as patch, counter:
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, counting(getattr(Tensor, name)))
        patch.setattr(Tensor, "cpu", counting(to_host))
        patch.setattr(torch, "from_numpy", counting(torch.from_numpy))
        yield counter


@pytest.mark.parametrize(
    "call,waits",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: int(x[0]), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu().numpy(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.masked_select(x > 1), 1),
        (lambda x: x.__setitem__(x > 1, x.new_zeros(())), 1),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), 1),
        (lambda x: x.repeat_interleave(x.long()), 1),
        (lambda x: [float(y) for y in x], 3),
        (lambda x: x.masked_fill(x > 1, 0.0) + torch.arange(3) + torch.full((3,), 2.0), 0),
        (lambda x: x[x.argsort()].repeat_interleave(2)[:2], 0),
    ],
)
def test_the_counter_counts(call: Callable[[Tensor], Any], waits: int) -> None:
    """What makes Python wait for a GPU, once each, and nothing else."""
    x = torch.arange(3.0)
    with counted() as counter:
        call(x)
    assert counter.count == waits


def steps_of(
    search: Callable[[Any], Any], step: Callable[[Tensor, State], tuple[Any, ...]]
) -> tuple[list[int], list[int]]:
    """The synchronisations from each step to the next, and the rows of each step.

    Not in inference mode, which hides `item` and `bool` from a dispatch mode.
    """
    counts: list[int] = []
    rows: list[int] = []

    def watched(tokens: Tensor, state: State) -> tuple[Any, ...]:
        counts.append(counter.count)
        rows.append(len(tokens))
        return step(tokens, state)

    with torch.no_grad(), counted() as counter:
        search(watched)
    return [after - before for before, after in pairwise(counts)], rows


WORDS = {"required": [("w7", [7]), ("w4 w5", [4, 5])], "forbidden": ["w8", "w10 w11"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"beam": 1, "stop": "filled"}, {}),
    "beam": ({}, {}),
    "groups": ({"beam": 6, "groups": 3, "diversity": 0.5}, {}),
    "coverage": ({"coverage_penalty": 0.5}, {}),
    "prefix": ({}, {"prefix": True}),
    "no_repeat": ({}, {"no_repeat": 2}),
    "forbid": ({}, {"forbidden": WORDS["forbidden"]}),
    "require": ({}, {"required": WORDS["required"]}),
    "all rules": ({"coverage_penalty": 0.5}, {**WORDS, "no_repeat": 2, "prefix": True}),
}


def task(count: int, rules: dict[str, Any]) -> DecodingTask:
    """All translations have the same length, so no sentence is decided before the last step."""
    length_B, words = torch.full((count,), LENGTH), {name: rules[name] for name in rules if name != "prefix"}
    prefix_BP = torch.tensor([[6, 9]] * count) if "prefix" in rules else None
    constraints = Rules(PIECES, END, **words) if words else None
    return DecodingTask(length_B, length_B, length_B, [1] * count, constraints, prefix_BP)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 5])
def test_a_quiet_step_of_beam_search_waits_once(family: str, name: str, count: int) -> None:
    """Whatever the rows, the beam and the rules."""
    changes, rules = CASES[name]
    config: SearchConfig = dataclasses.replace(search_preset("beam"), **{"stop": "longest", **changes})
    ensemble, sentences = Ensemble([tiny_model(family)]), random_sentences([3] * count, seed=1)
    asked = task(count, rules)

    def step_with_attention(tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        logits, state, weights = ensemble.step_with_attention(tokens, state)
        return logits, state, weights[:, :, :, -1].mean((1, 2))

    step = step_with_attention if config.coverage_penalty else ensemble.step
    with torch.no_grad():
        state = ensemble.start([padded(sentences)])
    counts, rows = steps_of(lambda step: unwrap(beam_search)(step, [(state, asked)], config, SPECIALS), step)
    assert rows == [count * config.beam] * LENGTH
    assert counts == [QUIET] * (LENGTH - 1)


@pytest.mark.parametrize("rules", [{}, {"forbidden": WORDS["forbidden"], "no_repeat": 2, "prefix": True}])
@pytest.mark.parametrize("count", [1, 5])
def test_a_quiet_step_of_sampling_waits_once(rules: dict[str, Any], count: int) -> None:
    """With every kind of truncation, for any number of samples."""
    cuts = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "epsilon_cutoff": 0.001}
    config = dataclasses.replace(search_preset("sample"), samples=3, n_best=3, **cuts)  # type: ignore[arg-type]
    model, asked = tiny_model("transformer"), task(count, rules)
    with torch.no_grad():
        state = model.start(*padded(random_sentences([3] * count, seed=1)))
    counts, rows = steps_of(lambda step: unwrap(sample)(step, state, asked, config, SPECIALS), model.step)
    assert rows == [count * 3] * LENGTH
    assert counts == [QUIET] * (LENGTH - 1)
