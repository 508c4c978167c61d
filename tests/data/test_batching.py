"""Laws of batches: cuts, padding, order, resuming, processes, mixes and resegmentation against plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations_with_replacement, islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seq2seq.cli.main import load_config
from seq2seq.data import encoding
from seq2seq.data.batching import (
    Batches,
    Mix,
    divide_rows,
    largest_batch,
    sequential_batches,
    split_by_token_budget,
    temperature_mix,
)
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import Batch, EncodedCorpus, encode_corpus, encode_training, resegmenter
from seq2seq.data.store import Integers, Ragged
from seq2seq.data.tokenizer import Tokenizer, Vocabulary, train_tokenizer
from tests.helpers.corpora import random_sentences
from tests.reference.batches import (
    BEGIN,
    END,
    PAD,
    UNKNOWN,
    greedy_cuts,
    matrix,
    mix_counts,
    padded_batch,
    pool_batches,
    updates,
)

LAW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
NUMBERS = itertools.count()  # of folders; `mktemp` takes longer than an example
WIDTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def encoded(source: Sequence[Sequence[int]], target: Sequence[Sequence[int]], rows: Sequence[int]) -> EncodedCorpus:
    return EncodedCorpus(Ragged.of(source), Ragged.of(target), np.array(rows))


def corpus_of(lengths: Sequence[int], seed: int = 0) -> EncodedCorpus:
    """Pairs whose sides differ in length, numbered as if every third pair of the corpus had been dropped."""
    shift = np.random.default_rng(seed).integers(-2, 3, len(lengths))
    source = random_sentences(list(lengths), seed)
    target = random_sentences([max(1, int(n + d)) for n, d in zip(lengths, shift, strict=True)], seed + 1)
    return encoded(source, target, [i * 3 // 2 for i in range(len(lengths))])


def random_lengths(count: int, most: int = 12, seed: int = 0) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(1, most, count)]


def width_of(corpus: EncodedCorpus) -> list[int]:
    return [max(len(corpus.source[i]), len(corpus.target[i])) for i in range(len(corpus))]


def rows_of(batches: Batches, epoch: int) -> list[tuple[int, ...]]:
    return [tuple(rows.tolist()) for rows in batches.rows(epoch)]


def content(batch: Batch) -> tuple[Any, ...]:
    return batch.index_B.tolist(), batch.source_BS.tolist(), batch.target_out_BT.tolist()


def next_updates(batches: Batches, count: int) -> list[Any]:
    """What a process does in its next updates: all ids, and the tokens of each update."""
    return [
        ([content(b) for b in rank_batches.micro_batches], rank_batches.target_tokens)
        for rank_batches in islice(batches, count)
    ]


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(Batches, "POOL", 16)
    return 16


# ------------------------------------------------------------------------------------------ the budget


@LAW
@given(WIDTHS, st.integers(1, 40))
def test_cuts_are_those_of_a_greedy_loop(widths: list[int], budget: int) -> None:
    """A batch takes rows while its padded size stays within the budget; an exact fit is within."""
    widths = sorted(widths)
    found = [(cut.start, cut.stop) for cut in split_by_token_budget(np.array(widths, np.int32), budget)]
    assert found == greedy_cuts(widths, budget)


@pytest.mark.parametrize(
    ("widths", "budget", "cuts"),
    [
        ([4, 4, 4], 12, [3]),
        ([4, 4, 4], 11, [2, 1]),
        ([1, 1, 1], 1, [1, 1, 1]),
        ([5, 6], 4, [1, 1]),
        ([1, 2, 3], 9, [3]),
        ([1, 1, 1, 1], 4, [4]),
        ([], 10, []),
    ],
)
def test_an_exact_fit_is_one_batch_and_one_token_less_is_two(widths: list[int], budget: int, cuts: list[int]) -> None:
    """The budget itself is allowed; a row over it is alone."""
    assert [cut.stop - cut.start for cut in split_by_token_budget(np.array(widths), budget)] == cuts


def test_budgets_over_two_billion_tokens_do_not_overflow() -> None:
    """The product of a width and a count needs more than 32 bits."""
    widths = np.full(3, 2**30, np.int32)
    assert [cut.stop for cut in split_by_token_budget(widths, 2**31)] == [2, 3]


@LAW
@given(WIDTHS, st.integers(1, 40))
def test_validation_reads_every_pair_once_by_rising_width_within_the_budget(lengths: list[int], budget: int) -> None:
    """Pairs of equal width keep their order, so validation is the same on every machine."""
    corpus = corpus_of(lengths)
    widths = width_of(corpus)
    expected = pool_batches(range(len(corpus)), widths, budget)
    found = list(sequential_batches(corpus, budget))
    assert [tuple(batch.index_B.tolist()) for batch in found] == [
        tuple(int(corpus.rows[i]) for i in rows) for rows in expected
    ]
    for batch in found:
        sizes = batch.source_BS.numel(), batch.target_out_BT.numel()
        assert max(sizes) <= budget or len(batch.index_B) == 1


@pytest.mark.parametrize("budget", [1, 7, 8, 15, 16, 17, 100])
def test_the_worst_batch_is_as_large_as_any_batch_can_be(budget: int) -> None:
    """Both sides are as wide as the widest side of all pairs, no position is padding, and one more row is too many."""
    corpus = encoded(random_sentences([3, 7, 1]), random_sentences([5, 2, 1]), range(3))
    batch = largest_batch(corpus, budget)
    rows = max(1, budget // 8)  # seven words and END
    assert batch.source_BS.tolist() == batch.target_out_BT.tolist() == [[UNKNOWN] * 8] * rows
    assert len(batch.index_B) == rows and batch.source_mask_BS.all() and batch.target_mask_BT.all()
    turned = encoded(random_sentences([5, 2, 1]), random_sentences([3, 7, 1]), range(3))
    assert largest_batch(turned, budget).source_BS.shape == batch.source_BS.shape


# ------------------------------------------------------------------------------------------- a batch


@LAW
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6), st.integers(0, 9))
def test_a_batch_is_what_a_plain_loop_makes_of_its_pairs(lengths: list[tuple[int, int]], seed: int) -> None:
    """Ids, masks, the shift by BEGIN, positions of real tokens, and numbers of the corpus, for any order of rows."""
    sides = [random_sentences([pair[i] for pair in lengths], seed + i) for i in (0, 1)]
    numbers = [7 * i + 2 for i in range(len(lengths))]
    corpus = encoded(sides[0], sides[1], numbers)
    rows = np.random.default_rng(seed).permutation(len(lengths))
    batch = corpus.batch(rows)
    expected = padded_batch(*([side[i] for i in rows] for side in sides))
    assert batch.source_BS.tolist() == expected.source
    assert batch.source_mask_BS.tolist() == expected.source_mask
    assert batch.target_in_BT.tolist() == expected.target_in
    assert batch.target_out_BT.tolist() == expected.target_out
    assert batch.target_mask_BT.tolist() == expected.target_mask
    assert batch.source_index_M.tolist() == expected.source_positions
    assert batch.target_index_M.tolist() == expected.target_positions
    assert batch.target_tokens == sum(map(sum, expected.target_mask))
    assert batch.index_B.tolist() == [numbers[i] for i in rows]
    assert batch.index_B.dtype == batch.source_BS.dtype == batch.target_in_BT.dtype == torch.int64


def test_a_moved_batch_takes_all_its_tensors_along() -> None:
    """A tensor that stays behind would fail on a GPU alone."""
    batch = corpus_of([2, 3]).batch(np.arange(2))
    moved = batch.to(torch.device("meta"))
    tensors = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    for name in tensors:
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(batch, name).shape, name


# ------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize("budget", [1, 24, 60])
@pytest.mark.parametrize("pairs", [1, 15, 16, 17, 50])
def test_an_epoch_is_its_shuffled_order_in_pools_each_sorted_and_cut(pairs: int, budget: int, small_pools: int) -> None:
    """Each pool of the order makes the batches of a greedy loop, in some order, and pools follow each other."""
    corpus = corpus_of(random_lengths(pairs))
    widths = width_of(corpus)
    batches = Batches(corpus, budget, seed=3)
    for epoch in (0, 1, 5):
        order = batches.order(epoch).tolist()
        assert sorted(order) == list(range(pairs)), "an epoch has every pair once"
        found = iter(rows_of(batches, epoch))
        for start in range(0, pairs, small_pools):
            expected = pool_batches(order[start : start + small_pools], widths, budget)
            pool = list(islice(found, len(expected)))
            assert sorted(pool) == sorted(tuple(int(corpus.rows[i]) for i in rows) for rows in expected)
        assert not list(found)
        for rows in rows_of(batches, epoch):
            padded = len(rows) * max(widths[corpus.rows.tolist().index(i)] for i in rows)
            assert padded <= budget or len(rows) == 1


def ranks(batches: Batches, epoch: int, pool_batches_: int) -> list[tuple[int, ...]]:
    """The order in which the batches of each pool come, where every pool has batches of one width each."""
    widths = dict(zip(batches.encoded.rows.tolist(), width_of(batches.encoded), strict=True))
    of_batches = [widths[rows[0]] for rows in rows_of(batches, epoch)]
    return [tuple(of_batches[i : i + pool_batches_]) for i in range(0, len(of_batches), pool_batches_)]


def test_every_pool_of_every_epoch_and_seed_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two pools, epochs or seeds have equal orders of pairs or batches, not even seed 1 epoch 2 and 2, 1."""
    monkeypatch.setattr(Batches, "POOL", 40)
    corpus = corpus_of([4] * 80)
    orders: list[tuple[int, ...]] = []
    positions: list[tuple[int, ...]] = []
    for seed, epoch in itertools.product((1, 2, 3), (0, 1, 2, 3)):
        batches = Batches(corpus, 1, seed)
        order = batches.order(epoch).tolist()
        orders.append(tuple(order))
        sorted_pools = [order[:40], order[40:]]
        found = [[corpus.rows.tolist().index(i) for (i,) in rows_of(batches, epoch)][k : k + 40] for k in (0, 40)]
        widths = width_of(corpus)
        for pool, rows in zip(sorted_pools, found, strict=True):
            by_width = [row for (row,) in pool_batches(pool, widths, 1)]
            positions.append(tuple(by_width.index(row) for row in rows))
    assert len(set(orders)) == len(orders)
    assert len(set(positions)) == len(positions)
    assert all(sorted(p) == list(range(40)) and p != tuple(range(40)) for p in positions)


