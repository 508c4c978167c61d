"""Backtracking: recover the hypotheses of a beam search from its steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seq2seq.decoding.constraints import NEG_INF
from seq2seq.decoding.scoring import Beams, Hypothesis


class Trellis:
    """All steps of a search; each hypothesis is traced back from its end."""

    def __init__(self, K: int) -> None:
        self.K, self.sentences = K, 0
        self.steps: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = []  # by length, then by batch
        self.finished: list[Beams] = []

    def add(self, length: int, beams: Beams, origin_BK: Tensor) -> None:
        if len(self.steps) < length:
            self.steps.append([])
        self.steps[length - 1].append((beams.index_B, beams.last_BK, origin_BK, beams.log_probability_BK))

    def finish(self, beams: Beams) -> None:
        self.finished.append(beams)

    def hypotheses(self, groups: int, count: int) -> list[list[Hypothesis]]:
        """Return the `count` best distinct hypotheses of each sentence, over all its groups."""
        if not self.finished:
            return []
        index_F, score_F, node_F, ids_FT, log_FT = self._backtrack()
        score_of, length_of = score_F.tolist(), (node_F // self.K).tolist()
        ranked: list[dict[bytes, Hypothesis]] = [{} for _ in range(self.sentences // groups)]
        for f in np.lexsort((-score_F, index_F // groups)).tolist():
            distinct, length = ranked[index_F[f] // groups], length_of[f]
            generated_ids = ids_FT[f, : length - 1]
            if len(distinct) < count and generated_ids.tobytes() not in distinct:
                path = log_FT[f, :length]
                token_logs = np.diff(path, prepend=0.0).tolist()
                distinct[generated_ids.tobytes()] = Hypothesis(
                    generated_ids.tolist(), float(path[-1]), score_of[f], tuple(token_logs)
                )
        return [list(distinct.values()) for distinct in ranked]

    def _backtrack(self) -> tuple[np.ndarray, ...]:
        """Return index, score, node, ids and cumulative log probabilities by step of all F finished hypotheses."""
        arrays_BK = [
            torch.cat([getattr(beams, name) for beams in self.finished]).cpu().numpy()
            for name in ("finished_score_BK", "finished_log_probability_BK", "finished_node_BK")
        ]
        index_BK = torch.cat([beams.index_B for beams in self.finished]).cpu().numpy()[:, None].repeat(self.K, 1)
        finished_BK = arrays_BK[0] > NEG_INF
        index_F, score_F, total_F, node_F = (x[finished_BK] for x in (index_BK, *arrays_BK))
        length_F, k_F = np.divmod(node_F, self.K)
        ids_FT = np.zeros((len(index_F), len(self.steps)), np.int64)
        log_FT = np.zeros((len(index_F), len(self.steps)))
        log_FT[np.arange(len(index_F)), length_F - 1] = total_F
        row_B = np.zeros(self.sentences, np.int64)
        for t in range(len(self.steps) - 1, -1, -1):
            index_B, ids_BK, origin_BK, log_BK = (torch.cat(x).cpu().numpy() for x in zip(*self.steps[t], strict=True))
            row_B[index_B] = np.arange(len(index_B))
            active_F = np.flatnonzero(length_F - 2 >= t)
            row, k = row_B[index_F[active_F]], k_F[active_F]
            ids_FT[active_F, t], log_FT[active_F, t] = ids_BK[row, k], log_BK[row, k]
            k_F[active_F] = origin_BK[row, k]
        return index_F, score_F, node_F, ids_FT, log_FT
