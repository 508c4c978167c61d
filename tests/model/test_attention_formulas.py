"""The shared attention module against its papers: masks, offsets, shared keys, positions, dropout and joined rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seq2seq.model import attention as attention_module
from seq2seq.model.attention import Attention, KeyValue, Position, alibi, concatenate_padded, rotate
from tests.helpers.small_models import POSITIONS, SCORES, replace_dropout, small_window
from tests.reference.attention import attend, rotated, slope, with_positions
from tests.reference.dropout import drop_numbers

PAIRS = list(itertools.product(SCORES, POSITIONS))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # angles and slopes are computed in float32
every_pair = pytest.mark.parametrize("score,position", PAIRS)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    yield from small_window(monkeypatch)


def built(score: str, position: str = "none", heads: int = 3, p: float = 0.0, project_values: bool = True) -> Attention:
    """Queries of 5 and memories of 7, in heads of 4; every parameter drawn."""
    torch.manual_seed(0)
    width = heads * 4 if project_values else 7
    module = Attention(5, 7, width, heads, score, position, p, project_values).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def expected_row(
    module: Attention,
    query_TD: Tensor,
    memory_SD: Tensor,
    visible: list[list[bool]],
    start: int,
    key: list[int],
    **drop: object,
) -> tuple[Tensor, Tensor]:
    return attend(
        dict(module.named_parameters()),
        module.score,
        module.heads,
        module.position_kind,
        query_TD,
        memory_SD,
        visible=visible,
        query_positions=range(start, start + len(query_TD)),
        key_positions=key,
        **drop,  # type: ignore[arg-type]
    )


# Rows of a sentence, their queries, where queries and keys begin, and whether later keys are hidden.
CASES = [
    (1, 3, 2, 1, False),
    (2, 2, 1, 0, True),
    (1, 1, 0, 0, False),
    (3, 1, 4, 0, False),
    (1, 5, 0, 0, True),
    (2, 2, 3, 2, True),
]


@pytest.mark.parametrize(
    "score,position,rows,T,start,key_start,causal",
    [(*pair, *case) for i, pair in enumerate(PAIRS) for case in (*CASES[:2], CASES[2 + i % 4])],
)
def test_every_score_and_position_is_its_formula_under_every_head(
    score: str, position: str, rows: int, T: int, start: int, key_start: int, causal: bool
) -> None:
    """Padded sentences, one or more rows of each, keys and queries that begin anywhere, a past that ends in between."""
    module, lengths, S = built(score, position), [5, 3, 1], 5
    memory_BSD, query_RTD = drawn(3, S, 7), drawn(3 * rows, T, 5, seed=2)
    mask_BS = torch.arange(S) < torch.tensor(lengths)[:, None]
    kv = module.project(memory_BSD, mask_BS, start=key_start)
    # ALiBi reads the keys' positions when it compares, rotary positions are in the keys already.
    position_S = torch.arange(key_start, key_start + S)
    attended = module(query_RTD, kv, start=start, causal=causal, weights=True, position_S=position_S)
    for r in range(3 * rows):
        length = lengths[r // rows]
        visible = [[s < length and (not causal or s <= start + t) for s in range(S)] for t in range(T)]
        context_TD, weights_NTS = expected_row(
            module, query_RTD[r], memory_BSD[r // rows], visible, start, position_S.tolist()
        )
        torch.testing.assert_close(attended.context_RTD[r], context_TD, **CLOSE)
        torch.testing.assert_close(attended.weights_RNTS[r], weights_NTS, **CLOSE)


@pytest.mark.parametrize("score", SCORES)
def test_keys_may_stand_in_any_order(score: str) -> None:
    """Slots of a beam: ALiBi's penalty follows each key's position, not its slot (Press et al. 2022, §3)."""
    module, positions = built(score, "alibi"), [0, 2, 1, 2, 1]
    memory_BSD, query_RTD = drawn(2, 5, 7), drawn(4, 2, 5, seed=2)
    attended = module(query_RTD, module.project(memory_BSD), start=3, weights=True, position_S=torch.tensor(positions))
    for r in range(4):
        every = [[True] * 5] * 2
        context_TD, weights_NTS = expected_row(module, query_RTD[r], memory_BSD[r // 2], every, 3, positions)
        torch.testing.assert_close(attended.context_RTD[r], context_TD, **CLOSE)
        torch.testing.assert_close(attended.weights_RNTS[r], weights_NTS, **CLOSE)


@pytest.mark.parametrize("score", SCORES)
def test_a_single_head_without_projection_averages_the_memory_itself(score: str) -> None:
    """As in Bahdanau et al. 2015 and Luong et al. 2015: the context is a mean of annotations."""
    module = built(score, heads=1, project_values=False)
    memory_BSD, query_RTD = drawn(2, 4, 7), drawn(2, 3, 5, seed=2)
    context_RTD, weights_RNTS = module(query_RTD, module.project(memory_BSD), weights=True)
    torch.testing.assert_close(context_RTD, weights_RNTS[:, 0] @ memory_BSD, **CLOSE)
    assert module.context_width == 7 and built(score).context_width == 5
    for r in range(2):
        expected = expected_row(module, query_RTD[r], memory_BSD[r], [[True] * 4] * 3, 0, [*range(4)])
        torch.testing.assert_close(context_RTD[r], expected[0], **CLOSE)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_has_the_parameters_of_its_formula_and_no_others(score: str) -> None:
    """Queries and keys without biases, but for the one of the additive score; projections of values with theirs."""
    Q, M, W = 5, 7, 12
    own = {"additive": W + W, "general": 3 * 4 * 4, "cosine": 3}.get(score, 0)
    assert count(built(score)) == Q * W + M * W + own + (M + 1) * W + (W + 1) * Q
    own = {"additive": 7 + 7, "general": 7 * 7, "cosine": 1}.get(score, 0)
    assert count(built(score, heads=1, project_values=False)) == Q * 7 + M * 7 + own


def count(module: Attention) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@every_pair
def test_each_query_of_a_row_may_have_a_mask_of_its_own(score: str, position: str) -> None:
    """The past of a beam: one row of the bias for every query, together with ALiBi's."""
    module, rows, T, S = built(score, position), 2, 2, 5
    memory_BSD, query_RTD = drawn(2, S, 7), drawn(2 * rows, T, 5, seed=2)
    visible = drawn(2, rows * T, S, seed=3) > -0.5
    visible[..., 0] = True
    bias_R1QS = torch.zeros(2, 1, rows * T, S, dtype=torch.float64).masked_fill(~visible[:, None], -math.inf)
    kv = module.project(memory_BSD)._replace(bias_R1QS=bias_R1QS)
    attended = module(query_RTD, kv, start=3, weights=True)
    for r in range(2 * rows):
        own = visible[r // rows, r % rows * T : (r % rows + 1) * T].tolist()
        expected = expected_row(module, query_RTD[r], memory_BSD[r // rows], own, 3, [*range(S)])
        torch.testing.assert_close(attended.context_RTD[r], expected[0], **CLOSE)
        torch.testing.assert_close(attended.weights_RNTS[r], expected[1], **CLOSE)


@pytest.mark.parametrize("kernel", ["plain", "fused"])
@pytest.mark.parametrize("score,position", [*zip(SCORES, POSITIONS, strict=True), ("cosine", "none")])
def test_dropout_falls_on_the_weights_after_the_softmax_in_training_only(
    score: str, position: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are averaged with dropped weights, and the weights that are handed out are the whole ones."""
    replace_dropout(monkeypatch)
    monkeypatch.setattr(attention_module, "use_fused_kernel", lambda _: kernel == "fused")

    def scaled_dot_product_attention(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float, is_causal: bool, scale: float
    ) -> Tensor:
        scores = q @ k.mT * scale + (0 if bias is None else bias)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        return drop_numbers(scores.softmax(-1), p) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    module, memory_BSD, query_RTD = built(score, position, p=0.4), drawn(2, 4, 7), drawn(2, 4, 5, seed=2)
    past = [[s <= t for s in range(4)] for t in range(4)]
    for training, rate in ((False, 0.0), (True, 0.4)):
        kv = module.train(training).project(memory_BSD)
        for weights in (False, True):
            attended = module(query_RTD, kv, causal=True, weights=weights)
            assert (attended.weights_RNTS is not None) == weights
            for r in range(2):
                expected = expected_row(
                    module, query_RTD[r], memory_BSD[r], past, 0, [*range(4)], drop=drop_numbers, p=rate
                )
                torch.testing.assert_close(attended.context_RTD[r], expected[0], **CLOSE)
                if attended.weights_RNTS is not None:
                    torch.testing.assert_close(attended.weights_RNTS[r], expected[1], **CLOSE)


def test_dropped_attention_weights_are_scaled_up(window: int) -> None:
    """Each context is a sum of values by weights that are zero or 1/(1 − p) times what they were."""
    module = built("dot", heads=1, p=0.5, project_values=False).train()
    memory_1SD, query_1TD = F.pad(torch.eye(6, dtype=torch.float64), (0, 1))[None], drawn(1, 40, 5)
    torch.manual_seed(0)
    dropped, weights = module(query_1TD, module.project(memory_1SD), weights=True)
    ratio = dropped[0, :, :6] / weights[0, 0]
    torch.testing.assert_close(ratio, 2 * (ratio > 1).double())
    assert 0.3 < float((ratio > 1).double().mean()) < 0.7
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("start", [0, 1, 7, 63])
@pytest.mark.parametrize("width", [2, 6, 10])
def test_rotary_positions_turn_pairs_of_neighbours(start: int, width: int) -> None:
    """Su et al. 2021, §3.2.2: the j-th pair by m·10,000^(−2j/H)."""
    x_RNTH = drawn(2, 3, 4, width)
    found = rotate(x_RNTH, start)
    for r, n, t in itertools.product(range(2), range(3), range(4)):
        torch.testing.assert_close(found[r, n, t], rotated(x_RNTH[r, n, t], start + t), **CLOSE)
    torch.testing.assert_close(found.norm(dim=-1), x_RNTH.norm(dim=-1), **CLOSE)


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_alibi_penalises_distance_with_the_slopes_of_its_paper(heads: int) -> None:
    """Press et al. 2022, §3: 2^(−8/n), 2^(−16/n), …, applied in both directions."""
    found = alibi(heads, 3, 5, 2, torch.zeros(1, dtype=torch.float64))
    assert found.shape == (1, heads, 3, 5) and found.dtype == torch.float64
    for n, t, s in itertools.product(range(heads), range(3), range(5)):
        torch.testing.assert_close(float(found[0, n, t, s]), -slope(n, heads) * abs(2 + t - s), **CLOSE)
    if heads == 8:
        torch.testing.assert_close(-found[0, :, 0, 1], torch.tensor([0.5**i for i in range(1, 9)]).double())


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rotary", "alibi", "none"])
@pytest.mark.parametrize("start", [0, 1, 5, 200])
def test_positions_are_added_from_any_start(kind: str, start: int) -> None:
    """Sinusoids (Vaswani et al. 2017, §3.5), rows of a table whose last one repeats, or nothing."""
    torch.manual_seed(0)
    module, x_RTD = Position(kind, 6, 4).double(), drawn(2, 5, 6)
    table = module.table.weight if module.table is not None else None
    assert (table is not None) == (kind == "learned")
    found = module(x_RTD, start)
    for r in range(2):
        expected = with_positions(x_RTD[r], kind, table, start)
        torch.testing.assert_close(found[r], expected, rtol=1e-4, atol=1e-4 if start == 200 else 1e-6)
    torch.testing.assert_close(module(x_RTD), module(x_RTD, 0))


def test_positions_keep_their_precision_in_a_model_of_few_bits() -> None:
    """Positions beyond 256 are no bfloat16 numbers: angles and distances are rounded last."""
    zeros, start = torch.zeros(1, 3, 6, dtype=torch.bfloat16), 301
    exact = with_positions(torch.zeros(3, 6, dtype=torch.float64), "sinusoidal", start=start)
    found = Position("sinusoidal", 6, 4)(zeros, start)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), exact, rtol=0.01, atol=0.005)
    x_11TH = drawn(1, 1, 3, 6).bfloat16()
    turned = rotate(x_11TH, start)
    assert turned.dtype == torch.bfloat16
    for t in range(3):
        expected = rotated(x_11TH[0, 0, t].double(), start + t)
        torch.testing.assert_close(turned[0, 0, t].double(), expected, rtol=0.02, atol=0.02)
    penalty = alibi(1, 2, 3, start, zeros)
    assert penalty.dtype == torch.bfloat16
    expected = -(2.0**-8) * torch.tensor([[301.0, 300.0, 299.0], [302.0, 301.0, 300.0]])
    torch.testing.assert_close(penalty[0, 0], expected.bfloat16(), rtol=0, atol=0)


def test_masks_are_of_the_models_type() -> None:
    """A bias in float32 would lift a bfloat16 model's scores to float32."""
    module = built("dot").bfloat16()
    kv = module.project(drawn(1, 3, 7).bfloat16(), torch.tensor([[True, True, False]]))
    assert kv.bias_R1QS is not None and kv.bias_R1QS.dtype == torch.bfloat16
    assert kv.bias_R1QS.tolist() == [[[[0.0, 0.0, -math.inf]]]]
    assert module(drawn(1, 2, 5).bfloat16(), kv, causal=True, weights=True).context_RTD.dtype == torch.bfloat16


@every_pair
def test_joined_memories_are_those_of_each(score: str, position: str) -> None:
    """The keys of two batches as one, the shorter one padded on either side, and nothing attends to the padding."""
    module, query_RTD = built(score, position), drawn(3, 2, 5, seed=5)
    for first, second in ((2, 5), (5, 2), (4, 4)):
        a_BSD, b_BSD = drawn(2, first, 7, seed=3), drawn(1, second, 7, seed=4)
        mask = torch.ones(2, first, dtype=torch.bool)
        mask[1, 1:] = False
        a, b = module.project(a_BSD, mask), module.project(b_BSD, torch.ones(1, second, dtype=torch.bool))
        joined = module(query_RTD, a.join(b), weights=True)
        separate = [module(query_RTD[:2], a, weights=True), module(query_RTD[2:], b, weights=True)]
        torch.testing.assert_close(joined.context_RTD, torch.cat([x.context_RTD for x in separate]), **CLOSE)
        width = max(first, second)
        weights = [F.pad(x.weights_RNTS, (0, width - x.weights_RNTS.shape[-1])) for x in separate]
        torch.testing.assert_close(joined.weights_RNTS, torch.cat(weights), **CLOSE)


def test_joined_memories_without_masks_have_none() -> None:
    a, b = (KeyValue(drawn(n, 2, 3, 4), drawn(n, 2, 3, 4, seed=n), None) for n in (2, 1))
    joined = a.join(b)
    assert joined.bias_R1QS is None
    torch.testing.assert_close(joined.key_RNSH, torch.cat((a.key_RNSH, b.key_RNSH)), rtol=0, atol=0)
    torch.testing.assert_close(joined.value_RNSH, torch.cat((a.value_RNSH, b.value_RNSH)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "a,b", [((2, 3), (1, 3)), ((1, 2), (2, 5)), ((2, 4, 1), (1, 2, 3)), ((1, 1, 2, 6), (3, 1, 5, 4))]
)
@pytest.mark.parametrize("value", [0.0, -math.inf, 7.0])
def test_rows_of_both_are_padded_behind_in_every_dimension(
    a: tuple[int, ...], b: tuple[int, ...], value: float
) -> None:
    """The second follows the first; what one lacks has the given value."""
    first, second = drawn(*a), drawn(*b, seed=2)
    joined = concatenate_padded(first, second, value)
    size = [a[0] + b[0], *map(max, zip(a[1:], b[1:], strict=True))]
    expected = torch.full(size, value, dtype=torch.float64)
    at_first, at_second = [slice(0, a[0]), *map(slice, a[1:])], [slice(a[0], None), *map(slice, b[1:])]
    expected[tuple(at_first)], expected[tuple(at_second)] = first, second
    torch.testing.assert_close(joined, expected, rtol=0, atol=0)
