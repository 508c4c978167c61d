"""Small models in float64 with every parameter drawn, their options, and their references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seq2seq.config.schema import (
    AttentionConfig,
    AttentionScore,
    LSTMConfig,
    ModelConfig,
    PositionKind,
    TransformerConfig,
)
from seq2seq.data.encoding import Batch
from seq2seq.data.tokenizer import BEGIN, PAD, Vocabulary
from seq2seq.model import attention as attention_module
from seq2seq.model import interface as seq2seq_module
from seq2seq.model import layers as layers_module
from seq2seq.model import lstm as lstm_module
from seq2seq.model import transformer as transformer_module
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from tests.helpers.corpora import random_sentences
from tests.reference import dropout, lstm, transformer
from tests.reference.attention import Weights
from tests.reference.dropout import OFF, Sites

FAMILIES = ("transformer", "lstm")
SCORES: tuple[AttentionScore, ...] = get_args(AttentionScore)
POSITIONS: tuple[PositionKind, ...] = get_args(PositionKind)
# No size is another one's, so that a wrong axis or width fails; two heads, so that heads can be mixed up.
TRANSFORMER = TransformerConfig(
    family="transformer",
    name="small",
    width=8,
    feed_forward=12,
    encoder_layers=2,
    decoder_layers=2,
    attention=AttentionConfig("scaled_dot", 2, 0.0),
    position="sinusoidal",
    max_length=64,
    norm="layer",
    norm_position="pre",
    activation="relu",
    dropout=0.0,
    embedding_dropout=None,
    activation_dropout=None,
    word_dropout=0.0,
    layer_dropout=0.0,
    tie_embeddings="all",
)
LSTM = LSTMConfig(
    family="lstm",
    name="small",
    embedding=6,
    width=8,
    encoder_layers=2,
    decoder_layers=2,
    attention=AttentionConfig("additive", 1, 0.0),
    position="none",
    max_length=64,
    convolutions=0,
    kernel_size=3,
    decoder_init="backward",
    dropout=0.0,
    embedding_dropout=None,
    word_dropout=0.0,
    layer_dropout=0.0,
    tie_embeddings="output",
)
SMALL: dict[str, ModelConfig] = {"transformer": TRANSFORMER, "lstm": LSTM}
JOINT, SEPARATE = Vocabulary(17, 17, joint=True), Vocabulary(17, 19, joint=False)
SOURCES = random_sentences([0, 3, 1, 5], seed=3, vocabulary=17)
TARGETS = random_sentences([4, 0, 2, 6], seed=4, vocabulary=17)


def variant(family: str, **options: Any) -> Any:
    """The small config of a family with other options; those of its attention are given by their last names."""
    config = SMALL[family]
    names = {"score": "score", "heads": "heads", "attention_dropout": "dropout"}
    attention = {names[name]: options.pop(name) for name in [*options] if name in names}
    return replace(config, attention=replace(config.attention, **attention), **options)


def small_model(config: ModelConfig, seed: int = 0) -> Seq2Seq:
    """In float64 for sharp comparisons, and with no parameter at the value that it starts from."""
    torch.manual_seed(seed)
    model = build_model(config, JOINT if config.tie_embeddings == "all" else SEPARATE).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters by name; one that has several names is listed under each."""
    return dict(model.named_parameters(remove_duplicate=False))


def reference_of(config: ModelConfig) -> Any:
    return transformer if isinstance(config, TransformerConfig) else lstm


def tolerance(config: ModelConfig) -> dict[str, Any]:
    """Sinusoids, angles and slopes are computed in float32, and so is the cell of the recurrent decoder."""
    exact = config.position in ("none", "learned") and isinstance(config, TransformerConfig)
    return {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-5, "atol": 1e-5}