def test_pools_and_batches_are_drawn_across_the_whole_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pool takes pairs from all parts of the corpus, and long batches come early as well as late."""
    monkeypatch.setattr(Batches, "POOL", 50)
    corpus = corpus_of(random_lengths(200, 30))
    batches = Batches(corpus, 60, seed=1)
    for start in range(0, 200, 50):
        pool = batches.order(0)[start : start + 50]
        assert [(pool // 50 == part).sum() >= 3 for part in range(4)] == [True] * 4
    widths = width_of(corpus)
    numbers = corpus.rows.tolist()
    of_batches = [max(widths[numbers.index(i)] for i in rows) for rows in rows_of(batches, 0)]
    rises = sum(a <= b for a, b in itertools.pairwise(of_batches))
    assert 0.25 < rises / len(of_batches) < 0.75, "batches come in no order of length"


def test_the_same_pairs_meet_other_pairs_in_another_epoch(small_pools: int) -> None:
    """Epochs and seeds differ in which pairs make a batch, not only in the order of batches."""
    corpus = corpus_of(random_lengths(64, 6))
    together = [
        {frozenset(rows) for rows in rows_of(Batches(corpus, 20, seed), epoch) if len(rows) > 1}
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    for left, right in itertools.combinations(together, 2):
        assert len(left & right) < len(left) / 3


def test_earlier_requests_change_nothing(small_pools: int) -> None:
    """Epochs can be read in any order and in the middle of training; caches never show."""
    corpus = corpus_of(random_lengths(50))
    fresh = [rows_of(Batches(corpus, 30, 1), epoch) for epoch in range(3)]
    used = Batches(corpus, 30, 1)
    for epoch in (2, 0, 0, 1, 2, 1):
        assert rows_of(used, epoch) == fresh[epoch]
    trained = Batches(corpus, 30, 1)
    expected = next_updates(Batches(corpus, 30, 1), 40)
    found = []
    for update in range(40):
        found += next_updates(trained, 1)
        rows_of(trained, update % 3)
        trained.estimate_padding()
    assert found == expected
    alone = [tuple(batch[0]) for update, _ in expected for batch in update]
    assert alone == [*itertools.chain(*fresh)][:40], "training reads what `rows` shows, epoch by epoch"


# --------------------------------------------------------------------------------- stopping and resuming


def sampled_anew(corpus: EncodedCorpus) -> Callable[[Integers, str], EncodedCorpus]:
    """A stand-in for sampling: the pairs asked for, with ids and lengths that follow from the key."""

    def resegment(rows: Integers, key: str) -> EncodedCorpus:
        random = np.random.default_rng(int(key, 16) % 2**31)

        def anew(side: Ragged) -> list[list[int]]:
            return [[*random.integers(4, 40, random.integers(1, 9)).tolist(), END] for _ in rows]

        return encoded(anew(corpus.source), anew(corpus.target), corpus.rows[rows].tolist())

    return resegment


KINDS = ["plain", "mixed", "sampled", "mixed and sampled"]


def made(kind: str, corpus: EncodedCorpus, seed: int = 1, **part: Any) -> Batches:
    mix = Mix((10, 40, len(corpus)), (25, 7, 12)) if "mixed" in kind else None
    resegment = sampled_anew(corpus) if "sampled" in kind else None
    return Batches(corpus, 30, seed, mix, resegment, **part)


@pytest.mark.parametrize("update_tokens", [0, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_training_continues_after_any_update_as_if_it_had_not_stopped(
    kind: str, update_tokens: int, small_pools: int
) -> None:
    """The few integers of a state are enough, at the ends of pools and epochs too, in an object used before."""
    corpus = corpus_of(random_lengths(50))
    count = 24 if update_tokens else 50
    whole = made(kind, corpus, 1, update_tokens=update_tokens)
    expected, states = [], [json.loads(json.dumps(whole.state_dict()))]
    for _ in range(count):
        expected += next_updates(whole, 1)
        states.append(json.loads(json.dumps(whole.state_dict())))
    assert whole.epoch >= 2 and {state["pool"] for state in states} >= {0, 1, 2}
    used = made(kind, corpus, 9, update_tokens=update_tokens)
    for update, state in enumerate(states[:-3]):
        next_updates(used, 1)
        used.seed, used.epoch, used.pool = 9, state["epoch"], state["pool"]
        next_updates(used, 1)  # of the same epoch and pool by another seed: nothing of it may stay
        used.load_state_dict(state)
        assert used.state_dict() == state
        assert next_updates(used, 3) == expected[update : update + 3], f"stopped after update {update}"


def test_a_state_of_another_number_of_pairs_begins_the_next_epoch(small_pools: int) -> None:
    """A position in the order of another corpus means nothing; the seed of the run stays."""
    first, other = Batches(corpus_of([3] * 50), 30, 4), Batches(corpus_of([3] * 49), 30, 8)
    list(islice(first, 9))
    state = first.state_dict()
    assert state["epoch"] == 0 and state["pool"] > 0 and state["taken"][0][1] > 0
    other.load_state_dict(state)
    assert other.state_dict() == {"seed": 4, "pairs": 49, "mix": [], "epoch": 1, "pool": 0, "taken": []}
    same = Batches(corpus_of([3] * 50), 30, 8)
    same.load_state_dict(state)
    assert same.state_dict() == state


def test_a_state_of_another_mix_begins_the_next_epoch(small_pools: int) -> None:
    """Other weights of the corpora, or another temperature, draw other pairs in another order."""
    corpus = corpus_of([3] * 50)
    first, same, other = (Batches(corpus, 30, 1, Mix((10, 50), counts)) for counts in ((25, 25), (25, 25), (30, 20)))
    list(islice(first, 9))
    state = json.loads(json.dumps(first.state_dict()))
    for batches, expected in ((same, first.epoch), (other, first.epoch + 1)):
        batches.load_state_dict(state)
        assert batches.epoch == expected
    assert other.pool == other.position == 0 < same.pool + same.position


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budgets", [(30, 12), (30, 70), (30, 11, 60, 11), (30, 12, 30)])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_epoch_has_the_same_pairs_when_its_budget_changes(
    kind: str, budgets: tuple[int, ...], taken: int, small_pools: int
) -> None:
    """A resumed run trains on what is left of its pool, in batches of the new budget: none is lost, none repeated."""
    batches = made(kind, corpus_of(random_lengths(50)))
    found: list[int] = []
    for budget in budgets:
        resumed = made(kind, batches.encoded, 9)
        resumed.tokens = 64  # until the memory check has found the budget
        resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        resumed.tokens, batches = budget, resumed
        for update in islice(batches, taken):
            found += update.micro_batches[0].index_B.tolist()
    for update in batches:
        if batches.epoch:
            break
        found += update.micro_batches[0].index_B.tolist()
    drawn = made(kind, batches.encoded).order(0)
    assert sorted(found) == sorted(batches.encoded.rows[drawn].tolist())


def test_a_state_of_version_0_1_0_has_the_position_without_its_budget(small_pools: int) -> None:
    first, other = (Batches(corpus_of(random_lengths(50)), 30, 1) for _ in range(2))
    list(islice(first, 9))
    old = {"seed": 1, "pairs": 50, "epoch": first.epoch, "pool": first.pool, "position": first.position}
    other.load_state_dict(old)
    assert other.state_dict() == first.state_dict() and next_updates(other, 3) == next_updates(first, 3)


# ------------------------------------------------------------------------------ several processes, updates


@pytest.mark.parametrize("kind", ["plain", "mixed and sampled"])
@pytest.mark.parametrize("wanted", [0, 1, 50, 51, 120])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_divide_the_rows_of_the_batches_of_one(world: int, wanted: int, kind: str, small_pools: int) -> None:
    """In order and without loss; all know the tokens of the whole update, and are at the position of one process."""
    corpus = corpus_of(random_lengths(50))
    alone = made(kind, corpus, update_tokens=wanted)
    parts = [made(kind, corpus, update_tokens=wanted) for _ in range(world)]
    for rank, batches in enumerate(parts):
        batches.divide_among(rank, world)
    for whole, *divided in islice(zip(alone, *parts, strict=True), 40):
        assert {update.target_tokens for update in divided} == {whole.target_tokens}
        rows = [index for update in divided for batch in update.micro_batches for index in batch.index_B.tolist()]
        assert sorted(rows) == sorted(index for batch in whole.micro_batches for index in batch.index_B.tolist())
        assert all(len(batch.index_B) for update in divided for batch in update.micro_batches)
        assert [batches.state_dict() for batches in parts] == [alone.state_dict()] * world


@settings(max_examples=60, deadline=None, derandomize=True)
@given(widths=st.lists(st.integers(1, 30), min_size=1, max_size=9), parts=st.integers(1, 4))
def test_no_division_of_rows_has_a_smaller_largest_part(widths: list[int], parts: int) -> None:
    """Compared with every way to cut the rows in their order; no row is lost."""
    width = np.array(sorted(widths), np.int32)

    def largest(cuts: Sequence[int]) -> int:
        bounds = [0, *cuts, len(width)]
        return max(int(width[end - 1]) * (end - start) for start, end in pairwise(bounds) if end > start)

    found = divide_rows(width, parts)
    assert len(found) == parts and [i for part in found for i in range(len(width))[part]] == list(range(len(width)))
    best = min(map(largest, combinations_with_replacement(range(len(width) + 1), parts - 1)))
    assert largest([part.stop for part in found[:-1]]) == best


@pytest.mark.parametrize("kind", ["plain", "mixed and sampled"])
@pytest.mark.parametrize("wanted", [0, 1, 50, 51, 120])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_rank_has_its_batches_of_each_update_and_all_know_its_tokens(
    world: int, wanted: int, kind: str, small_pools: int
) -> None:
    """Rounds of one batch a rank until an update has its tokens, counted over all ranks, across ends of epochs."""
    corpus = corpus_of(random_lengths(50))
    alone = [batch for update, _ in next_updates(made(kind, corpus), 80) for batch in update]
    tokens = [sum(i != PAD for row in target for i in row) for _, _, target in alone]
    for rank in range(world):
        batches = made(kind, corpus, update_tokens=wanted, rank=rank, world_size=world)
        expected = updates(tokens, rank, world, wanted)
        found = next_updates(batches, len(expected))
        assert found == [([alone[i] for i in own], total) for own, total in expected]


@pytest.mark.parametrize("world", [2, 8])
def test_no_rank_has_much_more_to_compute_than_the_others(world: int) -> None:
    """Of lengths as of text, the largest part of an update exceeds the mean by little: padded, and in target tokens."""
    random = np.random.default_rng(0)
    source = np.clip(random.lognormal(3.1, 0.55, 8000).astype(int) + 1, 1, 120)
    target = np.clip(source + random.integers(-4, 5, len(source)), 1, 120)
    corpus = encoded([[5] * n for n in source], [[5] * n for n in target], range(len(source)))
    ranks = [Batches(corpus, 2048, 1, rank=rank, world_size=world) for rank in range(world)]
    count = int(ranks[0].batches_per_epoch()) // world
    parts = [[update.micro_batches for update in islice(rank, count)] for rank in ranks]
    padded = [[sum(max(b.source_BS.numel(), b.target_out_BT.numel()) for b in batches) for batches in p] for p in parts]
    tokens = [[sum(b.target_tokens for b in batches) for batches in p] for p in parts]
    for numbers, most in ((padded, 0.02), (tokens, 0.05)):
        assert (np.max(numbers, 0) / np.mean(numbers, 0) - 1).mean() < most


def test_an_update_that_reaches_its_tokens_exactly_is_complete() -> None:
    """An exact fit needs no further batch."""
    batches = Batches(encoded([[5, END]] * 8, [[5, 6, END]] * 8, range(8)), 3, 1, update_tokens=6)
    assert [(len(rank_batches.micro_batches), rank_batches.target_tokens) for rank_batches in islice(batches, 4)] == [
        (2, 6)
    ] * 4


# ------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [1, 16, 33, 50])
def test_batches_an_epoch_and_padding_are_counted_on_the_first_pool(kind: str, pairs: int, small_pools: int) -> None:
    """Of both sides together; the number of batches in proportion to the pairs an epoch draws."""
    corpus = corpus_of(random_lengths(max(pairs, 41) if "mixed" in kind else pairs))
    batches = made(kind, corpus)
    batches.epoch = 1
    drawn = 44 if "mixed" in kind else len(corpus)
    counted = made(kind, corpus)
    counted.epoch = 1
    positions = real = seen = number = 0
    for rank_batches in counted:
        (batch,) = rank_batches.micro_batches
        seen, number = seen + len(batch.index_B), number + 1
        for ids_BX in (batch.source_BS, batch.target_out_BT):
            positions += ids_BX.numel()
            real += int((ids_BX != PAD).sum())
        if seen == min(drawn, small_pools):
            break
    count, padding = batches.estimate_padding()
    assert count == round(number * drawn / seen) and batches.batches_per_epoch() == max(1, count)
    assert padding == pytest.approx(1 - real / positions, abs=1e-12)


def test_epochs_done_are_the_part_of_the_pairs_that_was_drawn(small_pools: int) -> None:
    """With batches of equal size it is exact at every update, across pools, and counts what a mix draws."""
    corpus = encoded([[5, 5, END]] * 40, [[5, END]] * 40, range(40))
    for mix, pairs in ((None, 40), (Mix((10, 40), (30, 30)), 60)):
        batches = Batches(corpus, 12, 1, mix)  # four pairs a batch
        size = batches.batches_per_epoch()
        assert size == pairs / 4
        assert batches.epochs_done(size) == 0
        for update in range(1, int(2.5 * size)):
            next(iter(batches))
            assert batches.epochs_done(size) == pytest.approx(4 * update / pairs, abs=1e-9)
            assert batches.epochs_done(size / 100) <= batches.epoch + 1, "a size guessed too small ends no epoch"
    resumed = Batches(corpus, 24, 1)  # eight pairs a batch
    resumed.load_state_dict({"seed": 1, "pairs": 40, "epoch": 0, "pool": 1, "taken": [[12, 2], [24, 1]]})
    assert resumed.epochs_done(resumed.batches_per_epoch()) == pytest.approx((16 + 8 + 8) / 40)
    one = Batches(encoded([[5, END]], [[5, END]], [0]), 1, 1)
    assert one.batches_per_epoch() == 1 and one.epochs_done(1) == 0


# ------------------------------------------------------------------------------------------- mixes


@LAW
@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0.25, 1.0, 3.0])), min_size=1, max_size=4).filter(
        lambda parts: sum(size for size, _ in parts) > 0
    ),
    st.sampled_from([0.5, 1.0, 2.0, 5.0, 100.0]),
)
@example([(0, 1.0), (5, 1.0)], 1.0)
@example([(5, 1.0), (0, 3.0), (1, 0.25)], 2.0)
def test_a_mix_follows_its_formula_and_uses_each_corpus_up(parts: list[tuple[int, float]], temperature: float) -> None:
    """Proportions are (pairs × weight) ^ (1 / temperature); no pair repeats before all of its corpus was drawn."""
    sizes, weights = zip(*parts, strict=True)
    ends = list(itertools.accumulate(sizes))
    mix = temperature_mix(ends, weights, temperature)
    assert mix.ends == tuple(ends)
    expected = mix_counts(sizes, weights, temperature)
    for count, wanted in zip(mix.counts, expected, strict=True):
        assert abs(count - wanted) <= 1e-9 * sum(sizes) or abs(count - wanted) == 1
    assert sum(mix.counts) == pytest.approx(sum(sizes), abs=len(sizes))
    rows = mix.draw(np.random.default_rng(0))
    for start, end, count in zip([0, *ends], ends, mix.counts, strict=False):
        times = [int((rows == row).sum()) for row in range(start, end)]
        assert sum(times) == (count if end > start else 0)
        assert max(times, default=0) - min(times, default=0) <= 1


def test_each_epoch_draws_a_new_mix_and_shuffles_it() -> None:
    """Which pairs of a large corpus come differs between epochs and seeds; the counts do not."""
    corpus = corpus_of([3] * 60)
    mix = Mix((20, 60), (30, 10))
    drawn = {(s, e): Batches(corpus, 20, s, mix).order(e).tolist() for s in (1, 2) for e in (0, 1)}
    for order in drawn.values():
        assert [sum(i < 20 for i in order), sum(i >= 20 for i in order)] == [30, 10]
        assert order != sorted(order) and sum(i >= 20 for i in order[:20]) not in (0, 10), "corpora are interleaved"
        assert {i for i in order if i < 20} == set(range(20))
    for left, right in itertools.combinations(drawn.values(), 2):
        assert {i for i in left if i >= 20} != {i for i in right if i >= 20}
        repeated = [{i for i in order if i < 20 and order.count(i) == 2} for order in (left, right)]
        assert repeated[0] != repeated[1]


# ---------------------------------------------------------------------------------------------- resegmentation


def test_each_pool_is_sampled_under_a_key_of_its_own(small_pools: int) -> None:
    """The key follows from seed, epoch and pool alone, and the rows are those of the pool."""
    corpus = corpus_of(random_lengths(40))
    asked: dict[tuple[int, int, int], str] = {}
    for seed, epoch in itertools.product((1, 2), (0, 1, 2)):
        calls: list[tuple[list[int], str]] = []

        def resegment(rows: Integers, key: str, calls: list[Any] = calls) -> EncodedCorpus:
            calls.append((rows.tolist(), key))
            return sampled_anew(corpus)(rows, key)

        batches = Batches(corpus, 30, seed, None, resegment)
        list(batches.rows(epoch))
        order = batches.order(epoch).tolist()
        assert [rows for rows, _ in calls] == [order[:16], order[16:32], order[32:]]
        asked.update({(seed, epoch, pool): key for pool, (_, key) in enumerate(calls)})
        list(batches.rows(epoch))
        assert [key for _, key in calls[3:]] == [key for _, key in calls[:3]]
    assert len(set(asked.values())) == len(asked)


def test_batches_hold_the_sampled_ids_cut_by_their_own_lengths(small_pools: int) -> None:
    """Sorting and cutting look at the segmentation of this epoch, and index_B at the pair it came from."""
    corpus = corpus_of(random_lengths(40))
    pools: list[EncodedCorpus] = []

    def resegment(rows: Integers, key: str) -> EncodedCorpus:
        pools.append(sampled_anew(corpus)(rows, key))
        return pools[-1]

    batches = Batches(corpus, 30, 1, None, resegment)
    found = iter(next_updates(batches, 60))
    for number in range(3):
        first = next(found)
        widths = width_of(pools[number])
        expected = {}
        for rows in pool_batches(range(len(widths)), widths, 30):
            sides = [matrix([side[i].tolist() for i in rows]) for side in (pools[number].source, pools[number].target)]
            expected[tuple(int(pools[number].rows[i]) for i in rows)] = sides
        for update in [first, *islice(found, len(expected) - 1)]:
            (((index, source, target),), _) = update
            assert expected.pop(tuple(index)) == [source, target]
        assert not expected


@lru_cache
def real_tokenizer() -> tuple[Tokenizer, list[str]]:
    words = ["the old dog", "some red birds", "a man sees", "two women see", "the cat"]
    text = [f"{a} {b} number{i}" for i, (a, b) in enumerate(itertools.product(words, words))]
    config = dataclasses.replace(load_config("train").tokenizer, vocabulary=60)
    return train_tokenizer(Corpus(text, text), config)[0], text


def test_sampling_segments_the_same_pairs_again_and_each_side_separately() -> None:
    """Equal texts on both sides are cut unlike; the pairs, their order and their text stay."""
    tokenizer, text = real_tokenizer()
    corpus = Corpus(["", *text], ["", *text])
    sides = tokenizer.encode_source(text)
    base = encoded(sides, sides, [i + 1 for i in range(len(text))])
    rows = np.random.default_rng(0).permutation(len(text))[:15]
    resegment = resegmenter(corpus, base, tokenizer, 0.2, 100)
    found = resegment(rows, "a1")
    assert found.rows.tolist() == [int(i) + 1 for i in rows]
    for side, decode in ((found.source, tokenizer.decode_source), (found.target, tokenizer.decode)):
        assert [decode(side[i].tolist()) for i in range(15)] == [text[i] for i in rows]
        assert all(side[i][-1] == END for i in range(15))

    def ids(corpus: EncodedCorpus) -> list[list[list[int]]]:
        return [[side[i].tolist() for i in range(len(corpus))] for side in (corpus.source, corpus.target)]

    source, target = ids(found)
    assert sum(a != b for a, b in zip(source, target, strict=True)) > 7, "the two sides are drawn independently"
    assert ids(resegment(rows, "a1")) == ids(found), "a key decides all"
    again = ids(resegment(rows, "f7"))
    for one, other in itertools.product((source, target), again):
        assert one != other
    bold, mild = (ids(resegmenter(corpus, base, tokenizer, rate, 100)(rows, "a1"))[0] for rate in (0.05, 0.9))
    plain = [sides[i] for i in rows]
    assert sum(a != b for a, b in zip(bold, plain, strict=True)) > 12
    assert sum(map(len, bold)) > sum(map(len, mild)), "the rate reaches the sampler"


def test_a_sample_over_the_limit_falls_back_to_its_own_plain_pair() -> None:
    """The limit is inclusive, and both sides of the pair fall back, each to that pair's plain ids."""
    tokenizer, text = real_tokenizer()
    other = text[7:] + text[:7]
    corpus = Corpus(["", *text], ["", *other])
    sides = tokenizer.encode_source(text), tokenizer.encode_target(other)
    base = encoded(*sides, [i + 1 for i in range(len(text))])
    rows = np.random.default_rng(1).permutation(len(text))
    limit = max(map(len, sides[0])) - 1
    free = resegmenter(corpus, base, tokenizer, 0.1, 100)(rows, "5")
    found = resegmenter(corpus, base, tokenizer, 0.1, limit)(rows, "5")
    kept = []
    for i, row in enumerate(rows):
        drawn = free.source[i].tolist(), free.target[i].tolist()
        assert (tokenizer.decode_source(drawn[0]), tokenizer.decode(drawn[1])) == (text[row], other[row])
        kept.append(max(map(len, drawn)) - 1 <= limit)
        expected = drawn if kept[-1] else (sides[0][row], sides[1][row])
        assert (found.source[i].tolist(), found.target[i].tolist()) == expected
    assert 0 < sum(kept) < len(kept)
    assert any(max(len(free.source[i]), len(free.target[i])) - 1 == limit for i in range(len(rows)))


