"""Laws of a validation: what it measures, with which weights, and that it leaves no trace."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from seq2seq.cli.main import load_config
from seq2seq.config.schema import SearchConfig, TrainConfig
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import encode_corpus
from seq2seq.data.tokenizer import Tokenizer, train_tokenizer
from seq2seq.inference.translator import Translator
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.trainer import Trainer
from seq2seq.training.validation import Validation, select_examples, spread_indices, validate
from seq2seq.utils.images import attention_image
from tests.helpers.configs import FAMILIES
from tests.helpers.trainers import Threads, make_trainer, varied, weights
from tests.reference.losses import smoothed_cross_entropy

SOURCES = ["a b cd", "h", "ab gf e d", "", "c d e", "gh ab", "e", "f a c d b", "b h g e a"]
# Chinese characters: sacreBLEU counts them one by one only where it knows the language.
LETTERS = ["猫狗鸟", "鱼马牛羊虎", "鸟一二三四五", "狗六七八九十", "虎猫", "羊鱼牛", "马", "一", "二"]


@lru_cache
def tokenizer() -> Tokenizer:
    settings = ["tokenizer=char", "tokenizer.joint=false", "model.tie_embeddings=output"]
    return train_tokenizer(Corpus(SOURCES, LETTERS), load_config("train", *settings).tokenizer)[0]


def config_of(family: str, **changes: Any) -> TrainConfig:
    """A search that writes some characters for every sentence, whatever the model has learned."""
    search = {"search__no_repeat_ngram": 1, "search__min_length_factor": 1.0, "search__min_length_extra": 3}
    ours = {
        "training__examples": 4,
        "training__label_smoothing": 0.3,
        "data__target": "zh",
        "model__tie_embeddings": "output",
    }
    return varied(family, **{**search, **ours, "model__dropout": 0.5, **changes})


def shaken(model: Seq2Seq, seed: int) -> dict[str, Tensor]:
    """Weights far from the model's own, but not so far that a word is impossible."""
    scale = 0.4 if any("forwards" in name for name, _ in model.named_parameters()) else 0.7
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + scale * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()
    }


def set_weights(model: Seq2Seq, values: dict[str, Tensor]) -> Seq2Seq:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    return model


def alone(model: Seq2Seq, config: TrainConfig, source: str) -> str:
    """The translation of a sentence by itself."""
    translator = Translator(model, tokenizer(), torch.device("cpu"), config.model.max_length)
    return translator.translate([source], config.search)[0][0].text


@torch.no_grad()
def loss_by_hand(model: Seq2Seq, corpus: Corpus) -> float:
    """Cross-entropy per target token with the END of each sentence, from sentences one at a time in float64."""
    exact, total, tokens = copy.deepcopy(model).double().eval(), 0.0, 0
    encoded = encode_corpus(corpus, tokenizer())
    for i in range(len(corpus)):
        batch = encoded.batch(np.array([i]))
        logits = exact.logits(exact(batch))
        total += float(smoothed_cross_entropy(logits, batch.target_out_BT[0], 0.0))
        tokens += len(encoded.target[i])
    return total / tokens


def near(hypotheses: list[str]) -> list[str]:
    """References that are a little like the translations, each in its own way."""
    return [text[: -1 - i % 2] + LETTERS[i][:1] + text[:i] for i, text in enumerate(hypotheses)]


def trainer_of(config: TrainConfig, folder: Path, **rest: Any) -> Trainer:
    encoded = encode_corpus(Corpus(SOURCES, LETTERS), tokenizer())
    return make_trainer(config, folder, tokenizer=tokenizer(), encoded=encoded, **rest)


