"""Beam search is its definition: every option at once, on random tables, against lists and loops in float64."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig, Stop
from seq2seq.decoding.beam import beam_search, diverse_candidates
from seq2seq.decoding.constraints import Rules
from seq2seq.decoding.progress import Progress
from seq2seq.decoding.scoring import DecodingTask, Hypothesis, Specials
from seq2seq.model.decoder_state import State
from tests.helpers.tables import BANNED, BEGIN, END, RowsState, Table, padded_prefixes
from tests.reference import search as reference
from tests.reference.constraints import PlainRules

SPECIALS = Specials(BEGIN, END, BANNED)
LETTERS = ("<pad>", "<unk>", "<s>", "</s>", "▁a", "b", "▁ab", "a", "▁b", ".", "▁a.", "▁c")
REQUIRED = ((("a", (4,)),), (("ab", (4, 5)),), (("a b", (4, 8)), ("c", (11,))), (("ab.", (6, 9)), ("b", (8,))))
FORBIDDEN = (("a",), ("ab", "."), ("b a", "c"), ("a.",))
STOPS = get_args(Stop)
FAST = settings(max_examples=22, deadline=None, derandomize=True, database=None,
                phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip


@lru_cache(maxsize=1)
def preset() -> SearchConfig:
    return search_preset("beam")


@dataclass(frozen=True)
class Case:
    options: SearchConfig
    vocabulary: int
    seed: int
    end: float
    sources: list[int]
    lengths: list[tuple[int, int]]  # shortest, longest
    batches: list[int]  # how many sentences each has
    rules: dict[str, Any] = field(default_factory=dict)
    prefixes: list[list[int]] = field(default_factory=list)


def searched(case: Case, table: Table, progress: Progress | None) -> list[list[Hypothesis]]:
    """The search's own answer, batch after batch."""
    pieces = LETTERS if case.rules.get("required") or case.rules.get("forbidden") else [""] * case.vocabulary
    rules, prefix_BP = Rules(pieces, END, **case.rules) if case.rules else None, padded_prefixes(case.prefixes)
    batches: list[tuple[State, DecodingTask]] = []
    first = 0
    for size in case.batches:
        rows = list(range(first, first + size))
        first += size
        shortest, longest = zip(*(case.lengths[i] for i in rows), strict=True)
        sources = [case.sources[i] for i in rows]
        begun_BP = None if prefix_BP is None else prefix_BP[rows]
        asked = DecodingTask(
            torch.tensor(longest), torch.tensor(shortest), torch.tensor(sources), rows, rules, begun_BP
        )
        batches.append((table.begin(rows, sources), asked))
    step = table.step_with_attention if case.options.coverage_penalty else table.step
    return beam_search(step, iter(batches), case.options, SPECIALS, progress)


def expected(case: Case, table: Table, sentence: int) -> reference.Outcome:
    rules = None
    if case.rules or any(case.prefixes):
        pieces = LETTERS if case.vocabulary == len(LETTERS) else [""] * case.vocabulary
        rules = PlainRules(pieces, END, prefix=case.prefixes[sentence], **case.rules)
    shortest, longest = case.lengths[sentence]
    request = reference.Request(shortest, longest, END, BANNED, rules)
    return reference.beam_search(table.model(sentence, case.sources[sentence]), request, case.options)


def assert_is_the_definition(case: Case) -> None:
    """The same hypotheses in the same order, all their numbers, the same rows at every step and the best after it."""
    table = Table(case.seed, case.vocabulary, max(case.sources), case.end)
    reports: dict[int, list[tuple[int, ...]]] = {i: [] for i in range(len(case.sources))}
    progress = Progress(case.options, lambda i, ids: reports[i].append(tuple(ids)))
    found = searched(case, table, progress if case.seed % 2 else None)
    wanted = [expected(case, table, i) for i in range(len(case.sources))]
    assert len(found) == len(wanted)
    clear = [one for one in zip(found, wanted, strict=True) if one[1].clear]
    for sentence, (hypotheses, outcome) in enumerate(clear):
        paths = outcome.finished
        assert [(*h.ids, END) for h in hypotheses] == [path.ids for path in paths], f"hypotheses of {sentence}"
        for h, path in zip(hypotheses, paths, strict=True):
            assert h.score == pytest.approx(path.score, rel=1e-5, abs=3e-5), "score"
            assert h.log_probability == pytest.approx(path.total, rel=1e-5, abs=3e-5), "log probability"
            assert h.token_log_probabilities == pytest.approx(path.each, rel=1e-5, abs=3e-5), "of each token"
    for sentence, outcome in enumerate(wanted):
        if outcome.clear and case.seed % 2:
            both = zip(reports[sentence], outcome.best, strict=True)
            assert all(ids == best for ids, best in both if best is not None), f"progress of {sentence}"
    if len(clear) == len(found):
        rows = iter([outcome.steps for outcome in wanted])
        steps = [[next(rows) for _ in range(size)] for size in case.batches]
        assert table.calls == reference.batch_rows(steps), "the sentences of each step"


