"""Inference in int8: compiled products are the plain ones, no row depends on another, and little is lost."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seq2seq.config.loading import search_preset
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN
from seq2seq.decoding.beam import BestWords, beam_search
from seq2seq.decoding.scoring import DecodingTask, Hypothesis, Specials
from seq2seq.model import native
from seq2seq.model.decoder_state import State
from seq2seq.model.int8 import Int8Decoder, Int8Encoder, Int8Linear, Int8Output, quantize
from seq2seq.model.interface import Seq2Seq
from tests.helpers.corpora import padded, random_sentences
from tests.helpers.models import begin, compiled, tiny_model

# Those that this CPU has: a level needs all instructions of the ones after it.
LEVELS = [*native.LEVELS][[*native.LEVELS].index(native.level()) :]
every_level = pytest.mark.parametrize("level", LEVELS)
OPTIONS = [
    [],
    ["model.norm=rms", "model.norm_position=post", "model.activation=swiglu", "model.tie_embeddings=none"],
    ["model.activation=gelu", "model.encoder_layers=1", "model.decoder_layers=3"],
    *([f"model.position={position}"] for position in ("none", "learned", "rotary", "alibi")),
    *([f"model.attention.score={score}"] for score in ("dot", "general")),
]
TARGET = torch.cat((begin(1), torch.tensor(random_sentences([6], seed=9))), 1)
SENTENCES = random_sentences([4, 1, 9, 6])


def quantized(*options: str, family: str = "transformer") -> Seq2Seq:
    model = tiny_model(family, *options)
    quantize(model, compiled())
    return model


@contextmanager
def threads_used(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def logits(model: Seq2Seq, sentences: list[list[int]] = SENTENCES, extra: int = 0) -> Tensor:
    return model.step(TARGET.expand(len(sentences), -1), model.start(*padded(sentences, extra)))[0]


# ------------------------------------------------------------------------------------------- products


@every_level
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "rows,inputs,outputs", [(1, 4, 64), (5, 3, 1), (6, 256, 64), (7, 257, 65), (13, 30, 130), (100, 64, 200)]
)
def test_a_compiled_product_is_the_plain_one(level: str, relu: bool, rows: int, inputs: int, outputs: int) -> None:
    """For sizes around those of blocks and tiles, rows of any size, and a row and an output of zeros."""
    torch.manual_seed(rows)
    x_RI, weight_OI, bias_O = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    x_RI *= 10.0 ** torch.randint(-3, 4, (rows, 1))
    x_RI[rows // 2], weight_OI[outputs // 2] = 0.0, 0.0
    found, expected = (Int8Linear(library, weight_OI, bias_O, relu)(x_RI) for library in (compiled(level), None))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@every_level
@pytest.mark.parametrize("inputs", [3, 32, 257])
@pytest.mark.parametrize("count,threads", [(1, 1), (3, 2)])
def test_a_shortlisted_product_has_the_columns_of_the_whole_one(
    level: str, inputs: int, count: int, threads: int
) -> None:
    """Each sentence has its own columns, and −∞ for padding."""
    torch.manual_seed(inputs)
    weight_VD, x_RTD = torch.randn(130, inputs), torch.randn(20 * count, 2, inputs)
    ids_BU = torch.randint(-1, 130, (20, 9))
    for library in (compiled(level), None):
        output = Int8Output(library, weight_VD, None)
        expected = output(x_RTD).unflatten(0, (20, count)).take_along_dim(ids_BU.clamp(min=0)[:, None, None], -1)
        expected = expected.masked_fill(ids_BU[:, None, None] < 0, float("-inf")).flatten(0, 1)
        with threads_used(threads):
            torch.testing.assert_close(output.shortlisted(x_RTD, ids_BU), expected, rtol=1e-6, atol=0)


@every_level
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_of_a_product_depends_on_no_other(level: str, threads: int) -> None:
    """To the last bit, whatever its tile, its thread and its neighbours."""
    torch.manual_seed(0)
    product, x_RI = Int8Linear(compiled(level), torch.randn(70, 33), torch.randn(70)), torch.randn(110, 33)
    alone = torch.cat([product(row) for row in x_RI.split(1)])
    with threads_used(threads):
        assert torch.equal(product(x_RI), alone)
        assert torch.equal(product(x_RI.flip(0)).flip(0), alone)
        assert torch.equal(product(x_RI.T.contiguous().T), alone), "also from rows that do not lie together"


@every_level
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("outputs", [5, 64, 130, 200])
def test_the_best_word_is_that_of_the_logits(level: str, threads: int, outputs: int) -> None:
    """With its log probability among all words, banned ones included; the first of equal words; alone or together."""
    torch.manual_seed(outputs)
    output, x_R1D = Int8Output(compiled(level), torch.randn(outputs, 33), None), torch.randn(110, 1, 33)
    x_R1D *= 10.0 ** torch.randint(-2, 3, (110, 1, 1))
    x_R1D[7], banned = 0.0, (0, outputs - 1)
    only_R = torch.where(torch.arange(110) % 3 == 0, 3, -1)
    log_RV = output(x_R1D)[:, 0].log_softmax(-1)
    allowed_RV = log_RV.index_fill(1, torch.tensor(banned), float("-inf"))
    chosen_R = torch.where(only_R >= 0, only_R, allowed_RV.argmax(1))
    with threads_used(threads):
        found_R, ids_R = output.best_words(x_R1D, banned, only_R)
        free_R = output.best_words(x_R1D, banned, None)[1]
    assert torch.equal(ids_R, chosen_R) and torch.equal(free_R, allowed_RV.argmax(1))
    torch.testing.assert_close(found_R, log_RV.gather(1, chosen_R[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    alone = [output.best_words(x_R1D[i : i + 1], banned, only_R[i : i + 1])[0] for i in range(110)]
    assert torch.equal(torch.cat(alone), found_R)


def test_a_product_loses_at_most_half_a_unit_of_each_number() -> None:
    """The bound that rounding to one of 255 numbers implies, for rows and outputs of any size."""
    torch.manual_seed(0)
    x_RI, weight_OI = (torch.randn(n, 50) * 10.0 ** torch.randint(-3, 4, (n, 1)) for n in (20, 30))
    unit_R1, unit_O = x_RI.abs().amax(1, keepdim=True) / 127, weight_OI.abs().amax(1) / 127
    bound_RO = 0.51 * (
        unit_R1 * weight_OI.abs().sum(1) + x_RI.abs().sum(1, keepdim=True) * unit_O + 50 * unit_R1 * unit_O
    )
    error_RO = (Int8Linear(compiled(), weight_OI, None)(x_RI) - x_RI @ weight_OI.T).abs()
    assert bool((error_RO <= bound_RO).all())


# ------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_whole_transformer_is_close_to_its_parts_in_plain_torch(options: list[str]) -> None:
    """Both round products to int8; the compiled one also rounds keys and values, to bfloat16."""
    exact, whole = tiny_model("transformer", *options), quantized(*options)
    parts = copy.deepcopy(exact)
    quantize(parts, None)
    assert isinstance(whole.encoder, Int8Encoder) and isinstance(whole.decoder, Int8Decoder)
    assert not any(isinstance(part, nn.Linear) for part in parts.modules())
    found, plain, float32 = logits(whole), logits(parts), logits(exact)
    spread = float(float32.std())
    assert float((found - plain).abs().mean()) < 0.02 * spread
    assert float((found - float32).abs().mean()) < 0.03 * spread
    assert not torch.equal(found, float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_of_a_model_depends_on_no_other(options: list[str]) -> None:
    """To the last bit: alone, in another order, and beside any padding."""
    model = quantized(*options)
    alone = torch.cat([logits(model, [sentence]) for sentence in SENTENCES])
    assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model, SENTENCES[::-1]).flip(0), alone)
    assert torch.equal(logits(model, extra=7), alone)


@pytest.mark.parametrize("kind", ["none", "sinusoidal", "learned"])
@torch.inference_mode()
def test_positions_are_those_of_the_model_at_any_length(kind: str) -> None:
    decoder = quantized(f"model.position={kind}").decoder
    assert isinstance(decoder, Int8Decoder)
    for start in (0, 1, 63, 64, 65, 200):
        expected = decoder.input.position(torch.zeros(1, 1, decoder.width), start)[0, 0]
        assert torch.equal(decoder.position(start), expected)


@pytest.mark.parametrize("score", ["additive", "cosine"])
def test_a_score_that_is_no_product_of_query_and_key_keeps_its_own_attention(score: str) -> None:
    model = quantized(f"model.attention.score={score}")
    assert not isinstance(model.decoder, Int8Decoder) and isinstance(model.output, Int8Linear)
    exact = logits(tiny_model("transformer", f"model.attention.score={score}"))
    assert float((logits(model) - exact).abs().mean()) < 0.03 * float(exact.std())


def test_an_lstm_has_int8_products_too() -> None:
    model, exact = quantized(family="lstm"), logits(tiny_model("lstm"))
    assert not any(isinstance(part, nn.Linear) for part in model.modules())
    assert float((logits(model) - exact).abs().mean()) < 0.03 * float(exact.std())


@torch.inference_mode()
def test_attention_weights_are_those_of_the_model() -> None:
    """Of every layer and head, one for each source word and none for padding."""
    exact, model = tiny_model("transformer"), quantized()
    sources, target = padded(SENTENCES), TARGET.expand(len(SENTENCES), -1)
    expected, found = (m.decode(target, m.start(*sources), weights=True).weights for m in (exact, model))
    assert len(found) == len(expected)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))
        assert float((ours - wanted).abs().max()) < 0.05
        assert not ours[1, :, :, len(SENTENCES[1]) :].any()


# ------------------------------------------------------------------------------------------- search


def test_greedy_search_without_logits_finds_the_same_translations() -> None:
    """At the longest length, beside other lengths, and where a rule needs the logits."""
    model = quantized()

    def found(minimum: Tensor | None, best_words: BestWords | None = None) -> list[Hypothesis]:
        task = DecodingTask(torch.tensor([12, 4, 14, 9]), minimum, torch.zeros(4, dtype=torch.int64), [*range(4)])
        batches, specials = [(model.start(*padded(SENTENCES)), task)], Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN))
        n_best = beam_search(
            model.step, batches, search_preset("greedy"), specials, library=compiled(), best_words=best_words
        )
        return [hypothesis for hypotheses in n_best for hypothesis in hypotheses]

    def counted(tokens_B1: Tensor, *given: Any) -> tuple[Tensor, Tensor, State]:
        calls.append(len(tokens_B1))
        return model.best_words(tokens_B1, *given)

    calls: list[int] = []
    for minimum, used in ((None, True), (torch.full((4,), 4), False)):
        calls.clear()
        fast, plain = found(minimum, counted), found(minimum)
        assert bool(calls) == used
        assert [one.ids for one in fast] == [one.ids for one in plain]
        for one, other in zip(fast, plain, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-5)
            assert one.token_log_probabilities == pytest.approx(other.token_log_probabilities, abs=1e-5)


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_the_compiled_choice_of_words_finds_the_same_translations(search: str) -> None:
    model = quantized()

    def found(library: ctypes.CDLL | None) -> list[Hypothesis]:
        zeros = torch.zeros(4, dtype=torch.int64)
        task = DecodingTask(torch.tensor([12, 4, 14, 9]), zeros, zeros, [*range(4)])
        batches, specials = [(model.start(*padded(SENTENCES)), task)], Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN))
        n_best = beam_search(model.step, batches, search_preset(search), specials, library=library)
        return [hypothesis for hypotheses in n_best for hypothesis in hypotheses]

    compiled_ones, plain = found(compiled()), found(None)
    assert [one.ids for one in compiled_ones] == [one.ids for one in plain]
    assert [one.score for one in compiled_ones] == pytest.approx([one.score for one in plain], rel=1e-5)
