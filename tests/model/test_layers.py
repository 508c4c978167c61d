"""The parts that both families share: dropout, packing, norms, residuals, prepared products, tables."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.model import layers
from seq2seq.model.cpu_inference import PreparedLinear, optimize_for_cpu, prepare_products
from seq2seq.model.factory import parameter_table
from seq2seq.model.interface import OutputTable, Seq2Seq
from seq2seq.model.layers import (
    FeedForward,
    Residual,
    build_norm,
    drop_rows,
    dropout,
    embedding,
    initialise,
    value_or,
)
from seq2seq.model.layout import Packed
from tests.helpers.small_models import (
    FAMILIES,
    SEPARATE,
    SOURCES,
    TARGETS,
    matrix,
    pairs,
    reference_features,
    replace_dropout,
    shifted,
    small_model,
    small_window,
    variant,
    weights_of,
)
from tests.reference import transformer as reference
from tests.reference.dropout import OFF, ON, drop_numbers

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    yield from small_window(monkeypatch)


# --------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_zeroes_at_its_rate_and_scales_up_the_rest(
    p: float, compiled: bool, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number is zeroed or divided by 1 − p, and so is its gradient; so does the kernel for other devices."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    torch.manual_seed(0)
    x = (torch.rand(10, 3000, dtype=torch.float64) + 1).requires_grad_()
    y = dropout(x, p, True)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / (1 - p), 0.0))
    assert abs(float(kept.double().mean()) - (1 - p)) < 0.02
    assert all(abs(float(row.double().mean()) - (1 - p)) < 0.06 for row in kept)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept.double() / (1 - p))


@pytest.mark.parametrize("training,p", [(False, 0.5), (True, 0.0), (False, 0.0)])
def test_dropout_is_off_outside_of_training_and_at_a_rate_of_zero(training: bool, p: float) -> None:
    x = torch.randn(3, 4, 5)
    assert dropout(x, p, training) is x
    assert drop_rows(x, p, training, words=True) is x and drop_rows(x, p, training, words=False) is x


@pytest.mark.parametrize("shape", [(0, 3), (1,), (4096,), (4097,), (2, 4096), (3, 5, 7, 11)], ids=str)
def test_dropout_keeps_the_shape_and_the_type_of_any_size(shape: tuple[int, ...], window: int) -> None:
    """Up to a window of draws, and one number beyond it."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = dropout(torch.ones(shape, dtype=dtype), 0.5, True)
        assert (y.shape, y.dtype) == (torch.Size(shape), dtype)
        assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_dropout_draws_separately_for_each_window_and_each_call(window: int) -> None:
    """No part of a large tensor, and no second call, has the mask of another; neighbours are independent."""
    torch.manual_seed(0)
    masks = [dropout(torch.ones(3 * window + 5), 0.5, True).ne(0) for _ in range(8)]
    parts = [part for mask in masks for part in mask.split(window) if len(part) == window]
    assert len({tuple(part.tolist()) for part in parts}) == 24
    for shift in (1, 2, 64):
        same = torch.stack([part[shift:] == part[:-shift] for part in parts]).double().mean()
        assert abs(float(same) - 0.5) < 0.02
    for a, b in itertools.pairwise(masks):
        assert abs(float((a == b).double().mean()) - 0.5) < 0.1


def test_dropout_sees_every_part_of_its_table(window: int) -> None:
    """Windows begin anywhere: over many calls a single number is dropped as often as it should be."""
    torch.manual_seed(0)
    kept = torch.stack([dropout(torch.ones(2), 0.3, True) for _ in range(2000)]).ne(0).double()
    assert (kept.mean(0) - 0.7).abs().max() < 0.05
    assert abs(float((kept[:, 0] * kept[:, 1]).mean()) - 0.49) < 0.05


def test_masks_follow_from_the_seed_alone(window: int) -> None:
    """Whatever was drawn before the table was made, in whichever mode, and for whichever rates and types."""

    def masks() -> list[Tensor]:
        torch.manual_seed(1)
        return [
            dropout(torch.ones(9, dtype=t), p, True) for p in (0.2, 0.6, 0.2) for t in (torch.float32, torch.float64)
        ]

    torch.manual_seed(5)
    first = masks()
    layers._mask_table.cache_clear()
    with torch.inference_mode():
        second = masks()
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b.clone(), rtol=0, atol=0)
    x = torch.ones(9, requires_grad=True)
    dropout(x, 0.2, True).square().sum().backward()  # a table that was made in inference mode serves training too
    assert x.grad is not None


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("p", [0.2, 0.7])
def test_whole_words_or_whole_sentences_are_dropped(words: bool, p: float) -> None:
    """One draw for each, with the mean kept (word dropout; stochastic depth, Huang et al. 2016, §3)."""
    torch.manual_seed(0)
    x_RTD = (torch.rand(300, 12, 3, dtype=torch.float64) + 1).requires_grad_()
    y_RTD = drop_rows(x_RTD, p, True, words=words)
    kept_RTD = y_RTD != 0
    torch.testing.assert_close(y_RTD, torch.where(kept_RTD, x_RTD / (1 - p), 0.0))
    assert (kept_RTD == kept_RTD[..., :1]).all()
    assert abs(float(kept_RTD.double().mean()) - (1 - p)) < (0.03 if words else 0.08)
    alike = (kept_RTD[:, :, 0] == kept_RTD[:, :1, 0]).all(1)
    assert not alike.all() if words else alike.all()
    (gradient,) = torch.autograd.grad(y_RTD.sum(), x_RTD)
    torch.testing.assert_close(gradient, kept_RTD.double() / (1 - p))
    assert drop_rows(x_RTD.bfloat16(), p, True, words=words).dtype == torch.bfloat16


