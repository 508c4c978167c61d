"""The attentional LSTM against Bahdanau et al. 2015, sentence by sentence in float64, and against torch's own LSTMs."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seq2seq.model.factory import build_model
from seq2seq.model.lstm import BidirectionalLayer, Convolutions, Encoder, LSTMState, lstm_cell
from tests.helpers.small_models import (
    JOINT,
    POSITIONS,
    SCORES,
    SEPARATE,
    SOURCES,
    check_gradients,
    check_steps,
    matrix,
    pairs,
    reference_batch,
    replace_dropout,
    small_model,
    tolerance,
    variant,
    weights_of,
)
from tests.reference import lstm as reference
from tests.reference.attention import below
from tests.reference.dropout import ON

# Every score and every position, and between them every other option at least three times.
HEADS, CONVOLUTIONS, STARTS, TIES = (
    (1, 2, 4),
    ((0, 3), (1, 5), (2, 3)),
    ("backward", "pooled"),
    ("output", "all", "none"),
)
VARIANTS: list[dict[str, Any]] = [
    {
        "score": score,
        "position": position,
        "heads": HEADS[(i + j) % 3],
        "convolutions": CONVOLUTIONS[(i + 2 * j) % 3][0],
        "kernel_size": CONVOLUTIONS[(i + 2 * j) % 3][1],
        "decoder_init": STARTS[(i + j) % 2],
        "tie_embeddings": TIES[(2 * i + j) % 3],
        "encoder_layers": (2, 1, 3)[(i + j) % 3],
        "decoder_layers": (2, 3, 1)[(i + 2 * j) % 3],
        "max_length": 4 if j % 2 else 64,
    }
    for i, score in enumerate(SCORES)
    for j, position in enumerate(POSITIONS)
]
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
some_variants = pytest.mark.parametrize("options", VARIANTS[::6], ids=lambda o: "-".join(map(str, o.values())))
RATES: dict[str, dict[str, float | None]] = {
    "each site has its own rate": {
        "dropout": 0.1,
        "embedding_dropout": 0.2,
        "attention_dropout": 0.4,
        "word_dropout": 0.5,
        "layer_dropout": 0.6,
    },
    "an unset rate follows the general one": {"dropout": 0.3},
    "a rate of zero is not an unset rate": {"dropout": 0.4, "embedding_dropout": 0.0},
    "embeddings alone": {"embedding_dropout": 0.3},
    "attention alone": {"attention_dropout": 0.3},
    "words alone": {"word_dropout": 0.3},
    "layers alone": {"layer_dropout": 0.3},
}


@every_variant
def test_features_are_the_papers(options: dict[str, Any]) -> None:
    """Encoder, first state, recurrence, layers above and readout (Bahdanau et al. 2015, §3 and §A)."""
    config = variant("lstm", **options)
    model = small_model(config)
    with torch.inference_mode():
        expected_MD = reference_batch(model, config)
        torch.testing.assert_close(model(pairs()), expected_MD, **tolerance(config))
        torch.testing.assert_close(model(pairs(extra=3), packing=True), expected_MD, **tolerance(config))


@pytest.mark.parametrize("options", VARIANTS[::2], ids=lambda o: "-".join(map(str, o.values())))
def test_steps_of_any_size_continue_the_papers_decoder(options: dict[str, Any]) -> None:
    """Logits and attention weights of one to three tokens at a time, past every learned position."""
    check_steps(variant("lstm", **options))


@some_variants
def test_gradients_are_those_of_the_papers_formulas(options: dict[str, Any]) -> None:
    """Every parameter's, tied tables included; every other time padding is not computed."""
    packing = VARIANTS.index(options) % 12 == 0
    check_gradients(variant("lstm", **options), packing)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
