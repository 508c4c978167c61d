"""Step function → hypotheses. Greedy search is a beam of one. Nothing here knows a model.

Shapes: B sentences still open, K hypotheses of each, R = B × K rows, T target positions, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from seq2seq.config import SearchConfig
from seq2seq.model.state import State

Step = Callable[[Tensor, State], tuple[Tensor, State]]  # tokens_R1, state → logits_R1V, state
NEVER = float("-inf")


@dataclass(frozen=True)
class Specials:
    """Ids with a meaning; `banned` ones are never said."""

    begin: int
    end: int
    banned: tuple[int, ...]


@dataclass(frozen=True)
class Hypothesis:
    ids: list[int]  # without END
    log_probability: float  # of all ids and END
    score: float  # the log probability over the length penalty: what hypotheses are ranked by
    token_log_probabilities: tuple[float, ...]  # of each id, then of END


@dataclass(frozen=True)
class Beams:
    """The open hypotheses of B sentences, and the best finished ones so far."""

    sentence_B: Tensor  # which sentence of the input each row group is
    limit_B: Tensor  # tokens, END included
    tokens_BKT: Tensor
    path_BKT: Tensor  # the log probability after each token
    log_probability_BK: Tensor
    done_BKT: Tensor
    done_path_BKT: Tensor
    done_log_probability_BK: Tensor
    done_score_BK: Tensor
    done_length_BK: Tensor

    def select(self, kept_B: Tensor) -> Beams:
        return Beams(*(getattr(self, name)[kept_B] for name in self.__dataclass_fields__))


@torch.inference_mode()
def beam_search(
    step: Step, state: State, config: SearchConfig, specials: Specials, max_length_B: Tensor
) -> list[list[Hypothesis]]:
    """The `n_best` finished hypotheses of every sentence, best first; a sentence leaves as soon as it is decided.

    A sentence is decided when `beam` hypotheses are finished, or when its longest length is reached; nothing of it
    depends on its neighbours in the batch.
    """
    K = config.beam
    beams = _start(max_length_B, K, specials)
    results: list[list[Hypothesis]] = [[] for _ in range(len(max_length_B))]
    rows_R = torch.arange(len(max_length_B), device=max_length_B.device).repeat_interleave(K)
    state = state.select(rows_R, K) if K > 1 else state
    for length in range(1, int(max_length_B.max()) + 1):
        logits_R1V, state = step(beams.tokens_BKT[:, :, -1].reshape(-1, 1), state)
        scores_BC, ids_BC, origin_BC = expand(logits_R1V[:, -1], beams, specials, length)
        beams = finish(beams, scores_BC, ids_BC, origin_BC, specials.end, length, config.length_penalty)
        beams, origin_BK = extend(beams, scores_BC, ids_BC, origin_BC, specials.end)
        decided_B = (beams.done_score_BK[:, -1] > NEVER) | (beams.limit_B <= length)
        if decided_B.any():
            _collect(beams.select(decided_B), config.n_best, results)
            kept_B = (~decided_B).nonzero()[:, 0]
            if len(kept_B) == 0:
                break
            beams = beams.select(kept_B)
            state = state.select((kept_B[:, None] * K + origin_BK[kept_B]).flatten(), K)
        elif K > 1:
            first_row_B1 = torch.arange(len(origin_BK), device=origin_BK.device)[:, None] * K
            state = state.reorder((first_row_B1 + origin_BK).flatten())
    return results


def _start(max_length_B: Tensor, K: int, specials: Specials) -> Beams:
    """One hypothesis that says nothing yet; the K − 1 others beside it are impossible."""
    B, device = len(max_length_B), max_length_B.device
    longest = int(max_length_B.max())
    impossible_BK = torch.full((B, K), NEVER, device=device)
    log_probability_BK = impossible_BK.clone()
    log_probability_BK[:, 0] = 0.0
    return Beams(
        sentence_B=torch.arange(B, device=device),
        limit_B=max_length_B,
        tokens_BKT=torch.full((B, K, 1), specials.begin, device=device),
        path_BKT=log_probability_BK[:, :, None],
        log_probability_BK=log_probability_BK,
        done_BKT=torch.zeros((B, K, longest), dtype=torch.int64, device=device),
        done_path_BKT=torch.zeros((B, K, longest), device=device),
        done_log_probability_BK=impossible_BK,
        done_score_BK=impossible_BK,
        done_length_BK=torch.zeros((B, K), dtype=torch.int64, device=device),
    )


def expand(logits_RV: Tensor, beams: Beams, specials: Specials, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The 2K best continuations of each sentence → their log probabilities, last ids, and hypotheses of origin."""
    B, K, _ = beams.tokens_BKT.shape
    logits_RV = logits_RV.to(torch.float32, copy=True)
    # One pass over the logits instead of logsumexp's four.
    total_R1 = logits_RV[:, :1] - logits_RV.log_softmax(-1)[:, :1]
    for banned in specials.banned:
        logits_RV[:, banned] = NEVER
    last_R = (beams.limit_B <= length).repeat_interleave(K)
    if last_R.any():
        # At its longest length a sentence can only end.
        end_R = logits_RV[:, specials.end].clone()
        logits_RV[last_R] = NEVER
        logits_RV[:, specials.end] = end_R
    # The best 2K of a sentence are among the best 2K of its rows; only those are normalised.
    best_RC, ids_RC = logits_RV.topk(min(2 * K, logits_RV.shape[1]), dim=-1)
    scores_BC = ((best_RC - total_R1).view(B, K, -1) + beams.log_probability_BK[:, :, None]).flatten(1)
    scores_BC, place_BC = scores_BC.topk(min(2 * K, scores_BC.shape[1]), dim=-1)
    return scores_BC, ids_RC.reshape(B, -1).gather(1, place_BC), place_BC // ids_RC.shape[1]


