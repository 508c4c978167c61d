"""Progress of a beam search: the best hypothesis of every sentence after each step, assembled on the host.

Shapes: B entries of a step (sentences × groups), K hypotheses of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.constraints import NEG_INF
from seq2seq.decoding.scoring import Beams, coverage_penalty, length_penalty


class Best(NamedTuple):
    score: float
    ids: list[int]  # without END


class Progress:
    """Reports each undecided sentence's index and the ids of its best hypothesis, live or finished.

    A live hypothesis is scored as if it ended with the next token. Only a search that is watched pays for this.
    """

    def __init__(self, config: SearchConfig, report: Callable[[int, list[int]], None]) -> None:
        self.config, self.report = config, report
        self.live: dict[int, list[list[int]]] = {}  # by entry: the ids of its live hypotheses
        self.finished: dict[int, Best] = {}  # by entry: its best finished hypothesis

    def add(self, length: int, beams: Beams, origin_BK: Tensor, decided_B: Tensor) -> None:
        """Report the sentences of a step, without those that an earlier step decided."""
        score_BK = beams.log_probability_BK / length_penalty(length + 1, self.config)
        if beams.coverage_BKS is not None:
            score_BK = score_BK + coverage_penalty(beams.coverage_BKS, self.config.coverage_penalty)
        finished_B, node_B = beams.finished_score_BK[:, 0], beams.finished_node_BK[:, 0]
        columns = (beams.index_B, decided_B, beams.last_BK, origin_BK, score_BK, finished_B, node_B)
        best: dict[int, Best] = {}
        for entry, decided, *step in zip(*(column.tolist() for column in columns), strict=True):
            if not decided:
                one, sentence = self._advance(entry, length, *step), entry // self.config.groups
                best[sentence] = max(best.get(sentence, one), one, key=lambda best: best.score)
        for sentence, hypothesis in best.items():
            self.report(sentence, hypothesis.ids)

    def _advance(
        self, entry: int, length: int, last: list[int], origin: list[int], scores: list[float], score: float, node: int
    ) -> Best:
        """Extend an entry's hypotheses by one id each, and return the best of them and of the finished ones."""
        K = len(last)
        before = self.live.get(entry, [[]] * K)
        self.live[entry] = [[*before[k], id_] for k, id_ in zip(origin, last, strict=True)]
        if node // K == length:
            self.finished[entry] = Best(score, before[node % K])
        live = max(map(Best, scores, self.live[entry]), key=lambda best: best.score)
        return max(self.finished.get(entry, Best(NEG_INF, [])), live, key=lambda best: best.score)
