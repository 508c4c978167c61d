"""Attention over packed sentences: one long row, in which each sentence attends to itself or to its source alone.

Shapes: N heads, H head width; M query and L key tokens of all sentences, one sentence after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seq2seq.model.layout import Packed

HEAD_MULTIPLE = 8  # of the head width, which the kernel reads in 16 bytes
CAUSAL = 1  # the kernel's number of a mask that hides the future, counted from each sentence's first token


def use_packed_kernel(x: Tensor) -> bool:
    """Return whether torch has a kernel for packed sentences here, on NVIDIA GPUs from Ampere on, and can run it.

    torch.compile cannot trace its backward pass, of which torch's description lacks an argument.
    """
    if not x.is_cuda or torch.version.hip is not None or torch.compiler.is_compiling():
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)  # older ones have no such kernel in bfloat16


def attend_packed(
    query_1NMH: Tensor, key_1NLH: Tensor, value_1NLH: Tensor, queries: Packed, keys: Packed, causal: bool
) -> Tensor:
    """Average each sentence's values; the scores are plain products."""
    if not query_1NMH.is_cuda:
        return attend_masked(query_1NMH, key_1NLH, value_1NLH, queries, keys, causal)
    # The kernel below torch's jagged tensors, without their Python code in each call; the host limits small models.
    longest_q, longest_k = min(queries.width, query_1NMH.shape[2]), min(keys.width, key_1NLH.shape[2])
    context_1MNH: Tensor = torch.ops.aten._efficient_attention_forward(
        query_1NMH.transpose(1, 2), key_1NLH.transpose(1, 2), value_1NLH.transpose(1, 2), None,
        queries.bounds, keys.bounds, longest_q, longest_k, 0.0, CAUSAL if causal else 0, True, scale=1.0,
    )[0]  # fmt: skip
    return context_1MNH.transpose(1, 2)


def attend_masked(
    query_1NMH: Tensor, key_1NLH: Tensor, value_1NLH: Tensor, queries: Packed, keys: Packed, causal: bool
) -> Tensor:
    """The definition, in plain form: all pairs of tokens, those of other sentences masked."""
    visible_ML = queries.sentence_M[:, None] == keys.sentence_M
    if causal:  # queries and keys are the same tokens
        visible_ML = visible_ML.tril()
    scores_1NML = (query_1NMH @ key_1NLH.mT).masked_fill(~visible_ML, -math.inf)
    return scores_1NML.softmax(-1) @ value_1NLH
