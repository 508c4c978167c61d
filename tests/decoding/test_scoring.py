"""What hypotheses are ranked by, and the best continuations, against plain sorting."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.decoding import native_search, processors
from seq2seq.decoding.constraints import Rules
from seq2seq.decoding.processors import (
    EndIfStuck,
    MaxLength,
    MinLength,
    StepInput,
    next_candidates,
    next_log_probabilities,
    process,
    step_processors,
)
from seq2seq.decoding.scoring import (
    NO_ID,
    PLAIN_KEYS,
    Candidates,
    DecodingTask,
    Specials,
    coverage_penalty,
    length_penalty,
    log_sum_exp,
    special_keys,
    top_candidates,
)
from seq2seq.model import native
from tests.helpers.tables import BANNED, BEGIN, END

SPECIALS = Specials(BEGIN, END, BANNED)
SPECIAL_KEYS: dict[str, Any] = {  # with values that change a search
    **{"coverage_penalty": 0.2, "stop": "likely", "min_length_factor": 0.5, "min_length_extra": 1, "groups": 2},
    **{"require": ["a"], "forbid": ["a"], "no_repeat_ngram": 2, "samples": 3},
}
NEG_INF = float("-inf")
FAST = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32)


@lru_cache(maxsize=1)
def preset() -> SearchConfig:
    return search_preset("beam")


def assert_close(found: Tensor, wanted: Tensor, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol, atol)


def task(shortest: list[int], longest: list[int], **changes: Any) -> DecodingTask:
    count = len(longest)
    asked = DecodingTask(torch.tensor(longest), torch.tensor(shortest), torch.arange(count), list(range(count)))
    return dataclasses.replace(asked, **changes)


def step_of(logits_RV: Tensor, length: int, asked: DecodingTask, **changes: Any) -> StepInput:
    at_limit = bool((asked.max_length_B <= length).any())
    return StepInput(logits_RV, length, asked, at_limit, None, None)._replace(**changes)


def assert_are_the_best(found: Candidates, total_BKV: Tensor, count: int) -> None:
    """The `count` largest of each sentence, best first, each of them another id of another hypothesis."""
    B, K, V = total_BKV.shape
    wanted = [sorted(row.flatten().tolist(), reverse=True)[:count] for row in total_BKV]
    assert found.selection_score_BC.shape == (B, min(count, K * V))
    assert_close(found.selection_score_BC, torch.tensor(wanted).to(found.selection_score_BC), rtol=1e-6, atol=4e-6)
    assert torch.equal(found.selection_score_BC, found.log_probability_BC)
    assert int(found.ids_BC.min()) >= 0 and int(found.ids_BC.max()) < V, "padding is no id"
    assert int(found.origin_BC.min()) >= 0 and int(found.origin_BC.max()) < K
    index_BC = found.origin_BC * V + found.ids_BC
    possible_BC = found.selection_score_BC > NEG_INF
    own_BC = total_BKV.flatten(1).gather(1, index_BC).to(found.selection_score_BC)
    assert_close(own_BC[possible_BC], found.selection_score_BC[possible_BC], rtol=1e-6, atol=4e-6)
    for indices, possible in zip(index_BC.tolist(), possible_BC.tolist(), strict=True):
        kept = [index for index, yes in zip(indices, possible, strict=True) if yes]
        assert len(set(kept)) == len(kept), "no candidate comes twice"


@FAST
@given(SEEDS)
def test_the_best_continuations_are_those_of_a_full_sort(seed: int) -> None:
    """With exact ties, impossible rows and columns, and more candidates asked for than there are."""
    random = Random(seed)
    B, K = random.choice([1, 2, 5]), random.choice([1, 2, 3, 5])
    V = random.choice([1, 2, 5, 63, 64, 65, 127, 128, 129, 200])
    count = random.choice([1, 2, K, 2 * K, 2 * K + 1, 7, K * V, K * V + 3])
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    x_BKV = torch.randn(B, K, V, generator=generator)
    if random.random() < 0.4:
        x_BKV = x_BKV.round()  # ties
    x_BKV[torch.rand(B, K, V, generator=generator) < random.choice([0.0, 0.5, 0.98])] = NEG_INF
    before_BK = torch.randn(B, K, generator=generator) * 3
    before_BK[torch.rand(B, K, generator=generator) < random.choice([0.0, 0.5])] = NEG_INF
    normalizer_R1 = torch.randn(B * K, 1, generator=generator) if random.random() < 0.5 else None
    less_BK1 = torch.zeros(B, K, 1) if normalizer_R1 is None else normalizer_R1.view(B, K, 1)
    kept, total_BKV = x_BKV.clone(), x_BKV.double() - less_BK1 + before_BK[:, :, None]
    assert_are_the_best(top_candidates(x_BKV.view(B * K, V), before_BK, count, normalizer_R1), total_BKV, count)
    assert torch.equal(x_BKV, kept)
    if library := native.load().library:
        x_RV, less_R1 = x_BKV.view(B * K, V), less_BK1.reshape(-1, 1)
        assert_are_the_best(native_search.top_candidates(library, x_RV, before_BK, count, less_R1), total_BKV, count)


@pytest.mark.parametrize("count", range(2, 7))
def test_the_best_continuations_may_lie_far_apart_in_the_vocabulary(count: int) -> None:
    """Each in a chunk without another one of them."""
    logits_RV = torch.full((1, 64 * 9), -10.0)
    ids = [64 * chunk + 7 * chunk for chunk in range(count)]
    logits_RV[0, ids] = -torch.arange(float(count))
    assert top_candidates(logits_RV, torch.zeros(1, 1), count).ids_BC[0].tolist() == ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "B,K", [(1, 1), (31, 4), (32, 4), (33, 4), (127, 1), (128, 1), (129, 1), (257, 1), (2, 130), (43, 3), (3, 64)]
)
def test_the_leaders_of_any_number_of_rows_are_those_of_a_full_sort(B: int, K: int, dtype: torch.dtype) -> None:
    """However many sentences are ranked together: each by its own length limits and its own hypotheses."""
    V, count, length = 65, 2 * K, 3
    generator = torch.Generator().manual_seed(B * K)
    logits_RV = (torch.randn(B * K, V, generator=generator) * 3).to(dtype)
    before_BK = torch.randn(B, K, generator=generator)
    shortest = torch.randint(0, 6, (B,), generator=generator)
    longest = torch.maximum(shortest, torch.randint(1, 7, (B,), generator=generator))
    kept = logits_RV.clone()
    asked = task(shortest.tolist(), longest.tolist())
    found = next_candidates(step_of(logits_RV, length, asked), step_processors(asked, SPECIALS), before_BK, count)
    total_BKV = logits_RV.double().log_softmax(-1).view(B, K, V) + before_BK[:, :, None]
    total_BKV[:, :, list(BANNED)] = NEG_INF
    for b in range(B):
        end_K = total_BKV[b, :, END].clone()
        if longest[b] <= length:
            total_BKV[b] = NEG_INF
        total_BKV[b, :, END] = NEG_INF if shortest[b] > length else end_K
    assert_are_the_best(found, total_BKV, count)
    assert torch.equal(logits_RV, kept), "the model's logits stay as they are"


@pytest.mark.parametrize("device,rows", [("cpu", [126, 126, 48]), ("meta", [300])])
def test_only_a_cpu_works_in_chunks(device: str, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many whole sentences as fit; other devices take all rows together."""
    found: list[int] = []
    process_rows = processors.process

    def watched(step: StepInput, *rest: Any) -> Any:
        found.append(len(step.raw_RV))
        return process_rows(step, *rest)

    monkeypatch.setattr(processors, "CHUNK_ROWS", 128)
    monkeypatch.setattr(processors, "process", watched)
    asked = DecodingTask(torch.full((100,), 9, device=device), None, torch.zeros(100, device=device), [0] * 100)
    step = StepInput(torch.zeros(300, 65, device=device), 1, asked, False, None, None)
    best = next_candidates(step, step_processors(asked, SPECIALS), step.raw_RV[:, :1].view(100, 3), 6)
    assert best.ids_BC.shape == (100, 6)
    assert found == rows