@pytest.mark.parametrize("start,heads,decoder_layers", [("backward", 1, 2), ("pooled", 2, 3)])
def test_dropout_is_at_its_sites_with_its_rates_in_training_only(
    rates: dict[str, float | None], start: str, heads: int, decoder_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On embeddings, between and after layers, before the vocabulary, on attention weights, on words and layers."""
    replace_dropout(monkeypatch)
    config = variant("lstm", decoder_init=start, heads=heads, decoder_layers=decoder_layers, convolutions=1, **rates)
    model = small_model(config)
    with torch.inference_mode():
        torch.testing.assert_close(model(pairs()), reference_batch(model, config), **tolerance(config))
        model.train()
        expected_MD = reference_batch(model, config, ON, config.word_dropout)
        torch.testing.assert_close(model(pairs()), expected_MD, **tolerance(config))
        torch.testing.assert_close(model(pairs(), packing=True), expected_MD, **tolerance(config))
        # A caller may ask for another rate of dropped words.
        for p in (0.0, 0.7) if "word_dropout" in rates else ():
            expected_MD = reference_batch(model, config, ON, p)
            torch.testing.assert_close(model(pairs(), p), expected_MD, **tolerance(config))


@pytest.mark.parametrize("options", VARIANTS[::3], ids=lambda o: "-".join(map(str, o.values())))
def test_annotations_are_the_papers_to_the_last_digit(options: dict[str, Any]) -> None:
    """[→h; ←h] of each real word (Bahdanau et al. 2015, §3.2), and the mask that tells which words are real."""
    options = {**options, "position": "learned"}
    config = variant("lstm", **options)
    model, source_BS = small_model(config), matrix(SOURCES, extra=2)
    mask_BS = source_BS.ne(0)
    states_BSD, returned_BS, _ = model.encoder(model.source_embedding(source_BS), mask_BS)
    assert torch.equal(returned_BS, mask_BS)
    for states_SD, source in zip(states_BSD, SOURCES, strict=True):
        expected_SD = reference.encode(weights_of(model), config, source)
        torch.testing.assert_close(states_SD[: len(source)], expected_SD, rtol=1e-9, atol=1e-9)


def bidirectional(width_in: int, width: int) -> tuple[BidirectionalLayer, nn.LSTM]:
    """The product's layer and torch's own with the same weights."""
    torch.manual_seed(0)
    layer, own = BidirectionalLayer(width_in, width).double(), nn.LSTM(width_in, width, bidirectional=True).double()
    own.batch_first = True
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        for name, parameter in own.named_parameters():
            direction = layer.backwards if name.endswith("_reverse") else layer.forwards
            parameter.copy_(direction.get_parameter(name.removesuffix("_reverse")))
    return layer, own


@pytest.mark.parametrize("lengths", [[1], [4], [1, 1], [5, 3, 1], [2, 6, 4, 1, 6]], ids=str)
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_the_backward_layer_reads_each_sentence_from_its_own_end(lengths: list[int], extra: int) -> None:
    """The same as torch's bidirectional LSTM on each sentence alone, and on packed sequences."""
    layer, own = bidirectional(3, 5)
    mask_BS = torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]
    x_BSD = torch.randn(*mask_BS.shape, 3, dtype=torch.float64)
    found_BSD = layer(x_BSD, mask_BS)
    packed, _ = own(pack_padded_sequence(x_BSD, torch.tensor(lengths), batch_first=True, enforce_sorted=False))
    packed_BSD, _ = pad_packed_sequence(packed, batch_first=True)
    for i, length in enumerate(lengths):
        alone_1SD, _ = own(x_BSD[i : i + 1, :length])
        torch.testing.assert_close(found_BSD[i, :length], alone_1SD[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_BSD[i, :length], packed_BSD[i, :length], rtol=1e-9, atol=1e-9)


def test_the_cell_is_the_one_of_torch() -> None:
    """Input, forget, cell and output gates in torch's order, for values of every size."""
    torch.manual_seed(0)
    own = nn.LSTMCell(3, 4)
    x, h, c = torch.randn(6, 3), torch.randn(6, 4), 3 * torch.randn(6, 4)
    gates = x @ own.weight_ih.T + own.bias_ih + h @ own.weight_hh.T + own.bias_hh
    for found, expected in zip(lstm_cell(gates, c), own(x, (h, c)), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_cell_adds_up_in_float32_whatever_the_model_computes_in() -> None:
    """In bfloat16 a cell of 256 would never grow by one; hidden states are of the model's type."""
    gates = torch.tensor([[20.0, 20.0, 20.0, 20.0]], dtype=torch.bfloat16)
    h, c = lstm_cell(gates, torch.tensor([[256.0]]))
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(c, torch.tensor([[257.0]]))
    gates, c_RD = torch.randn(5, 12).bfloat16(), torch.randn(5, 3)
    for row, c_D, found_h, found_c in zip(gates, c_RD, *lstm_cell(gates, c_RD), strict=True):
        expected_h, expected_c = reference.cell(row.double(), c_D.double())
        torch.testing.assert_close(found_c.double(), expected_c, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_h.double(), expected_h.bfloat16().double(), rtol=0, atol=0.004)
    model = small_model(variant("lstm", decoder_layers=1)).bfloat16()
    state = model.start(matrix(SOURCES), matrix(SOURCES).ne(0))
    for _ in range(2):
        assert isinstance(state, LSTMState)
        hidden_BD, cell_BD = state.layers[0]
        assert (hidden_BD.dtype, cell_BD.dtype) == (torch.bfloat16, torch.float32)
        _, state = model.step(torch.full((len(SOURCES), 1), 5), state)
    assert isinstance(state, LSTMState)
    cell_BD = state.layers[0].cell_RD
    assert not torch.equal(cell_BD, cell_BD.bfloat16().float()), "the cell has been rounded"


@pytest.mark.parametrize("kernel,count", [(1, 1), (3, 1), (3, 3), (5, 2), (7, 1)])
def test_convolutions_see_zeros_beyond_both_ends_of_each_sentence(kernel: int, count: int) -> None:
    """Whatever stands in the padding, in a batch as alone."""
    torch.manual_seed(0)
    module, lengths = Convolutions(3, kernel, count).double(), [5, 1, 2, 4]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    mask_BS = torch.arange(6) < torch.tensor(lengths)[:, None]
    x_BSE = torch.randn(4, 6, 3, dtype=torch.float64)
    found_BSE = module(x_BSE, mask_BS)
    for i, length in enumerate(lengths):
        expected_SE = x_BSE[i, :length]
        for j in range(count):
            weights = below(weights_of(module), f"layers.{j}")
            expected_SE = reference.convolved(weights, expected_SE)
        torch.testing.assert_close(found_BSE[i, :length], expected_SE, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"decoder_init": "pooled", "heads": 4, "convolutions": 2, "kernel_size": 5}], ids=str
)
def test_every_parameter_starts_as_documented(options: dict[str, Any]) -> None:
    """Xavier into the gates, orthogonal between the steps (Saxe et al. 2014), forget gates open, the rest at zero."""
    D, E = 64, 48
    config = variant(
        "lstm",
        width=D,
        embedding=E,
        score="general",
        position="learned",
        decoder_layers=3,
        tie_embeddings="none",
        **options,
    )
    torch.manual_seed(0)
    seen = set()
    for name, parameter in build_model(config, SEPARATE).named_parameters():
        x, kind = parameter.detach(), ""
        if re.search(r"(bias_ih_l0|embedded_gates\.bias)$", name):
            kind = "open forget gate"
            assert torch.equal(x, torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(D)), name
        elif name.endswith(("bias", "bias_hh_l0")):
            kind = "zero"
            assert (x == 0).all(), name
        elif "weight_hh" in name:
            kind = "orthogonal"
            torch.testing.assert_close(x.T @ x, torch.eye(D), rtol=0, atol=1e-5, msg=name)
        elif re.search(r"(embedding|output|table)\.weight$", name) and "attention" not in name:
            kind = "table"
            assert abs(float(x.std()) * E**0.5 - 1) < 0.1 and abs(float(x.mean())) < 0.03, name
        elif name.endswith("pool.query"):
            kind = "query"
            assert x.shape == (1, D) and 0.7 < float(x.std()) * D**0.5 < 1.3, name
        elif "general" in name:
            kind = "identity"
            torch.testing.assert_close(x, torch.eye(x.shape[1]).expand_as(x), msg=name)
        else:
            kind = "Xavier"
            kernel = math.prod(x.shape[2:])
            bound = math.sqrt(6 / (sum(x.shape[:2]) * kernel))
            assert 0.98 * bound < float(x.abs().max()) <= bound, name
            assert abs(float(x.std()) * 3**0.5 / bound - 1) < 0.05, name
        seen.add(kind)
    expected = {"open forget gate", "zero", "orthogonal", "table", "identity", "Xavier"}
    assert seen == (expected | {"query"} if options else expected)


