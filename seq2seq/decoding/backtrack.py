"""Backtracking: recover the hypotheses of a beam search from its steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from seq2seq.decoding.scoring import (
    NEVER,
    Beams,
    Hypothesis,
)


class Trellis:
    """All steps of a search; each hypothesis is traced back from its end."""

    def __init__(self, K: int) -> None:
        self.K, self.sentences = K, 0
        self.steps: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = []  # by length, then by batch
        self.left: list[Beams] = []

    def add(self, length: int, beams: Beams, origin_BK: Tensor) -> None:
        if len(self.steps) < length:
            self.steps.append([])
        self.steps[length - 1].append((beams.place_B, beams.last_BK, origin_BK, beams.log_probability_BK))

    def leave(self, beams: Beams) -> None:
        self.left.append(beams)

    def hypotheses(self, groups: int, count: int) -> list[list[Hypothesis]]:
        """Return the `count` best distinct hypotheses of each sentence, over all its groups."""
        if not self.left:
            return []
        place_F, score_F, node_F, ids_FT, log_FT = self._finished()
        score_of, length_of = score_F.tolist(), (node_F // self.K).tolist()
        ranked: list[dict[bytes, Hypothesis]] = [{} for _ in range(self.sentences // groups)]
        for f in np.lexsort((-score_F, place_F // groups)).tolist():
            different, length = ranked[place_F[f] // groups], length_of[f]
            said = ids_FT[f, : length - 1]
            if len(different) < count and said.tobytes() not in different:
                path = log_FT[f, :length]
                each = np.diff(path, prepend=0.0).tolist()
                different[said.tobytes()] = Hypothesis(said.tolist(), float(path[-1]), score_of[f], tuple(each))
        return [list(different.values()) for different in ranked]

    def _finished(self) -> tuple[np.ndarray, ...]:
        """Return index, score, node, ids and cumulative log probabilities by step of all F finished hypotheses."""
        together = [
            torch.cat([getattr(beams, name) for beams in self.left]).cpu().numpy()
            for name in ("done_score_BK", "done_log_probability_BK", "done_node_BK")
        ]
        place_BK = torch.cat([beams.place_B for beams in self.left]).cpu().numpy()[:, None].repeat(self.K, 1)
        ended_BK = together[0] > NEVER
        place_F, score_F, total_F, node_F = (x[ended_BK] for x in (place_BK, *together))
        length_F, k_F = np.divmod(node_F, self.K)
        ids_FT = np.zeros((len(place_F), len(self.steps)), np.int64)
        log_FT = np.zeros((len(place_F), len(self.steps)))
        log_FT[np.arange(len(place_F)), length_F - 1] = total_F
        row_B = np.zeros(self.sentences, np.int64)
        for t in range(len(self.steps) - 1, -1, -1):
            place_B, ids_BK, origin_BK, log_BK = (torch.cat(x).cpu().numpy() for x in zip(*self.steps[t], strict=True))
            row_B[place_B] = np.arange(len(place_B))
            here_F = np.flatnonzero(length_F - 2 >= t)
            row, k = row_B[place_F[here_F]], k_F[here_F]
            ids_FT[here_F, t], log_FT[here_F, t] = ids_BK[row, k], log_BK[row, k]
            k_F[here_F] = origin_BK[row, k]
        return place_F, score_F, node_F, ids_FT, log_FT