def test_log_sum_exp_is_its_definition_for_numbers_of_any_size() -> None:
    """Against log Σ exp in float64: large and small numbers, impossible entries, a single column, far outliers."""
    generator = torch.Generator().manual_seed(0)
    x_RV = torch.randn(12, 70, generator=generator) * 3
    x_RV[1] += 1e4
    x_RV[2] -= 1e4
    x_RV[3, 5:] = NEG_INF
    x_RV[4, 0] = 300.0
    x_RV[5] = -300.0
    x_RV[6] = 0.0
    x_RV[7, 1:] = NEG_INF
    for part_RV in (x_RV, x_RV[:, :1]):
        wanted = part_RV.double().logsumexp(-1, keepdim=True)
        assert_close(log_sum_exp(part_RV).double(), wanted, rtol=3e-7, atol=2e-6)
        if library := native.load().library:
            found = native_search.log_sum_exp(library, part_RV.contiguous())
            assert_close(found.double(), wanted, rtol=3e-7, atol=2e-6)


@FAST
@given(SEEDS)
def test_log_probabilities_are_normalised_before_anything_is_forbidden(seed: int) -> None:
    """Forbidden ids keep their probability mass: the others are the log-softmax over the whole vocabulary."""
    random = Random(seed)
    B, rows, V, length = random.choice([1, 3]), random.choice([1, 2]), random.choice([5, 64, 70]), random.randint(1, 5)
    shortest = [random.randint(0, 6) for _ in range(B)]
    longest = [max(1, s, random.randint(1, 7)) for s in shortest]
    logits_RV = torch.randn(B * rows, V, generator=torch.Generator().manual_seed(random.getrandbits(30))) * 4
    asked = task(shortest, longest)
    found_RV = next_log_probabilities(step_of(logits_RV, length, asked), step_processors(asked, SPECIALS))
    wanted_RV = logits_RV.double().log_softmax(-1)
    for r, row_V in enumerate(wanted_RV):
        b, end = r // rows, float(row_V[END])
        row_V[list(BANNED)] = NEG_INF
        if length >= longest[b]:
            row_V[:] = NEG_INF
        row_V[END] = end if length >= shortest[b] else NEG_INF
    assert_close(found_RV.double(), wanted_RV, rtol=1e-5, atol=1e-5)


