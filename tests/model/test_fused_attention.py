"""What a GPU needs from attention, shown on a CPU: layouts that torch's fused kernels take, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seq2seq.model import attention as attention_module
from seq2seq.model import kv_cache
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Seq2Seq
from seq2seq.model.kv_cache import KVBuffer, grown_capacity
from seq2seq.model.transformer import TransformerState
from seq2seq.utils.device import tune_cuda
from tests.helpers.configs import FAMILIES
from tests.helpers.small_models import POSITIONS, SOURCES, TARGETS, matrix, pairs, shifted, small_model, variant

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
DOT_PRODUCTS = ("dot", "scaled_dot", "general", "cosine")
VARIANTS = [*(("scaled_dot", position) for position in POSITIONS), *((score, "rotary") for score in DOT_PRODUCTS)]


class Call(NamedTuple):
    """What the kernel was given."""

    inputs: tuple[Tensor, Tensor, Tensor]  # query, key, value
    mask: Tensor | None
    is_causal: bool


Calls = list[Call]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """All attention runs through the fused kernel, which notes what it is given."""
    found: Calls = []
    kernel: Callable[..., Tensor] = F.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float) -> Tensor:
        found.append(Call((q, k, v), mask, is_causal))
        return kernel(q, k, v, mask, p, is_causal, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    use_fused_kernel(monkeypatch, True)
    return found


def use_fused_kernel(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(attention_module, "use_fused_kernel", lambda _: fused)


def search(model: Seq2Seq, steps: int = 20) -> list[Tensor]:
    """The logits of two beams that are joined, lose a sentence and go on; sources are not a multiple of 8 long."""
    generator = torch.Generator().manual_seed(0)
    logits: list[Tensor] = []

    def advance(state: State, count: int) -> State:
        for _ in range(count):
            rows = state.beam * sentences
            logits_RTV, state = model.step(torch.randint(4, 17, (rows, 1), generator=generator), state)
            ranks_R = torch.randint(state.beam, (rows,), generator=generator)
            state = state.reorder(torch.arange(rows) // state.beam * state.beam + ranks_R)
            logits.append(logits_RTV)
        return state

    sentences, parts = 2, []
    for part_BS in (matrix(SOURCES[:2]), matrix(SOURCES[2:])):
        part = model.start(part_BS, part_BS.ne(0)).select(torch.arange(2).repeat_interleave(3), 3)
        parts.append(advance(part, 2))
    joined, sentences = parts[0].join(parts[1]), 4
    joined = advance(joined, 3)
    joined, sentences = joined.select(torch.arange(3, 12), 3), 3
    advance(joined, steps)
    return logits


@pytest.mark.parametrize("score,position", VARIANTS)
@torch.inference_mode()
def test_a_search_gives_the_kernels_what_they_take(
    score: str, position: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stride of all inputs is 1; rows of masks start at multiples of 8 once there is a buffer."""
    model = small_model(variant("transformer", score=score, position=position)).float()
    fused = search(model)
    assert calls
    for call in calls:
        assert [x.stride(-1) for x in call.inputs] == [1, 1, 1]
    buffered = [call for call in calls if call.inputs[1].shape[2] % kv_cache.SLOT_MULTIPLE == 0]
    widths = {source_BS.shape[1] for source_BS in (matrix(SOURCES), matrix(SOURCES[:2]))}
    cross = [call for call in calls if call.inputs[0].shape[2] == 3 and call.inputs[1].shape[2] in widths]
    assert buffered and cross
    for mask in (call.mask for call in (*buffered, *cross)):
        assert mask is not None
        strides = [stride for stride, size in zip(mask.stride(), mask.shape, strict=True) if size > 1]
        assert strides[-1] == 1 and all(stride % 8 == 0 for stride in strides[:-1]), mask.stride()
    use_fused_kernel(monkeypatch, False)
    torch.testing.assert_close(fused, search(model), **CLOSE)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("score,position", VARIANTS)
