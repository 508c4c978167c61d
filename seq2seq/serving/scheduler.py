"""Which waiting sentences form the next batch: a plain data structure, without clock, processes or event loop.

Requests share the workers by fair queueing (Demers et al. 1989): each has a tag, which grows by the cost of every
sentence it has in a batch, and the lowest tag is next. A new request starts at the virtual time, which grows as if all
requests were served in equal parts at once: it passes the rest of a long document, but many short ones never starve it.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

BYTES_PER_SUBWORD = 4  # of UTF-8: an estimate of costs, without a tokenizer


def cost(text: str) -> int:
    """Estimate the subwords of a source, with its end mark."""
    return 1 + len(text.encode("utf-8", "replace")) // BYTES_PER_SUBWORD


@dataclass(eq=False)
class Request:
    """Sentences that came together; `key` decides which may share a batch, `rows` are the hypotheses of each."""

    key: Hashable
    items: Sequence[Any]
    texts: Sequence[str]  # the source of each item
    rows: int = 1
    arrived: float = 0.0
    tag: float = 0.0
    next: int = 0  # index of the first item that waits
    costs: list[int] = field(init=False)
    characters: int = field(init=False)  # of the items that wait

    def __post_init__(self) -> None:
        self.costs = [cost(text) * self.rows for text in self.texts]
        self.characters = sum(map(len, self.texts))

    @property
    def waiting(self) -> int:
        return len(self.items) - self.next

    @property
    def waiting_cost(self) -> int:
        return sum(self.costs[self.next :])


@dataclass(frozen=True)
class Part:
    """A sentence of a batch."""

    request: Request
    index: int

    @property
    def item(self) -> Any:
        return self.request.items[self.index]

    @property
    def text(self) -> str:
        return self.request.texts[self.index]


class Scheduler:
    """Waiting requests, bounded by their characters."""

    def __init__(self, batch_cost: int, wait: float, max_characters: int, batch_sentences: int = 2**20) -> None:
        self.batch_cost, self.batch_sentences = batch_cost, batch_sentences
        self.wait, self.max_characters = wait, max_characters
        self.queues: dict[Hashable, dict[Request, None]] = {}  # by key, in order of arrival
        self.costs: dict[Hashable, int] = {}  # of the sentences that wait, by key
        self.characters = self.sentences = 0  # that wait
        self.virtual_time = 0.0

    def has_room(self, characters: int) -> bool:
        return self.characters + characters <= self.max_characters

    def add(self, request: Request, now: float) -> None:
        """Queue a request, for which there must be room."""
        assert self.has_room(request.characters)
        request.arrived, request.tag = now, self.virtual_time
        if request.waiting:
            self.queues.setdefault(request.key, {})[request] = None
            self._count(request, request.waiting, request.characters, request.waiting_cost)

    def cancel(self, request: Request) -> None:
        """Drop what waits of a request."""
        if request in self.queues.get(request.key, ()):
            self._count(request, -request.waiting, -request.characters, -request.waiting_cost)
            request.next, request.characters = len(request.items), 0
            self._remove(request)

    def take(self, now: float, idle: int = 1) -> list[Part]:
        """Return the next batch for one of some idle workers, or nothing while more sentences may yet join it."""
        ready = [key for key in self.queues if self._ready_at(key) <= now]
        if not ready:
            return []
        key = min(ready, key=lambda key: min((request.tag, request.arrived) for request in self.queues[key]))
        # Idle workers divide what waits: each takes less time for less.
        budget = min(self.batch_cost, -(-self.costs[key] // idle))
        return list(self._fill(key, budget))

    def ready_at(self) -> float | None:
        """Return the time at which a batch is ready for an idle worker, None if nothing waits."""
        return min(map(self._ready_at, self.queues), default=None)

    def _ready_at(self, key: Hashable) -> float:
        arrived = next(iter(self.queues[key])).arrived
        return arrived if self.costs[key] >= self.batch_cost else arrived + self.wait

    def _fill(self, key: Hashable, budget: int) -> Iterator[Part]:
        """Take sentences, each from the request with the lowest tag, until the next would exceed the budget."""
        heap = [(request.tag, order, request) for order, request in enumerate(self.queues[key])]
        heapq.heapify(heap)
        spent = count = 0
        while heap and count < self.batch_sentences:
            _, order, request = heap[0]
            price = request.costs[request.next]
            if count and spent + price > budget:
                return
            spent, count = spent + price, count + 1
            yield self._pop(request, price)
            if request.waiting:
                heapq.heapreplace(heap, (request.tag, order, request))
            else:
                heapq.heappop(heap)

    def _pop(self, request: Request, price: int) -> Part:
        part = Part(request, request.next)
        self.virtual_time = max(self.virtual_time, request.tag) + price / sum(map(len, self.queues.values()))
        characters = len(part.text)
        self._count(request, -1, -characters, -price)
        request.next, request.characters = request.next + 1, request.characters - characters
        request.tag += price
        if not request.waiting:
            self._remove(request)
        return part

    def _count(self, request: Request, sentences: int, characters: int, cost: int) -> None:
        self.sentences += sentences
        self.characters += characters
        self.costs[request.key] = self.costs.get(request.key, 0) + cost

    def _remove(self, request: Request) -> None:
        queue = self.queues[request.key]
        del queue[request]
        if not queue:
            del self.queues[request.key], self.costs[request.key]
