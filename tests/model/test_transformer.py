"""The Transformer against the formulas of its papers, sentence by sentence in float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from seq2seq.model.factory import build_model
from seq2seq.model.transformer import Input
from tests.helpers.small_models import (
    JOINT,
    POSITIONS,
    SCORES,
    SEPARATE,
    check_gradients,
    check_steps,
    pairs,
    reference_batch,
    replace_dropout,
    small_model,
    tolerance,
    variant,
)
from tests.reference.dropout import ON

# Every score and every position, and between them every other option at least three times.
NORMS = [("layer", "pre"), ("layer", "post"), ("rms", "pre"), ("rms", "post")]
ACTIVATIONS, TIES, HEADS, DEPTHS = ("relu", "gelu", "swiglu"), ("all", "output", "none"), (2, 4, 1), (2, 1, 3)
VARIANTS: list[dict[str, Any]] = [
    {
        "score": score,
        "position": position,
        "norm": NORMS[(i + j) % 4][0],
        "norm_position": NORMS[(i + j) % 4][1],
        "activation": ACTIVATIONS[(i + 2 * j) % 3],
        "tie_embeddings": TIES[(2 * i + j + 1) % 3],
        "heads": HEADS[(i + j) % 2 if position == "rotary" else (i + j) % 3],
        "encoder_layers": DEPTHS[(i + 2 * j) % 2],
        "decoder_layers": DEPTHS[(i + j) % 3] if i == j else DEPTHS[(i + j) % 2],
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
        "activation_dropout": 0.3,
        "attention_dropout": 0.4,
        "word_dropout": 0.5,
        "layer_dropout": 0.6,
    },
    "unset rates follow the general one": {"dropout": 0.3},
    "a rate of zero is not an unset rate": {"dropout": 0.4, "embedding_dropout": 0.0, "activation_dropout": 0.0},
    "embeddings alone": {"embedding_dropout": 0.3},
    "activations alone": {"activation_dropout": 0.3},
    "attention alone": {"attention_dropout": 0.3},
    "words alone": {"word_dropout": 0.3},
    "layers alone": {"layer_dropout": 0.3},
}


@every_variant
def test_features_are_the_papers(options: dict[str, Any]) -> None:
    """Encoder and decoder (Vaswani et al. 2017, §3), with and without padding computed."""
    config = variant("transformer", **options)
    model = small_model(config)
    with torch.inference_mode():
        expected_MD = reference_batch(model, config)
        torch.testing.assert_close(model(pairs()), expected_MD, **tolerance(config))
        torch.testing.assert_close(model(pairs(extra=1), packing=True), expected_MD, **tolerance(config))


@pytest.mark.parametrize("options", VARIANTS[::2], ids=lambda o: "-".join(map(str, o.values())))
def test_steps_of_any_size_continue_the_papers_decoder(options: dict[str, Any]) -> None:
    """Logits and attention weights of one to three tokens at a time, past every learned position."""
    check_steps(variant("transformer", **options))


@some_variants
def test_gradients_are_those_of_the_papers_formulas(options: dict[str, Any]) -> None:
    """Every parameter's, tied tables included; every other time padding is not computed."""
    packing = VARIANTS.index(options) % 12 == 0
    check_gradients(variant("transformer", **options), packing)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES.keys())
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout_is_at_its_sites_with_its_rates_in_training_only(
    rates: dict[str, float | None], norm_position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On embeddings, attention weights, activations, what a layer adds (Vaswani et al. 2017, §5.4), words, layers."""
    replace_dropout(monkeypatch)
    config = variant("transformer", norm_position=norm_position, activation="swiglu", **rates)
    model = small_model(config)
    with torch.inference_mode():
        torch.testing.assert_close(model(pairs()), reference_batch(model, config), **tolerance(config))
        model.train()
        expected_MD = reference_batch(model, config, ON, config.word_dropout)
        torch.testing.assert_close(model(pairs()), expected_MD, **tolerance(config))
        if not config.layer_dropout:
            torch.testing.assert_close(model(pairs(), packing=True), expected_MD, **tolerance(config))
        # A caller may ask for another rate of dropped words.
        for p in (0.0, 0.7) if "word_dropout" in rates else ():
            expected_MD = reference_batch(model, config, ON, p)
            torch.testing.assert_close(model(pairs(), p), expected_MD, **tolerance(config))


def test_every_parameter_starts_as_documented() -> None:
    """Xavier matrices (Glorot & Bengio 2010, eq. 16), zero biases, gains of one, tables by the inverse root of D."""
    config = variant(
        "transformer",
        score="general",
        heads=4,
        position="learned",
        width=64,
        feed_forward=96,
        max_length=50,
        tie_embeddings="none",
    )
    torch.manual_seed(0)
    for name, learned in build_model(config, SEPARATE).named_parameters():
        parameter = learned.detach()
        if re.search(r"norm\.weight$", name):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif re.search(r"(embedding|output|table)\.weight$", name) and "attention" not in name:
            assert abs(float(parameter.std()) * 64**0.5 - 1) < 0.1 and abs(float(parameter.mean())) < 0.02, name
        elif "general" in name:
            torch.testing.assert_close(parameter, torch.eye(16).expand(4, -1, -1), msg=name)
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * bound < float(parameter.abs().max()) <= bound, name
            assert abs(float(parameter.std()) * 3**0.5 / bound - 1) < 0.05, name


@pytest.mark.parametrize("score", ["additive", "cosine"])
def test_the_parameters_of_a_score_start_as_documented(score: str) -> None:
    """The vector of the additive score is a Xavier matrix over heads; the cosine's gain is ten."""
    config = variant("transformer", score=score, heads=4, width=64)
    torch.manual_seed(0)
    named = dict(build_model(config, SEPARATE).named_parameters())
    if score == "cosine":
        gains = [p for name, p in named.items() if name.endswith("gain_N")]
        assert len(gains) == 6
        for gain_N in gains:
            torch.testing.assert_close(gain_N.exp().data, torch.full((4,), 10.0))
    else:
        vectors = torch.stack([p for name, p in named.items() if name.endswith("v_NH")])
        bound = math.sqrt(6 / (4 + 16))
        assert vectors.shape == (6, 4, 16) and 0.95 * bound < float(vectors.detach().abs().max()) <= bound
        assert all((p == 0).all() for name, p in named.items() if name.endswith("bias"))


def test_only_pre_norm_ends_with_a_norm() -> None:
    """Post-norm has normalised already: its models have one norm less on each side."""

    def norms(**options: Any) -> int:
        model = build_model(variant("transformer", **options), SEPARATE)
        return sum(isinstance(part, (nn.LayerNorm, nn.RMSNorm)) for part in model.modules())

    assert norms(norm_position="pre") == norms(norm_position="pre", norm="rms") == 2 * 2 + 3 * 2 + 2
    assert norms(norm_position="post") == norms(norm_position="post", norm="rms") == 2 * 2 + 3 * 2


@pytest.mark.parametrize("activation,norm", [("relu", "layer"), ("gelu", "rms"), ("swiglu", "layer")])
def test_parameters_are_only_those_of_the_formulas(activation: str, norm: str) -> None:
    """Every linear map but those of queries and keys has a bias, every norm of a kind its gain and bias."""
    D, F, V = 8, 12, 17
    attention = 2 * D * D + 2 * (D + 1) * D
    feed_forward = (D + 1) * (2 * F if activation == "swiglu" else F) + (F + 1) * D
    one_norm = 2 * D if norm == "layer" else D
    layers = 2 * (attention + feed_forward + 2 * one_norm) + 2 * (2 * attention + feed_forward + 3 * one_norm)
    model = build_model(variant("transformer", activation=activation, norm=norm), JOINT)
    assert sum(parameter.numel() for parameter in model.parameters()) == V * D + layers + 2 * one_norm


def test_inputs_are_scaled_before_positions_are_added() -> None:
    """Embeddings times √D (Vaswani et al. 2017, §3.4) have the size of the sinusoids, which stay what they are."""
    config = variant("transformer", width=16, heads=2)
    made = Input(config).eval()(torch.zeros(1, 1, 16, dtype=torch.float64), start=0)
    torch.testing.assert_close(made[0, 0], torch.tensor([0.0, 1.0] * 8, dtype=torch.float64))
    scaled = Input(variant("transformer", width=16, position="none")).eval()(torch.ones(2, 3, 16))
    torch.testing.assert_close(scaled, torch.full((2, 3, 16), 4.0))
