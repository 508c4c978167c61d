"""Laws of the shared attention and position module."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch

from seq2seq.config.schema import AttentionScore, PositionKind
from seq2seq.model import attention as attention_module
from seq2seq.model.attention import Attention, KeyValue, rotate
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.loss import loss_sum
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import padded, random_sentences, tiny_batch
from tests.helpers.models import begin, tiny_model

SCORES, POSITIONS = get_args(AttentionScore), get_args(PositionKind)
PAIRS = list(itertools.product(SCORES, POSITIONS))
EVERY = list(itertools.product(FAMILIES, SCORES, POSITIONS))


def attention(score: str, heads: int = 1, position: str = "none", project_values: bool = False) -> Attention:
    torch.manual_seed(0)
    built = Attention(6, 10, 8, heads, score, position, project_values=project_values).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def memory() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 5, 10), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("score", SCORES)
def test_one_head_is_the_formula_of_its_paper(score: str) -> None:
    module, (states_BSD, mask_BS) = attention(score), memory()
    query_BTD = torch.randn(3, 4, 6)
    q, k = query_BTD @ module.query.weight.T, states_BSD @ module.key.weight.T
    if score == "additive":
        energy = torch.tanh(q[:, :, None] + k[:, None] + module.key.bias) @ module.v_NH[0]
    elif score == "general":
        energy = q @ module.general_NHH[0] @ k.transpose(1, 2)
    elif score == "cosine":
        lengths = q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None]
        energy = module.gain_N.exp() * (q @ k.transpose(1, 2)) / lengths
    else:
        energy = q @ k.transpose(1, 2) / (math.sqrt(8) if score == "scaled_dot" else 1)
    alpha = energy.masked_fill(~mask_BS[:, None], -math.inf).softmax(-1)
    context, weights = module(query_BTD, module.project(states_BSD, mask_BS), weights=True)
    torch.testing.assert_close(weights[:, 0], alpha)
    torch.testing.assert_close(context, alpha @ states_BSD)


@pytest.mark.parametrize("score,position", PAIRS)
def test_weights_are_distributions_over_real_positions(score: str, position: str) -> None:
    module, (states, mask) = attention(score, 2, position, project_values=True), memory()
    weights = module(torch.randn(3, 4, 6), module.project(states, mask), weights=True).weights_RNTS
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 4))
    assert weights.masked_select(~mask[:, None, None].expand_as(weights)).eq(0).all()


@pytest.mark.parametrize("score,position", PAIRS)
def test_rows_of_a_sentence_use_the_same_keys(score: str, position: str) -> None:
    """Three query rows per sentence over shared keys = the same with every key copied three times."""
    module, (states, mask) = attention(score, 2, position, project_values=True), memory()
    query, kv = torch.randn(9, 2, 6), module.project(states, mask)
    key, value, bias = (part.repeat_interleave(3, 0) for part in kv[:3] if part is not None)
    copied = KeyValue(key, value, bias)
    shared, plain = (module(query, each, start=3, weights=True) for each in (kv, copied))
    torch.testing.assert_close(shared.context_RTD, plain.context_RTD)
    torch.testing.assert_close(shared.weights_RNTS, plain.weights_RNTS)


@pytest.mark.parametrize("score,position", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 6])
def test_the_fused_kernel_is_the_plain_form(
    score: str, position: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of a GPU equals that of a CPU: padded, causal, and with several rows a sentence."""
    module, (states, mask) = attention(score, 2, position, project_values=True).to(dtype), memory()
    query, kv = torch.randn(rows, 5, 6, dtype=dtype), module.project(states.to(dtype), mask)
    for causal in (False, True):
        plain = module(query, kv, causal=causal).context_RTD
        with monkeypatch.context() as patch:
            patch.setattr(attention_module, "use_fused_kernel", lambda _: True)
            fused = module(query, kv, causal=causal).context_RTD
        tolerance = None if dtype == torch.float32 else 0.05
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", SCORES)
def test_causal_attention_does_not_see_the_future(score: str) -> None:
    module = attention(score, 2, "alibi", project_values=True)
    module.query, module.key, module.value = (torch.nn.Linear(6, 8) for _ in range(3))
    x = torch.randn(2, 5, 6)
    changed = torch.cat((x[:, :3], torch.randn(2, 2, 6)), 1)
    before, after = (module(y, module.project(y), causal=True).context_RTD for y in (x, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [(rotate(q, start + 3) * rotate(k, start)).sum() for start in (0, 5, 40)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3))
    assert not torch.allclose(scores[0], (rotate(q, 7) * rotate(k, 0)).sum())


@pytest.mark.parametrize("family,score,position", EVERY)
def test_every_score_and_position_trains_and_decodes(family: str, score: str, position: str) -> None:
    """The loss falls in a few updates, every parameter learns, and step by step = all at once."""
    model = tiny_model(family, f"model.attention.score={score}", f"model.position={position}")
    batch, losses = tiny_batch(), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4):
        loss = loss_sum(model, batch, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    _step_by_step_is_all_at_once(model)


@torch.inference_mode()
def _step_by_step_is_all_at_once(model: Seq2Seq) -> None:
    source, mask = padded(random_sentences([6, 2, 4]))
    target = torch.cat((begin(3), padded(random_sentences([7, 7, 7], 5))[0][:, :-1]), 1)
    at_once, _ = model.step(target, model.start(source, mask))
    state, steps = model.start(source, mask), []
    for t in range(target.shape[1]):
        logits, state = model.step(target[:, t : t + 1], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), at_once)