# ------------------------------------------------------------------------------------------- encoding


class Words:
    """A tokenizer whose sentences are numbers: their ids as they stand, then END."""

    def __init__(self, models: tuple[bytes, bytes] = (b"s", b"t"), vocabulary: tuple[int, int] = (100, 100)) -> None:
        self.models = dict(zip(("source", "target"), models, strict=True))
        self.vocabulary = Vocabulary(*vocabulary, joint=False)

    def encode_source(self, sentences: Sequence[str], subword_sampling: object = None) -> list[list[int]]:
        return [[*map(int, text.split()), END] for text in sentences]

    def encode_target(self, sentences: Sequence[str], subword_sampling: object = None) -> list[list[int]]:
        return [[*map(int, text.split()), END] for text in sentences]


def tokenizer_of(stub: Words) -> Tokenizer:
    return cast(Tokenizer, stub)


def sentence(length: int, first: int = 4) -> str:
    return " ".join(str(first + i) for i in range(length))


def expected_ids(corpus: Corpus, limit: int) -> Iterator[tuple[int, list[int], list[int]]]:
    for row, (source, target) in enumerate(zip(corpus.source, corpus.target, strict=True)):
        sides = [[*map(int, text.split()), END] for text in (source, target)]
        if all(1 <= len(side) - 1 <= limit for side in sides):
            yield row, sides[0], sides[1]


