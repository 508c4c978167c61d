"""Laws of what an update minimises: smoothed cross-entropy, R-Drop and SimCut, against their formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from seq2seq.config.schema import TrainingConfig
from seq2seq.data.encoding import Batch
from seq2seq.data.tokenizer import PAD, Vocabulary
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.training import loss as loss_module
from seq2seq.training.loss import divergence, loss_sum, training_loss
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import tiny_batch
from tests.helpers.trainers import base_config, varied
from tests.reference.losses import kl, r_drop, simcut, smoothed_cross_entropy

CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}  # sums of losses are float32


class Given(nn.Module):
    """A model whose features are given, one table of them for each pass, and which notes how it is called."""

    def __init__(self, features: list[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.features = nn.ParameterList([nn.Parameter(x) for x in features])
        self.output = nn.Embedding(vocabulary, features[0].shape[1]).double()
        self.calls: list[tuple[Batch, float | None, bool]] = []

    def forward(self, batch: Batch, word_dropout: float | None = None, packing: bool = False) -> Any:
        self.calls.append((batch, word_dropout, packing))
        return self.features[len(self.calls) - 1] * 1.0

    def logits(self, which: int) -> Any:
        return self.features[which] @ self.output.weight.T

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [*self.features, self.output.weight], allow_unused=True))


def pairs(lengths: list[int], vocabulary: int, generator: torch.Generator) -> Batch:
    """Padded targets of these lengths, any word of the vocabulary but padding."""
    target_BT = torch.full((len(lengths), max(lengths)), PAD)
    for row, n in zip(target_BT, lengths, strict=True):
        row[:n] = torch.randint(PAD + 1, vocabulary, (n,), generator=generator)
    return Batch.of(torch.full((len(lengths), 2), 5), target_BT, torch.arange(len(lengths)))


def given_model(lengths: list[int], vocabulary: int, passes: int, seed: int) -> tuple[Given, Batch, Tensor]:
    """Such a model, a batch for it, and the real target words, sentence after sentence."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths), 4)
    features = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(passes)]
    model, batch = Given(features, vocabulary), pairs(lengths, vocabulary, generator)
    words = [row[:n] for row, n in zip(batch.target_out_BT, lengths, strict=True)]
    return model, batch, torch.cat(words)


def settings_with(**changes: Any) -> TrainingConfig:
    return varied("transformer", **{f"training__{name}": value for name, value in changes.items()}).training


