"""The best next words, chosen by the compiled part of inference: float32 logits on a CPU.

Shapes: B sentences, K hypotheses of each, R = B × K rows, V vocabulary, C candidates.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from seq2seq.decoding.scoring import Candidates


def log_sum_exp(library: ctypes.CDLL, x_RV: Tensor) -> Tensor:
    (R, V), out_R1 = x_RV.shape, x_RV.new_empty(len(x_RV), 1)
    library.seq2seq_log_sum_exp(x_RV.data_ptr(), R, V, out_R1.data_ptr(), threads(R))
    return out_R1


def top_candidates(
    library: ctypes.CDLL, x_RV: Tensor, log_probability_BK: Tensor, count: int, normalizer_R1: Tensor
) -> Candidates:
    """Like `scoring.top_candidates`; of equal continuations the first comes first."""
    (B, K), V = log_probability_BK.shape, x_RV.shape[1]
    log_probability_BK, count = log_probability_BK.contiguous(), min(count, K * V)
    value_BC = x_RV.new_empty(B, count)
    ids_BC, origin_BC = (torch.empty(B, count, dtype=torch.int64) for _ in range(2))
    given = (x.data_ptr() for x in (x_RV, normalizer_R1, log_probability_BK))
    found = (x.data_ptr() for x in (value_BC, ids_BC, origin_BC))
    library.seq2seq_top(*given, B, K, V, count, *found, threads(B * K))
    return Candidates(value_BC, value_BC, ids_BC, origin_BC)


def threads(rows: int) -> int:
    """Return how many threads these rows of logits are worth."""
    return torch.get_num_threads() if rows > 32 else 1