@st.composite
def cases(draw: st.DrawFn, stop: Stop, vocabularies: tuple[int, ...], constrained: bool) -> Case:
    """Every option is drawn independently, so that all combinations occur."""
    random = Random(f"{draw(st.integers(0, 2**32))} {stop}")
    pick = random.choice
    vocabulary = pick(vocabularies)
    rules = random_rules(random, vocabulary) if constrained else {}
    groups = 1 if rules.get("required") else pick([1, 1, 2, 3])
    beam = groups * pick([1, 2, 3, 4, 4])
    options = dataclasses.replace(
        preset(),
        beam=beam,
        groups=groups,
        n_best=random.randint(1, beam),
        diversity=pick([0.0, 0.7, 3.0]) if groups > 1 else 0.0,
        length_normalization=pick(["gnmt", "average"]),
        length_penalty=pick([0.0, 0.6, 1.0, 1.7]),
        coverage_penalty=pick([0.0, 0.3, 1.5]),
        stop=stop,
        select_by=pick(["score", "score", "chrf"]) if beam > 1 else "score",
    )
    sizes = [pick([1, 2, 4, 5, 12 // groups]) for _ in range(pick([1, 2, 3]))]
    count, words = sum(sizes), [i for i in range(1, vocabulary) if i not in (BEGIN, END)]
    prefixes = [random.choices(words, k=pick([0, 0, 1, 2, 4])) if constrained else [] for _ in range(count)]
    lengths = []
    for prefix in prefixes:
        longest = pick([1, 2, 3, 4, 5, 6, 9]) + len(prefix) + sum(len(ids) for _, ids in rules.get("required", ()))
        lengths.append((min(pick([0, 0, 1, 2, longest // 2, longest]), longest + (random.random() < 0.1)), longest))
    sources = [random.randint(1, 6) for _ in range(count)]
    return Case(
        options, vocabulary, random.getrandbits(30), pick([-1.0, 1.0, 3.0]), sources, lengths, sizes, rules, prefixes
    )


def random_rules(random: Random, vocabulary: int) -> dict[str, Any]:
    rules: dict[str, Any] = {"no_repeat": random.choice([0, 0, 1, 2, 3])}
    if vocabulary == len(LETTERS):
        rules |= random.choice(
            [
                {},
                {"required": random.choice(REQUIRED)},
                {"forbidden": random.choice(FORBIDDEN)},
                {"required": (("ab", (4, 5)),), "forbidden": ("a.",)},
            ]
        )
    return {name: value for name, value in rules.items() if value}


@pytest.mark.parametrize("stop", STOPS)
@FAST
@given(st.data())
def test_beam_search_is_its_definition(stop: Stop, data: st.DataObject) -> None:
    """Beams, groups, scores, lengths and every rule of stopping (Wu et al. 2016, §7; Vijayakumar et al. 2016, §4)."""
    assert_is_the_definition(data.draw(cases(stop, (5, 9, 63, 64, 65, 130), constrained=False)))


@pytest.mark.parametrize("stop", STOPS)
@FAST
@given(st.data())
def test_beam_search_under_constraints_is_its_definition(stop: Stop, data: st.DataObject) -> None:
    """Prefixes, repetition, forbidden and required phrases (Post & Vilar 2018, §3) with all other options."""
    assert_is_the_definition(data.draw(cases(stop, (len(LETTERS), len(LETTERS), 65), constrained=True)))


def many(sizes: list[int], **changes: Any) -> Case:
    """Many short sentences."""
    count = sum(sizes)
    options = dataclasses.replace(preset(), **changes)
    lengths = [(i % 2, 2 + i * i % 7) for i in range(count)]
    return Case(options, 65, 7, 2.0, [1 + i % 5 for i in range(count)], lengths, sizes, {}, [[]] * count)


@pytest.mark.parametrize("beam,sizes", [(1, [150, 40]), (2, [70]), (5, [9, 40, 9])])
def test_large_batches_are_the_definition(beam: int, sizes: list[int]) -> None:
    """More rows than are ranked together, and finished sentences leave in a few fixed sizes."""
    assert_is_the_definition(many(sizes, beam=beam, n_best=beam, coverage_penalty=0.2))


@pytest.mark.parametrize("stop", ["likely", "certain"])
def test_a_tie_with_the_best_possible_score_ends_the_search(stop: Stop) -> None:
    """END and one word are equally likely: without a length penalty nothing can beat the finished hypothesis."""
    table_V = torch.full((6,), -torch.inf)
    table_V[[END, 4]] = 0.0
    calls: list[int] = []

    def step(tokens_R1: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        calls.append(len(tokens_R1))
        return table_V.expand(len(tokens_R1), 1, -1), state

    options = dataclasses.replace(preset(), beam=2, n_best=1, length_penalty=0.0, stop=stop)
    asked = DecodingTask(torch.tensor([9]), torch.tensor([0]), torch.tensor([1]), [0])
    found = beam_search(step, [(RowsState(torch.zeros(1)), asked)], options, SPECIALS)
    assert [h.ids for h in found[0]] == [[]]
    assert found[0][0].score == pytest.approx(-math.log(2))
    assert len(calls) == 1


def test_no_batches_give_no_translations() -> None:
    """Empty input is no error."""
    assert beam_search(Table(0, 9, 1).step, [], preset(), SPECIALS) == []


def test_impossible_hypotheses_do_not_count_for_diversity() -> None:
    """Where an earlier group has one possible continuation, that alone costs the later groups something."""
    log_probability_RV = torch.full((4, 6), -math.inf)
    log_probability_RV[0, 4] = 0.0  # of the first group
    log_probability_RV[2] = torch.tensor([-1.0, -1.1, -1.2, -9.0, -1.3, -1.4])  # of the second
    beams: Any = SimpleNamespace(
        last_BK=torch.zeros(2, 2, dtype=torch.int64), log_probability_BK=torch.tensor([[0.0, -math.inf]] * 2)
    )
    options = dataclasses.replace(preset(), beam=4, groups=2, diversity=0.5)
    found = diverse_candidates(log_probability_RV, beams, options, END, 6)
    penalty_V = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.0])
    expected = (log_probability_RV[2] - penalty_V)[found.ids_BC[1]]
    torch.testing.assert_close(found.selection_score_BC[1], expected)
