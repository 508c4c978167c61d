"""Laws of the queue: each sentence comes once, shares are fair, and nothing exceeds its bound."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.serving.scheduler import Part, Request, Scheduler, cost

LAW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
WAIT = 0.5
PLENTY = 10**9
TEXTS = st.lists(st.text("ab é。", max_size=30), max_size=8)
# Requests of three kinds, batches at growing times for one or two idle workers, and cancellations.
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("xyz"), TEXTS),
        st.tuples(st.just("take"), st.floats(0, 1), st.integers(1, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.none()),
    ),
    max_size=25,
)


def request(count: int, key: str = "x", text: str = "a sentence of some length") -> Request:
    return Request(key, range(count), [text] * count)


def scheduler(batch_cost: int = 40, characters: int = PLENTY, sentences: int = PLENTY) -> Scheduler:
    return Scheduler(batch_cost, WAIT, characters, sentences)


def all_batches(queue: Scheduler, now: float = PLENTY) -> list[list[Part]]:
    batches = []
    while batch := queue.take(now):
        batches.append(batch)
    return batches


def owners(batch: list[Part]) -> Counter[Request]:
    return Counter(part.request for part in batch)


@LAW
@given(ACTIONS)
def test_each_sentence_comes_once_unless_it_was_cancelled(actions: list[tuple[str, object, object]]) -> None:
    """Whatever comes in between; counts of what waits agree with a plain sum at all times."""
    queue, requests, taken, now = scheduler(), list[Request](), list[Part](), 0.0
    cancelled: dict[Request, set[int]] = {}
    for action, a, b in actions:
        if action == "add":
            assert isinstance(b, list)
            requests.append(Request(a, range(len(b)), b))
            queue.add(requests[-1], now)
        elif action == "take":
            assert isinstance(a, float) and isinstance(b, int)
            now += a
            batch = queue.take(now, b)
            assert len({part.request.key for part in batch}) <= 1
            taken += batch
        elif requests:
            assert isinstance(a, int)
            dropped = requests[a % len(requests)]
            done = {part.index for part in taken if part.request is dropped}
            cancelled.setdefault(dropped, set(range(len(dropped.items))) - done)
            queue.cancel(dropped)
        left = [(r, i) for r in requests for i in range(len(r.items)) if i not in cancelled.get(r, ())]
        left = [each for each in left if each not in {(part.request, part.index) for part in taken}]
        assert queue.sentences == len(left)
        assert queue.characters == sum(len(r.texts[i]) for r, i in left)
    taken += [part for batch in all_batches(queue) for part in batch]
    wanted = {(r, i) for r in requests for i in range(len(r.items)) if i not in cancelled.get(r, ())}
    assert Counter((part.request, part.index) for part in taken) == Counter(wanted)
    assert queue.sentences == queue.characters == 0 and queue.ready_at() is None and not queue.costs
    for one in requests:  # in order
        assert all(a < b for a, b in pairwise(part.index for part in taken if part.request is one))


@LAW
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 9), st.integers(1, 3))
def test_batches_keep_to_their_bounds_and_are_full(texts: list[list[str]], budget: int, most: int, rows: int) -> None:
    """A sentence larger than the budget comes alone; otherwise a batch ends only where the next one would exceed it."""
    queue = scheduler(budget, sentences=most)
    for one in texts:
        queue.add(Request("x", range(len(one)), one, rows), 0.0)
    batches = all_batches(queue)
    assert sum(map(len, batches)) == sum(map(len, texts))
    prices = [[cost(part.text) * rows for part in batch] for batch in batches]
    assert all(sum(price) <= budget or len(price) == 1 for price in prices)
    assert all(len(price) <= most for price in prices)
    cheapest = max((cost(text) * rows for one in texts for text in one), default=0)
    for price in prices[:-1]:
        assert len(price) == most or sum(price) + cheapest > budget


def test_a_short_request_passes_a_long_document() -> None:
    """It is in the very next batch, wherever the document is; so are several, and the document goes on as well."""
    queue, document = scheduler(batch_cost=400), request(2000)
    queue.add(document, 0.0)
    for _ in range(3):
        assert owners(queue.take(1.0)) == {document: 400 // document.costs[0]}
        short = [request(1) for _ in range(5)]
        for one in short:
            queue.add(one, 1.0)
        batch = owners(queue.take(1.0))
        assert all(batch[one] == 1 for one in short) and batch[document] == 400 // document.costs[0] - 5


def test_many_short_requests_do_not_starve_a_document() -> None:
    """Even if more of them come than the workers can answer, it goes on at the pace of the others."""
    queue, document = scheduler(batch_cost=70), request(60)
    queue.add(document, 0.0)
    shares = []
    for _ in range(40):
        for _ in range(10):
            queue.add(request(1), 0.0)
        shares.append(owners(queue.take(1.0))[document])
    assert sum(shares[2:]) >= 3


@LAW
@given(
    st.lists(
        st.sampled_from(["ab", "a longer sentence", "the longest sentence of all of them"]), min_size=2, max_size=5
    )
)
def test_equal_requests_get_equal_shares(texts: list[str]) -> None:
    """Measured by cost: between two that both wait, never more than two of the longest sentences apart."""
    queue = scheduler(batch_cost=25)
    requests = [request(30, text=text) for text in texts]
    for one in requests:
        queue.add(one, 0.0)
    served, longest = Counter[Request](), max(map(cost, texts))
    while all(one.waiting for one in requests):
        for part in queue.take(1.0):
            served[part.request] += cost(part.text)
        shares = [served[one] for one in requests if one.waiting]
        assert not shares or max(shares) - min(shares) <= 2 * longest


def test_what_waits_for_company_is_not_taken_before_its_time() -> None:
    """A sentence waits at most so long, a full batch not at all, and other kinds do not delay it."""
    queue = scheduler(batch_cost=40)
    queue.add(request(1, "x"), 1.0)
    queue.add(request(1, "y"), 1.2)
    assert queue.ready_at() == 1.0 + WAIT
    assert queue.take(1.0 + WAIT - 0.01) == []
    assert [part.request.key for part in queue.take(1.0 + WAIT)] == ["x"]
    assert queue.ready_at() == 1.2 + WAIT and queue.take(1.0 + WAIT) == []
    queue.add(request(9, "y"), 1.3)
    assert [part.request.key for part in queue.take(1.3)] == ["y"] * (40 // request(1).costs[0])


def test_idle_workers_divide_what_waits() -> None:
    queue = scheduler(batch_cost=PLENTY)
    queue.add(request(12), 0.0)
    assert [len(queue.take(1.0, idle)) for idle in (3, 2, 1)] == [4, 4, 4]


def test_kinds_take_turns() -> None:
    """The kind whose request has had the least comes next."""
    queue = scheduler(batch_cost=14)
    for key in "xy":
        queue.add(request(6, key), 0.0)
    assert [batch[0].request.key for batch in all_batches(queue)] == ["x", "y"] * 3


def test_the_queue_is_bounded_by_characters() -> None:
    """Whatever leaves makes room again, whether it was taken or cancelled."""
    queue = scheduler(characters=10)
    first, second = Request("x", [0], ["12345"]), Request("x", [0], ["1234"])
    queue.add(first, 0.0)
    queue.add(second, 0.0)
    assert queue.has_room(1) and not queue.has_room(2)
    queue.cancel(first)
    assert queue.has_room(6) and not queue.has_room(7)
    assert queue.take(1.0) == [Part(second, 0)]
    assert queue.has_room(10) and not queue.has_room(11)


@pytest.mark.parametrize(("text", "subwords"), [("", 1), ("a" * 8, 3), ("é" * 8, 5), ("日" * 8, 7)])
def test_costs_grow_with_bytes(text: str, subwords: int) -> None:
    """Characters of scripts with more bytes are worth more of a subword, and each source has an end mark."""
    assert cost(text) == subwords