SHAPES = {
    "lengths": st.lists(st.integers(1, 6), min_size=1, max_size=4),
    "vocabulary": st.integers(3, 9),
    "rows": st.integers(1, 6),  # tokens of a chunk
    "seed": st.integers(0, 99),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@over(smoothing=st.sampled_from([0.0, 0.1, 0.7]), **SHAPES)
def test_the_loss_and_its_gradients_are_szegedys(
    lengths: list[int], vocabulary: int, rows: int, seed: int, smoothing: float
) -> None:
    """However many tokens a chunk has, the last one as well, and whatever the loss is multiplied with afterwards."""
    model, batch, words = given_model(lengths, vocabulary, 1, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK", {"cpu": rows * vocabulary + vocabulary - 1})
        ours = loss_sum(model, batch, smoothing)  # type: ignore[arg-type]
        gradients = model.gradients(0.3 * ours)
    expected = smoothed_cross_entropy(model.logits(0), words, smoothing)
    torch.testing.assert_close(ours.double(), expected, **CLOSE)
    for one, other in zip(gradients, model.gradients(0.3 * expected), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    with torch.no_grad():
        model.calls.clear()
        torch.testing.assert_close(loss_sum(model, batch, smoothing).double(), expected, **CLOSE)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None, derandomize=True)
@over(**SHAPES)
def test_the_divergence_is_kullback_and_leiblers(lengths: list[int], vocabulary: int, rows: int, seed: int) -> None:
    """From the first to the second distribution, token by token, with gradients into both and into the table."""
    model, _, _ = given_model(lengths, vocabulary, 2, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK", {"cpu": rows * vocabulary})
        ours = divergence(model.features[0], model.features[1], model.output.weight)
        gradients = model.gradients(ours)
    expected = kl(model.logits(0), model.logits(1))
    torch.testing.assert_close(ours.double(), expected, **CLOSE)
    for one, other in zip(gradients, model.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@settings(max_examples=12, deadline=None, derandomize=True)
@over(smoothing=st.sampled_from([0.0, 0.3]), alpha=st.sampled_from([0.5, 5.0]), **SHAPES)
def test_r_drop_is_the_papers(
    lengths: list[int], vocabulary: int, rows: int, seed: int, smoothing: float, alpha: float
) -> None:
    """Half of both losses and of both divergences, halved again (Liang et al. 2021, §2.1), and all their gradients."""
    model, batch, words = given_model(lengths, vocabulary, 2, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK", {"cpu": rows * vocabulary})
        chosen = settings_with(r_drop=alpha, label_smoothing=smoothing)
        objective, plain = training_loss(model, batch, chosen)  # type: ignore[arg-type]
        gradients = model.gradients(objective)
    expected = r_drop(model.logits(0), model.logits(1), words, smoothing, alpha)
    torch.testing.assert_close(objective.double(), expected, **CLOSE)
    for one, other in zip(gradients, model.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    first = smoothed_cross_entropy(model.logits(0), words, smoothing)
    torch.testing.assert_close(plain.double(), first, **CLOSE, msg="the plain loss is the first pass's")
    assert not plain.requires_grad
    assert [p for _, p, _ in model.calls] == [None, None], "both passes drop words as the model does"


@settings(max_examples=12, deadline=None, derandomize=True)
@over(
    smoothing=st.sampled_from([0.0, 0.3]),
    alpha=st.sampled_from([0.5, 3.0]),
    cutoff=st.sampled_from([0.0, 0.05, 0.4]),
    **SHAPES,
)
def test_simcut_is_the_papers(
    lengths: list[int], vocabulary: int, rows: int, seed: int, smoothing: float, alpha: float, cutoff: float
) -> None:
    """The loss of the whole pass and its divergence from one with words cut out (Gao et al. 2022, §3.2)."""
    model, batch, words = given_model(lengths, vocabulary, 2, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK", {"cpu": rows * vocabulary})
        chosen = settings_with(simcut=alpha, simcut_cutoff=cutoff, label_smoothing=smoothing)
        objective, plain = training_loss(model, batch, chosen)  # type: ignore[arg-type]
        gradients = model.gradients(objective)
    expected = simcut(model.logits(0), model.logits(1), words, smoothing, alpha)
    torch.testing.assert_close(objective.double(), expected, **CLOSE)
    for one, other in zip(gradients, model.gradients(expected), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    first = smoothed_cross_entropy(model.logits(0), words, smoothing)
    torch.testing.assert_close(plain.double(), first, **CLOSE)
    assert not plain.requires_grad
    assert [p for _, p, _ in model.calls] == [None, cutoff], "words are cut out of the second pass only"


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", [{}, {"r_drop": 1.0}, {"simcut": 1.0}])
def test_every_pass_sees_the_whole_batch_packed_as_configured(method: dict[str, float], packing: bool) -> None:
    """Without a regulariser there is one pass, and its loss is the objective."""
    model, batch, words = given_model([2, 1, 3], 7, 2, 0)
    chosen = settings_with(packing=packing, label_smoothing=0.1, **method)
    objective, plain = training_loss(model, batch, chosen)  # type: ignore[arg-type]
    assert len(model.calls) == (2 if method else 1)
    for seen, _, packed in model.calls:
        assert packed is packing and torch.equal(seen.target_out_BT, batch.target_out_BT)
    if not method:
        expected = smoothed_cross_entropy(model.logits(0), words, 0.1)
        torch.testing.assert_close(objective.double(), expected, **CLOSE)
        assert torch.equal(objective.detach(), plain) and not plain.requires_grad


def dropping(family: str, **changes: Any) -> Seq2Seq:
    """A model in float64 with every kind of dropout."""
    config = base_config(family)
    config = varied(config, model__dropout=0.2, model__attention__dropout=0.2, **changes)
    torch.manual_seed(0)
    return build_model(config.model, Vocabulary(40, 40, joint=True)).double().train()


def compared(model: Seq2Seq, ours: Tensor, expected: Tensor) -> None:
    """Equal losses with equal gradients of all parameters."""
    torch.testing.assert_close(ours.double(), expected, **CLOSE)
    parameters = dict(model.named_parameters())
    pairs = [torch.autograd.grad(x, list(parameters.values()), allow_unused=True) for x in (ours, expected)]
    for name, one, other in zip(parameters, *pairs, strict=True):
        assert one is not None and other is not None, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_r_drop_draws_two_dropout_masks_and_learns_from_both(family: str) -> None:
    """Two passes of a real model, one after the other from one random generator."""
    model, batch = dropping(family, model__word_dropout=0.1), tiny_batch()
    words = batch.target_out_BT[batch.target_mask_BT]
    torch.manual_seed(7)
    ours, _ = training_loss(model, batch, settings_with(r_drop=4.0, label_smoothing=0.1))
    torch.manual_seed(7)
    first, second = (model.logits(model(batch)) for _ in range(2))
    assert not torch.equal(first, second), "the passes differ"
    compared(model, ours, r_drop(first, second, words, 0.1, 4.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_simcut_cuts_words_out_of_its_second_pass_only(family: str) -> None:
    """The first pass drops words as the model does; the second with the probability of the cut."""
    model, batch = dropping(family, model__word_dropout=0.5), tiny_batch()
    other = dropping(family, model__word_dropout=0.15)
    words = batch.target_out_BT[batch.target_mask_BT]
    torch.manual_seed(7)
    ours, _ = training_loss(model, batch, settings_with(simcut=3.0, simcut_cutoff=0.15, label_smoothing=0.1))
    torch.manual_seed(7)
    first = model.logits(model(batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "word_dropout", other.word_dropout)
        second = model.logits(model(batch))
    compared(model, ours, simcut(first, second, words, 0.1, 3.0))


def test_an_impossible_word_costs_a_large_number_and_not_infinity() -> None:
    """Where the softmax of the right word is zero in float32, its loss is still a number, and so are its gradients."""
    model, batch, words = given_model([1], 4, 1, 0)
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.weight[int(words[0]) % 3 + 1, 0] = 1.0
        model.features[0].fill_(500.0)
    loss = loss_sum(model, batch, 0.0)  # type: ignore[arg-type]
    assert 80 < float(loss.detach()) < 1000
    assert all(g.isfinite().all() for g in model.gradients(loss))