def finish(
    beams: Beams, scores_BC: Tensor, ids_BC: Tensor, origin_BC: Tensor, end: int, length: int, penalty: float
) -> Beams:
    """The candidates among the K best that end, merged into the K best finished hypotheses."""
    K = beams.tokens_BKT.shape[1]
    ends_BC = (ids_BC == end)[:, :K]
    if not ends_BC.any():
        return beams
    log_probability_BC = scores_BC[:, :K].masked_fill(~ends_BC, NEVER)
    scores_BX = torch.cat((beams.done_score_BK, log_probability_BC / length_penalty(length, penalty)), 1)
    done_score_BK, chosen_BK = scores_BX.topk(K, dim=1)

    def merged(done_BKT: Tensor, open_BKT: Tensor) -> Tensor:
        ended_BCT = done_BKT.new_zeros((*ends_BC.shape, done_BKT.shape[2]))
        ended_BCT[:, :, : length - 1] = open_BKT[:, :, 1:].take_along_dim(origin_BC[:, :K, None], 1)
        return torch.cat((done_BKT, ended_BCT), 1).take_along_dim(chosen_BK[:, :, None], 1)

    lengths_BC = torch.full_like(ids_BC[:, :K], length - 1)
    return replace(
        beams,
        done_BKT=merged(beams.done_BKT, beams.tokens_BKT),
        done_path_BKT=merged(beams.done_path_BKT, beams.path_BKT),
        done_log_probability_BK=torch.cat((beams.done_log_probability_BK, log_probability_BC), 1).gather(1, chosen_BK),
        done_score_BK=done_score_BK,
        done_length_BK=torch.cat((beams.done_length_BK, lengths_BC), 1).gather(1, chosen_BK),
    )


def extend(beams: Beams, scores_BC: Tensor, ids_BC: Tensor, origin_BC: Tensor, end: int) -> tuple[Beams, Tensor]:
    """The K best candidates that go on → the new open hypotheses, and the old ones they come from."""
    K = beams.tokens_BKT.shape[1]
    open_BC = scores_BC.masked_fill(ids_BC == end, NEVER)
    log_probability_BK, chosen_BK = open_BC.topk(K, dim=1)
    origin_BK = origin_BC.gather(1, chosen_BK)
    tokens_BKT = beams.tokens_BKT.take_along_dim(origin_BK[:, :, None], 1)
    tokens_BKT = torch.cat((tokens_BKT, ids_BC.gather(1, chosen_BK)[:, :, None]), 2)
    path_BKT = beams.path_BKT.take_along_dim(origin_BK[:, :, None], 1)
    path_BKT = torch.cat((path_BKT, log_probability_BK[:, :, None]), 2)
    return replace(beams, tokens_BKT=tokens_BKT, path_BKT=path_BKT, log_probability_BK=log_probability_BK), origin_BK


def length_penalty(length: int, alpha: float) -> float:
    """What a log probability is divided by (Wu et al. 2016, §7)."""
    return float(((5 + length) / 6) ** alpha)


def _collect(beams: Beams, n_best: int, results: list[list[Hypothesis]]) -> None:
    """The finished hypotheses of decided sentences, as plain Python."""
    columns = (
        beams.sentence_B,
        beams.done_BKT,
        beams.done_path_BKT,
        beams.done_length_BK,
        beams.done_log_probability_BK,
        beams.done_score_BK,
    )
    for sentence, *rest in zip(*(c.tolist() for c in columns), strict=True):
        ranked = zip(*rest, strict=True)
        results[sentence] = [
            Hypothesis(ids[:n], p, s, _steps(path[:n], p)) for ids, path, n, p, s in ranked if s > NEVER
        ][:n_best]


def _steps(path: list[float], total: float) -> tuple[float, ...]:
    """What each token added to the log probability."""
    return tuple(after - before for before, after in pairwise([0.0, *path, total]))
