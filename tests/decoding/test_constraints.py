"""Constraints decide as if they searched the whole text of every continuation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.decoding.constraints import Rules, ban_repeats
from seq2seq.decoding.phrases import Phrase, partial_match
from seq2seq.decoding.processors import StepInput, step_processors
from seq2seq.decoding.scoring import DecodingTask, Specials
from tests.helpers.tables import BEGIN, END, padded_prefixes
from tests.reference.constraints import PlainRules, occurrences

NEG_INF = float("-inf")
FAST = settings(max_examples=50, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32)
ALPHABET = "aé1_.- "
WORDS = ["a", "é", "a1", "a.", ".", "-", "--", ".a", "a a", "a-a", "a -", "1_1", "aa", ". a", "éa é", "aé", "-a-"]
# Any one or two characters, and a space in front of any character: subwords have no space inside.
PIECES = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    *("".join(p).replace(" ", "▁") for n in (1, 2) for p in product(ALPHABET, repeat=n)),
]
PIECES = [piece for piece in PIECES if not piece[1:].endswith("▁")]
ID = {piece: i for i, piece in enumerate(PIECES)}


def letters(text: str) -> list[int]:
    return [ID[c.replace(" ", "▁")] for c in text]


def random_text(random: Random, phrases: list[str]) -> str:
    """Characters and parts of phrases, so that many phrases occur in full or in part."""
    parts = []
    for _ in range(random.randint(0, 5)):
        phrase = random.choice(phrases)
        parts.append(random.choice([random.choice(ALPHABET), phrase, phrase[: random.randint(1, len(phrase))], " "]))
    return "".join(parts)


def words_of(rules: Rules, ids: Sequence[Sequence[int]]) -> torch.Tensor | None:
    """The states of the automata after these ids, R × 1 × X."""
    states_R1X = rules.start(len(ids), 1)
    for id_R in torch.tensor([list(row) for row in ids], dtype=torch.int64).T:
        states_R1X = None if states_R1X is None else rules.advance(states_R1X, id_R[:, None])
    return states_R1X


def exclude(logits_RV: torch.Tensor, raw_RV: torch.Tensor, ids: Sequence[Sequence[int]], task: DecodingTask) -> None:
    """What the rules of a task write into logits after these ids."""
    assert task.rules
    phrase_states_R1X = words_of(task.rules, ids)
    phrase_states_RX = None if phrase_states_R1X is None else phrase_states_R1X[:, 0]
    prefix_RT = torch.tensor([[BEGIN, *row] for row in ids])
    step = StepInput(raw_RV, prefix_RT.shape[1], task, False, prefix_RT, phrase_states_RX)
    for processor in step_processors(task, Specials(BEGIN, END, ())):
        processor(logits_RV, step)


def banned(rules: Rules, ids: list[int], final: bool, early: bool = False) -> set[int]:
    """Which ids may not follow, by what is written into logits."""
    raw_RV = torch.arange(float(len(PIECES)))[None].repeat(2, 1)
    raw_RV[1] += 0.5
    logits_RV = raw_RV.clone()
    if early:
        logits_RV[:, END] = NEG_INF
    longest_B = torch.tensor([len(ids) + 3 - final, len(ids) + 2 + final])
    exclude(logits_RV, raw_RV, [ids, ids[::-1]], DecodingTask(longest_B, None, longest_B, [0, 0], rules))
    possible_RV = logits_RV > NEG_INF
    assert torch.equal(logits_RV[possible_RV], raw_RV[possible_RV]), "what is possible keeps its value"
    return set((~possible_RV[0]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("kind", ["forbidden", "required", "both"])
@FAST
@given(SEEDS)
def test_what_may_follow_is_what_the_whole_text_allows(kind: str, seed: int) -> None:
    """For every piece of a vocabulary: as if the text with it were searched for whole words."""
    random = Random(seed)
    phrases = random.sample(WORDS, 3)
    forbidden = phrases[:2] if kind != "required" else []
    required = [
        (text, letters(text)) for text in (phrases[2:] if kind == "both" else phrases if kind == "required" else [])
    ]
    no_repeat = random.choice([0, 0, 2, 3])
    ids, final = letters(random_text(random, phrases)), random.random() < 0.4
    rules = Rules(PIECES, END, required, forbidden, no_repeat)
    plain = PlainRules(PIECES, END, required, forbidden, no_repeat)
    wanted = set(range(len(PIECES))) - set(plain.filtered(tuple(ids), list(range(len(PIECES))), final))
    found = banned(rules, ids, final)
    assert found == wanted, (plain.text(ids), phrases, [PIECES[i] for i in sorted(found ^ wanted)])
    assert banned(rules, ids, final) == wanted, "the same when asked again"
    assert banned(rules, ids, not final) == set(range(len(PIECES))) - set(
        plain.filtered(tuple(ids), list(range(len(PIECES))), not final)
    )


@pytest.mark.parametrize("phrase", ["ab", "a", ".", "..", "a.", "über uns"])
def test_a_phrase_is_a_whole_word_or_more(phrase: str) -> None:
    """It counts at the beginning, in the middle and at the end of a text, and never inside of a longer word."""
    known = Phrase(phrase)
    word = phrase[-1].isalnum()
    for before, after in product(["", "x", " ", "-", "_", "1"], repeat=2):
        text = before + phrase + after
        assert bool(known.complete_pattern.search(text)) == bool(occurrences(phrase, text, closed=False)), text
        assert bool(known.closed_pattern.search(text)) == bool(occurrences(phrase, text, closed=True)), text
    assert bool(known.complete_pattern.search(phrase + "x")) == (not word)
    assert bool(known.closed_pattern.search(phrase)) == (not word)


@FAST
@given(SEEDS)
def test_no_sequence_of_ids_comes_twice(seed: int) -> None:
    """Exactly the ids that would repeat an n-gram of their own row are impossible, whatever n and the length are."""
    random = Random(seed)
    n, rows, length = random.randint(1, 5), random.randint(1, 4), random.randint(0, 9)
    ids = [[random.randint(4, 6) for _ in range(length)] for _ in range(rows)]
    logits_RV = torch.randn(rows, 8)
    wanted_RV = logits_RV.clone()
    for row, row_ids in enumerate(ids):
        grams = {tuple(row_ids[i : i + n]) for i in range(len(row_ids) - n + 1)}
        for id_ in range(8):
            if len(row_ids) >= n - 1 and (*row_ids[len(row_ids) - n + 1 :], id_) in grams:
                wanted_RV[row, id_] = NEG_INF
    ban_repeats(logits_RV, torch.tensor(ids, dtype=torch.int64).view(rows, length), n)
    assert torch.equal(logits_RV, wanted_RV)


def test_where_nothing_is_possible_a_sentence_may_end() -> None:
    """Only in that case, with the value that the model gave END, even where it is too early."""
    rules = Rules(PIECES, END, no_repeat=1)
    everything = [i for i in range(len(PIECES)) if i != END]
    assert banned(rules, everything, final=False, early=True) == set(everything)
    assert banned(rules, everything[:-1], final=False, early=True) == {*everything[:-1], END}


def test_a_prefix_is_forced_id_by_id_whatever_is_forbidden() -> None:
    """Each row follows the prefix of its sentence; after it everything is free again."""
    prefixes = [letters("a.a"), [], [ID["a"], 1], letters("é")]
    sentence_R = torch.tensor([3, 0, 0, 2, 1])
    longest_B = torch.full((len(prefixes),), 9)
    rules = Rules(PIECES, END, forbidden=["a", "."], no_repeat=1)
    task = DecodingTask(longest_B, None, longest_B, [0] * 4, rules, padded_prefixes(prefixes)).select(sentence_R)
    raw_RV = torch.randn(5, len(PIECES))
    for position in range(4):
        others = letters("-é1_")
        prefix_ids = [[*prefixes[s][:position], *others][:position] for s in sentence_R]
        logits_RV = torch.full_like(raw_RV, NEG_INF)
        exclude(logits_RV, raw_RV, prefix_ids, task)
        for row, s in enumerate(sentence_R.tolist()):
            only = prefixes[s][position] if position < len(prefixes[s]) else END
            assert (logits_RV[row] > NEG_INF).nonzero()[:, 0].tolist() == [only]
            assert logits_RV[row, only] == raw_RV[row, only]


@FAST
@given(SEEDS)
def test_progress_and_what_is_wanted_next(seed: int) -> None:
    """Whole phrases and the best begun one, also where phrases overlap themselves and each other."""
    random = Random(seed)
    phrases = random.sample(["a", "aa1", "a a", "a-a-1", "aé", "éa é", "-a-", "aaa1"], random.randint(1, 3))
    required = [(text, letters(text)) for text in phrases]
    rules, plain = Rules(PIECES, END, required), PlainRules(PIECES, END, required)
    prefixes = [letters(random_text(random, phrases)[-6:].rjust(6, ".")) for _ in range(3)]
    states_R1X = words_of(rules, prefixes)
    assert states_R1X is not None
    assert rules.progress(states_R1X)[:, 0].tolist() == [plain.progress(tuple(ids)) for ids in prefixes]
    ids_RY, counts_RY = rules.wanted(states_R1X[:, 0])
    wanted = [ids_Y[counts_Y].tolist() for ids_Y, counts_Y in zip(ids_RY, counts_RY, strict=True)]
    assert [set(ids) for ids in wanted] == [plain.wanted(tuple(ids)) for ids in prefixes]
    assert all(len(set(ids)) == len(ids) for ids in wanted)
    for ids in prefixes:
        for _, phrase in required:
            assert partial_match(ids, phrase) == plain.begun(tuple(ids), phrase)


@FAST
@given(SEEDS)
def test_a_beam_is_divided_among_degrees_of_progress(seed: int) -> None:
    """Dynamic beam allocation (Post & Vilar 2018, §3.2): which candidates go on, and which only fill the beam."""
    random = Random(seed)
    required = random.choice([[("a", letters("a"))], [("a a", letters("a a")), ("é", letters("é"))]])
    rules, plain = Rules(PIECES, END, required), PlainRules(PIECES, END, required)
    B, K, C, T = random.choice([1, 3]), random.choice([1, 2, 4, 5, 7]), random.choice([8, 15]), random.randint(1, 3)
    # Hypotheses of a sentence differ.
    begun = [letters("".join(text)) for text in product("aé -", repeat=T + 1)]
    prefixes = [random.sample(begun, K) for _ in range(B)]
    states_BKX = words_of(rules, [ids for sentence in prefixes for ids in sentence])
    assert states_BKX is not None
    states_BKX = states_BKX.view(B, K, -1)
    ids_BC = torch.tensor([[random.choice([END, *letters("aaéé -. ")]) for _ in range(C)] for _ in range(B)])
    origin_BC = torch.tensor([[random.randrange(K) for _ in range(C)] for _ in range(B)])
    scores_BC = torch.tensor(
        [[random.choice([NEG_INF, *([random.gauss(0, 1)] * 4)]) for _ in range(C)] for _ in range(B)]
    )
    remaining_B = torch.tensor([random.randint(0, 5) for _ in range(B)])
    chosen_BK, filler_BK = rules.allocate(scores_BC, ids_BC, origin_BC, states_BKX, remaining_B)
    assert chosen_BK.shape == filler_BK.shape == (B, K)
    for b in range(B):
        whole = [(*prefixes[b][k], id_) for k, id_ in zip(origin_BC[b].tolist(), ids_BC[b].tolist(), strict=True)]
        order = sorted(range(C), key=lambda c: -float(scores_BC[b, c]))
        possible = [c for c in order if scores_BC[b, c] > NEG_INF and whole[c][-1] != END]
        first = {whole[c]: c for c in reversed(possible)}
        wanted = plain.allocated(sorted(first, key=lambda ids: possible.index(first[ids])), K, int(remaining_B[b]))
        kept = [c for c, void in zip(chosen_BK[b].tolist(), filler_BK[b].tolist(), strict=True) if not void]
        assert {whole[c] for c in kept} == wanted and len(kept) == len(wanted)
        assert all(c in first.values() for c in kept), "of equal ones the likeliest"
        assert kept == sorted(kept, key=lambda c: -float(scores_BC[b, c])), "best first"
        assert filler_BK[b].tolist() == [False] * len(kept) + [True] * (K - len(kept))


def test_the_end_of_a_sentence_ends_a_word() -> None:
    """A forbidden word at the end of the prefix forbids END; a required one allows it."""
    assert END in banned(Rules(PIECES, END, forbidden=["aé"]), letters("- aé"), final=False)
    assert END not in banned(Rules(PIECES, END, forbidden=["aé"]), letters("- aé1"), final=False)
    assert END not in banned(Rules(PIECES, END, [("aé", letters("aé"))]), letters("- aé"), final=False)
    assert END in banned(Rules(PIECES, END, [("aé", letters("aé"))]), letters("- aé1"), final=False)


def test_a_forbidden_mark_that_a_prefix_has_is_not_found_again() -> None:
    """After "..", which a prefix may force, other pieces than marks go on freely."""
    for phrase, text in [(".", "a."), ("..", "a.."), ("--", "--"), ("-a-", "-a-")]:
        rules = Rules(PIECES, END, forbidden=[phrase])
        assert ID["é"] not in banned(rules, letters(text), final=False)
        assert END not in banned(rules, letters(text), final=True)
