"""Samples follow from seeds: every draw, cut and score against plain Python; and the choice among samples."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from torch import Tensor

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.constraints import Rules
from seq2seq.decoding.mbr import expected_similarity
from seq2seq.decoding.sampling import (
    build_warpers,
    draw,
    hash_splitmix64,
    sample,
    sampling_probabilities,
    seeds,
    uniform,
    uniforms,
)
from seq2seq.decoding.scoring import DecodingTask, Specials
from tests.helpers.tables import BANNED, BEGIN, END, Table, padded_prefixes
from tests.reference import search as reference
from tests.reference.constraints import PlainRules

SPECIALS = Specials(BEGIN, END, BANNED)
APPLE = torch.device("mps")
FAST = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SEEDS = st.integers(0, 2**32)
LARGE = [0, 1, 2**32, 2**63, 2**64 - 1, 0x123456789ABCDEF]


@lru_cache(maxsize=1)
def preset() -> SearchConfig:
    return dataclasses.replace(search_preset("sample"), epsilon_cutoff=0.0)


def options(**changes: Any) -> SearchConfig:
    return dataclasses.replace(preset(), **changes)


def random_cuts(random: Random) -> dict[str, Any]:
    pick = random.choice
    return {
        "temperature": pick([1.0, 0.3, 2.5]),
        "top_k": pick([0, 0, 1, 3, 500]),
        "top_p": pick([1.0, 1.0, 0.5, 0.93]),
        "min_p": pick([0.0, 0.1, 0.2]),
        "epsilon_cutoff": pick([0.0, 0.02, 0.05, 0.1, 0.9]),
    }


@FAST
@given(SEEDS)
def test_sampling_is_its_definition(seed: int) -> None:
    """With all cuts, lengths and rules: the same samples in the same order, their scores and log probabilities.

    Each is decided by its sentence's seed, its number and its step alone; its log probabilities are the model's own.
    """
    random = Random(seed)
    pick, B, V = random.choice, random.choice([1, 2, 5]), random.choice([6, 9, 65])
    chosen = options(
        samples=random.randint(1, 4),
        seed=pick([0, 1, 2**63 - 1]),
        length_penalty=pick([0.0, 0.6, 1.5]),
        length_normalization=pick(["gnmt", "average"]),
        **random_cuts(random),
    )
    no_repeat = pick([0, 0, 1, 2])
    prefixes = [[random.randint(4, V - 1) for _ in range(pick([0, 0, 2]))] for _ in range(B)]
    longest = [random.randint(1, 6) + len(prefix) for prefix in prefixes]
    shortest = [random.randint(0, n) for n in longest]
    of_sentences = [random.choice([*LARGE, random.getrandbits(64)]) for _ in range(B)]
    given_rules = bool(no_repeat or any(prefixes))
    rules = Rules([""] * V, END, no_repeat=no_repeat) if no_repeat else None
    table = Table(random.getrandbits(30), V, 2, end=pick([-1.0, 1.0]))
    columns = torch.tensor(longest), torch.tensor(shortest), torch.ones(B)
    asked = DecodingTask(*columns, of_sentences, rules, padded_prefixes(prefixes))
    found = sample(table.step, table.begin(range(B), [1 + b % 2 for b in range(B)]), asked, chosen, SPECIALS)
    assert [len(samples) for samples in found] == [chosen.samples] * B
    outcomes = []
    for b, samples in enumerate(found):
        plain = PlainRules([""] * V, END, no_repeat=no_repeat, prefix=prefixes[b]) if given_rules else None
        request = reference.Request(shortest[b], longest[b], END, BANNED, plain)
        outcomes.append(reference.sample(table.model(b, 1 + b % 2), request, chosen, of_sentences[b]))
        if not outcomes[-1].clear:
            continue
        assert [(*h.ids, END) for h in samples] == [path.ids for path in outcomes[-1].finished]
        for h, path in zip(samples, outcomes[-1].finished, strict=True):
            assert h.score == pytest.approx(path.score, rel=1e-5, abs=3e-5)
            assert h.log_probability == pytest.approx(path.total, rel=1e-5, abs=3e-5)
            assert h.token_log_probabilities == pytest.approx(path.each, rel=1e-5, abs=3e-5)
    if all(outcome.clear for outcome in outcomes):
        # Finished samples leave at once.
        ends = [[len(path.ids) for path in outcome.finished] for outcome in outcomes]
        wanted = [
            [b for b, lengths in enumerate(ends) for n in lengths if n > step] for step in range(len(table.calls))
        ]
        assert table.calls == wanted and len(wanted) == max(map(max, ends))


@FAST
@given(SEEDS)
def test_each_cut_takes_what_the_one_before_it_left(seed: int) -> None:
    """Temperature, top k, top p, min p and epsilon, in this order, on random tables with impossible ids."""
    random = Random(seed)
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    logs_RV = (torch.randn(3, random.choice([2, 8, 50]), generator=generator) * 2).log_softmax(-1)
    logs_RV[:, 1:][torch.rand(logs_RV[:, 1:].shape, generator=generator) < random.choice([0.0, 0.4])] = -torch.inf
    chosen, kept = options(**random_cuts(random)), logs_RV.clone()
    found_RV = sampling_probabilities(logs_RV, build_warpers(chosen))
    for row_V, found_V in zip(logs_RV, found_RV, strict=True):
        ties = reference.Ties()
        wanted = reference.shaped(row_V.double().numpy(), chosen, ties)
        if ties.clear:
            np.testing.assert_allclose(found_V.numpy(), wanted, rtol=2e-5, atol=1e-7)
    assert torch.equal(logs_RV, kept)


@pytest.mark.parametrize(
    "counts,changes,kept",
    [
        ([3, 1, 3, 1, 3], {"top_k": 1}, 3),
        ([3, 1, 3, 1, 3], {"top_k": 3}, 3),
        ([3, 1, 3, 1, 3], {"top_k": 4}, 5),
        ([1, 2, 4, 1], {"top_p": 0.5}, 1),
        ([1, 2, 4, 1], {"top_p": 0.51}, 2),
        ([1, 2, 4, 1], {"top_p": 0.75}, 2),
        ([1, 2, 4, 1], {"top_p": 0.76}, 3),
        ([1, 1, 1, 1], {"top_p": 0.25}, 1),
        ([1, 1, 1, 1], {"top_p": 0.5}, 2),
        ([1, 2, 4, 1], {"min_p": 0.25}, 4),
        ([1, 2, 4, 1], {"min_p": 0.26}, 2),
        ([1, 2, 4, 4], {"min_p": 1.0}, 2),
        ([1, 2, 4, 1], {"epsilon_cutoff": 0.125}, 4),
        ([1, 2, 4, 1], {"epsilon_cutoff": 0.13}, 2),
        ([1, 2, 4, 1], {"epsilon_cutoff": 0.25}, 2),
        ([2, 2, 4, 4, 4], {"epsilon_cutoff": 0.9}, 3),
        ([1, 2, 4, 1], {"top_k": 2, "epsilon_cutoff": 0.3}, 2),
        ([1, 2, 4, 1], {"top_p": 0.6, "epsilon_cutoff": 0.3}, 2),
        ([1, 2, 4, 1], {"min_p": 0.4, "epsilon_cutoff": 0.3}, 2),
        ([1, 2, 4, 1], {"top_k": 2, "top_p": 0.6}, 1),
    ],
)
def test_cuts_are_exact_where_probabilities_are(counts: list[int], changes: dict[str, Any], kept: int) -> None:
    """Ties stay together, what equals a bound is kept, and each cut applies to what the one before it left.

    Top p keeps the fewest ids whose sum reaches it (Holtzman et al. 2020, §3.1), so a sum that equals it is enough.
    """
    logits_V = torch.tensor([*counts, 0.0]).log()
    if sum(counts) in (4, 8):
        exact = [count / sum(counts) for count in (*counts, 0)]
        assert logits_V.softmax(0).tolist() == exact, "the law is about exact numbers"
    found_V = sampling_probabilities(logits_V[None], build_warpers(options(**changes)))[0]
    likeliest = sorted(range(len(counts)), key=lambda i: -counts[i])[:kept]
    assert int((found_V > 0).sum()) == kept
    assert sorted(counts[i] for i in found_V.nonzero()[:, 0].tolist()) == sorted(counts[i] for i in likeliest)


def test_a_draw_is_the_id_at_which_the_sum_passes_the_number() -> None:
    """Its lower bound belongs to an id and its upper bound to the next; what is impossible is never drawn."""
    probability_RV = torch.tensor(
        [[0.25, 0.25, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 0.0]]
    )
    almost = 1 - 2.0**-32
    for number, wanted in [
        (0.0, [0, 1, 0, 1, 1]),
        (0.25, [1, 1, 0, 1, 1]),
        (0.5, [2, 2, 1, 1, 1]),
        (0.5 - 2.0**-32, [1, 1, 0, 1, 1]),
        (0.75, [2, 2, 1, 2, 1]),
        (almost, [2, 2, 1, 2, 1]),
    ]:
        assert draw(probability_RV, torch.full((5,), number, dtype=torch.float64)).tolist() == wanted


def test_a_draw_among_many_ids_is_not_rounded() -> None:
    """The sum of 60,000 equal probabilities is exact enough in float64 to find each of them."""
    V = 60_000
    numbers = torch.tensor([0.0, 0.5, 12_345 / V, (V - 1) / V], dtype=torch.float64) + 0.5 / V
    probability_RV = torch.full((4, V), 1.0 / V)
    assert draw(probability_RV, numbers).tolist() == [0, V // 2, 12_345, V - 1]


class OnAppleGPU(Tensor):
    """Refuses what an Apple GPU does: numbers in float64."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return APPLE

    def double(self) -> Tensor:
        raise TypeError("the MPS framework doesn't support float64")

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        assert device.type == "cpu"
        return self.as_subclass(Tensor).to(dtype).as_subclass(FromAppleGPU)


