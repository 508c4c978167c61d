"""Packed sentences attend as padded ones do: the plain form of the kernel, each attention, and whole models.

A CPU lacks the kernel. Here its arguments and gradients are checked against torch's own description of it;
tests/gpu computes it sentence by sentence.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seq2seq.model import interface
from seq2seq.model.attention import Attention, KeyValue
from seq2seq.model.layout import Packed
from seq2seq.model.packed_attention import attend_packed, use_packed_kernel
from seq2seq.training.loss import training_loss
from tests.helpers.configs import tiny_config
from tests.helpers.corpora import tiny_batch
from tests.helpers.models import tiny_model
from tests.helpers.small_models import POSITIONS, SCORES, pairs, small_model, variant

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
LENGTHS = [[1], [1, 1, 1], [4, 4, 4], [1, 17, 3, 9], [64, 1, 2]]
SOURCES = [[1], [5, 1, 2], [4, 4, 4], [9, 2, 30, 1], [1, 1, 40]]  # of the same sentences
CASES = [(lengths, lengths, causal) for lengths in LENGTHS for causal in (False, True)]
CASES += [(lengths, sources, False) for lengths, sources in zip(LENGTHS, SOURCES, strict=True)]


def packed(lengths: list[int], extra: int = 0) -> Packed:
    mask = torch.arange(max(lengths) + extra) < torch.tensor(lengths)[:, None]
    return Packed(mask.flatten().nonzero().squeeze(1), *mask.shape).with_bounds()


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_bounds_are_the_running_sum_of_lengths(lengths: list[int], extra: int) -> None:
    layout = packed(lengths, extra)
    assert layout.bounds is not None and layout.bounds.dtype == torch.int32
    assert layout.bounds.tolist() == [0, *itertools.accumulate(lengths)]
    assert layout.sentence_M.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert layout.position_M.tolist() == [t for length in lengths for t in range(length)]


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, EXACT), (torch.float32, {}), (torch.bfloat16, {"rtol": 0.02, "atol": 0.02})]
)
@pytest.mark.parametrize("lengths,sources,causal", CASES)
def test_each_sentence_attends_as_if_alone(
    lengths: list[int], sources: list[int], causal: bool, dtype: torch.dtype, tolerance: dict[str, Any]
) -> None:
    """Contexts and gradients."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = inputs = tuple(
        torch.randn(1, 2, sum(each), 8, generator=generator, dtype=torch.float64).div(2).to(dtype).requires_grad_()
        for each in (lengths, sources, sources)
    )
    found = attend_packed(query, key, value, packed(lengths), packed(sources), causal)
    sentences = zip(query.split(lengths, 2), key.split(sources, 2), value.split(sources, 2), strict=True)
    alone = [F.scaled_dot_product_attention(*each, is_causal=causal, scale=1.0) for each in sentences]
    expected = torch.cat(alone, 2)
    torch.testing.assert_close(found, expected, **tolerance)
    weight = torch.arange(expected.numel()).sin().view_as(expected).to(dtype)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (found, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


# ------------------------------------------------------------------------------------------------ the kernel

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
    "bool compute_log_sumexp=False, *, float? scale=None, "
)