def test_training_masks_the_future_without_a_mask(
    score: str, position: str, packing: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each decoder layer's self-attention, unless positions add a penalty; features and gradients stay."""
    model = small_model(variant("transformer", score=score, position=position))
    found = []
    for fused in (True, False):
        use_fused_kernel(monkeypatch, fused)
        features_MD = model(pairs(), packing=packing)
        found.append((features_MD, torch.autograd.grad(features_MD.square().sum(), [*model.parameters()])))
    torch.testing.assert_close(*found, **CLOSE)
    causal = [call for call in calls if call.is_causal]
    assert len(causal) == (0 if position == "alibi" else 2) and all(call.mask is None for call in causal)
    assert len(calls) == 2 + 2 * 2
    for call in calls:
        assert [x.stride(-1) for x in call.inputs] == [1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_steps_of_several_tokens_see_no_later_ones(family: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal kernel counts from the first key, so it is used for the first step only."""
    model = small_model(variant(family, score="scaled_dot"))
    source_BS, target_BT = matrix(SOURCES), matrix([shifted([*t, *[5] * (7 - len(t))]) for t in TARGETS])
    expected, _ = model.step(target_BT, model.start(source_BS, source_BS.ne(0)))
    state, parts = model.start(source_BS, source_BS.ne(0)), []
    for part_BT in target_BT.split([3, 1, 3], 1):
        logits_BTV, state = model.step(part_BT, state)
        parts.append(logits_BTV)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
    use_fused_kernel(monkeypatch, False)
    plain, _ = model.step(target_BT, model.start(source_BS, source_BS.ne(0)))
    torch.testing.assert_close(expected, plain, **CLOSE)
    assert calls


@pytest.mark.parametrize("fused", [False, True])
@torch.inference_mode()
def test_keys_are_stored_as_they_are_multiplied(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots last for the plain product, head width last for a fused kernel: memories, buffers and their selections."""
    use_fused_kernel(monkeypatch, fused)
    model, source_BS = small_model(variant("transformer")), matrix(SOURCES)
    state = model.start(source_BS, source_BS.ne(0))
    for _ in range(2):
        _, state = model.step(torch.full((4, 1), 5), state)
    assert isinstance(state, TransformerState) and state.growing.buffer
    buffers = (state.growing.buffer, state.growing.buffer.select(torch.tensor([2, 0]), 2))
    for key in (*(kv.key_RNSH for kv in state.memory), *(buffer.key_LBNPH for buffer in buffers)):
        assert (key if fused else key.mT).is_contiguous()


@pytest.mark.parametrize("fused", [False, True])
def test_a_buffer_grows_by_steps_and_on_a_gpu_by_half(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU allocates as often as the logarithm of the length, and never twice what a long prefix needs."""
    use_fused_kernel(monkeypatch, fused)
    for slots in (1, 7, 16, 100, 1000):
        for new in (1, 4, 12):
            capacity = grown_capacity(slots, new, torch.empty(0))
            spare = max(kv_cache.FUSED_SPARE_STEPS * new, slots // 2) if fused else kv_cache.SPARE_STEPS * new
            assert capacity % kv_cache.SLOT_MULTIPLE == 0
            assert slots + spare <= capacity < slots + spare + kv_cache.SLOT_MULTIPLE


@torch.inference_mode()
def test_a_gpu_allocates_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy search over the same steps, with the growth of either device."""
    model, source_BS, count = small_model(variant("transformer")), matrix(SOURCES), {}
    allocate = KVBuffer.allocate
    for fused in (False, True):
        use_fused_kernel(monkeypatch, fused)
        made: list[int] = []
        monkeypatch.setattr(
            KVBuffer, "allocate", lambda layers, new, made=made: made.append(new) or allocate(layers, new)
        )
        state = model.start(source_BS, source_BS.ne(0))
        for _ in range(100):
            _, state = model.step(torch.full((4, 1), 5), state)
        count[fused] = len(made)
    assert 2 <= count[True] < count[False] / 2


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_slower_attention_kernels_are_off_after_tuning(kernel: str) -> None:
    cuda = torch.backends.cuda
    enabled, enable = getattr(cuda, f"{kernel}_sdp_enabled"), getattr(cuda, f"enable_{kernel}_sdp")
    before = enabled()
    try:
        enable(True)
        tune_cuda()
        assert not enabled()
    finally:
        enable(before)