def test_word_dropout_draws_for_each_sentence_separately() -> None:
    torch.manual_seed(0)
    kept_RT = drop_rows(torch.ones(40, 30, 2), 0.5, True, words=True)[..., 0]
    assert len({tuple(row.tolist()) for row in kept_RT}) == 40
    assert len({tuple(column.tolist()) for column in kept_RT.T}) == 30


@pytest.mark.parametrize("own,otherwise,rate", [(None, 0.3, 0.3), (0.0, 0.3, 0.0), (0.1, 0.3, 0.1), (None, 0.0, 0.0)])
def test_a_rate_of_its_own_counts_even_when_it_is_zero(own: float | None, otherwise: float, rate: float) -> None:
    assert value_or(own, otherwise) == rate


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_in_training_differ_and_start_from_the_seed(family: str, window: int) -> None:
    """Every site draws for itself: no rate alone leaves two passes equal."""
    for name in ("dropout", "embedding_dropout", "attention_dropout", "word_dropout", "layer_dropout"):
        model = small_model(variant(family, **{name: 0.5})).train()
        torch.manual_seed(0)
        first, second = model(pairs()), model(pairs())
        torch.manual_seed(0)
        torch.testing.assert_close(model(pairs()), first, rtol=0, atol=0)
        assert not torch.allclose(first, second), name


# --------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("lengths", [[1], [3], [2, 4, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("extra", [0, 2])
def test_packing_takes_real_tokens_row_by_row_and_back(lengths: list[int], extra: int) -> None:
    """Forward and backward: padding gets zeros, and no gradient."""
    width = max(lengths) + extra
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    packing = Packed(mask.flatten().nonzero().squeeze(1), len(lengths), width)
    x_RTD = torch.randn(len(lengths), width, 3, dtype=torch.float64, requires_grad=True)
    expected_MD = torch.cat([row[:length] for row, length in zip(x_RTD, lengths, strict=True)])
    torch.testing.assert_close(packing.pack(x_RTD), expected_MD, rtol=0, atol=0)
    torch.testing.assert_close(packing.unpack(expected_MD), x_RTD * mask.unsqueeze(-1), rtol=0, atol=0)
    assert torch.autograd.gradcheck(packing.pack, x_RTD)
    assert torch.autograd.gradcheck(packing.unpack, expected_MD.detach().requires_grad_())
    weight_MD = torch.randn_like(expected_MD)
    (found,) = torch.autograd.grad((packing.pack(x_RTD) * weight_MD).sum(), x_RTD)
    torch.testing.assert_close(found, packing.unpack(weight_MD), rtol=0, atol=0)


# --------------------------------------------------------------------------- norms, residuals, feed-forward


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_norms_are_their_formulas(kind: str, size: float) -> None:
    """Small inputs show the constant 10⁻⁵ under the root."""
    torch.manual_seed(0)
    module = build_norm(kind, 6).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x_TD = size * torch.randn(4, 6, dtype=torch.float64) + size
    torch.testing.assert_close(module(x_TD), reference.norm(dict(module.named_parameters()), kind, x_TD), **CLOSE)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("training", [False, True])
