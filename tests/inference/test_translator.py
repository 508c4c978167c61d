"""Laws of the translator: raw text in, raw text out, the same in every batch."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from seq2seq.cli.commands.score import tabbed
from seq2seq.config.loading import build_config, search_preset
from seq2seq.config.paths import choices
from seq2seq.config.schema import SearchConfig
from seq2seq.data.corpus import Corpus
from seq2seq.data.tokenizer import BEGIN, Tokenizer, train_tokenizer
from seq2seq.inference import translator as inference
from seq2seq.inference.checkpoint import write_config, write_weights
from seq2seq.inference.translator import Translation, Translator
from seq2seq.inference.workers import choose_processes
from seq2seq.utils.errors import UserError
from tests.helpers.configs import FAMILIES, tiny_config
from tests.helpers.models import tiny_model
from tests.helpers.program import Program, forks

PAIRS = [
    ("A dog runs across the street.", "Ein Hund rennt über die Straße."),
    ("Two young men are playing football.", "Zwei junge Männer spielen Fußball."),
    ("A woman in a red dress sings.", "Eine Frau in einem roten Kleid singt."),
    ("The old man reads a newspaper.", "Der alte Mann liest eine Zeitung."),
    ("Children are swimming in the lake.", "Kinder schwimmen im See."),
]
SOURCES = [source for source, _ in PAIRS]
COUNT = 80  # of real sentences


def tokenizer(pairs: list[tuple[str, str]], vocabulary: int) -> Tokenizer:
    config = dataclasses.replace(tiny_config("transformer").tokenizer, vocabulary=vocabulary)
    return train_tokenizer(Corpus([s for s, _ in pairs], [t for _, t in pairs]), config)[0]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer(PAIRS, 90)


def translator(family: str, words: Tokenizer, seed: int = 0) -> Translator:
    return Translator(tiny_model(family, vocabulary=words.vocabulary, seed=seed), words, torch.device("cpu"), 64)


def options(**changes: object) -> SearchConfig:
    return dataclasses.replace(search_preset("beam"), **changes)  # type: ignore[arg-type]


def assert_same(found: list[list[Translation]], expected: list[list[Translation]]) -> None:
    """The same translations, but for ties: float32 sums depend on the shape of a batch, in their last bits."""
    for ours, wanted in zip(found, expected, strict=True):
        for one, other in zip(ours, wanted, strict=True):
            assert one.score == pytest.approx(other.score, abs=2e-5)
        if [one.text for one in ours] != [other.text for other in wanted]:
            scores = {one.pieces: one.score for one in (*ours, *wanted)}
            assert max(scores.values()) - min(scores.values()) < 1e-4 * len(ours), "no tie, but another translation"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam", [1, 4])
def test_real_sentences_in_every_batch(family: str, beam: int, multi30k: Path) -> None:
    """Alone, by sevens and by 32, in order and shuffled: the same translations."""
    rows = [json.loads(line) for line in (multi30k / "test.jsonl").read_text(encoding="utf-8").splitlines()[:COUNT]]
    model = translator(family, tokenizer([(row["en"], row["de"]) for row in rows], 300))
    sentences, search = [row["en"] for row in rows], options(beam=beam, length_factor=1.0, length_extra=1)
    expected = model.translate(sentences, search)
    shuffled = random.Random(0).sample(range(COUNT), COUNT)
    for size in (1, 7, 32):
        order = shuffled if size > 1 else list(range(COUNT))
        found: dict[int, list[Translation]] = {}
        for start in range(0, COUNT, size):
            part = order[start : start + size]
            found |= zip(part, model.translate([sentences[i] for i in part], search), strict=True)
        assert_same([found[i] for i in range(COUNT)], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_is_what_teacher_forcing_gives(family: str, words: Tokenizer) -> None:
    """Of pairs of any length scored together: the model's log-softmax at each piece and the end, pair by pair."""
    model = translator(family, words)
    scored = model.score(SOURCES, [target for _, target in PAIRS], attention=True)
    for (source, target), one in zip(PAIRS, scored, strict=True):
        ids = words.encode_target([target])[0]
        read = torch.tensor(words.encode_source([source]))
        with torch.inference_mode():
            network = model.models.models[0]
            decoded = network.decode(torch.tensor([[BEGIN, *ids[:-1]]]), network.start(read, read > 0), weights=True)
            logs = network.logits(decoded.features_RTD)[0].log_softmax(-1).gather(1, torch.tensor([ids]).T)[:, 0]
        assert one.token_log_probabilities == pytest.approx(logs.tolist(), abs=1e-4)
        assert one.log_probability == pytest.approx(float(logs.sum()), abs=1e-3)
        assert one.score == pytest.approx(one.log_probability / ((5 + len(ids)) / 6), abs=1e-3)
        assert one.weights_LNTS is not None
        torch.testing.assert_close(one.weights_LNTS, torch.cat(decoded.weights))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_translation_carries_its_steps_and_its_attention(family: str, words: Tokenizer) -> None:
    for ranked in translator(family, words).translate(SOURCES, options(beam=3, n_best=3), attention=True):
        for one in ranked:
            assert len(one.token_log_probabilities) == len(one.pieces) + 1
            assert sum(one.token_log_probabilities) == pytest.approx(one.log_probability, abs=1e-3)
            weights_TS = one.attention()
            assert weights_TS.shape == (len(one.pieces) + 1, len(one.source_pieces))
            torch.testing.assert_close(weights_TS.sum(1), torch.ones(len(weights_TS)))
            assert one.weights_LNTS is not None
            torch.testing.assert_close(one.attention(0, 0), one.weights_LNTS[0, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_how_a_translation_begins(family: str, words: Tokenizer) -> None:
    model = translator(family, words)
    prefixes = ["Ein Hund", "", "Eine Frau in einem", "Der", ""]
    found = model.translate(SOURCES, options(n_best=2, beam=3), prefixes=prefixes)
    free = model.translate(SOURCES, options(n_best=2, beam=3))
    for prefix, ranked, unforced in zip(prefixes, found, free, strict=True):
        assert all(one.text.startswith(prefix) for one in ranked)
        if not prefix:
            assert_same([ranked], [unforced])


def test_alternatives_are_the_models_next_probabilities(words: Tokenizer) -> None:
    model = translator("transformer", words)
    (first, probability), *_ = alternatives = model.alternatives(SOURCES[0], "Ein Hund", 5)
    likeliest = [p for _, p in alternatives]
    assert len(alternatives) == 5 and likeliest == sorted(likeliest, reverse=True)
    probabilities = dict(model.alternatives(SOURCES[0], "Ein Hund", 1000))
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    scored = model.score([SOURCES[0]], ["Ein Hund"])[0]
    assert probabilities["</s>"] == pytest.approx(
        torch.tensor(scored.token_log_probabilities[-1]).exp().item(), abs=1e-5
    )
    assert probabilities[first] == probability


def test_minimum_risk_chooses_among_the_candidates(words: Tokenizer) -> None:
    """The translation of least risk is among the candidates, and its score the mean likeness to them."""
    model = translator("transformer", words)
    every = model.translate(SOURCES[:2], options(beam=4, n_best=4))
    chosen = model.translate(SOURCES[:2], options(beam=4, n_best=2, select_by="chrf"))
    for candidates, ranked in zip(every, chosen, strict=True):
        assert {one.text for one in ranked} <= {one.text for one in candidates}
        assert 100 >= ranked[0].score >= ranked[-1].score >= 0


@pytest.mark.slow
def test_threads_share_a_translator(words: Tokenizer) -> None:
    model = translator("transformer", words)
    expected = model.translate(SOURCES, options())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model.translate(SOURCES, options()), range(8)):
            assert_same(found, expected)


@pytest.mark.parametrize("beam", [1, 5])
def test_few_products_take_one_thread(beam: int, words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many take all threads; both leave the number as it was."""
    made, used = translator("transformer", words), set[int]()
    step = made.models.step

    def noted(*given: Any) -> Any:
        used.add(torch.get_num_threads())
        return step(*given)

    monkeypatch.setattr(made.models, "step", noted)
    monkeypatch.setattr(inference, "FEW_PRODUCTS", 3 * beam * made.models.models[0].size)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        few = made.translate(["a b c"] * 3, options(beam=beam))
        assert used == {1} and torch.get_num_threads() == 2
        many = made.translate(["a b c"] * 4, options(beam=beam))
        assert used == {1, 2}
    finally:
        torch.set_num_threads(before)
    assert_same(few, many[:3])


@pytest.mark.slow
@forks
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_divide_the_sentences(family: str, words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same translations in the same order, also when several threads ask, and attention goes without."""
    sentences = [" ".join(SOURCES[i % 5].split()[: i % 7]) for i in range(50)]
    prefixes = ["Ein" if i % 3 else "" for i in range(50)]
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_PER_PART", 60)  # which makes four parts
    model, search = translator(family, words), options(n_best=2, length_extra=2)
    expected = model.translate(sentences, search, prefixes=prefixes)
    model.use_processes(3)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: model.translate(sentences, search, prefixes=prefixes), range(3)):
            assert_same(found, expected)
    assert len(multiprocessing.active_children()) == 3, "they are made once"
    assert model.translate(sentences, search, attention=True)[1][0].attention() is not None
    model.workers.close()  # type: ignore[union-attr]


@pytest.mark.slow
@forks
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_digit_depends_on_the_number_of_processes(
    family: str, precision: torch.dtype, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any search, of scores and of attention; the length of a batch's longest sentence changes its last bits."""
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_OF_TWO_PARTS", 16)
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_PER_PART", 12)
    monkeypatch.setattr("seq2seq.inference.translator.SCORING_TOKENS", 60)
    model, sentences = translator(family, words), [" ".join(SOURCES[i % 5].split()[: i % 7]) for i in range(16)]
    for one in model.models.models:
        one.to(precision)
    measured: list[list[Any]] = []
    for count in (1, 2):
        model.use_processes(count)
        searches = [
            dataclasses.replace(search_preset(name), length_factor=0.5, length_extra=1) for name in choices("search")
        ]
        measured.append([model.translate(sentences, search) for search in searches])
        scored = model.score(sentences, [sentences[-1]] * 16, attention=True)
        measured[-1] += [scored, [one.attention().tolist() for one in scored]]
        assert model.workers is not None and len(model.workers.pipes) == (count if count > 1 else 0)
        model.workers.close()
    assert measured[0] == measured[1]


@pytest.mark.parametrize("phrase", ["Ω", "\u200b", "Hund Ω"])
def test_a_required_phrase_that_no_subwords_spell_is_named(phrase: str, words: Tokenizer) -> None:
    """Such as one of which normalisation leaves nothing."""
    problem = f"search.require: {phrase!r} cannot be written in this model's subwords"
    with pytest.raises(UserError, match=re.escape(problem)):
        translator("transformer", words).translate(SOURCES, options(beam=5, require=["Hund", phrase]))


@pytest.mark.slow
@forks
def test_an_error_in_a_worker_process_is_raised_in_the_parent(words: Tokenizer) -> None:
    model, sentences = translator("transformer", words).use_processes(2), SOURCES * 20
    with pytest.raises(UserError, match=r"search\.require: 'Ω' cannot be written in this model's subwords"):
        model.translate(sentences, options(require=["Ω"]))
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with pytest.raises(UserError, match="a worker process died"):
        model.translate(sentences, options())
    assert len(model.translate(sentences, options())) == len(sentences), "new processes replace them"
    model.workers.close()  # type: ignore[union-attr]


def test_processes_are_for_a_cpu() -> None:
    assert choose_processes("auto", torch.device("cuda")) == choose_processes(1, torch.device("cuda")) == 1
    with pytest.raises(UserError, match="processes: 2 run in parallel only on Linux with device=cpu"):
        choose_processes(2, torch.device("cuda"))


def test_samples_do_not_depend_on_their_neighbours(words: Tokenizer) -> None:
    model = translator("transformer", words)
    search = dataclasses.replace(search_preset("sample"), samples=3, n_best=3)
    together = model.translate(SOURCES, search)
    assert_same([model.translate([source], search)[0] for source in SOURCES], together)
    assert_same(model.translate(SOURCES[::-1], search)[::-1], together)


def save(folder: Path, family: str, words: Tokenizer, seed: int) -> None:
    checkpoint = folder / "checkpoints" / "update-0000001"
    checkpoint.mkdir(parents=True)
    config = tiny_config(family)
    write_config(config, checkpoint / "config.yaml")
    write_weights(
        dict(tiny_model(family, vocabulary=words.vocabulary, seed=seed).named_parameters()),
        checkpoint / "model.safetensors",
    )
    words.save(checkpoint)
    (folder / "checkpoints" / "index.json").write_text('{"last": "update-0000001", "best": "update-0000001"}')


def test_an_ensemble_of_both_families_from_disk(tmp_path: Path, words: Tokenizer) -> None:
    for family in FAMILIES:
        save(tmp_path / family, family, words, seed=1)
    save(tmp_path / "other", "lstm", tokenizer(PAIRS, 80), seed=1)
    settings = {"outputs": str(tmp_path), "device": "cpu", "precision": "float32"}
    one, twice = Translator.load("lstm", **settings), Translator.load(["lstm", "lstm"], **settings)
    assert_same(twice.translate(SOURCES), one.translate(SOURCES))
    both = Translator.load(list(FAMILIES), **settings)
    scored = zip(
        *(t.score([SOURCES[0]], [PAIRS[0][1]]) for t in (both, Translator.load("transformer", **settings), one)),
        strict=True,
    )
    for mixed, *parts in scored:
        for mean, *each in zip(*(x.token_log_probabilities for x in (mixed, *parts)), strict=True):
            assert torch.tensor(mean).exp() == pytest.approx(float(torch.tensor(each).exp().mean()), abs=1e-5)
    with pytest.raises(UserError, match="lstm and other use different target subwords"):
        Translator.load(["lstm", "other"], **settings)


def test_score_command(program: Program, tmp_path: Path, words: Tokenizer) -> None:
    """A line for each pair, from files and from a pipe, and the perplexity of all; what is wrong is named."""
    save(tmp_path / "outputs" / "mine", "lstm", words, seed=1)
    for side, texts in (("en", SOURCES), ("de", [target for _, target in PAIRS])):
        (tmp_path / f"a.{side}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    files = program("score", "run=mine", "source=a.en", "target=a.de", "precision=float32")
    assert files.returncode == 0, files.stderr
    piped = program("score", "run=mine", "precision=float32", input="".join(f"{s}\t{t}\n" for s, t in PAIRS))
    assert piped.stdout == files.stdout
    model = Translator.load("mine", outputs=str(tmp_path / "outputs"), precision="float32")
    scored = model.score(SOURCES, [target for _, target in PAIRS])
    for line, one in zip(files.stdout.splitlines(), scored, strict=True):
        log_probability, tokens, perplexity = line.split("\t")
        assert float(log_probability) == pytest.approx(one.log_probability, abs=1e-3)
        assert int(tokens) == len(one.pieces) + 1
        assert float(perplexity) == pytest.approx(2.718281828 ** (-one.log_probability / int(tokens)), rel=1e-3)
    summary = program("score", "run=mine", "source=a.en", "target=a.de", "summary=true")
    assert summary.stdout.startswith("perplexity ") and summary.stdout.count("\n") == 1 and "5 pairs" in summary.stdout
    short = program("score", "run=mine", "source=a.en", "target=missing.de")
    assert short.returncode == 1 and short.stderr == "error: target: missing.de does not exist\n"


def test_broken_pairs_are_named_by_their_line() -> None:
    assert list(tabbed([b"a\tb\r\n", b"\t\n"])) == [("a", "b"), ("", "")]
    with pytest.raises(UserError, match="line 2: 1 columns"):
        list(tabbed([b"a\tb\n", b"ab\n"]))
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        list(tabbed([b"\xff\tb\n"]))


def test_contradictory_searches_are_refused() -> None:
    given = {**dataclasses.asdict(search_preset("greedy")), "samples": 4, "beam": 2, "temperature": 0.5}
    with pytest.raises(UserError, match="beam: this key applies to beam search, not to samples=4"):
        build_config(SearchConfig, given)
    wrong: dict[str, dict[str, object]] = {
        "temperature: this key applies to sampling only": {"temperature": 0.5},
        "groups: 2 does not divide the beam of 5": {"groups": 2},
        "diversity: 0.5 has no effect with one group": {"diversity": 0.5},
        "select_by: chrf compares candidates": {"beam": 1, "select_by": "chrf"},
        "n_best: 9 exceeds beam=5": {"n_best": 9},
        "min_length_factor: the minimum length exceeds": {"min_length_factor": 3.0},
        "forbid: Hund is also required": {"require": ["Hund"], "forbid": ["Hund"]},
        "require: an entry is empty": {"require": [" "]},
    }
    for message, changes in wrong.items():
        with pytest.raises(UserError, match=message):
            build_config(SearchConfig, {**dataclasses.asdict(search_preset("beam")), **changes})
