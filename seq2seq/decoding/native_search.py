"""What the compiled part of inference does of a search: the choice of next words, or all of a plain beam search.

Shapes: B sentences, K hypotheses of each, R = B × K rows, V vocabulary, C candidates, N translations that are wanted
of each sentence, T words, END included.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.scoring import Candidates, DecodingTask, Hypothesis, Specials, length_penalty
from seq2seq.model import native
from seq2seq.model.int8 import Int8Decoder, Int8Output, Int8State, threads_for
from seq2seq.model.interface import Seq2Seq

PARALLEL_ROWS = 33  # fewest rows of logits worth a second thread


def log_sum_exp(library: ctypes.CDLL, x_RV: Tensor) -> Tensor:
    (R, V), out_R1 = x_RV.shape, x_RV.new_empty(len(x_RV), 1)
    library.seq2seq_log_sum_exp(x_RV.data_ptr(), R, V, out_R1.data_ptr(), threads_for(R, PARALLEL_ROWS))
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
    library.seq2seq_top(*given, B, K, V, count, *found, threads_for(B * K, PARALLEL_ROWS))
    return Candidates(value_BC, value_BC, ids_BC, origin_BC)


def is_compiled(model: Seq2Seq) -> bool:
    """Return whether a plain beam search with this model is one call: a Transformer in int8."""
    return isinstance(model.decoder, Int8Decoder)


def plain_search(
    model: Seq2Seq, state: Int8State, task: DecodingTask, config: SearchConfig, specials: Specials
) -> list[list[Hypothesis]]:
    """Return the best translations of every sentence, best first, as `beam_search` does without rules."""
    decoder, output = model.decoder, model.output
    assert isinstance(decoder, Int8Decoder) and isinstance(output, Int8Output)
    B, T = len(task.max_length_B), int(task.max_length_B.max())
    N = config.n_best if config.select_by == "score" else config.beam
    listed = () if task.shortlist_BU is None else (task.shortlist_BU.contiguous(), output.rows_OI)
    U = listed[0].shape[1] if listed else 0
    ids_BNT, count_BN = torch.empty(B, N, T, dtype=torch.int64), torch.empty(B, N, dtype=torch.int64)
    log_probability_BNT, score_BN = torch.zeros(B, N, T), torch.empty(B, N)
    arrays = {
        "embedding_VD": model.target_embedding.weight,
        "position_TD": decoder.first_positions(T),
        **{"memory": state.memory_MX, "first_B": state.first_B, "length_B": state.length_B},
        "longest_B": task.max_length_B,
        "penalty_T": torch.tensor([length_penalty(n, config) for n in range(T + 1)], dtype=torch.float32),
        "banned_X": torch.tensor(specials.banned),
        **dict(zip(("listed_BU", "rows_OI"), listed, strict=False)),
        **{"ids_BNT": ids_BNT, "log_probability_BNT": log_probability_BNT, "score_BN": score_BN, "count_BN": count_BN},
    }
    search = native.Search(
        **{name: x.data_ptr() for name, x in arrays.items()},
        **{"sentences": B, "beam": config.beam, "wanted": N, "columns": T, "words": U},
        **{"bans": len(specials.banned), "begin": specials.begin, "end": specials.end},
        threads=torch.get_num_threads(),
        scale=decoder.input.scale,
    )
    decoder.library.seq2seq_search(decoder.struct, output.map, search)
    each_BNT = np.diff(log_probability_BNT.double().numpy(), prepend=0.0)
    found = zip(
        ids_BNT.tolist(), log_probability_BNT.tolist(), score_BN.tolist(), each_BNT, count_BN.tolist(), strict=True
    )
    return [
        [
            Hypothesis(ids_T[: count - 1], log_T[count - 1], score, tuple(each_T[:count].tolist()))
            for ids_T, log_T, score, each_T, count in zip(*sentence, strict=True)
            if count
        ]
        for sentence in found
    ]
