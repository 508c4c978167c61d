"""Laws of the search, against a few lines of plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from typing import Any, get_args

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig, Stop
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, Vocabulary
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.constraints import Rules
from seq2seq.decoding.mbr import expected_similarity
from seq2seq.decoding.sampling import sample
from seq2seq.decoding.scoring import NO_ID, DecodingTask, Hypothesis, Specials
from seq2seq.inference.ensemble import Ensemble, EnsembleState
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Seq2Seq
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import padded, random_sentences
from tests.helpers.models import tiny_model
from tests.helpers.tables import RowsState

SPECIALS = Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN))
SMALL = Vocabulary(8, 8, joint=True)  # four words beside the specials


def search(beam: int, **changes: object) -> SearchConfig:
    return dataclasses.replace(search_preset("beam"), beam=beam, **changes)  # type: ignore[arg-type]


def task(longest: list[int], **changes: Any) -> DecodingTask:
    zeros = torch.zeros(len(longest), dtype=torch.int64)
    return dataclasses.replace(DecodingTask(torch.tensor(longest), zeros, zeros, list(range(len(longest)))), **changes)


def decode(
    model: Seq2Seq, sentences: list[list[int]], config: SearchConfig, longest: int | list[int], extra: int = 0
) -> list[list[Hypothesis]]:
    limits = longest if isinstance(longest, list) else [longest] * len(sentences)
    with torch.inference_mode():
        return beam_search(model.step, [(model.start(*padded(sentences, extra)), task(limits))], config, SPECIALS)


def log_probability(model: Seq2Seq, source: list[int], ids: list[int]) -> float:
    """The log probability of a given translation, by teacher forcing."""
    with torch.inference_mode():
        logits, _ = model.step(torch.tensor([[BEGIN, *ids]]), model.start(*padded([source])))
    chosen = logits[0].log_softmax(-1).gather(1, torch.tensor([[*ids, END]]).T)
    return float(chosen.sum())


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def everything(words: int) -> list[tuple[int, ...]]:
    """All sequences of at most so many words of the small vocabulary."""
    return [w for n in range(words + 1) for w in itertools.product(range(4, 8), repeat=n)]


def continuations(model: Seq2Seq, source: list[int], prefix: tuple[int, ...]) -> list[float]:
    """The log probabilities of all next ids."""
    with torch.inference_mode():
        logits, _ = model.step(torch.tensor([[BEGIN, *prefix]]), model.start(*padded([source])))
    return [float(x) for x in logits[0, -1].log_softmax(-1)]


Scored = tuple[float, tuple[int, ...]]


def plain_beam(model: Seq2Seq, source: list[int], groups: int, k: int, diversity: float, longest: int) -> list[Scored]:
    """Beam search (in groups: Vijayakumar et al. 2016) with lists and loops, ranked by log probability."""
    beams: list[list[Scored]] = [[(0.0, ())] for _ in range(groups)]
    finished: list[list[Scored]] = [[] for _ in range(groups)]
    for length in range(1, longest + 1):
        taken = [0] * 8
        for g in range(groups):
            ranked = []
            for total, prefix in beams[g]:
                logs = continuations(model, source, prefix)
                for word in (END, *range(4, 8)) if length < longest else (END,):
                    ranked.append((total + logs[word] - diversity * taken[word], total + logs[word], prefix, word))
            ranked.sort(reverse=True)
            finished[g] += [(total, prefix) for _, total, prefix, word in ranked[:k] if word == END]
            beams[g] = [(total, (*prefix, word)) for _, total, prefix, word in ranked if word != END][:k]
            for _, prefix in beams[g]:
                taken[prefix[-1]] += 1
        if all(len(each) >= k for each in finished):
            break
    return sorted({one for each in finished for one in sorted(each, reverse=True)[:k]}, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_one_is_the_argmax_loop(family: str) -> None:
    model, sentences = tiny_model(family), random_sentences([5, 2, 8, 3], seed=3)
    found = decode(model, sentences, search(1), longest=12)
    for source, (hypothesis,) in zip(sentences, found, strict=True):
        prefix: list[int] = []
        with torch.inference_mode():
            while len(prefix) < 11:
                logits, _ = model.step(torch.tensor([[BEGIN, *prefix]]), model.start(*padded([source])))
                logits[..., list(SPECIALS.banned)] = -torch.inf
                word = int(logits[0, -1].argmax())
                if word == END:
                    break
                prefix.append(word)
        assert hypothesis.ids == prefix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_very_wide_beam_is_brute_force(family: str, alpha: float) -> None:
    model, longest = tiny_model(family, vocabulary=SMALL), 4
    sentences = random_sentences([3, 5], seed=2, vocabulary=8)
    everything = [list(w) for n in range(longest) for w in itertools.product(range(4, 8), repeat=n)]
    found = decode(model, sentences, search(len(everything), length_penalty=alpha, n_best=5), longest)
    for source, hypotheses in zip(sentences, found, strict=True):
        scores = {tuple(w): log_probability(model, source, w) / penalty(len(w) + 1, alpha) for w in everything}
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:5]
        assert [tuple(h.ids) for h in hypotheses] == best
        assert [h.score for h in hypotheses] == pytest.approx([scores[w] for w in best], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam", [1, 4])
def test_batched_is_alone(family: str, beam: int) -> None:
    """Any neighbours, any order, any padding: the same hypotheses."""
    model, config = tiny_model(family), search(beam, n_best=beam)
    lengths = [1, 4, 9, 2, 6, 5, 3]
    sentences, limits = random_sentences(lengths, seed=5), [2 * n + 3 for n in lengths]
    alone = [decode(model, [s], config, [n])[0] for s, n in zip(sentences, limits, strict=True)]
    order = list(range(len(sentences)))
    random.Random(0).shuffle(order)
    shuffled = decode(model, [sentences[i] for i in order], config, [limits[i] for i in order], extra=5)
    for i, hypotheses in zip(order, shuffled, strict=True):
        assert [h.ids for h in hypotheses] == [h.ids for h in alone[i]]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in alone[i]], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam", [1, 5])
def test_scores_are_teacher_forced_scores(family: str, beam: int) -> None:
    model, sentences = tiny_model(family), random_sentences([5, 2, 8], seed=7)
    for source, hypotheses in zip(sentences, decode(model, sentences, search(beam, n_best=beam), 9), strict=True):
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for h in hypotheses:
            assert h.log_probability == pytest.approx(log_probability(model, source, h.ids), abs=1e-4)
            assert h.score == pytest.approx(h.log_probability / penalty(len(h.ids) + 1, 1.0), abs=1e-5)
            assert len(h.ids) < 9 and not {END, *SPECIALS.banned} & set(h.ids)


def test_every_sentence_keeps_its_own_limit() -> None:
    """A table that never wants to end is stopped at each sentence's own length, and its END is paid for."""
    table = torch.zeros(8)
    table[END] = -5.0
    limits = [1, 3, 6]

    def step(tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        return table.expand(len(tokens), 1, -1), state

    found = beam_search(step, [(RowsState(torch.zeros(3)), task(limits))], search(2), SPECIALS)
    assert [len(hypotheses[0].ids) for hypotheses in found] == [0, 2, 5]
    end = float(table.log_softmax(-1)[END])
    word = float(table.log_softmax(-1)[4])
    assert [h[0].log_probability for h in found] == pytest.approx([end, 2 * word + end, 5 * word + end])
    assert table[PAD] == 0, "the search must not write into the logits it is given"


def test_finished_sentences_leave_the_batch() -> None:
    """Rows shrink as sentences end: the work done is that of the sentences still open."""
    rows: list[int] = []
    stops = torch.tensor([2, 5, 3])

    def step(tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, State]:
        rows.append(len(tokens))
        logits = torch.zeros(len(tokens), 1, 8)
        logits[:, 0, 4] = 5.0
        logits[state.x_R == state.length + 1, 0, END] = 50.0
        return logits, dataclasses.replace(state, length=state.length + 1)

    found = beam_search(step, [(RowsState(stops), task([9, 9, 9]))], search(1), SPECIALS)
    assert [len(h[0].ids) for h in found] == [1, 4, 2]
    assert rows == [3, 3, 2, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups,k,diversity", [(1, 2, 0.0), (1, 3, 0.0), (2, 2, 0.0), (2, 2, 0.7), (3, 1, 1.5)])
def test_beam_and_diverse_groups_are_their_definition(family: str, groups: int, k: int, diversity: float) -> None:
    model, longest = tiny_model(family, vocabulary=SMALL), 4
    config = search(groups * k, groups=groups, diversity=diversity, length_penalty=0.0, n_best=groups * k)
    sentences = random_sentences([3, 5, 1], seed=2, vocabulary=8)
    for source, found in zip(sentences, decode(model, sentences, config, longest), strict=True):
        expected = plain_beam(model, source, groups, k, diversity, longest)
        assert [tuple(h.ids) for h in found] == [ids for _, ids in expected]
        assert [h.log_probability for h in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "beam,changes",
    [
        (1, {}),
        (3, {}),
        (4, {"groups": 2, "diversity": 0.5}),
        (3, {"coverage_penalty": 0.5}),
        (2, {"no_repeat_ngram": 2}),
    ],
)
def test_sentences_that_wait_for_the_next_batch_end_as_alone(
    family: str, beam: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of several widths; in each some sentences may become much longer than the others."""
    ensemble, config = Ensemble([tiny_model(family)]), search(beam, n_best=beam, stop="longest", **changes)
    lengths, limits = [2, 3, 3, 4, 6, 6, 7, 9, 9, 5, 3], [3, 12, 4, 4, 14, 5, 3, 4, 16, 2, 20]
    sentences, join = random_sentences(lengths, seed=5), EnsembleState.join
    joined: list[int] = []
    monkeypatch.setattr(EnsembleState, "join", lambda self, other: joined.append(other.length) or join(self, other))  # type: ignore[func-returns-value]

    def step_with_coverage(tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State, torch.Tensor]:
        logits, state, weights = ensemble.step_with_attention(tokens, state)
        return logits, state, weights[:, :, :, -1].mean((1, 2))

    rules = Rules([f"▁{i}" for i in range(40)], END, [], [], config.no_repeat_ngram)
    prefix_BP = torch.tensor([[10 + i] if i % 2 else [NO_ID] for i in range(11)])

    def batch(rows: slice) -> tuple[State, DecodingTask]:
        asked = task(limits[rows], source_length_B=torch.tensor(lengths[rows]))
        if config.no_repeat_ngram:
            asked = dataclasses.replace(asked, rules=rules, prefix_BP=prefix_BP[rows])
        return ensemble.start([padded(sentences[rows])]), asked

    step = step_with_coverage if config.coverage_penalty else ensemble.step
    with torch.inference_mode():
        cuts = [slice(0, 4), slice(4, 9), slice(9, 10), slice(10, 11)]
        found = beam_search(step, (batch(rows) for rows in cuts), config, SPECIALS)
        each = [slice(i, i + 1) for i in range(11)]
        alone = [beam_search(step, [batch(row)], config, SPECIALS)[0] for row in each]
    assert joined == [4, 14]
    for together, one in zip(found, alone, strict=True):
        assert [h.ids for h in together] == [h.ids for h in one]
        assert [h.score for h in together] == pytest.approx([h.score for h in one], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_is_its_formula(family: str) -> None:
    """A wide beam ranks everything by log probability / length penalty + coverage penalty (Wu et al. 2016, §7)."""
    model, longest, beta = tiny_model(family, vocabulary=SMALL), 3, 0.8
    possible, ensemble = everything(longest - 1), Ensemble([model])
    sentences = random_sentences([3, 5], seed=2, vocabulary=8)
    config = search(len(possible), coverage_penalty=beta, n_best=len(possible), length_normalization="average")

    def step_with_coverage(tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State, torch.Tensor]:
        logits, state, weights = ensemble.step_with_attention(tokens, state)
        return logits, state, weights[:, :, :, -1].mean((1, 2))

    with torch.inference_mode():
        asked = task([longest] * 2, source_length_B=torch.tensor([len(s) for s in sentences]))
        found = beam_search(step_with_coverage, [(ensemble.start([padded(sentences)]), asked)], config, SPECIALS)
    for source, hypotheses in zip(sentences, found, strict=True):
        scores = {}
        for ids in possible:
            with torch.inference_mode():
                decoded = model.decode(torch.tensor([[BEGIN, *ids]]), model.start(*padded([source])), weights=True)
            got_S = torch.stack(decoded.weights).mean((0, 1, 2)).sum(0)
            coverage = sum(math.log(min(float(p), 1.0)) for p in got_S)
            scores[ids] = log_probability(model, source, list(ids)) / (len(ids) + 1) + beta * coverage
        assert [tuple(h.ids) for h in hypotheses] == sorted(scores, key=scores.__getitem__, reverse=True)
        assert [h.score for h in hypotheses] == pytest.approx([scores[tuple(h.ids)] for h in hypotheses], abs=1e-4)


def test_steps_of_a_hypothesis_add_up() -> None:
    model, sentences = tiny_model("transformer"), random_sentences([5, 2], seed=7)
    for source, hypotheses in zip(sentences, decode(model, sentences, search(3, n_best=3), 9), strict=True):
        for h in hypotheses:
            logs = [continuations(model, source, tuple(h.ids[:n]))[id_] for n, id_ in enumerate([*h.ids, END])]
            assert h.token_log_probabilities == pytest.approx(logs, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_stopping_rules(alpha: float) -> None:
    """Certain = longest for what is asked; every rule finds no more than it."""
    model, sentences = tiny_model("transformer", vocabulary=SMALL), random_sentences([3, 5, 2, 6], seed=4, vocabulary=8)
    options = {"length_penalty": alpha, "n_best": 2}
    rules = {rule: decode(model, sentences, search(3, stop=rule, **options), 8) for rule in get_args(Stop)}
    assert set(rules) == {"filled", "likely", "certain", "longest"}
    for each in zip(*rules.values(), strict=True):
        by_rule = dict(zip(rules, each, strict=True))
        assert [h.ids for h in by_rule["certain"]] == [h.ids for h in by_rule["longest"]]
        for hypotheses in each:
            assert hypotheses[0].score <= by_rule["longest"][0].score + 1e-6


@pytest.mark.parametrize("beam", [1, 3])
def test_shortest_and_longest_lengths(beam: int) -> None:
    model, sentences = tiny_model("lstm"), random_sentences([4, 2], seed=1)
    limits = {"min_length_B": torch.tensor([5, 7])}
    with torch.inference_mode():
        batch = model.start(*padded(sentences)), task([6, 7], **limits)
        found = beam_search(model.step, [batch], search(beam, n_best=beam), SPECIALS)
    assert all(5 <= len(h.ids) + 1 <= 6 for h in found[0])
    assert all(len(h.ids) + 1 == 7 for h in found[1])


# ------------------------------------------------------------------------------------------ constraints

PIECES = ["", "", "", "", "▁a", "▁b", "b", "▁ab"]


def constrained(beam: int, rules: Rules, prefix: list[int], longest: int, **changes: object) -> list[Hypothesis]:
    model, source = tiny_model("transformer", vocabulary=SMALL), random_sentences([4], seed=3, vocabulary=8)
    config = search(beam, n_best=beam, **changes)
    with torch.inference_mode():
        asked = task([longest], rules=rules, prefix_BP=torch.tensor([prefix]) if prefix else None)
        return beam_search(model.step, [(model.start(*padded(source)), asked)], config, SPECIALS)[0]


def spoken(ids: tuple[int, ...]) -> list[str]:
    return "".join(PIECES[i] for i in ids).replace("▁", " ").split()


@pytest.mark.parametrize(
    "rules,prefix,allowed",
    [
        ({"forbidden": ["ab"]}, [], lambda ids: "ab" not in spoken(ids)),
        (
            {"forbidden": ["a b", "abb"]},
            [],
            lambda ids: ("a", "b") not in itertools.pairwise(spoken(ids)) and "abb" not in spoken(ids),
        ),
        ({"no_repeat": 1}, [], lambda ids: len(set(ids)) == len(ids)),
        ({"no_repeat": 2}, [], lambda ids: len(set(itertools.pairwise(ids))) == max(len(ids) - 1, 0)),
        ({}, [7, 6], lambda ids: ids[:2] == (7, 6)),
        ({"forbidden": ["a"]}, [5], lambda ids: ids[:1] == (5,) and "a" not in spoken(ids)),
    ],
)
def test_a_very_wide_beam_under_rules_is_brute_force(rules: Any, prefix: list[int], allowed: Any) -> None:
    """The best of all that the rules allow, however it is cut into subwords."""
    model, source = tiny_model("transformer", vocabulary=SMALL), random_sentences([4], seed=3, vocabulary=8)[0]
    possible = [ids for ids in everything(3) if allowed(ids)]
    scores = {ids: log_probability(model, source, list(ids)) / penalty(len(ids) + 1, 1.0) for ids in possible}
    found = constrained(len(everything(3)), Rules(PIECES, END, **rules), prefix, 4)
    assert [tuple(h.ids) for h in found] == sorted(scores, key=scores.__getitem__, reverse=True)
    assert [h.score for h in found] == pytest.approx([scores[tuple(h.ids)] for h in found], abs=1e-4)


@pytest.mark.parametrize("beam", [1, 4, 85])
@pytest.mark.parametrize("required", [["ab"], ["a", "bb"]])
def test_required_words_are_in_every_translation(beam: int, required: list[str]) -> None:
    """With any beam each word appears as a word; a very wide one finds the best translation that has them."""
    as_ids = {"ab": [7], "a": [4], "bb": [5, 6]}
    model, source = tiny_model("transformer", vocabulary=SMALL), random_sentences([4], seed=3, vocabulary=8)[0]
    found = constrained(beam, Rules(PIECES, END, [(word, as_ids[word]) for word in required]), [], 4)
    assert found and all(set(required) <= set(spoken(tuple(h.ids))) for h in found)
    if beam == 85:
        allowed = [ids for ids in everything(3) if set(required) <= set(spoken(ids))]
        scores = {ids: log_probability(model, source, list(ids)) / penalty(len(ids) + 1, 1.0) for ids in allowed}
        assert tuple(found[0].ids) == max(scores, key=scores.__getitem__)


# --------------------------------------------------------------------------------------------- sampling


def drawn(config: SearchConfig, table: torch.Tensor, seeds: list[int], longest: int = 1) -> list[list[Hypothesis]]:
    def step(tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        return table.expand(len(tokens), 1, -1), state

    asked = task([longest] * len(seeds), seeds=seeds)
    return sample(step, RowsState(torch.zeros(len(seeds))), asked, config, SPECIALS)


def sampling(samples: int, **changes: object) -> SearchConfig:
    return dataclasses.replace(search_preset("sample"), **{"samples": samples, "epsilon_cutoff": 0.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes,kept",
    [
        ({}, (3, 4, 5, 6, 7)),
        ({"temperature": 0.5}, (3, 4, 5, 6, 7)),
        ({"top_k": 2}, (5, 7)),
        ({"top_p": 0.75}, (5, 6, 7)),
        ({"min_p": 0.3}, (5, 6, 7)),
        ({"epsilon_cutoff": 0.1}, (4, 5, 6, 7)),
    ],
)
def test_samples_are_as_frequent_as_probable(changes: dict[str, float], kept: tuple[int, ...]) -> None:
    """Pearson's chi-square of 20,000 first words against the distribution that the options describe."""
    model = torch.log(torch.tensor([0.2, 0.2, 0.1, 0.03, 0.1, 0.3, 0.17, 0.4]) + 1e-9)
    probabilities = torch.zeros(8)
    probabilities[list(kept)] = (model[list(kept)] / changes.get("temperature", 1.0)).exp()
    probabilities /= probabilities.sum()
    found = drawn(sampling(200, n_best=200, **changes), model, list(range(100)), longest=2)
    counts = Counter(([*h.ids, END])[0] for hypotheses in found for h in hypotheses)
    assert set(counts) == set(kept)
    expected = {id_: float(probabilities[id_]) * 20_000 for id_ in kept}
    chi_square = sum((counts[id_] - expected[id_]) ** 2 / expected[id_] for id_ in kept)
    # One in a thousand for 1 to 4 degrees of freedom.
    assert chi_square < {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}[len(kept) - 1]


def test_samples_depend_on_the_sentence_and_the_seed_alone() -> None:
    table = torch.randn(8, generator=torch.Generator().manual_seed(0))

    def ids(config: SearchConfig, seeds: list[int]) -> list[list[list[int]]]:
        return [[h.ids for h in hypotheses] for hypotheses in drawn(config, table, seeds, longest=6)]

    together = ids(sampling(5, n_best=5), [11, 22, 33, 44])
    assert [ids(sampling(5, n_best=5), [seed])[0] for seed in (11, 22, 33, 44)] == together
    assert ids(sampling(5, n_best=5), [44, 22]) == [together[3], together[1]]
    assert ids(sampling(5, n_best=5, seed=2), [11, 22, 33, 44]) != together
    fewer = ids(sampling(3, n_best=3), [11])[0]
    assert all(sample_ids in together[0] for sample_ids in fewer), "more samples keep the earlier ones"


def test_samples_have_the_log_probability_that_the_model_gives_them() -> None:
    model, sentences = tiny_model("transformer"), random_sentences([5, 2], seed=7)
    config = sampling(4, n_best=4, temperature=0.7, top_k=9)
    with torch.inference_mode():
        found = sample(model.step, model.start(*padded(sentences)), task([9, 9], seeds=[3, 4]), config, SPECIALS)
    for source, hypotheses in zip(sentences, found, strict=True):
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for h in hypotheses:
            assert not {END, *SPECIALS.banned} & set(h.ids)
            assert h.log_probability == pytest.approx(log_probability(model, source, h.ids), abs=1e-4)


# ------------------------------------------------------------------------------- choice, and ensembles


def test_minimum_bayes_risk_is_its_definition() -> None:
    texts = ["ein Hund rennt", "ein Hund läuft", "ein Hund rennt", "zwei Katzen", "der Hund rennt"]
    for metric, measure in (("chrf", CHRF()), ("bleu", BLEU(effective_order=True))):
        risks = []
        for text in texts:
            gains = [measure.sentence_score(text, [other]).score for other in texts]
            risks.append(sum(gains) / len(gains))
        assert expected_similarity(texts, metric) == pytest.approx(risks)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ensemble_of_one_model_twice_is_that_model(family: str) -> None:
    model, sentences = tiny_model(family), random_sentences([5, 2, 8], seed=7)
    twice, read = Ensemble([model, model]), padded(sentences)
    config = search(4, n_best=4)
    with torch.inference_mode():
        found = beam_search(twice.step, [(twice.start([read, read]), task([9] * 3))], config, SPECIALS)
    for both, one in zip(found, decode(model, sentences, config, 9), strict=True):
        assert [h.ids for h in both] == [h.ids for h in one]
        assert [h.score for h in both] == pytest.approx([h.score for h in one], abs=1e-5)


def test_an_ensemble_averages_probabilities() -> None:
    """Of a Transformer and an LSTM."""
    models, sentences = [tiny_model(family) for family in FAMILIES], random_sentences([5, 2], seed=7)
    ensemble, target = Ensemble(models), torch.tensor([[BEGIN, 5, 6], [BEGIN, 7, 8]])
    with torch.inference_mode():
        logits, _ = ensemble.step(target, ensemble.start([padded(sentences)] * 2))
        each = [model.step(target, model.start(*padded(sentences)))[0].softmax(-1) for model in models]
    torch.testing.assert_close(logits.softmax(-1), (each[0] + each[1]) / 2)