def test_a_sentence_may_end_at_its_shortest_length_and_must_at_its_longest() -> None:
    """Lengths count END: END as id number `length` is too early below the shortest one, and due at the longest."""
    asked = task([3, 1, 0], [5, 2, 4])
    for length in range(1, 7):
        early_RV, last_RV = torch.zeros(6, 5), torch.zeros(6, 5)
        MinLength(END)(early_RV, step_of(early_RV, length, asked))
        MaxLength(END)(last_RV, step_of(last_RV, length, asked))
        for row, (shortest, longest) in enumerate(((3, 5), (3, 5), (1, 2), (1, 2), (0, 4), (0, 4))):
            assert (early_RV[row] == NEG_INF).tolist() == [id_ == END and length < shortest for id_ in range(5)]
            assert (last_RV[row] == NEG_INF).tolist() == [id_ != END and length >= longest for id_ in range(5)]
        assert asked.remaining(length, torch.tensor([False, False, True])).tolist() == [5 - length, 2 - length, 0]
        unlimited_RV = torch.zeros(6, 5)
        MaxLength(END)(unlimited_RV, step_of(unlimited_RV, length, asked, at_limit=False))
        assert not unlimited_RV.any()


def test_only_end_is_left_where_a_sentence_must_end_and_keeps_its_value() -> None:
    """The limits of some rows leave the others alone; the normaliser counts all that the model gave."""
    raw_RV = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)).half()
    asked = task([4, 0, 0], [5, 3, 5])
    found_RV, normalizer_R1 = process(step_of(raw_RV, 3, asked), step_processors(asked, SPECIALS))
    assert found_RV.dtype == torch.float32
    assert_close(normalizer_R1, raw_RV.float().logsumexp(-1, keepdim=True))
    words = [i for i in range(9) if i not in BANNED]
    assert (found_RV > NEG_INF).nonzero().tolist() == [
        *([0, i] for i in words if i != END),
        [1, END],
        *([2, i] for i in words),
    ]
    possible_RV = found_RV > NEG_INF
    assert torch.equal(found_RV[possible_RV], raw_RV.float()[possible_RV])


def test_what_is_off_is_not_in_the_list_and_the_rest_is_in_order() -> None:
    """Rules may open END where it is too early, a prefix overrides them, and the longest length overrides all."""

    def names(asked: DecodingTask) -> list[str]:
        return [type(processor).__name__ for processor in step_processors(asked, SPECIALS)]

    everything = task([1], [2], prefix_BP=torch.tensor([[4]]))
    nothing = dataclasses.replace(everything, min_length_B=None, prefix_BP=None)
    assert names(nothing) == ["BanSpecials", "MaxLength"]
    assert names(everything) == ["BanSpecials", "MinLength", "ForcedPrefix", "MaxLength"]
    rules = Rules(["", "", "", "", "▁a"], END, forbidden=["a"], no_repeat=1)
    assert names(dataclasses.replace(nothing, rules=rules)) == [
        *("BanSpecials", "NoRepeat", "LexicalConstraints", "EndIfStuck", "MaxLength")
    ]
    assert "LexicalConstraints" not in names(dataclasses.replace(nothing, rules=Rules([""] * 5, END, no_repeat=1)))
    assert "NoRepeat" not in names(dataclasses.replace(nothing, rules=Rules([""] * 5, END, forbidden=["a"])))


