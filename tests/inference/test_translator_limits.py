"""The translator around a table: lengths, batches, prefixes, attention, scores and choices of every sentence."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.chrf import CHRF
from safetensors.torch import load_file, save_file

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.scoring import Hypothesis
from seq2seq.inference import translator as translator_module
from seq2seq.inference.translator import (
    EMPTY,
    MOST_PARTS,
    ROWS_OF_TWO_PARTS,
    ROWS_PER_PART,
    Translation,
    Translator,
    parts_of,
    seed,
    token_budget,
)
from seq2seq.inference.workers import Workers
from seq2seq.utils.errors import UserError
from tests.helpers.runs import saved_run
from tests.helpers.tables import BANNED, END, Table, hashed, mean_of
from tests.reference import search as reference
from tests.reference.constraints import PlainRules

CPU = torch.device("cpu")
UNKNOWN = 1
FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None,
                phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
SEEDS = st.integers(0, 2**32)
TARGET = ("<pad>", "<unk>", "<s>", "</s>", "▁a", "b", "▁ab", "a", "▁b", ".", "▁c", "▁")
TEXTS = ["", "a", "b", "ab", " ", "\t", "c", "aab", "abcab", "cba", "bbbbbb", "abcabcab", "acacacacac", "cccccccccccc"]


class Letters:
    """A tokenizer that reads `width` letters as one id, or with 0 an a as three, and writes TARGET's pieces."""

    def __init__(self, width: int = 1) -> None:
        self.width, self.target_pieces = width, list(TARGET)

    def encode_source(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*self._read(text), END] for text in texts]

    def _read(self, text: str) -> list[int]:
        if self.width == 0:
            return [id_ for c in text for id_ in (ord(c) - 93, *([30, 31] if c == "a" else []))]
        parts = [text[i : i + self.width] for i in range(0, len(text), self.width)]
        return [4 + sum((ord(c) - 96) * 4**i for i, c in enumerate(part)) for part in parts]

    def encode_target(self, texts: Sequence[str]) -> list[list[int]]:
        """The longest piece that fits, again and again."""
        return [[*self._written(" " + text if text else ""), END] for text in texts]

    def _written(self, text: str) -> list[int]:
        rest, ids = text.replace(" ", "▁"), []
        while rest:
            fitting = [i for i in range(4, len(TARGET)) if rest.startswith(TARGET[i])]
            ids.append(max(fitting, key=lambda i: len(TARGET[i]), default=UNKNOWN))
            rest = rest[len(TARGET[ids[-1]]) if fitting else 1 :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(TARGET[i] for i in ids if i > END).replace("▁", " ").strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [TARGET[i] for i in ids]

    def source_pieces(self, ids: Sequence[int]) -> list[str]:
        return [f"s{i}" for i in ids]


@cache
def preset(name: str = "beam") -> SearchConfig:
    return search_preset(name)


def options(**changes: Any) -> SearchConfig:
    return dataclasses.replace(preset(), **changes)


def translator(tables: Sequence[Table], widths: Sequence[int] = (1,), max_length: int = 64) -> Translator:
    """A translator of tables; with several the limit is that of the first, which is the shortest."""
    made = [
        Translator(table, Letters(width), CPU, max_length + i)  # type: ignore[arg-type]
        for i, (table, width) in enumerate(zip(tables, widths, strict=True))
    ]
    return Translator.ensemble(made, [str(i) for i in range(len(made))])


class Plain:
    """What a translator must answer, sentence by sentence."""

    def __init__(self, tables: Sequence[Table], widths: Sequence[int], max_length: int) -> None:
        self.tables, self.letters, self.max_length = tables, [Letters(w) for w in widths], max_length

    def read(self, text: str) -> tuple[list[list[int]], bool]:
        """The ids of each model, at most `max_length` of them with END as the last; and whether any were left out."""
        every = [letters.encode_source([text if text.strip() else ""])[0] for letters in self.letters]
        kept = [ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], END] for ids in every]
        return kept, kept != every

    def model(self, text: str) -> reference.Model:
        models = [
            table.model(hashed(ids), len(ids)) for table, ids in zip(self.tables, self.read(text)[0], strict=True)
        ]
        return models[0] if len(models) == 1 else mean_of(models)

    def weights(self, text: str, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Of the first model: from each id and END to each source position."""
        source = self.read(text)[0][0]
        rows = [self.tables[0].weights_LNS(hashed(source), len(source), tuple(ids[:t])) for t in range(len(ids) + 1)]
        return np.stack(rows, 2)

    def lengths(self, text: str, prefix: list[int], search: SearchConfig, constrained: bool) -> tuple[int, int]:
        n = len(self.read(text)[0][0])
        longest = min(max(int(n * search.length_factor) + search.length_extra, 1), self.max_length)
        if constrained:
            required = [Letters().encode_target([phrase])[0][:-1] for phrase in search.require]
            longest = max(longest, len(prefix) + sum(map(len, required)) + 1)
        return min(int(n * search.min_length_factor) + search.min_length_extra, longest), longest

    def translate(self, texts: Sequence[str], prefixes: Sequence[str], search: SearchConfig) -> list[Any]:
        """Hypotheses of each text as (ids, score, log probabilities), and whether they are sure."""
        begun = [ids[:-1] for ids in Letters().encode_target(prefixes)]
        constrained = bool(search.require or search.forbid or search.no_repeat_ngram or any(begun))
        answers: list[Any] = []
        for text, prefix in zip(texts, begun, strict=True):
            if not text.strip():
                answers.append(([], True))
                continue
            shortest, longest = self.lengths(text, prefix, search, constrained)
            required = [(phrase, Letters().encode_target([phrase])[0][:-1]) for phrase in search.require]
            rules = (
                PlainRules(TARGET, END, required, search.forbid, search.no_repeat_ngram, prefix)
                if constrained
                else None
            )
            request = reference.Request(shortest, longest, END, BANNED, rules)
            if search.samples:
                outcome = reference.sample(self.model(text), request, search, seed(self.read(text)[0][0]))
            else:
                outcome = reference.beam_search(self.model(text), request, search)
            answers.append((self.chosen(outcome.finished, search), outcome.clear))
        return answers

    def chosen(self, paths: list[reference.Path], search: SearchConfig) -> list[reference.Path]:
        """The `n_best` by score, or by the mean likeness of their texts to all; equal texts once, the first of them."""
        if search.select_by == "score":
            return paths[: search.n_best]
        texts = [Letters().decode(path.ids) for path in paths]
        likeness = {
            text: sum(CHRF().sentence_score(text, [other]).score for other in texts) / len(texts) for text in texts
        }
        first = [i for i, text in enumerate(texts) if text not in texts[:i]]
        first.sort(key=lambda i: -likeness[texts[i]])
        return [dataclasses.replace(paths[i], score=likeness[texts[i]]) for i in first[: search.n_best]]


def assert_translations(
    found: Sequence[Sequence[Translation]],
    plain: Plain,
    texts: Sequence[str],
    answers: Sequence[Any],
    attention: bool | None,
) -> None:
    assert len(found) == len(texts)
    for text, ranked, (paths, clear) in zip(texts, found, answers, strict=True):
        if not clear:
            continue
        if not paths:
            assert ranked == [EMPTY], f"of {text!r}"
            continue
        source, cut = plain.read(text)
        assert [one.pieces for one in ranked] == [tuple(TARGET[i] for i in path.ids[:-1]) for path in paths]
        for one, path in zip(ranked, paths, strict=True):
            assert one.text == Letters().decode(path.ids)
            assert one.score == pytest.approx(path.score, rel=1e-5, abs=3e-5)
            assert one.log_probability == pytest.approx(path.total, rel=1e-5, abs=5e-5)
            assert one.token_log_probabilities == pytest.approx(path.each, rel=1e-5, abs=3e-5)
            assert one.truncated == cut and one.source_pieces == tuple(f"s{i}" for i in source[0])
            if attention is not None:
                assert (one.weights_LNTS is not None) == attention
            if attention and one.weights_LNTS is not None:
                np.testing.assert_allclose(one.weights_LNTS.numpy(), plain.weights(text, path.ids[:-1]), rtol=1e-4)


def random_search(random: Random, kind: str) -> SearchConfig:
    pick = random.choice
    changes: dict[str, Any] = {
        "length_factor": pick([0.0, 0.5, 1.5]),
        "length_extra": random.randint(1, 5),
        "min_length_factor": 0.0,
        "min_length_extra": pick([0, 0, 2, 9]),
        "length_normalization": pick(["gnmt", "average"]),
        "length_penalty": pick([0.0, 1.0, 1.3]),
        "tokens": pick([1, 7, 30, 16384]),
        "select_by": pick(["score", "chrf"]),
    }
    if pick([False, True]):
        changes |= {"min_length_factor": changes["length_factor"], "min_length_extra": random.randint(0, 3)}
    rows = pick([2, 3, 4])
    if kind == "sample":
        changes |= {
            "samples": rows,
            "seed": pick([1, 2]),
            "temperature": pick([0.7, 1.0]),
            "beam": 1,
            "epsilon_cutoff": 0.02,
        }
    else:
        changes |= {"beam": rows, "stop": pick(["filled", "likely", "certain", "longest"])}
        changes |= {"coverage_penalty": pick([0.0, 0.4])}
    if kind == "require":
        changes |= {"require": pick([["ab"], ["b", "c"]]), "select_by": "score"}
    elif pick([False, True]):
        changes |= {"forbid": pick([[], ["ab"], ["a", "."]]), "no_repeat_ngram": pick([0, 1, 2])}
    return options(**changes, n_best=random.randint(1, rows))


@pytest.mark.parametrize("kind", ["beam", "require", "sample"])
@FAST
@given(SEEDS)
def test_a_translation_is_the_search_of_its_sentence_alone(kind: str, number: int) -> None:
    """In any batch and order: empty, short, long and cut sentences, prefixes, ensembles, and attention on request."""
    random = Random(f"{number} {kind}")
    widths = random.choice([[1], [1], [1, 2], [2, 0]])
    max_length = random.choice([3, 5, 9, 64])
    tables = [Table(random.getrandbits(30), len(TARGET), 64, random.choice([-1.0, 1.0])) for _ in widths]
    model, plain = translator(tables, widths, max_length), Plain(tables, widths, max_length)
    texts = random.choices(TEXTS, k=random.randint(1, 9))
    some = random.random() < 0.5
    prefixes = [random.choice(["", "", "a", "ab b", "c.c.c", "aé"]) if some else "" for _ in texts]
    search, attention = random_search(random, kind), random.random() < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translator_module, "ENCODER_TOKENS", random.choice([1, 8, 20, 2048]))
        patch.setattr(translator_module, "SCORING_TOKENS", random.choice([1, 8, 20, 2048]))
        given_prefixes = prefixes if some or random.random() < 0.5 else None
        found = model.translate(texts, search, prefixes=given_prefixes, attention=attention)
    assert_translations(found, plain, texts, plain.translate(texts, prefixes, search), attention)


@FAST
@given(SEEDS)
def test_a_score_is_that_of_its_pair_alone(number: int) -> None:
    """Of pairs of any lengths in any batches: every log probability, the penalty, the cut source, the attention."""
    random = Random(number)
    widths = random.choice([[1], [2, 1]])
    max_length = random.choice([3, 6, 64])
    tables = [Table(random.getrandbits(30), len(TARGET), 64) for _ in widths]
    model, plain = translator(tables, widths, max_length), Plain(tables, widths, max_length)
    texts = random.choices(TEXTS, k=random.randint(1, 9))
    targets = random.choices(["", "a", "ab", "c b.", "b", "ab ab ab ab.", "é", "c c c"], k=len(texts))
    search = options(
        length_normalization=random.choice(["gnmt", "average"]), length_penalty=random.choice([0.0, 0.7, 1.0])
    )
    given_search, attention = random.choice([search, None]), random.random() < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translator_module, "ENCODER_TOKENS", random.choice([1, 8, 2048]))
        patch.setattr(translator_module, "SCORING_TOKENS", random.choice([1, 5, 9, 2048]))
        scored = model.score(texts, targets, given_search, attention=attention)
    paths = []
    for text, target in zip(texts, targets, strict=True):
        ids, one = tuple(Letters().encode_target([target])[0]), plain.model(text)
        each = tuple(float(one.log_probabilities(ids[:t])[id_]) for t, id_ in enumerate(ids))
        score = sum(each) / reference.length_penalty(len(ids), given_search or preset())
        paths.append(([reference.Path(ids, each, score)], True))
    assert_translations([[one] for one in scored], plain, texts, paths, attention)


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("max_length", [2, 4, 7])
def test_a_source_is_cut_exactly_at_the_longest_that_the_model_reads(max_length: int) -> None:
    """With END it may be as long as the limit; what is longer keeps its beginning and END, and its cut is reported."""
    table = Table(1, len(TARGET), 64)
    model = translator([table], max_length=max_length)
    texts = ["abc"[i % 3] * (max_length - 2 + i) for i in range(1, 4)]  # as long with END as the limit, and longer
    (one,), (two,), (three,) = model.translate(texts, options(beam=1, n_best=1))
    assert [x.truncated for x in (one, two, three)] == [False, True, True]
    assert [len(x.source_pieces) for x in (one, two, three)] == [max_length] * 3
    ids = Letters().encode_source(texts)
    read = sorted(row for reads in table.reads for row in reads)
    assert read == sorted([ids[0], *([*row[: max_length - 1], END] for row in ids[1:])])
    assert [x.truncated for x in model.score(texts, ["a"] * 3)] == [False, True, True]


@pytest.mark.parametrize(
    "changes,max_length,wanted",
    [
        ({"length_factor": 1.5, "length_extra": 2}, 64, [5, 6, 9, 20]),
        ({"length_factor": 0.0, "length_extra": 4}, 64, [4, 4, 4, 4]),
        ({"length_factor": 2.0, "length_extra": 10}, 13, [13, 13, 13, 13]),
        ({"length_factor": 2.0, "length_extra": 1}, 12, [5, 7, 11, 12]),
        ({"length_factor": 0.0, "length_extra": 0}, 64, [1, 1, 1, 1]),
    ],
)
def test_the_longest_length_counts_end_on_both_sides(
    changes: dict[str, Any], max_length: int, wanted: list[int]
) -> None:
    """Factor × source + extra, at least 1 and at most what the model writes; a model that never ends shows it."""
    model = translator([Table(2, len(TARGET), 64, end=-40.0)], max_length=max_length)
    texts = ["a", "ab", "abca", "abcabcabcab"]
    found = model.translate(texts, options(beam=2, n_best=1, **changes))
    assert [len(ranked[0].token_log_probabilities) for ranked in found] == wanted


@pytest.mark.parametrize(
    "changes,max_length,wanted",
    [
        ({"min_length_factor": 1.5, "min_length_extra": 0}, 64, [3, 4, 7, 18]),
        ({"min_length_factor": 0.0, "min_length_extra": 3}, 64, [3, 3, 3, 3]),
        ({"min_length_factor": 2.0, "min_length_extra": 2}, 12, [6, 8, 12, 12]),
        ({"min_length_factor": 0.0, "min_length_extra": 0}, 64, [1, 1, 1, 1]),
    ],
)
def test_the_shortest_length_gives_way_to_the_longest(
    changes: dict[str, Any], max_length: int, wanted: list[int]
) -> None:
    """A model that wants to end at once is held back as long as it is asked, and no longer than it may write."""
    model = translator([Table(2, len(TARGET), 64, end=40.0)], max_length=max_length)
    texts = ["a", "ab", "abca", "abcabcabcab"]
    search = options(beam=2, n_best=1, length_factor=2.0, length_extra=2, length_penalty=0.0, **changes)
    assert [len(ranked[0].token_log_probabilities) for ranked in model.translate(texts, search)] == wanted


def test_a_prefix_and_required_phrases_make_room_for_themselves() -> None:
    """However short the limit: the whole prefix, the phrases and END; sentences without a prefix keep their limit."""
    model = translator([Table(3, len(TARGET), 64, end=-40.0)])
    search = options(beam=4, n_best=1, length_factor=0.0, length_extra=2)
    found = model.translate(["ab", "c", "", "a"], search, prefixes=["ab b.", "", "c", "c"])
    assert [len(ranked[0].token_log_probabilities) for ranked in found] == [4, 2, 0, 2]
    assert found[0][0].text == "ab b." and found[3][0].text == "c"
    ((required,),) = model.translate(["ab"], dataclasses.replace(search, require=["c", "b."]))
    assert sorted(required.pieces) == [".", "▁b", "▁c"]


# ------------------------------------------------------------------------------------------------------------- batches


def greedy_batches(widths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in this order, each batch as large as fits with its padding, and at least one row."""
    batches: list[list[int]] = []
    for i, width in enumerate(widths):
        if batches and max(width, *(widths[j] for j in batches[-1])) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@pytest.mark.parametrize(
    "tokens,rows",
    [(1, {"beam": 2}), (12, {"beam": 2}), (30, {"beam": 3}), (24, {"samples": 4, "beam": 1}), (500, {"beam": 2})],
)
@pytest.mark.parametrize("widths", [[1], [2, 0]])
def test_batches_hold_as_many_tokens_as_fit(tokens: int, rows: dict[str, int], widths: list[int]) -> None:
    """Source subwords × hypotheses with padding, of the model that reads most; an exact fit fits."""
    tables = [Table(4 + i, len(TARGET), 64) for i in range(len(widths))]
    texts = ["aaa", "b", "cccc", "b", "ccccc", "aa", "bbbbbb", "cc"]
    model = translator(tables, widths)
    model.translate(texts, options(n_best=1, length_extra=1, tokens=tokens, **rows))
    read = [[letters.encode_source([text])[0] for letters in model.tokenizers] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: max(map(len, read[i])))
    size = [max(map(len, read[i])) * (rows.get("samples") or rows["beam"]) for i in order]
    for m, table in enumerate(tables):
        wanted = [[read[order[i]][m] for i in batch] for batch in greedy_batches(size, tokens)]
        assert table.reads == wanted


@pytest.mark.parametrize("budget", [1, 6, 12, 16, 100])
@pytest.mark.parametrize("widths", [[1], [2, 0]])
def test_a_cpu_reads_few_sentences_together(widths: list[int], budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a batch as many source tokens as fit, of the model that reads most; another device reads all at once."""
    monkeypatch.setattr(translator_module, "ENCODER_TOKENS", budget)
    texts = ["ab", "a", "abc", "b", "c", "abcab", "bc"]
    tables = [Table(5, len(TARGET), 64) for _ in widths]
    model = translator(tables, widths)
    model.translate(texts, options(beam=2, n_best=1))
    read = [[letters.encode_source([text])[0] for letters in model.tokenizers] for text in texts]
    order = sorted(range(7), key=lambda i: max(map(len, read[i])))
    parts = greedy_batches([max(map(len, read[i])) for i in order], budget)
    for m, table in enumerate(tables):
        assert table.reads == [[read[order[i]][m] for i in part] for part in parts]
    together: list[int] = []
    model.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(model, "_start_batch", lambda sources: together.append(len(sources)))
    model._start(model._encode_sources(texts))
    assert together == [7]


@pytest.mark.parametrize("budget", [1, 6, 8, 100])
def test_forced_targets_are_read_in_batches_that_fit(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short targets first, and equally long ones by their sources; each batch as large as fits with END and padding."""
    monkeypatch.setattr(translator_module, "SCORING_TOKENS", budget)
    table = Table(6, len(TARGET), 64)
    texts, targets = ["ab", "a", "abc", "b", "c", "abcab"], ["a b", "c", "", "c.c.", "b", "a"]
    translator([table]).score(texts, targets)
    lengths = [len(ids) for ids in Letters().encode_target(targets)]
    order = sorted(range(6), key=lambda i: (lengths[i], len(texts[i])))
    ids = Letters().encode_source(texts)
    wanted = [[ids[order[i]] for i in part] for part in greedy_batches([lengths[i] for i in order], budget)]
    assert table.reads == wanted


def test_the_budget_of_a_batch_is_the_one_given_or_follows_the_device() -> None:
    given, auto = (dataclasses.replace(search_preset("beam"), tokens=tokens) for tokens in (300, "auto"))
    small, large = (token_budget(auto, torch.device(name)) for name in ("cpu", "cuda"))
    assert small < large
    assert {token_budget(given, torch.device(name)) for name in ("cpu", "cuda")} == {300}


def test_other_devices_score_as_much_as_they_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of a CPU does not bind them."""
    monkeypatch.setattr(translator_module, "SCORING_TOKENS", 1)
    model, together = translator([Table(6, len(TARGET), 64)]), list[int]()

    def batch(sources: Any, ids: list[list[int]], _: bool) -> list[tuple[tuple[float], None]]:
        together.append(len(ids))
        return [((0.0,), None)] * len(ids)

    monkeypatch.setattr(model, "device", torch.device("meta"))
    monkeypatch.setattr(model, "_teacher_force_batch", batch)
    search = dataclasses.replace(search_preset("beam"), tokens=6)
    sources, ids = model._encode_sources(["a"] * 5), [[4]] * 5
    model._teacher_force(sources, ids, search, False)
    assert together == [3, 2]


# ----------------------------------------------------------------------------------------------------------- processes


class FakeWorkers:
    """Does the work of the processes in this one, and keeps the parts that it was given."""

    def __init__(self, model: Translator) -> None:
        self.model, self.given = model, []  # type: ignore[var-annotated]

    def map(self, requests: Sequence[tuple[Any, ...]], on_result: Callable[[int], Any] = str) -> list[Any]:
        self.given.append([given for _, *given in requests])
        results = [method(self.model, *given) for method, *given in requests]
        for i in reversed(range(len(requests))):
            on_result(i)
        return results


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 hypotheses, so that tests need few."""
    monkeypatch.setattr(translator_module, "ROWS_OF_TWO_PARTS", 32)
    monkeypatch.setattr(translator_module, "ROWS_PER_PART", 16)


def test_parts_are_a_power_of_two_and_never_small() -> None:
    """The number never falls as the work grows, and ends at the largest; what is too little for two stays whole."""
    counts = [parts_of(rows) for rows in range(2 * MOST_PARTS * ROWS_PER_PART)]
    assert counts == sorted(counts) and set(counts) == {1 << i for i in range(MOST_PARTS.bit_length())}
    assert counts.index(2) == ROWS_OF_TWO_PARTS and counts.index(4) == 4 * ROWS_PER_PART
    assert counts.index(MOST_PARTS) == MOST_PARTS * ROWS_PER_PART


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("count,parts", [(1, 1), (15, 1), (16, 2), (31, 2), (32, 4), (70, 8)])
def test_divided_sentences_are_translated_as_undivided_ones(count: int, parts: int) -> None:
    """Texts, prefixes and options go together, and the order is restored."""
    random, table = Random(count), Table(7, len(TARGET), 64)
    model, search = translator([table]), options(beam=2, n_best=2, length_factor=1.0, length_extra=2)
    texts = ["".join(random.choices("abc", k=random.choice([0, 1, 2, 3, 12]))) for _ in range(count)]
    prefixes = [random.choice(["", "a", "b c"]) for _ in texts]
    whole = model.translate(texts, search, prefixes=prefixes)
    workers = FakeWorkers(model)
    model.workers = workers  # type: ignore[assignment]
    assert model.translate(texts, search, prefixes=prefixes) == whole
    (chunks,) = workers.given
    assert len(chunks) == parts
    given_pairs = Counter((text, prefix) for chunk in chunks for text, prefix in zip(*chunk[:2], strict=True))
    assert given_pairs == Counter(zip(texts, prefixes, strict=True))
    ranges = [(min(map(len, chunk[0])), max(map(len, chunk[0]))) for chunk in reversed(chunks)]
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(ranges)), "the longest come first"
    costs = [sum((1 + len(text)) ** 1.1 for text in chunk[0]) for chunk in chunks]
    assert max(costs) - min(costs) <= 2 * max((1 + len(text)) ** 1.1 for text in texts), "equal work for each"


@pytest.mark.usefixtures("small_parts")
def test_a_search_with_attention_or_steps_is_cut_as_without() -> None:
    """It is not asked of other processes; a step names the sentence by its index in the whole input."""
    texts = ["ab", "c", "abc"] * 20
    model, search = translator([Table(7, len(TARGET), 64)]), options(beam=2, n_best=1)
    workers = FakeWorkers(model)
    model.workers = workers  # type: ignore[assignment]
    found, shown = model.translate(texts, search), dict[int, str]()
    asked = len(workers.given)
    assert model.translate(texts, search, on_step=shown.__setitem__) == found
    assert len(workers.given) == asked
    assert [shown.get(i, "") for i in range(len(texts))] == [best.text for best, *_ in found]
    attended = model.translate(texts, search, attention=True)
    assert attended == found and all(best.weights_LNTS is not None for best, *_ in attended)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("attention", [False, True])
def test_every_number_of_processes_shows_how_much_is_done(attention: bool) -> None:
    """After each part, in whatever order they end: the number of sentences in all that are done."""
    texts = ["ab", "c", "abc" * 4] * 13
    model, search = translator([Table(7, len(TARGET), 64)]), options(beam=2, n_best=1)
    several = FakeWorkers(model)
    for workers in (Workers(model._call, 1), several):
        model.workers, done = workers, list[int]()  # type: ignore[assignment]
        model.translate(texts, search, attention=attention, on_done=done.append)
        assert len(done) == parts_of(2 * len(texts)) > 2 and done[-1] == len(texts)
        assert all(0 < after - before < len(texts) for before, after in pairwise([0, *done]))
    if not attention:
        sizes = [len(chunk[0]) for chunk in several.given[0]]
        assert [after - before for before, after in pairwise([0, *done])] == sizes[::-1]


@pytest.mark.usefixtures("small_parts")
def test_a_few_very_long_sentences_leave_some_processes_without_work() -> None:
    """One text that outweighs all others: every sentence is still translated once, in its own position."""
    texts = ["a" * 5000, *["ab"] * 64]
    model = translator([Table(7, len(TARGET), 64)], max_length=20)
    workers = FakeWorkers(model)
    search = options(beam=1, n_best=1)
    whole = model.translate(texts, search)
    model.workers = workers  # type: ignore[assignment]
    assert model.translate(texts, search) == whole
    assert 1 < len(workers.given[0]) < parts_of(len(texts)) and all(chunk[0] for chunk in workers.given[0])


@pytest.mark.usefixtures("small_parts")
def test_what_an_engine_searches_is_left_whole() -> None:
    """It has threads of its own; what it does not support is divided as without it."""
    asked: list[tuple[SearchConfig, bool]] = []

    class Engine:
        def supports(self, search: SearchConfig, prefixes: bool) -> bool:
            asked.append((search, prefixes))
            return search.beam == 1

    model, texts = translator([Table(7, len(TARGET), 64)]), ["ab", "c"] * 40
    model.use_processes(1).engine = Engine()  # type: ignore[assignment]
    assert [len(model._parts(texts, [""] * len(texts), options(beam=beam))) for beam in (1, 2)] == [1, 8]
    model._parts(texts, ["", "a"] * 40, options(beam=1))
    assert [prefixes for _, prefixes in asked] == [False, False, True]


def test_only_a_cpu_and_a_translator_with_workers_cut() -> None:
    """A GPU is faster with large batches, and a server has batches of its own."""
    model, texts = translator([Table(7, len(TARGET), 64)]), ["ab"] * 4 * ROWS_PER_PART
    assert model.workers is None and len(model._parts(texts, texts, options())) == 1
    assert model.use_processes(1) is model and model.workers is not None
    assert len(model._parts(texts, texts, options())) == parts_of(options().rows * len(texts)) > 1
    model.device = torch.device("meta")
    assert len(model._parts(texts, texts, options())) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_workers_do_what_they_are_asked_for(count: int) -> None:
    model = translator([Table(7, len(TARGET), 64)])
    workers = model.use_processes(count).workers
    assert workers is not None and workers.count == count
    assert workers.work(Translator._target_ids, ["ab"]) == model._target_ids(["ab"])


# -------------------------------------------------------------------------------------------------- everything besides


@pytest.mark.parametrize("count", [1, 3, 12, 50])
def test_alternatives_are_the_likeliest_next_pieces_after_a_prefix(count: int) -> None:
    """With their probabilities among all pieces, special ones included, best first, and no more than there are."""
    tables = [Table(8, len(TARGET), 64), Table(9, len(TARGET), 64)]
    model, plain = translator(tables, [1, 2], 5), Plain(tables, [1, 2], 5)
    for text, prefix in (("ab", ""), ("abcabcabc", "ab c"), ("", "a")):
        ids = tuple(Letters().encode_target([prefix])[0][:-1])
        probabilities = np.exp(plain.model(text).log_probabilities(ids))
        order = sorted(range(len(TARGET)), key=lambda i: -probabilities[i])[:count]
        found = model.alternatives(text, prefix, count)
        assert [piece for piece, _ in found] == [TARGET[i] for i in order]
        assert [probability for _, probability in found] == pytest.approx(probabilities[order], rel=1e-4)


def test_an_empty_sentence_has_the_empty_translation_in_every_position() -> None:
    """Spaces alone are empty too; nothing is read for them, and the others are as they were without them."""
    table = Table(10, len(TARGET), 64)
    model, search = translator([table]), options(beam=2, n_best=2)
    both = model.translate(["ab", "c"], search)
    for texts in (["", "ab", "c"], ["ab", " \t", "c"], ["ab", "c", " "], ["", "ab", "", "\n", "c", ""]):
        found = iter(model.translate(texts, search))
        others = iter(both)
        for text, ranked in zip(texts, found, strict=True):
            assert ranked == (next(others) if text.strip() else [EMPTY])
    table.reads.clear()
    assert model.translate(["", " "], search, attention=True) == [[EMPTY], [EMPTY]] and table.reads == []
    assert model.translate([], search) == []


def test_candidates_with_one_text_are_one_candidate_that_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minimum Bayes risk compares texts: of equal ones the likeliest stays, equal likeness keeps the order."""
    model = translator([Table(11, len(TARGET), 64)])
    ids = [[6], [4, 5], [10], [6, 9], [8]]  # ab, ab, c, ab., b
    hypotheses = [Hypothesis(one, -float(i), -float(i), (-float(i),)) for i, one in enumerate(ids)]
    likeness = {"ab": 2.0, "c": 3.0, "ab.": 2.0, "b": 3.0}
    monkeypatch.setattr(translator_module, "expected_similarity", lambda texts, _: [likeness[t] for t in texts])
    chosen = model._select(hypotheses, options(beam=5, n_best=5, select_by="chrf"))
    assert [(one.ids, one.score, one.log_probability) for one in chosen] == [
        ([10], 3.0, -2.0),
        ([8], 3.0, -4.0),
        ([6], 2.0, 0.0),
        ([6, 9], 2.0, -3.0),
    ]
    assert model._select(hypotheses, options(beam=5, n_best=2, select_by="chrf")) == chosen[:2]


def test_a_sentence_has_a_seed_of_its_own_ids_alone() -> None:
    """Other ids, another order or another length give another seed; 64 bits, all of them used."""
    found = [seed(list(ids)) for ids in ([3], [4, 3], [3, 4], [4, 4, 3], [0, 3], [3, 0], [260, 3], [4 + 2**33, 3])]
    assert len(set(found)) == len(found) and all(0 <= x < 2**64 for x in found)
    assert seed([4, 3]) == found[1] and max(seed([i]) for i in range(20)) > 2**63


def test_attention_is_averaged_over_what_is_not_named() -> None:
    """Layers first, then heads; a translation without weights says how to get them."""
    model = translator([Table(12, len(TARGET), 64)])
    one = model.translate(["abc"], options(beam=2), attention=True)[0][0]
    weights = one.weights_LNTS
    assert weights is not None and weights.shape == (2, 3, len(one.pieces) + 1, 4)
    assert torch.allclose(one.attention(), weights.mean((0, 1)))
    assert torch.allclose(one.attention(1), weights[1].mean(0))
    assert torch.allclose(one.attention(head=2), weights[:, 2].mean(0))
    assert torch.equal(one.attention(1, 2), weights[1, 2]) and torch.equal(one.attention(0, 0), weights[0, 0])
    with pytest.raises(ValueError, match="attention=True"):
        model.translate(["abc"], options(beam=2))[0][0].attention()


def test_the_limit_of_an_ensemble_is_that_of_its_shortest_model() -> None:
    """Wherever it stands; the models and their tokenizers stay in order."""
    tables = [Table(i, len(TARGET), 64) for i in range(3)]
    made = [Translator(t, Letters(1 + i), CPU, n) for i, (t, n) in enumerate(zip(tables, (9, 4, 7), strict=True))]  # type: ignore[arg-type]
    whole = Translator.ensemble([Translator.ensemble(made[:2], ["a", "b"]), made[2]], ["ab", "c"])
    assert whole.max_length == 4
    assert all(model is table for model, table in zip(list[Any](whole.models.models), tables, strict=True))
    assert [tokenizer.width for tokenizer in whole.tokenizers] == [1, 2, 3]  # type: ignore[attr-defined]
    assert Translator.ensemble(made[:1], ["a"]) is made[0]
    with pytest.raises(UserError, match="at least one"):
        Translator.ensemble([], [])


def test_what_does_not_go_together_is_refused() -> None:
    """A text for a list, other numbers of prefixes or targets, a phrase that has no subwords."""
    model = translator([Table(1, len(TARGET), 64)])
    with pytest.raises(TypeError, match="list of sentences"):
        model.translate("ab")
    with pytest.raises(ValueError, match="2 sentences and 1 prefixes"):
        model.translate(["a", "b"], prefixes=["a"])
    with pytest.raises(ValueError, match="2 sources and 1 targets"):
        model.score(["a", "b"], ["a"])
    with pytest.raises(UserError, match=r"search\.require: 'é'"):
        model.translate(["a"], options(require=["ab", "é"]))


def test_the_default_search_is_the_preset_beam() -> None:
    """Without options a translation is that of configs/search/beam.yaml."""
    model = translator([Table(13, len(TARGET), 64)])
    assert model.translate(["ab", "cab"]) == model.translate(["ab", "cab"], search_preset("beam"))


def test_a_translator_is_the_checkpoint_that_is_asked_for(tmp_path: Path) -> None:
    """Best or last, ready to translate without dropout, in the precision, the length and the processes asked for."""
    run = saved_run(tmp_path / "mine", "transformer", "model.dropout=0.5", "model.max_length=50")
    first, last = (run.checkpoints / f"update-000000{i}" for i in (1, 2))
    shutil.copytree(first, last)
    config, weights = last / "config.yaml", last / "model.safetensors"
    config.write_text(config.read_text(encoding="utf-8").replace("max_length: 50", "max_length: 40"), encoding="utf-8")
    save_file({name: -x for name, x in load_file(weights).items()}, weights)
    other = tmp_path / "other" / "checkpoints"
    shutil.copytree(last, other / "update-0000002")
    for folder, best_one in ((run.checkpoints, first.name), (other, last.name)):
        (folder / "index.json").write_text(f'{{"last": "{last.name}", "best": "{best_one}"}}', encoding="utf-8")
    outputs: dict[str, Any] = {"outputs": str(tmp_path), "device": "cpu", "precision": "float32"}
    best = Translator.load("mine", **outputs)
    texts, search = ["Some dogs see cats.", "cats", "the birds and a cow"], options(beam=2, n_best=2, length_extra=4)
    found = best.translate(texts, search)
    assert best.max_length == 50 and best.device == CPU
    assert best.workers is not None and best.workers.count == 1
    assert best.translate(texts, search) == found, "no dropout"
    newest, elsewhere = Translator.load("mine", "last", **outputs), Translator.load("other", **outputs)
    assert newest.max_length == elsewhere.max_length == 40
    assert newest.translate(texts, search) == elsewhere.translate(texts, search) != found
    both = Translator.load(["mine", "other"], **outputs, processes=2)
    assert len(both.models.models) == 2 and both.max_length == 40
    assert both.workers is not None and both.workers.count == 2
    low = Translator.load("mine", **{**outputs, "precision": "bfloat16"})
    assert {p.dtype for p in low.models.models[0].parameters()} == {torch.bfloat16}


def test_numbers_of_a_half_precision_model_are_added_in_single_precision() -> None:
    """Log probabilities, scores and attention weights of a model in bfloat16 are no coarser than its logits."""
    tables = [Table(14, len(TARGET), 64, dtype=torch.bfloat16)]
    model, plain, texts = translator(tables), Plain(tables, [1], 64), ["ab", "cab", "abcabcabcab"]
    search = options(beam=3, n_best=3, length_factor=1.0, length_extra=2)
    found = model.translate(texts, search, attention=True)
    assert_translations(found, plain, texts, plain.translate(texts, [""] * 3, search), attention=None)
    for text, ranked in zip(texts, found, strict=True):
        for one in ranked:
            assert one.weights_LNTS is not None and one.weights_LNTS.dtype == torch.float32
            (scored,) = model.score([text], [one.text])
            ids = Letters().encode_target([one.text])[0]
            each = [float(plain.model(text).log_probabilities(tuple(ids[:t]))[id_]) for t, id_ in enumerate(ids)]
            assert scored.token_log_probabilities == pytest.approx(each, rel=1e-5, abs=3e-5)
    (_, probability), *_ = model.alternatives("ab", "", 3)
    assert probability == pytest.approx(float(np.exp(plain.model("ab").log_probabilities(()).max())), rel=1e-5)
