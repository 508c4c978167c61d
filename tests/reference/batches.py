"""Batches of a token budget in plain loops: cuts, padding, what a process does of an update, mixes of corpora."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3


def greedy_cuts(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Rows join a batch while its padded size stays within the budget; a row over the budget is alone."""
    cuts: list[tuple[int, int]] = []
    start = 0
    for row in range(1, len(widths) + 1):
        grown = row < len(widths) and (row + 1 - start) * widths[row] <= budget
        if not grown:
            cuts.append((start, row))
            start = row
    return cuts


def pool_batches(order: Sequence[int], widths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """The rows of a pool by width, rows of equal width in their shuffled order, cut greedily."""
    ranked = sorted(order, key=lambda row: widths[row])  # stable
    cuts = greedy_cuts([widths[row] for row in ranked], budget)
    return [tuple(ranked[start:stop]) for start, stop in cuts]


def matrix(rows: Sequence[Sequence[int]], filler: int = PAD) -> list[list[int]]:
    """Rows filled up on the right to the longest."""
    width = max(len(row) for row in rows)
    return [[*row, *[filler] * (width - len(row))] for row in rows]


@dataclass(frozen=True)
class Padded:
    """What a batch must hold, as lists."""

    source: list[list[int]]
    source_mask: list[list[bool]]
    target_in: list[list[int]]
    target_out: list[list[int]]
    target_mask: list[list[bool]]
    source_positions: list[int]
    target_positions: list[int]


def padded_batch(source: Sequence[Sequence[int]], target: Sequence[Sequence[int]]) -> Padded:
    """Pairs with their END as a batch: the input is BEGIN and all of the target but its last position."""
    source_ids, target_ids = matrix(source), matrix(target)
    return Padded(
        source_ids,
        [[i < len(row) for i in range(len(source_ids[0]))] for row in source],
        [[BEGIN, *row[:-1]] for row in target_ids],
        target_ids,
        [[i < len(row) for i in range(len(target_ids[0]))] for row in target],
        [b * len(source_ids[0]) + i for b, row in enumerate(source) for i in range(len(row))],
        [b * len(target_ids[0]) + i for b, row in enumerate(target) for i in range(len(row))],
    )


def updates(tokens: Sequence[int], rank: int, world: int, wanted: int) -> list[tuple[list[int], int]]:
    """The batches of one rank in each update, and the update's target tokens in all ranks.

    `tokens` counts those of each batch in order. A round gives one batch to each rank; an update has rounds until it
    has at least `wanted` tokens, and at least one. An update that the batches do not fill is left out.
    """
    found: list[tuple[list[int], int]] = []
    own: list[int] = []
    total = 0
    for first in range(0, len(tokens) - world + 1, world):
        own.append(first + rank)
        for batch in range(first, first + world):
            total += tokens[batch]
        if total >= wanted:
            found.append((own, total))
            own, total = [], 0
    return found


def mix_counts(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[int]:
    """Corpus i in proportion to (its pairs × weight) ^ (1 / temperature), all pairs together."""
    powers = [(size * weight) ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)]
    return [round(power / sum(powers) * sum(sizes)) for power in powers]
