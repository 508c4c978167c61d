"""Inference in int8: compiled products are the plain ones, no row depends on another, and little is lost."""

from __future__ import annotations

import copy
import ctypes
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, Vocabulary
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.native_search import plain_search
from seq2seq.decoding.scoring import NO_ID, DecodingTask, Hypothesis, Specials
from seq2seq.model import native
from seq2seq.model.int8 import Int8Decoder, Int8Encoder, Int8Linear, Int8Output, Int8State, quantize
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
    *([f"model.width={2 * head}"] for head in (32, 64, 128)),  # of two heads
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


class Searched:
    """A model, the sources of many sentences, and how long each translation may be."""

    def __init__(self, model: Seq2Seq, vocabulary: int, listed: bool = False) -> None:
        self.model, self.specials = model, Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN))
        self.vocabulary, self.listed = vocabulary, listed
        draw = random.Random(1)
        self.sentences = random_sentences([draw.randint(1, 9) for _ in range(70)], vocabulary=vocabulary)
        self.longest = [draw.randint(1, 12) for _ in self.sentences]

    def find(self, config: SearchConfig, whole: bool = True, order: Sequence[int] | None = None) -> list[Any]:
        """Search in one call or step by step; return what is found in each sentence, in this order."""
        order = range(len(self.sentences)) if order is None else order
        zeros_B = torch.zeros(len(order), dtype=torch.int64)
        longest_B = torch.tensor([self.longest[i] for i in order])
        shortlist_BU = torch.stack([self.words(i) for i in order]) if self.listed else None
        task = DecodingTask(longest_B, None, zeros_B, [*order], shortlist_BU=shortlist_BU)
        with torch.inference_mode():
            state = self.model.start(*padded([self.sentences[i] for i in order]))
            if whole:
                return plain_search(self.model, cast(Int8State, state), task, config, self.specials)
            return beam_search(self.model.step, [(state, task)], config, self.specials, library=compiled())

    def words(self, i: int) -> Tensor:
        """All special ids and about half of the others, padded."""
        drawn = random.Random(i).sample(range(END + 1, self.vocabulary), self.vocabulary // 2 - i % 3)
        return F.pad(torch.tensor([*range(END + 1), *sorted(drawn)]), (0, 64 - len(drawn) - END - 1), value=NO_ID)


PLAIN = [
    ("greedy", {}),
    ("greedy", {"length_penalty": 2.0}),
    ("beam", {"beam": 2, "n_best": 2}),
    ("beam", {"n_best": 3, "length_normalization": "average", "length_penalty": 1}),
    ("beam", {"select_by": "chrf", "length_penalty": 0.0}),
]


@every_level
@pytest.mark.parametrize("preset,changes", PLAIN)
@pytest.mark.parametrize("vocabulary", [10, 64, 150])
def test_a_search_in_one_call_is_the_search_in_steps(
    level: str, preset: str, changes: dict[str, Any], vocabulary: int
) -> None:
    """For every level of instructions, also where translations are as long as may be, and greedily with equal words."""
    config = replace(search_preset(preset), **changes)
    model = tiny_model("transformer", "model.tie_embeddings=none", vocabulary=Vocabulary(vocabulary, vocabulary, True))
    with torch.no_grad():
        model.output.weight[END] *= 2
        if config.beam == 1 and vocabulary > 56:
            for first in (END + 33, END + 41):  # in the same lane of a vector, and in another one
                model.output.weight[first : first + 8] = model.output.weight[END + 1 : END + 9]
        if config.beam == 1 and vocabulary > 64:
            model.output.weight[64:] *= 20  # far likelier or less likely than what comes before
            model.output.weight[END] *= 20
    quantize(model, compiled(level))
    searched = Searched(model, vocabulary)
    found, expected = searched.find(config), searched.find(config, whole=False)
    lengths = [
        len(one.ids) + 1 - longest for n_best, longest in zip(found, searched.longest, strict=True) for one in n_best
    ]
    assert min(lengths) < 0 and max(lengths) == 0
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.ids for one in ours] == [one.ids for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-6, abs=2e-5)  # the rounding of logits of about 50
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-6, abs=2e-5)
            assert one.token_log_probabilities == pytest.approx(other.token_log_probabilities, abs=2e-5)


@every_level
@pytest.mark.parametrize("preset", ["greedy", "beam"])
def test_a_search_in_one_call_keeps_to_shortlists(level: str, preset: str) -> None:
    model = tiny_model("transformer", "model.tie_embeddings=none", vocabulary=Vocabulary(100, 100, True))
    quantize(model, compiled(level))
    searched = Searched(model, 100, listed=True)
    found, expected = (searched.find(search_preset(preset), whole) for whole in (True, False))
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert [one.ids for one in ours] == [one.ids for one in theirs]
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], rel=1e-5)
        assert {*ours[0].ids} <= {*searched.words(i).tolist()}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_search_in_one_call_does_all_that_a_step_does(options: list[str]) -> None:
    searched = Searched(quantized(*options), vocabulary=40)
    found, expected = (searched.find(search_preset("beam"), whole) for whole in (True, False))
    assert [[one.ids for one in n_best] for n_best in found] == [[one.ids for one in n_best] for n_best in expected]


@pytest.mark.parametrize("preset", ["greedy", "beam"])
def test_a_translation_depends_on_no_other_sentence_and_thread(preset: str) -> None:
    searched, config = Searched(quantized(), vocabulary=40), search_preset(preset)
    together = searched.find(config)
    with threads_used(3):
        assert searched.find(config) == together
    backwards = [*reversed(range(len(together)))]
    assert searched.find(config, order=backwards) == together[::-1]
    assert [searched.find(config, order=[i])[0] for i in range(9)] == together[:9]
    searched.longest = [1] * len(together)
    assert all(searched.find(config)), "also where all end together"


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
