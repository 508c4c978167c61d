"""Laws that both families obey."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from seq2seq.cli.main import load_config
from seq2seq.config.paths import CONFIGS, choices
from seq2seq.data.tokenizer import Vocabulary
from seq2seq.inference.checkpoint import count_parameters, load_checkpoint
from seq2seq.model import layers
from seq2seq.model.cpu_inference import PreparedLinear, optimize_for_cpu
from seq2seq.model.factory import build_model, parameter_table
from seq2seq.model.interface import Seq2Seq
from seq2seq.model.layers import dropout
from tests.helpers.configs import FAMILIES, STILL, TINY, tiny_config
from tests.helpers.corpora import padded, random_sentences, tiny_batch
from tests.helpers.models import VOCABULARY, begin, tiny_model
from tests.helpers.runs import saved_run

OPTIONS = [
    ("transformer", []),
    (
        "transformer",
        ["model.norm=rms", "model.norm_position=post", "model.activation=swiglu", "model.tie_embeddings=none"],
    ),
    (
        "transformer",
        ["model.activation=gelu", "model.tie_embeddings=output", "model.encoder_layers=1", "model.decoder_layers=3"],
    ),
    ("lstm", []),
    ("lstm", ["model.encoder_layers=1", "model.decoder_layers=1", "model.tie_embeddings=all"]),
    (
        "lstm",
        ["model.convolutions=2", "model.decoder_init=pooled", "model.tie_embeddings=none", "model.decoder_layers=3"],
    ),
    ("lstm", ["model.attention.heads=1", "model.convolutions=1", "model.kernel_size=5"]),
]
both_families_with_options = pytest.mark.parametrize("family,options", OPTIONS, ids=str)


def read(model: Seq2Seq, sentences: list[list[int]], target: torch.Tensor, extra: int = 0) -> torch.Tensor:
    """Logits for the same target under each source sentence."""
    with torch.inference_mode():
        return model.step(target.expand(len(sentences), -1), model.start(*padded(sentences, extra)))[0]


TARGET = torch.cat((begin(1), torch.tensor(random_sentences([6], seed=9))), 1)


@both_families_with_options
def test_padding_and_neighbours_change_nothing(family: str, options: list[str]) -> None:
    model = tiny_model(family, *options)
    sentences = random_sentences([4, 1, 9, 6])
    alone = torch.cat([read(model, [sentence], TARGET) for sentence in sentences])
    torch.testing.assert_close(read(model, sentences, TARGET), alone)
    torch.testing.assert_close(read(model, sentences, TARGET, extra=7), alone)
    torch.testing.assert_close(read(model, sentences[::-1], TARGET).flip(0), alone)


@both_families_with_options
def test_the_future_is_invisible(family: str, options: list[str]) -> None:
    model, sentences = tiny_model(family, *options), random_sentences([4, 5])
    changed = TARGET.clone()
    changed[0, 4:] = 7
    before, after = read(model, sentences, TARGET), read(model, sentences, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@both_families_with_options
def test_every_source_word_matters(family: str, options: list[str]) -> None:
    model, sentence = tiny_model(family, *options), random_sentences([5])[0]
    before = read(model, [sentence], TARGET)
    for position in range(5):
        changed = [*sentence[:position], 4 if sentence[position] != 4 else 5, *sentence[position + 1 :]]
        assert not torch.allclose(read(model, [changed], TARGET), before)


@both_families_with_options
def test_a_state_is_a_value(family: str, options: list[str]) -> None:
    """Two continuations of one state do not disturb each other."""
    model = tiny_model(family, *options)
    with torch.inference_mode():
        _, state = model.step(begin(2), model.start(*padded(random_sentences([4, 5]))))
        first, _ = model.step(torch.tensor([[5], [6]]), state)
        model.step(torch.tensor([[8], [9]]), state)
        again, _ = model.step(torch.tensor([[5], [6]]), state)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@both_families_with_options
def test_reorder_is_select_inside_a_sentence(family: str, options: list[str]) -> None:
    model = tiny_model(family, *options)
    rows = torch.tensor([2, 0, 1, 3, 3, 5])
    with torch.inference_mode():
        state = model.start(*padded(random_sentences([4, 5]))).select(torch.arange(2).repeat_interleave(3), 3)
        _, state = model.step(torch.tensor([[5], [6], [7], [8], [9], [10]]), state)
        reordered, selected = (model.step(begin(6), s)[0] for s in (state.reorder(rows), state.select(rows, 3)))
    torch.testing.assert_close(reordered, selected, rtol=0, atol=0)


@both_families_with_options
def test_select_is_the_same_as_starting_over(family: str, options: list[str]) -> None:
    """Rows that are expanded, permuted and dropped = the same histories read from the beginning."""
    model, sentences = tiny_model(family, *options), random_sentences([4, 2, 6])
    first, second = torch.tensor([[5], [6], [7]]), torch.tensor([[8], [9], [10], [11]])
    with torch.inference_mode():
        _, state = model.step(torch.cat((begin(3), first), 1), model.start(*padded(sentences)))
        picked, _ = model.step(second, state.select(torch.tensor([2, 2, 0, 0]), 2))
        history = torch.cat((begin(4), first[[2, 2, 0, 0]], second), 1)
        again, _ = model.step(history, model.start(*padded([sentences[i] for i in (2, 2, 0, 0)])))
    torch.testing.assert_close(picked[:, -1], again[:, -1])


@both_families_with_options
def test_weights_on_request_are_distributions(family: str, options: list[str]) -> None:
    model, sentences = tiny_model(family, *options), random_sentences([4, 2])
    source, mask = padded(sentences)
    with torch.inference_mode():
        target = TARGET.expand(2, -1)
        decoded = model.decode(target, model.start(source, mask), weights=True)
        without = model.decode(target, model.start(source, mask))
    torch.testing.assert_close(decoded.features_RTD, without.features_RTD)
    assert decoded.weights and not without.weights
    for weights_RNTS in decoded.weights:
        assert weights_RNTS.shape[0] == 2 and weights_RNTS.shape[2:] == (target.shape[1], source.shape[1])
        torch.testing.assert_close(weights_RNTS.sum(-1), torch.ones(weights_RNTS.shape[:3]))


@pytest.mark.parametrize(
    "family,options",
    [
        *OPTIONS,
        ("transformer", ["model.attention.score=additive", "model.position=alibi"]),
        ("transformer", ["model.attention.score=cosine", "model.position=rotary"]),
    ],
    ids=str,
)
def test_packing_changes_no_number(family: str, options: list[str]) -> None:
    """Features and gradients, whether padding is computed or not."""
    batch, seen = tiny_batch(), []
    for packing in (False, True):
        model = tiny_model(family, *options)
        features_MD = model(batch, packing=packing)
        features_MD.square().sum().backward()
        seen.append((features_MD, [parameter.grad for parameter in model.parameters()]))
    assert len(features_MD) == batch.target_tokens < batch.target_out_BT.numel(), "there is padding"
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


@both_families_with_options
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_weights_laid_out_for_a_cpu_have_the_same_output(
    family: str, options: list[str], precision: torch.dtype
) -> None:
    sentences = random_sentences([4, 1, 9])
    plain, prepared = (tiny_model(family, *options).to(precision) for _ in range(2))
    if not PreparedLinear.is_supported(plain.output.weight):
        pytest.skip("this torch has no oneDNN, or none for this type of number")
    assert any(isinstance(part, PreparedLinear) for part in optimize_for_cpu(prepared).modules())
    tolerance = 2e-2 if precision == torch.bfloat16 else None
    found, expected = (read(model, sentences, TARGET) for model in (prepared, plain))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_tables_are_one(family: str) -> None:
    tied, half, free = (
        build_model(tiny_config(family, f"model.tie_embeddings={tie}").model, VOCABULARY)
        for tie in ("all", "output", "none")
    )
    assert tied.source_embedding.weight is tied.target_embedding.weight is tied.output.weight
    assert half.source_embedding.weight is not half.target_embedding.weight is half.output.weight
    assert free.target_embedding.weight is not free.output.weight
    table = VOCABULARY.target * free.output.weight.shape[1]
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, half, free)]
    assert counts == [counts[0], counts[0] + table, counts[0] + 2 * table]


@pytest.mark.parametrize("preset", choices("model"))
def test_every_model_preset_has_the_parameters_it_claims(preset: str) -> None:
    text = (CONFIGS / "model" / f"{preset}.yaml").read_text(encoding="utf-8")
    claim = re.search(r"Parameters: ([\d.]+) M with a joint vocabulary of ([\d,]+)\.", text)
    assert claim, "the first comment of a preset states its parameters"
    size = int(claim.group(2).replace(",", ""))
    config = load_config("train", f"model={preset}").model
    with torch.device("meta"):
        model = build_model(config, Vocabulary(size, size, joint=True))
    count = sum(p.numel() for p in model.parameters())
    assert f"{count / 1e6:.1f}" == claim.group(1)
    assert count == sum(part for _, part in parameter_table(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", ["all", "none"])
def test_a_checkpoint_has_the_parameters_of_its_model(family: str, tie: str, tmp_path: Path) -> None:
    """Counted without building the model; a table that is shared counts once."""
    folder = saved_run(tmp_path / "run", family, f"model.tie_embeddings={tie}").checkpoint("best")
    _, _, model = load_checkpoint(folder)
    assert count_parameters(folder) == sum(p.numel() for p in model.parameters())


def test_transformer_parameters_are_the_papers() -> None:
    """Vaswani et al. 2017 written out: 4D² for each attention, 2·D·F for each feed-forward, one table."""
    config, vocabulary = load_config("train", "model=transformer_base").model, 37000
    with torch.device("meta"):
        model = build_model(config, Vocabulary(vocabulary, vocabulary, joint=True))
    D, F, layers = 512, 2048, 6
    matrices = vocabulary * D + layers * (4 * D * D + 2 * D * F) + layers * (8 * D * D + 2 * D * F)
    assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == matrices


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    y = dropout(x, rate, training=True)
    assert abs(float((y == 0).float().mean()) - rate) < 0.004  # a byte decides: 1/512 of rounding, and chance
    assert abs(float(y.mean()) - 1) < 0.004
    assert dropout(x, rate, training=False) is x
    assert not torch.equal(y, dropout(x, rate, training=True))


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_dropout_masks_follow_from_the_seed_whatever_the_size(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller and larger than the window that a mask is seen through."""
    monkeypatch.setattr(layers, "WINDOW", 64)
    layers._mask_table.cache_clear()
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([dropout(torch.ones(count), 0.5, training=True) for _ in range(20)])
    layers._mask_table.cache_clear()
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=0)
    assert all(set(mask.tolist()) <= {0.0, 2.0} and len(mask) == count for mask in masks[0])
    assert count < 63 or any(not torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_alive_in_training_only(family: str) -> None:
    overrides = [o for o in STILL if "attention" in o]
    config = load_config("train", f"model={family}", *TINY[family], "model.attention.heads=2", *overrides).model
    model, batch = build_model(config, VOCABULARY), tiny_batch()
    with torch.inference_mode():
        assert not torch.equal(model.train()(batch), model(batch))
        assert torch.equal(model.eval()(batch), model(batch))