def reference_features(
    weights: Weights,
    config: ModelConfig,
    source: list[int],
    target: list[int],
    sites: Sites = OFF,
    word_dropout: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Features of one pair, T × D, and the weights over its source, N × T × S for each layer."""
    reference = reference_of(config)
    memory_SD = reference.encode(weights, config, source, sites, word_dropout)
    features_TD, attention_LNTS = reference.decode(weights, config, memory_SD, target, sites, word_dropout)
    return cast(Tensor, features_TD), attention_LNTS


def shifted(target: Sequence[int]) -> list[int]:
    """What a decoder reads while it writes this target."""
    return [BEGIN, *target[:-1]]


def matrix(sentences: Sequence[Sequence[int]], extra: int = 0) -> Tensor:
    """Sentences with PAD behind them."""
    width = max(map(len, sentences)) + extra
    return torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in sentences])


def pairs(extra: int = 0) -> Batch:
    """All small pairs in one batch."""
    return Batch.of(matrix(SOURCES, extra), matrix(TARGETS, extra), torch.arange(len(SOURCES)))


def reference_batch(model: Seq2Seq, config: ModelConfig, sites: Sites = OFF, word_dropout: float = 0.0) -> Tensor:
    """Features of all small pairs, sentence by sentence, M × D."""
    weights = weights_of(model)
    each = (
        reference_features(weights, config, source, shifted(target), sites, word_dropout)[0]
        for source, target in zip(SOURCES, TARGETS, strict=True)
    )
    return torch.cat([*each])


MODULES: tuple[ModuleType, ...] = (
    layers_module,
    attention_module,
    lstm_module,
    transformer_module,
    seq2seq_module,
)


def replace_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces both kinds of dropout by deterministic stand-ins, wherever they are used."""

    def numbers(x: Tensor, p: float, training: bool) -> Tensor:
        return dropout.drop_numbers(x, p) if training and p else x

    def rows(x_RTD: Tensor, p: float, training: bool, *, words: bool) -> Tensor:
        drop = dropout.drop_words if words else dropout.drop_sentences
        return drop(x_RTD, p) if training and p else x_RTD

    for module in MODULES:
        for name, stand_in in (("dropout", numbers), ("drop_rows", rows)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


def small_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A small table of draws for dropout, so that tests are fast and have tensors on both sides of its size."""
    monkeypatch.setattr(layers_module, "WINDOW", 4096)
    layers_module._mask_table.cache_clear()
    yield 4096
    layers_module._mask_table.cache_clear()


def check_steps(config: ModelConfig) -> None:
    """A decoder that reads one to three tokens at a time agrees with the reference on the whole target."""
    model = small_model(config)
    weights = weights_of(model)
    length = max(map(len, TARGETS))
    targets = [shifted([*target, *[5] * (length - len(target))]) for target in TARGETS]
    expected = [reference_features(weights, config, s, t) for s, t in zip(SOURCES, targets, strict=True)]
    target_BT, source_BS = torch.tensor(targets), matrix(SOURCES, extra=1)
    message = "{}, tokens given in steps of {}: {}"
    with torch.inference_mode():
        for sizes in ((length,), (1,) * length, (2, 1, 3, 1)):
            assert sum(sizes) == length
            state, at = model.start(source_BS, source_BS != PAD), 0
            for size in sizes:
                new = slice(at, at + size)
                decoded = model.decode(target_BT[:, new], state, weights=True)
                logits_BTV, after = model.logits(decoded.features_RTD), decoded.state
                if size == 3:
                    logits_BTV, after = model.step(target_BT[:, new], state)
                assert after.length == at + size
                for i, (features_TD, attention_LNTS) in enumerate(expected):
                    logits_TV = features_TD[new] @ weights["output.weight"].T
                    torch.testing.assert_close(
                        logits_BTV[i], logits_TV, **tolerance(config), msg=partial(message.format, "logits", sizes)
                    )
                    assert len(decoded.weights) == len(attention_LNTS)
                    for weights_BNTS, weights_NTS in zip(decoded.weights, attention_LNTS, strict=True):
                        padded_NTS = F.pad(weights_NTS[:, new], (0, source_BS.shape[1] - weights_NTS.shape[2]))
                        torch.testing.assert_close(
                            weights_BNTS[i],
                            padded_NTS,
                            **tolerance(config),
                            msg=partial(message.format, "attention weights", sizes),
                        )
                state, at = after, at + size


def check_gradients(config: ModelConfig, packing: bool = False) -> None:
    """The gradient of each parameter is that of the reference, for a loss that weighs every logit."""
    model = small_model(config)
    weights, parameters = weights_of(model), dict(model.named_parameters())
    expected_MV = reference_batch(model, config) @ weights["output.weight"].T
    weight_MV = torch.arange(expected_MV.numel(), dtype=torch.float64).sin().view_as(expected_MV)
    expected = torch.autograd.grad((expected_MV * weight_MV).sum(), [*parameters.values()])
    found_MV = model.logits(model(pairs(), packing=packing))
    found = torch.autograd.grad((found_MV * weight_MV).sum(), [*parameters.values()])
    for name, a, b in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance(config), msg=partial("{}: {}".format, name))