def validating(made: Trainer, corpus: Corpus) -> Trainer:
    """The trainer with the real validation, as the program gives it."""
    encoded = encode_corpus(corpus, tokenizer())
    made.validate_model = lambda model: validate(model, made.state, corpus, encoded)
    return made


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("average", ["none", "ema", "schedule_free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_validation_is_the_plain_loss_and_sacrebleus_scores(family: str, average: str, tmp_path: Path) -> None:
    """Per real target token, without smoothing or dropout, of the model that translates, in the corpus's order."""
    named = {"optimizer__name": "schedule_free", "optimizer__lr": 0.3} if average == "schedule_free" else {}
    config = config_of(family, training__average="none" if named else average, **named)
    made = trainer_of(config, tmp_path)
    model, state = made.state.model, made.state
    set_weights(model, shaken(model, 1))
    if named:
        for rank_batches, _ in zip(iter(state.batches), range(3), strict=False):
            made.update(rank_batches)
    if average == "ema":
        assert state.average is not None
        state.average.load(shaken(model, 2))
    live = weights(model)
    translating = copy.deepcopy(model).eval()
    if state.average:
        set_weights(translating, state.average.weights())
        assert any(not torch.equal(p, live[name]) for name, p in translating.named_parameters())
    hypotheses = [alone(translating, config, source) for source in SOURCES]
    assert len(set(hypotheses)) > 4 and not hypotheses[3], "the sentences differ"
    corpus = Corpus(SOURCES, near(hypotheses))
    model.train()
    validating(made, corpus).validate()
    [(update, scores, shown, pictures, _)] = made.logger.validations  # type: ignore[attr-defined]
    assert update == state.progress.update
    assert scores["loss"] == pytest.approx(loss_by_hand(translating, corpus), rel=1e-5)
    bleu = sacrebleu.corpus_bleu(hypotheses, [corpus.target], tokenize="zh", force=True).score
    assert 5 < bleu < 95 and abs(bleu - sacrebleu.corpus_bleu(hypotheses, [corpus.target], force=True).score) > 1
    assert scores["bleu"] == pytest.approx(bleu, abs=1e-9)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [corpus.target]).score, abs=1e-9)
    assert shown == [(SOURCES[i], corpus.target[i], hypotheses[i]) for i in (1, 3, 5, 7)]
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters()), "the live weights are back"
    saved = made.checkpoints.run.checkpoint("best")
    files = {"model": live, **({"averaged": weights(translating)} if state.average else {})}
    assert {path.stem for path in saved.glob("*.safetensors")} == files.keys()
    for file, expected_weights in files.items():
        stored = load_file(saved / f"{file}.safetensors")
        assert all(torch.equal(p, expected_weights[name]) for name, p in stored.items()), file
    assert list(pictures) == ["attention/1", "attention/3", "attention/4"], "an empty sentence has no picture"
    translator = Translator(translating, tokenizer(), torch.device("cpu"), config.model.max_length)
    for name, i in zip(pictures, (1, 5, 7), strict=True):
        best = translator.translate([SOURCES[i]], config.search, attention=True)[0][0]
        assert best.weights_LNTS is not None
        mean_TS = best.weights_LNTS.mean((0, 1))
        expected = attention_image(mean_TS, best.source_pieces, [*best.pieces, "</s>"])
        assert np.array_equal(np.asarray(pictures[name]), np.asarray(expected))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_a_validation_does_not_depend_on_its_batches(budget: int, tmp_path: Path) -> None:
    """A batch of one sentence, of a few, or of all."""
    corpus = Corpus(SOURCES, LETTERS)
    made = trainer_of(config_of("lstm", training__tokens=budget), tmp_path)
    validating(made, corpus).validate()
    [(_, scores, *_)] = made.logger.validations  # type: ignore[attr-defined]
    assert scores["loss"] == pytest.approx(loss_by_hand(made.state.model, corpus), rel=1e-5)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_validation_does_not_disturb_training(precision: torch.dtype, tmp_path: Path) -> None:
    """In the precision of training; the next update has dropout again, and the same weights and random numbers."""
    after = []
    for validated in (False, True):
        config = config_of("transformer", training__average="ema")
        made = trainer_of(config, tmp_path / str(validated), precision=precision)
        updates = iter(made.state.batches)
        seen: list[tuple[torch.dtype, bool]] = []
        corpus = Corpus(SOURCES, LETTERS)
        encoded = encode_corpus(corpus, tokenizer())

        def check(
            model: Seq2Seq,
            made: Trainer = made,
            seen: list[Any] = seen,
            corpus: Corpus = corpus,
            encoded: Any = encoded,
        ) -> Validation:
            seen.append((next(model.parameters()).dtype, any(part.training for part in model.modules())))
            return validate(model, made.state, corpus, encoded)

        made.validate_model = check
        stats = [made.update(next(updates))]
        if validated:
            made.validate()
            assert seen == [(precision, False)]
        stats += [made.update(next(updates)) for _ in range(2)]
        assert all(part.training for part in made.working.model.modules())
        after.append((stats, weights(made.state.model)))
    assert after[0][0] == after[1][0]
    assert all(torch.equal(p, after[1][1][name]) for name, p in after[0][1].items())


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("size", [2, 3])
def test_a_validation_divided_among_processes_equals_that_of_one(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process gets the same loss, scores and examples; the first one alone draws pictures."""
    corpus, config = Corpus(SOURCES, LETTERS), config_of("lstm")
    encoded = encode_corpus(corpus, tokenizer())
    made = [trainer_of(config, tmp_path) for _ in range(size + 1)]
    values = shaken(made[0].state.model, 1)
    for one in made:
        set_weights(one.state.model, values).eval()
    hypotheses = [alone(made[0].state.model, config, source) for source in SOURCES]
    corpus = Corpus(SOURCES, near(hypotheses))
    encoded = encode_corpus(corpus, tokenizer())
    expected = validate(made[size].state.model, made[size].state, corpus, encoded)

    def work(process_group: Any) -> Validation:
        state = made[process_group.rank].state
        state.process_group = process_group
        return validate(state.model, state, corpus, encoded)

    for rank, found in enumerate(Threads(size, monkeypatch).run(work)):
        assert found.scores == pytest.approx(expected.scores, rel=1e-6)
        assert found.examples == expected.examples
        assert list(found.images) == (list(expected.images) if rank == 0 else [])


@settings(max_examples=30, deadline=None, derandomize=True)
@over(pairs=st.integers(1, 40), count=st.integers(0, 50))
def test_examples_come_from_all_over_the_corpus(pairs: int, count: int) -> None:
    """One from the middle of each of `count` equal parts; all sentences where more are asked for."""
    corpus = Corpus([f"source {i}" for i in range(pairs)], [f"target {i}" for i in range(pairs)])
    found = spread_indices(corpus, count)
    assert found == sorted(set(found)) and all(0 <= i < pairs for i in found)
    for part in range(count):
        middle = (part + 0.5) * pairs / count
        assert any(abs(i + 0.5 - middle) <= 0.5 for i in found)
    assert len(found) <= count
    shown = select_examples(corpus, [f"output {i}" for i in range(pairs)], count)
    assert shown == [(f"source {i}", f"target {i}", f"output {i}") for i in found]


# ------------------------------------------------------------------------------- what is the best so far


MONITORED = [
    # (score, loss) of each validation, and which is the best after it
    ("bleu", [(1.0, 3.0), (2.0, 4.0), (2.0, 3.5), (2.0, 3.5), (1.0, 0.1)], [1, 2, 3, 3, 3]),
    ("chrf", [(1.0, 3.0), (2.0, 4.0), (2.0, 4.5), (0.5, 0.1), (2.5, 9.0)], [1, 2, 2, 2, 5]),
    ("loss", [(1.0, 3.0), (2.0, 4.0), (9.0, 2.5), (9.0, 2.5), (0.0, 2.0)], [1, 1, 3, 3, 5]),
    ("bleu", [(math.nan, 1.0), (0.0, 3.0), (math.nan, 1.0), (0.0, 2.0), (0.0, 2.0)], [0, 2, 2, 4, 4]),
    ("loss", [(5.0, math.nan), (0.0, 3.0), (0.0, math.nan), (0.0, math.inf), (0.0, 2.9)], [0, 2, 2, 2, 5]),
]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("monitor", "found", "best"), MONITORED)
def test_the_monitored_score_decides_and_then_the_loss(
    monitor: str, found: list[tuple[float, float]], best: list[int], tmp_path: Path
) -> None:
    """A higher score, or a lower loss, is better; an equal one is not, and what is no number never is."""
    other = "chrf" if monitor == "bleu" else "bleu"
    scores = [{"loss": loss, other: 50.0 - i, **({} if monitor == "loss" else {monitor: score})} 
              for i, (score, loss) in enumerate(found)]  # fmt: skip
    made = make_trainer(varied("lstm", training__monitor=monitor), tmp_path, scores)
    for n, expected in enumerate(best, 1):
        made.state.progress.update = n
        made.validate()
        progress = made.state.progress
        assert progress.best_update == expected and progress.without_gain == n - expected
        assert made.checkpoints.run.index().get("best") == (f"update-{expected:07d}" if expected else None)
        note = made.logger.validations[-1][-1]  # type: ignore[attr-defined]
        assert note == ("best so far" if expected == n else f"best: update {expected}")
        if expected:
            score, loss = found[expected - 1]
            assert progress.best_score == (-loss if monitor == "loss" else score) and progress.best_loss == loss


@pytest.mark.usefixtures("fast")
def test_a_validation_reports_all_its_scores_and_how_long_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_trainer("lstm", tmp_path)
    seconds = iter([100.0, 107.5])
    picture, lines = {"attention/1": object()}, [("a", "b", "c")]
    scores = {"loss": 2.0, "bleu": 3.0, "chrf": 4.0}
    made.validate_model = lambda _: Validation(scores, lines, picture)
    made.state.progress.update = 1234
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    made.validate()
    monkeypatch.undo()
    assert made.logger.validations == [  # type: ignore[attr-defined]
        (1234, {**scores, "seconds": 7.5}, lines, picture, "best so far")
    ]


@pytest.mark.usefixtures("fast")
def test_no_validation_records_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for its scores nor for its pictures: a recording that fails could spoil the memory of training."""
    searches: list[SearchConfig] = []
    translate = Translator.translate

    def noted(self: Translator, sentences: list[str], search: SearchConfig, **options: Any) -> Any:
        searches.append(search)
        return translate(self, sentences, search, **options)

    monkeypatch.setattr(Translator, "translate", noted)
    made = trainer_of(config_of("transformer", search__graphs=True), tmp_path)
    validating(made, Corpus(SOURCES, LETTERS)).validate()
    assert len(searches) == 2
    assert all(search == replace(made.state.config.search, graphs=False) for search in searches)


@pytest.mark.usefixtures("fast")
def test_a_run_of_one_sentence_validates(tmp_path: Path) -> None:
    corpus = Corpus(["a"], ["猫"])
    made = trainer_of(config_of("transformer", training__examples=0), tmp_path)
    validating(made, corpus).validate()
    [(_, scores, shown, pictures, _)] = made.logger.validations  # type: ignore[attr-defined]
    assert scores["loss"] == pytest.approx(loss_by_hand(made.state.model, corpus), rel=1e-5)
    assert shown == [] and pictures == {}