def test_a_stuck_hypothesis_ends_with_the_value_that_the_model_gave() -> None:
    """Even where it is too early; rows that may go on keep what they have."""
    raw_RV = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]] * 2).bfloat16()
    logits_RV = raw_RV.float()
    logits_RV[0] = NEG_INF
    logits_RV[1, END] = NEG_INF
    EndIfStuck(END)(logits_RV, step_of(raw_RV, 1, task([3, 3], [9, 9])))
    assert logits_RV.tolist() == [
        [NEG_INF, NEG_INF, NEG_INF, 4.0, NEG_INF],
        [1.0, 2.0, 3.0, NEG_INF, 5.0],
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("normalization", ["gnmt", "average"])
def test_length_penalties_are_their_formulas(normalization: str, alpha: float) -> None:
    """((5 + n) / 6)^alpha (Wu et al. 2016, §7), or n^alpha, for a number and for a tensor."""
    changes: dict[str, Any] = {"length_normalization": normalization, "length_penalty": alpha}
    options = dataclasses.replace(preset(), **changes)
    lengths = [1, 2, 7, 40]
    wanted = [(((5 + n) / 6) if normalization == "gnmt" else n) ** alpha for n in lengths]
    assert [float(length_penalty(n, options)) for n in lengths] == pytest.approx(wanted, rel=1e-12)
    assert length_penalty(torch.tensor(lengths), options).tolist() == pytest.approx(wanted, rel=1e-6)


def test_the_coverage_penalty_is_its_formula() -> None:
    """beta Σ log min(attention, 1) (Wu et al. 2016, §7); what got no attention at all stays finite."""
    coverage = [[0.5, 1.0, 0.25], [3.0, 1.5, 1.0], [0.0, 0.1, 2.0]]
    wanted = [0.7 * sum(math.log(min(max(x, 1e-9), 1.0)) for x in row) for row in coverage]
    assert coverage_penalty(torch.tensor(coverage), 0.7).tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_task_keeps_its_columns_together() -> None:
    """Repeated, selected and joined: every limit follows its sentence, rules and seeds belong to the whole batch."""
    rules = Rules([""] * 9, END, no_repeat=2)
    limits = {"source_length_B": torch.tensor([7, 8, 9]), "prefix_BP": torch.tensor([[1, 2], [3, NO_ID], [4, 5]])}
    asked = task([1, 2, 3], [4, 5, 6], seeds=[10, 11, 12], rules=rules, **limits)

    def columns(one: DecodingTask) -> list[list[int]]:
        assert one.rules is rules and list(one.seeds) == [10, 11, 12]
        assert one.min_length_B is not None and one.prefix_BP is not None
        return [x.tolist() for x in (one.min_length_B, one.max_length_B, one.source_length_B, one.prefix_BP)]

    twice = [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [7, 7, 8, 8, 9, 9]]
    begun = [[1, 2], [3, NO_ID], [4, 5]]
    assert columns(asked.repeat(1)) == [[1, 2, 3], [4, 5, 6], [7, 8, 9], begun]
    assert columns(asked.repeat(2)) == [*twice, [one for one in begun for _ in range(2)]]
    assert columns(asked.select(torch.tensor([2, 0]))) == [[3, 1], [6, 4], [9, 7], [[4, 5], [1, 2]]]
    assert columns(asked.select(slice(1, 3))) == [[2, 3], [5, 6], [8, 9], begun[1:]]
    other = task([20], [21], source_length_B=torch.tensor([22]), prefix_BP=torch.tensor([[6, 7, 8]]))
    wide = [[*one, NO_ID] for one in begun]
    assert columns(asked.join(other)) == [[1, 2, 3, 20], [4, 5, 6, 21], [7, 8, 9, 22], [*wide, [6, 7, 8]]]
    bare = task([1], [2], min_length_B=None)
    assert bare.join(bare).min_length_B is None and bare.select(slice(0, 1)).prefix_BP is None


def test_every_key_of_a_search_is_honoured_by_plain_searches_or_makes_it_special() -> None:
    """A new key is special, until plain searches are known to honour it."""
    assert {field.name for field in dataclasses.fields(SearchConfig)} == {*PLAIN_KEYS, *SPECIAL_KEYS}
    plain = search_preset("greedy")
    for key, value in SPECIAL_KEYS.items():
        assert special_keys(dataclasses.replace(plain, **{key: value})) == [key]
    for choice in ("greedy", "beam"):
        assert special_keys(search_preset(choice)) == []
    assert special_keys(search_preset("sample")) == ["samples"] and special_keys(search_preset("diverse")) == ["groups"]