def ids_of(corpus: EncodedCorpus) -> list[tuple[int, list[int], list[int]]]:
    return [(int(corpus.rows[i]), corpus.source[i].tolist(), corpus.target[i].tolist()) for i in range(len(corpus))]


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.integers(1, 5))
def test_pairs_that_fit_are_encoded_and_the_others_dropped_whole_across_blocks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], limit: int
) -> None:
    """Neither side empty nor over the limit, which is inclusive; numbers stay those of the corpus in every block."""
    folder = tmp_path_factory.getbasetemp() / f"ids-{next(NUMBERS)}"
    corpus = Corpus(
        [sentence(a, 4 + i) for i, (a, _) in enumerate(lengths)], [sentence(b, 40) for _, b in lengths], "c"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK", 3)
        found, cached = encode_training(corpus, tokenizer_of(Words()), limit, str(folder))
        again, cached_again = encode_training(corpus, tokenizer_of(Words()), limit, str(folder))
    expected = list(expected_ids(corpus, limit))
    assert ids_of(found) == ids_of(again) == expected
    assert found.dropped == again.dropped == len(lengths) - len(expected) and len(found) == len(expected)
    assert (cached, cached_again) == (False, True)


@pytest.mark.parametrize("sizes", [(2**16 - 1, 8), (2**16, 8), (2**16 + 1, 8), (8, 2**16 + 1), (8, 10**6), (10**6, 8)])
def test_the_largest_ids_of_both_sides_survive_in_the_cache(sizes: tuple[int, int], tmp_path: Path) -> None:
    """Ids of 2^16 and over need more than two bytes, on whichever side they stand."""
    corpus = Corpus([f"{sizes[0] - 1} 4"], [f"{sizes[1] - 1} 5"], "c")
    found, _ = encode_training(corpus, tokenizer_of(Words(vocabulary=sizes)), 9, str(tmp_path))
    assert ids_of(found) == [(0, [sizes[0] - 1, 4, END], [sizes[1] - 1, 5, END])]
    batch = found.batch(np.arange(1))
    assert batch.source_BS.tolist() == [[sizes[0] - 1, 4, END]]


def test_ids_are_cached_by_corpus_models_and_limit_and_by_nothing_else(tmp_path: Path) -> None:
    """A change of any makes them again, with a result unlike the cached one; unchanged ones read the cache."""
    text = [sentence(n) for n in (1, 2, 3, 4)]

    class Shifted(Words):
        def encode_source(self, sentences: Sequence[str], subword_sampling: object = None) -> list[list[int]]:
            return [[i + 1 for i in ids] for ids in super().encode_source(sentences)]

    base = (Corpus(text, text, "a"), Words(), 3)
    variants: list[tuple[Corpus, Words, int]] = [
        base,
        (Corpus(text[::-1], text, "b"), Words(), 3),
        (base[0], Words((b"x", b"t")), 3),
        (base[0], Words((b"s", b"x")), 3),
        (base[0], Shifted((b"t", b"s")), 3),
        (base[0], Words(), 2),
        (base[0], Words(), 4),
    ]
    for corpus, tokenizer, limit in variants:
        found, cached = encode_training(corpus, tokenizer_of(tokenizer), limit, str(tmp_path))
        cold, _ = encode_training(corpus, tokenizer_of(tokenizer), limit, str(tmp_path / "cold" / str(id(tokenizer))))
        assert not cached and ids_of(found) == ids_of(cold)
    for corpus, tokenizer, limit in variants:
        assert encode_training(corpus, tokenizer_of(tokenizer), limit, str(tmp_path))[1]
    other = dataclasses.replace(base[0], corpus_ends=(2, 4))
    assert encode_training(other, tokenizer_of(Words()), 3, str(tmp_path))[1], "where corpora end changes no ids"


def test_validation_keeps_every_pair_with_the_number_it_has() -> None:
    """No pair of a validation set is dropped, however long or empty."""
    tokenizer, text = real_tokenizer()
    corpus = Corpus([*text[:3], "", text[4] * 30], [*text[5:8], "the", ""])
    found = encode_corpus(corpus, tokenizer)
    assert found.dropped == 0 and found.rows.tolist() == [0, 1, 2, 3, 4]
    assert [found.source[i].tolist() for i in range(5)] == tokenizer.encode_source(corpus.source)
    assert [found.target[i].tolist() for i in range(5)] == tokenizer.encode_target(corpus.target)
    assert found.width().tolist() == width_of(found)
    assert PAD not in found.source.flat and BEGIN not in found.target.flat
