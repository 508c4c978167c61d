"""Filters, sentence ends, alignments of missing lines and folders of splits, in plain loops over plain lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

Pair = tuple[str, str]


def filtered(
    pairs: Sequence[Pair],
    *,
    empty: bool = False,
    max_characters: int = 0,
    max_ratio: float = 0,
    identical: bool = False,
    duplicate: bool = False,
) -> tuple[list[int], list[tuple[int, str]]]:
    """The pairs that stay, and how many the first filter that refuses them left out, in the order of the filters."""
    names = ["empty", "characters", "ratio", "identical", "duplicate"]
    counts = dict.fromkeys(names, 0)
    seen: set[Pair] = set()
    rows: list[int] = []
    for row, (source, target) in enumerate(pairs):
        shorter, longer = sorted((len(source.strip()), len(target.strip())))
        if empty and shorter == 0:
            counts["empty"] += 1
        elif max_characters and longer > max_characters:
            counts["characters"] += 1
        elif max_ratio and longer > max_ratio * max(shorter, 1):
            counts["ratio"] += 1
        elif identical and source == target:
            counts["identical"] += 1
        elif duplicate and (source, target) in seen:
            counts["duplicate"] += 1
        else:
            seen.add((source, target))
            rows.append(row)
    return rows, [(counts[name], name) for name in names if counts[name]]


CLOSING, CLOSING_WIDE, STOPS, STOPS_WIDE = "\"'»”’)]", "」』”’）", "!?…؟۔।", "。！？"


def sentence_ends(line: str) -> list[int]:
    """Where the sentences of a line end and others begin.

    A stop, what closes behind it, then space, and no small letter behind that. A full stop counts behind three letters
    or behind a mark; the wide stops of scripts without spaces need none, but their run of stops and what closes it
    stays together.
    """
    ends: list[int] = []
    for i, sign in enumerate(line):
        if sign == ".":
            behind_word = i >= 3 and all(letter.isalpha() for letter in line[i - 3 : i])
            behind_mark = i >= 1 and not (line[i - 1].isalnum() or line[i - 1] == "_" or line[i - 1].isspace())
            stop = behind_word or behind_mark
        else:
            stop = sign in STOPS
        wide = sign in STOPS_WIDE
        if not stop and not wide:
            continue
        k = i + 1
        while k < len(line) and line[k] in (CLOSING_WIDE if wide else CLOSING):
            k += 1
        spaces = k
        while k < len(line) and line[k].isspace():
            k += 1
        if k == len(line) or (stop and k == spaces) or line[k].islower():
            continue
        if wide and line[k] in STOPS_WIDE + CLOSING_WIDE:
            continue
        ends.append(k)
    return ends


def halved(text: str, within_limit: Callable[[str], bool]) -> list[str]:
    """A text that does not fit, cut at the space nearest to its middle within the middle third, else in the middle."""
    if len(text) <= 1 or within_limit(text):
        return [text]
    cut, nearest = len(text) // 2, math.inf
    for i, sign in enumerate(text):
        distance = abs(i - len(text) // 2)
        if sign.isspace() and len(text) < 3 * i < 2 * len(text) and distance < nearest:
            cut, nearest = i, distance
    return halved(text[:cut].strip(), within_limit) + halved(text[cut:].strip(), within_limit)


def misaligned_line(left: Sequence[int], right: Sequence[int]) -> int:
    """The line from 1 where the longer side must skip its surplus for log lengths to fit best, each cut tried."""
    shorter, longer = sorted(([math.log1p(n) for n in side] for side in (left, right)), key=len)
    if not shorter:
        return 1
    surplus = len(longer) - len(shorter)
    straight = [a - b for a, b in zip(shorter, longer, strict=False)]
    shifted = [a - b for a, b in zip(shorter, longer[surplus:], strict=True)]
    usual = median(straight), median(shifted)
    costs = [
        sum(abs(d - usual[0]) for d in straight[:cut]) + sum(abs(d - usual[1]) for d in shifted[cut:])
        for cut in range(len(shorter) + 1)
    ]
    least = min(costs)
    return next(i for i, cost in enumerate(costs) if cost <= least + 1e-12) + 1