def test_a_residual_normalises_before_or_after(
    position: str, kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x + layer(norm(x)) or norm(x + layer(x)), with what the layer adds dropped (Vaswani et al. 2017, §5.4)."""
    replace_dropout(monkeypatch)
    torch.manual_seed(0)
    module = Residual(6, kind, position, 0.3, 0.2).double().train(training)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x_RTD = torch.randn(2, 3, 6, dtype=torch.float64)
    found = module.add_output(x_RTD, module.prepare_input(x_RTD).sin())
    config = variant("transformer", norm=kind, norm_position=position, dropout=0.3, layer_dropout=0.2)
    weights = weights_of(module)
    for x_TD, y_TD in zip(x_RTD, found, strict=True):
        expected = reference.sublayer(weights, config, x_TD, torch.sin, ON if training else OFF)
        torch.testing.assert_close(y_TD, expected, **CLOSE)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("prepared", [False, True])
def test_feed_forward_is_its_formula_before_and_after_it_is_prepared(activation: str, prepared: bool) -> None:
    """Relu fused into the product, biases included; the other activations stay where they are."""
    torch.manual_seed(0)
    module, x_RTD = FeedForward(6, 10, activation, 0.0), torch.randn(2, 3, 6)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    weights = {name: parameter.double() for name, parameter in module.named_parameters()}
    config = variant("transformer", activation=activation, feed_forward=10)
    expected = reference.feed_forward(weights, config, x_RTD.double(), OFF).float()
    if prepared and not PreparedLinear.is_supported(module.outer.weight):
        pytest.skip("this torch has no oneDNN")
    with torch.inference_mode():
        if prepared:
            prepare_products(module)
            assert not any(isinstance(part, (nn.Linear, nn.ReLU)) for part in module.modules())
        torch.testing.assert_close(module(x_RTD), expected, rtol=1e-4, atol=1e-4)


def test_dropout_in_a_feed_forward_falls_on_its_hidden_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_dropout(monkeypatch)
    torch.manual_seed(0)
    module, x_TD = FeedForward(6, 10, "relu", 0.4).double().train(), torch.randn(3, 6, dtype=torch.float64)
    expected = module.outer(drop_numbers(F.relu(module.inner(x_TD)), 0.4))
    torch.testing.assert_close(module(x_TD), expected, **CLOSE)


def test_matrices_start_by_xavier_and_biases_at_zero_while_gains_stay() -> None:
    """Glorot & Bengio 2010, eq. 16, for linear maps, convolutions and plain matrices; nothing else is touched."""
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {
            "linear": nn.Linear(50, 70),
            "convolution": nn.Conv1d(20, 30, 5),
            "norm": nn.LayerNorm(9),
            "rms": nn.RMSNorm(9),
        }
    )
    module["linear"].register_parameter("matrix_AB", nn.Parameter(torch.full((40, 60), 9.0)))
    nn.init.constant_(module.get_parameter("norm.bias"), 3.0)
    initialise(module)
    fans = {"linear.weight": 120, "convolution.weight": 250, "linear.matrix_AB": 100}
    for name, parameter in module.named_parameters():
        x = parameter.detach()
        if name in fans:
            bound = math.sqrt(6 / fans[name])
            assert 0.98 * bound < float(x.abs().max()) <= bound, name
            assert abs(float(x.std()) * 3**0.5 / bound - 1) < 0.06 and abs(float(x.mean())) < 0.02, name
        else:
            value = {"linear.bias": 0.0, "convolution.bias": 0.0, "norm.bias": 3.0}.get(name, 1.0)
            assert (x == value).all(), name


def test_rows_of_a_table_have_length_one() -> None:
    torch.manual_seed(0)
    for width in (16, 256):
        lengths = embedding(400, width).weight.detach().norm(dim=1)
        assert abs(float(lengths.mean()) - 1) < 0.05 and len(lengths) == 400


# --------------------------------------------------------------------------------- prepared products


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("then", ["none", "relu"])
@pytest.mark.parametrize("shape", [(1, 6), (3, 1, 6), (2, 5, 6)], ids=str)
def test_a_prepared_product_is_the_plain_one(bias: bool, then: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 9, bias=bias), torch.randn(shape)
    if not PreparedLinear.is_supported(linear.weight):
        pytest.skip("this torch has no oneDNN")
    with torch.inference_mode():
        expected = linear(x).relu() if then == "relu" else linear(x)
        prepared = PreparedLinear(linear.weight, linear.bias, then)
        torch.testing.assert_close(prepared(x), expected)
        plain = PreparedLinear(linear.weight, linear.bias)
        torch.testing.assert_close(plain(x), linear(x))


def test_products_are_prepared_only_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that has it, and in bfloat16 only where it supports that; otherwise a model stays as it is."""
    supported = [True]
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported[0], raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    weight = torch.randn(3, 4)
    assert PreparedLinear.is_supported(weight) and PreparedLinear.is_supported(weight.bfloat16())
    assert not PreparedLinear.is_supported(weight.to("meta"))
    supported[0] = False
    assert PreparedLinear.is_supported(weight) and not PreparedLinear.is_supported(weight.bfloat16())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not PreparedLinear.is_supported(weight)
    model = small_model(variant("transformer")).float()
    before = [*model.modules()]
    assert optimize_for_cpu(model) is model and [*model.modules()] == before


@pytest.mark.parametrize(
    "family,options",
    [
        ("transformer", {"activation": "relu", "tie_embeddings": "none"}),
        ("transformer", {"activation": "swiglu", "score": "general", "norm_position": "post"}),
        ("transformer", {"activation": "gelu", "score": "additive", "heads": 4}),
        ("lstm", {"decoder_init": "pooled", "convolutions": 1, "decoder_layers": 3}),
        ("lstm", {"heads": 2, "score": "cosine", "tie_embeddings": "none"}),
    ],
    ids=str,
)
def test_a_prepared_model_is_the_papers(family: str, options: dict[str, Any]) -> None:
    """Every linear map is laid out again, and the logits stay; the plain model is untouched."""
    config = variant(family, **options)
    exact = small_model(config)
    plain = copy.deepcopy(exact).float()
    if not PreparedLinear.is_supported(plain.output.weight):
        pytest.skip("this torch has no oneDNN")
    prepared = optimize_for_cpu(copy.deepcopy(plain))
    assert not any(isinstance(part, (nn.Linear, OutputTable)) for part in prepared.modules())
    laid_out = [part for part in prepared.modules() if isinstance(part, PreparedLinear)]
    assert id(prepared.output) in map(id, laid_out)
    fused = sum(part.activation == "relu" for part in laid_out)
    assert fused == (4 if options.get("activation") == "relu" else 0), "relu is part of the product before it"
    source_BS = matrix(SOURCES)
    target_BT = matrix([shifted(t) for t in TARGETS])
    with torch.inference_mode():
        logits_BTV, _ = prepared.step(target_BT, prepared.start(source_BS, source_BS.ne(0)))
        for i, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
            features_TD, _ = reference_features(weights_of(exact), config, source, shifted(target))
            expected_TV = (features_TD @ exact.output.weight.T).float()
            torch.testing.assert_close(logits_BTV[i, : len(target)], expected_TV, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", ["none", "output", "all"])
def test_the_parameter_table_counts_each_parameter_once(family: str, tie: str) -> None:
    """By part, in order; a shared table is counted where it comes first."""
    model = small_model(variant(family, tie_embeddings=tie))
    width, V, W = model.output.weight.shape[1], 17, 17 if tie == "all" else 19
    sides = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ("encoder", "decoder")]
    expected = [("source embedding", V * width), ("encoder", sides[0])]
    expected += [("target embedding", W * width)] * (tie != "all")
    expected += [("decoder", sides[1])]
    expected += [("output", W * width)] * (tie == "none")
    assert parameter_table(model) == expected
    assert sum(count for _, count in parameter_table(model)) == sum(p.numel() for p in model.parameters())
    shared = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("first_part", "middle", "last")})
    for name in ("middle", "last"):
        shared.get_submodule(name).weight = shared.get_submodule("first_part").weight
    assert parameter_table(cast(Seq2Seq, shared)) == [("first part", 8), ("middle", 2), ("last", 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_have_the_sizes_of_their_vocabularies(family: str) -> None:
    """The source embedding has the source's; the target embedding and the output have the target's."""
    model = small_model(variant(family, tie_embeddings="none"))
    tables = (model.source_embedding, model.target_embedding, model.output)
    assert [table.num_embeddings for table in tables] == [SEPARATE.source, SEPARATE.target, SEPARATE.target]
    assert len({id(table.weight) for table in tables}) == 3
    features = torch.randn(2, 3, model.output.embedding_dim, dtype=torch.float64)
    torch.testing.assert_close(model.logits(features), features @ model.output.weight.T, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", [False, True])
def test_features_are_of_real_targets_only_row_by_row(family: str, packing: bool) -> None:
    """As many as target tokens; those of one sentence follow each other, whatever else is in the batch."""
    model, batch = small_model(variant(family)), pairs(extra=2)
    with torch.inference_mode():
        features_MD = model(batch, packing=packing)
        assert len(features_MD) == sum(map(len, TARGETS)) == batch.target_tokens
        for i, part in enumerate(features_MD.split([*map(len, TARGETS)])):
            source_1S, target_1T = matrix(SOURCES[i : i + 1]), torch.tensor([shifted(TARGETS[i])])
            state = model.start(source_1S, source_1S.ne(0))
            torch.testing.assert_close(part, model.decode(target_1T, state).features_RTD[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_word_dropout_reaches_both_sides(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping every word but none of the other numbers changes what encoder and decoder read."""
    replace_dropout(monkeypatch)
    model = small_model(replace(variant(family), word_dropout=0.5)).train()
    seen = {}
    for side in ("encoder", "decoder"):
        getattr(model, side).register_forward_pre_hook(lambda _, inputs, side=side: seen.update({side: inputs[0]}))
    batch = pairs()
    model(batch)
    for side, ids in (("encoder", batch.source_BS), ("decoder", batch.target_in_BT)):
        table = model.source_embedding if side == "encoder" else model.target_embedding
        torch.testing.assert_close(seen[side], ON.words(table(ids), 0.5), **CLOSE)