def test_the_kernel_takes_what_it_is_given() -> None:
    """Its name begins with an underscore, so another version of torch may change it."""
    assert SCHEMA in str(torch.ops.aten._efficient_attention_forward.default._schema)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_has_a_derivative(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own description of it, for tensors without numbers; that of its backward pass is incomplete."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    query = torch.empty(1, 2, 30, 8, device="meta", dtype=dtype, requires_grad=True)
    key = torch.empty(1, 2, 42, 8, device="meta", dtype=dtype, requires_grad=True)
    of_queries, of_keys = (
        Packed(torch.empty(count, dtype=torch.int64, device="meta"), 4, width).with_bounds()
        for count, width in ((30, 17), (42, 30))
    )
    context = attend_packed(query, key, key, of_queries, of_keys, False)
    assert context.shape == query.shape and context.dtype == dtype
    node = context.grad_fn
    while node is not None and "EfficientAttention" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None and sum(parent is not None for parent, _ in node.next_functions) == 3


# ------------------------------------------------------------------------------------------- within the models


def attend(
    module: Attention, layouts: tuple[Packed, Packed], query_MD: Tensor, memory_LD: Tensor, causal: bool
) -> tuple[KeyValue, list[Tensor]]:
    """Keys and values, and then the context of packed queries with all gradients."""
    layout, memory = layouts
    query_MD, memory_LD = (x.detach().requires_grad_() for x in (query_MD, memory_LD))
    mask = memory.unpack(torch.ones(len(memory_LD), 1))[..., 0] > 0
    kv = module.project(memory_LD, None if causal else mask, memory)
    context_MD = module(query_MD, kv, causal=causal, layout=layout).context_RTD
    inputs = (query_MD, memory_LD, *module.parameters())
    return kv, [context_MD, *torch.autograd.grad(context_MD.square().sum(), inputs)]


@pytest.mark.parametrize("score,position", [*itertools.product(SCORES, POSITIONS)])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_is_masked_attention(score: str, position: str, causal: bool) -> None:
    """For every score and position; those with a term for each pair of tokens pad."""
    torch.manual_seed(0)
    module = Attention(6, 6, 16, 2, score, position).double()
    lengths, sources = [5, 1, 9], [5, 1, 9] if causal else [2, 7, 1]
    query_MD, memory_LD = (torch.randn(sum(each), 6, dtype=torch.float64) for each in (lengths, sources))
    if causal:
        memory_LD = query_MD
    layouts = packed(lengths), packed(sources)
    kv, found = attend(module, layouts, query_MD, memory_LD, causal)
    assert (kv.packed is None) == (score == "additive" or position == "alibi")
    queries, keys = (layout._replace(bounds=None) for layout in layouts)
    _, expected = attend(module, (queries, keys), query_MD, memory_LD, causal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("score", SCORES)
def test_a_packed_model_computes_what_a_padded_one_does(
    score: str, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features and gradients, with longer padding than needed; nothing is unpacked where all attention stays packed."""
    model, found, unpacked = small_model(variant("transformer", score=score, position=position, heads=1)), [], 0
    unpack = Packed.unpack

    def counted(self: Packed, x: Tensor) -> Tensor:
        nonlocal unpacked
        unpacked += 1
        return unpack(self, x)

    for packing in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(interface, "use_packed_kernel", lambda _: True)
            patch.setattr(Packed, "unpack", counted)
            features_MD = model(pairs(extra=3), packing=packing)
        found.append((features_MD, torch.autograd.grad(features_MD.square().sum(), [*model.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert (unpacked == 0) == (score != "additive" and position != "alibi")


@pytest.mark.parametrize("options", [{}, {"r_drop": 1.0}, {"simcut": 1.0}], ids=str)
def test_a_packed_training_step_has_the_same_loss_and_gradients(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "use_packed_kernel", lambda _: True)
    settings, found = [f"training.{name}={value}" for name, value in options.items()], []
    for packing in ("false", "true"):
        torch.manual_seed(0)
        model, config = tiny_model("transformer"), tiny_config("transformer", f"training.packing={packing}", *settings)
        objective, plain = training_loss(model, tiny_batch(), config.training)
        objective.backward()
        found.append([objective, plain, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_cpu_an_amd_or_old_gpu_and_a_compiled_model_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(0)
    assert not use_packed_kernel(x)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert use_packed_kernel(x)
    for owner, name, answer in (
        (torch.compiler, "is_compiling", lambda: True),
        (torch.version, "hip", "6.4"),
        (torch.cuda, "get_device_capability", lambda _: (7, 5)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, answer)
            assert not use_packed_kernel(x)


@pytest.mark.parametrize("width,p,stays", [(16, 0.0, True), (24, 0.0, False), (8, 0.0, False), (16, 0.1, False)])
def test_odd_head_widths_pad_and_so_does_dropout(width: int, p: float, stays: bool) -> None:
    """The kernel reads the numbers of a head eight at a time, and drops different weights in its backward pass."""
    module = Attention(6, 6, width, 2, "scaled_dot", p=p)
    assert (module.project(torch.randn(4, 6), None, packed([3, 1])).packed is not None) == stays
    assert (module.eval().project(torch.randn(4, 6), None, packed([3, 1])).packed is not None) == (stays or p > 0)
