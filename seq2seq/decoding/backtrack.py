"""Backtracking: recover the hypotheses of a beam search from its steps.

Shapes: B sentences of a step, K hypotheses of each, F finished hypotheses, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.decoding.constraints import NEG_INF
from seq2seq.decoding.progress import Progress
from seq2seq.decoding.scoring import Beams, Hypothesis

Columns = tuple[Tensor, ...]


class Finished(NamedTuple):
    """All finished hypotheses of a search."""

    index_F: NDArray[Any]  # sentence index × number of groups + group
    score_F: NDArray[Any]
    log_probability_F: NDArray[Any]
    length_F: NDArray[Any]  # with END
    k_F: NDArray[Any]  # index of the hypothesis that END continues


class Trellis:
    """All steps of a search; each hypothesis is traced back from its end."""

    def __init__(self, K: int, progress: Progress | None = None) -> None:
        self.K, self.progress, self.sentences = K, progress, 0
        self.steps: list[list[Columns]] = []  # by length, then by batch
        self.finished: list[Columns] = []

    def add(self, length: int, beams: Beams, origin_BK: Tensor, decided_B: Tensor) -> None:
        """Keep a step; `decided_B` marks the sentences that earlier ones decided."""
        if len(self.steps) < length:
            self.steps.append([])
        self.steps[length - 1].append((beams.index_B, beams.last_BK, origin_BK, beams.log_probability_BK))
        if self.progress:
            self.progress.add(length, beams, origin_BK, decided_B)

    def finish(self, beams: Beams, decided_B: Tensor) -> None:
        """Keep the finished hypotheses of sentences that this step decided."""
        score_BK = beams.finished_score_BK.masked_fill(~decided_B[:, None], NEG_INF)
        self.finished.append((beams.index_B, score_BK, beams.finished_log_probability_BK, beams.finished_node_BK))

    def hypotheses(self, groups: int, count: int) -> list[list[Hypothesis]]:
        """Return the `count` best distinct hypotheses of each sentence, over all its groups."""
        if not self.finished:
            return []
        finished = self._all_finished()
        ids_FT, log_probability_FT = self._trace(finished)
        score, length, sentence_F = finished.score_F.tolist(), finished.length_F.tolist(), finished.index_F // groups
        ranked: list[dict[bytes, Hypothesis]] = [{} for _ in range(self.sentences // groups)]
        for f in np.lexsort((-finished.score_F, sentence_F)).tolist():
            distinct, generated_ids = ranked[sentence_F[f]], ids_FT[f, : length[f] - 1]
            if len(distinct) < count and generated_ids.tobytes() not in distinct:
                path = log_probability_FT[f, : length[f]]
                distinct[generated_ids.tobytes()] = Hypothesis(
                    generated_ids.tolist(), float(path[-1]), score[f], tuple(np.diff(path, prepend=0.0).tolist())
                )
        return [list(distinct.values()) for distinct in ranked]

    def _all_finished(self) -> Finished:
        index_B, score_BK, log_probability_BK, node_BK = _concatenate(self.finished)
        b_F, k_F = np.nonzero(score_BK > NEG_INF)
        length_F, origin_F = np.divmod(node_BK[b_F, k_F], self.K)
        return Finished(index_B[b_F], score_BK[b_F, k_F], log_probability_BK[b_F, k_F], length_F, origin_F)

    def _trace(self, finished: Finished) -> tuple[NDArray[Any], NDArray[Any]]:
        """Follow each hypothesis from its end to its first id; return ids, and log probabilities after each step."""
        F, k_F = len(finished.index_F), finished.k_F.copy()
        ids_FT, log_probability_FT = np.zeros((F, len(self.steps)), np.int64), np.zeros((F, len(self.steps)))
        log_probability_FT[np.arange(F), finished.length_F - 1] = finished.log_probability_F
        row_of = np.zeros(self.sentences, np.int64)
        for t in reversed(range(len(self.steps))):
            index_B, ids_BK, origin_BK, log_probability_BK = _concatenate(self.steps[t])
            row_of[index_B] = np.arange(len(index_B))
            longer_F = np.flatnonzero(finished.length_F > t + 1)  # END came in a later step
            row, k = row_of[finished.index_F[longer_F]], k_F[longer_F]
            ids_FT[longer_F, t], log_probability_FT[longer_F, t] = ids_BK[row, k], log_probability_BK[row, k]
            k_F[longer_F] = origin_BK[row, k]
        return ids_FT, log_probability_FT


def _concatenate(parts: Sequence[Columns]) -> list[NDArray[Any]]:
    """Join the columns of several batches on the CPU."""
    return [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