class FromAppleGPU(Tensor):
    """On a CPU, until it goes back."""

    def to(self, device: torch.device) -> Tensor:  # type: ignore[override]
        assert device == APPLE and not self.is_floating_point()
        return self.as_subclass(OnAppleGPU)


def test_samples_on_an_apple_gpu_are_drawn_on_the_cpu() -> None:
    """The same ones, as it has no float64."""
    uniform_TR = uniforms(seeds([7, 8], 2, 1), 3, APPLE)
    assert uniform_TR.device.type == "cpu" and uniform_TR.dtype == torch.float64
    probability_RV = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    found_R = draw(probability_RV.as_subclass(OnAppleGPU), uniform_TR[0])
    assert isinstance(found_R, OnAppleGPU) and found_R.tolist() == draw(probability_RV, uniform_TR[0]).tolist()


def test_numbers_are_those_of_splitmix() -> None:
    """On 64 bits without a sign, for each sentence, sample, seed and step (Steele et al. 2014)."""
    values = np.array(LARGE, np.uint64)
    assert hash_splitmix64(values).tolist() == [reference.splitmix(x) for x in LARGE]
    for seed in (0, 1, 2**63 - 1):
        of_samples = seeds(LARGE, 3, seed)
        for step in (1, 2, 1000):
            wanted = [reference.uniform(s, seed, number, step) for s in LARGE for number in range(3)]
            found = uniform(of_samples, step)
            assert found.tolist() == wanted
            assert min(wanted) >= 0 and max(wanted) < 1
        uniform_TR = uniforms(of_samples, 3, torch.device("cpu"))
        assert uniform_TR.tolist() == [uniform(of_samples, step).tolist() for step in (1, 2, 3)]
    assert len(set(seeds(range(50), 20, 1).tolist())) == 1000, "no two samples share their numbers"


# -------------------------------------------------------------------------------------------------- minimum Bayes risk


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_expected_similarity_counts_every_text_as_often_as_it_was_drawn(metric: str) -> None:
    """The mean over all drawn texts, itself and its copies included, of the text measured against each of them."""
    texts = [
        "ein Hund",
        "ein Hund rennt schnell über die Straße",
        "ein Hund",
        "",
        "zwei Hunde",
        "ein Hund rennt",
        "ein Hund",
    ]
    measure: Any = CHRF() if metric == "chrf" else BLEU(effective_order=True)
    wanted = []
    for text in texts:
        wanted.append(math.fsum(measure.sentence_score(text, [other]).score for other in texts) / len(texts))
    assert expected_similarity(texts, metric) == pytest.approx(wanted, rel=1e-12)
    turned = measure.sentence_score(texts[0], [texts[1]]).score - measure.sentence_score(texts[1], [texts[0]]).score
    assert abs(turned) > 1, "which of two texts is the reference must matter"
    assert expected_similarity(["ein Hund"], metric) == pytest.approx([100.0])
    assert expected_similarity([], metric) == []
