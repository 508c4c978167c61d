"""Laws of the search, against a few lines of plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from conftest import FAMILIES, padded, random_sentences, tiny_model

from seq2seq.config import SearchConfig, search_preset
from seq2seq.model.seq2seq import Seq2Seq
from seq2seq.model.state import State
from seq2seq.search.beam import beam_search
from seq2seq.search.scoring import Hypothesis, Specials, Task
from seq2seq.text.tokenizer import BEGIN, END, PAD, UNKNOWN, Vocabulary

SPECIALS = Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN))
SMALL = Vocabulary(8, 8, joint=True)  # four words beside the specials


def search(beam: int, **changes: object) -> SearchConfig:
    return dataclasses.replace(search_preset("beam"), beam=beam, **changes)  # type: ignore[arg-type]


def task(longest: list[int], **changes: Any) -> Task:
    zeros = torch.zeros(len(longest), dtype=torch.int64)
    return dataclasses.replace(Task(torch.tensor(longest), zeros, zeros, list(range(len(longest)))), **changes)


def decode(
    model: Seq2Seq, sentences: list[list[int]], config: SearchConfig, longest: int | list[int], extra: int = 0
) -> list[list[Hypothesis]]:
    limits = longest if isinstance(longest, list) else [longest] * len(sentences)
    with torch.inference_mode():
        return beam_search(model.step, model.start(*padded(sentences, extra)), config, SPECIALS, task(limits))


def log_probability(model: Seq2Seq, source: list[int], ids: list[int]) -> float:
    """What the model gives a translation that it is told: teacher forcing."""
    with torch.inference_mode():
        logits, _ = model.step(torch.tensor([[BEGIN, *ids]]), model.start(*padded([source])))
    chosen = logits[0].log_softmax(-1).gather(1, torch.tensor([[*ids, END]]).T)
    return float(chosen.sum())


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_one_is_the_argmax_loop(family: str) -> None:
    model, sentences = tiny_model(family), random_sentences([5, 2, 8, 3], seed=3)
    found = decode(model, sentences, search(1), longest=12)
    for source, (hypothesis,) in zip(sentences, found, strict=True):
        said = []
        with torch.inference_mode():
            while len(said) < 11:
                logits, _ = model.step(torch.tensor([[BEGIN, *said]]), model.start(*padded([source])))
                logits[..., list(SPECIALS.banned)] = -torch.inf
                word = int(logits[0, -1].argmax())
                if word == END:
                    break
                said.append(word)
        assert hypothesis.ids == said


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

    found = beam_search(step, State(None, (torch.zeros(3, 1),)), search(2), SPECIALS, task(limits))
    assert [len(hypotheses[0].ids) for hypotheses in found] == [0, 2, 5]
    end = float(table.log_softmax(-1)[END])
    word = float(table.log_softmax(-1)[4])
    assert [h[0].log_probability for h in found] == pytest.approx([end, 2 * word + end, 5 * word + end])
    assert table[PAD] == 0, "the search must not write into the logits it is given"


def test_finished_sentences_leave_the_batch() -> None:
    """Rows shrink as sentences end: the work done is that of the sentences still open."""
    rows: list[int] = []
    stops = torch.tensor([2, 5, 3])

    def step(tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        rows.append(len(tokens))
        logits = torch.zeros(len(tokens), 1, 8)
        logits[:, 0, 4] = 5.0
        logits[state.moving[0][:, 0] == state.length + 1, 0, END] = 50.0
        return logits, state.advance(state.moving, 1)

    found = beam_search(step, State(None, (stops[:, None],)), search(1), SPECIALS, task([9, 9, 9]))
    assert [len(h[0].ids) for h in found] == [1, 4, 2]
    assert rows == [3, 3, 2, 1, 1]