def test_layers_and_projections_are_only_those_of_the_config() -> None:
    """One head attends to the annotations themselves; several have projections (Vaswani et al. 2017, §3.2.2)."""
    D, E, V = 8, 6, 17
    base = V * E + 2 * 4 * D * (E + D + 2) + (D + 1) * D + (E + 1) * 4 * D

    def count(**options: Any) -> int:
        config = variant("lstm", encoder_layers=1, decoder_layers=1, tie_embeddings="all", score="dot", **options)
        return sum(p.numel() for p in build_model(config, JOINT).parameters())

    def readout(context: int) -> int:
        return (D + context + E + 1) * 2 * E

    attention = D * D + 2 * D * D
    one = base + attention + 4 * D * (2 * D + D) + readout(2 * D)
    assert count() == one
    projections = (2 * D + 1) * D + (D + 1) * D
    assert count(heads=2) == base + attention + projections + 4 * D * (D + D) + readout(D)
    assert count(decoder_init="pooled") == one + D * D + 2 * D * D + D + D * D
    assert count(convolutions=2, kernel_size=5) == one + 2 * E * (5 * E + 1)


def test_the_first_state_comes_from_the_first_word_of_the_backward_encoder() -> None:
    """s_0 = tanh(W ←h_1) (Bahdanau et al. 2015, §A.2.2) in every layer, with empty cells."""
    config = replace(variant("lstm", decoder_layers=3), position="none")
    model, source_BS = small_model(config), matrix(SOURCES, extra=1)
    state = model.start(source_BS, source_BS.ne(0))
    assert isinstance(state, LSTMState)
    (hidden_BD, cell_BD), *above = state.layers
    expected_BD = torch.stack(
        [
            reference.first_state(weights_of(model), config, reference.encode(weights_of(model), config, s))
            for s in SOURCES
        ]
    )
    for h, c in ((hidden_BD, cell_BD), *above):
        torch.testing.assert_close(h, expected_BD, rtol=1e-9, atol=1e-9)
        assert (c == 0).all() and c.shape == h.shape
    assert len(above) == 2 and (state.length, state.beam) == (0, 1)


def test_a_source_of_one_word_has_the_same_attention_at_every_step() -> None:
    """All of it on that word, under every score."""
    for score in SCORES:
        model = small_model(variant("lstm", score=score))
        source_BS = matrix([[5]], extra=2)
        decoded = model.decode(torch.tensor([[2, 6, 7]]), model.start(source_BS, source_BS.ne(0)), weights=True)
        expected = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 3, 3)
        torch.testing.assert_close(decoded.weights[0], expected)


def test_an_encoder_without_options_adds_nothing_to_its_embeddings() -> None:
    """The first layer sees embeddings whose entries have size one: rows times √E."""
    config = variant("lstm", encoder_layers=1)
    torch.manual_seed(0)
    encoder = Encoder(config).double().eval()
    seen: list[torch.Tensor] = []
    encoder.layers.get_submodule("0.forwards").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_BSE = torch.randn(2, 3, config.embedding, dtype=torch.float64)
    encoder(x_BSE, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(seen[0], x_BSE * 6**0.5, rtol=1e-9, atol=1e-9)
