"""Lexical constraints: required words, forbidden words and repetition, as tables on the device of the search.

Shapes: B sentences, K hypotheses of each, R rows, T target positions, V vocabulary, C candidates, F forbidden and
Q required phrases, X = F + 2Q automata, Z states of all automata together. The automata are those of the texts of
forbidden and required phrases, and last those of the ids of required phrases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seq2seq.data.store import Ragged
from seq2seq.decoding.phrases import Phrase, PieceTexts, partial_matches

NEG_INF = float("-inf")
SPACE = "▁"  # sentencepiece's word boundary


class Rules:
    """Constraints on hypotheses; every result depends only on the ids generated so far."""

    def __init__(
        self,
        pieces: Sequence[str],
        end: int,
        required: Sequence[tuple[str, Sequence[int]]] = (),
        forbidden: Sequence[str] = (),
        no_repeat: int = 0,
        device: torch.device | None = None,
    ) -> None:
        # The end of a sentence ends a word as a space does.
        self.texts = [" " if id_ == end else piece.replace(SPACE, " ") for id_, piece in enumerate(pieces)]
        self.end, self.no_repeat, self.has_phrases = end, no_repeat, bool(required or forbidden)
        self.required_ids = [list(ids) for _, ids in required]
        self.required_length = sum(map(len, self.required_ids))
        if self.has_phrases:
            self._build_tables([text for text, _ in required], forbidden, device)

    def _build_tables(self, required: Sequence[str], forbidden: Sequence[str], device: torch.device | None) -> None:
        """Number the states of all automata together."""
        vocabulary = PieceTexts(self.texts)
        automata = [
            *(Phrase(text).forbidden(vocabulary) for text in forbidden),
            *(Phrase(text).required(vocabulary, self.end) for text in required),
        ]
        tables = [one.next_SV for one in automata] + [
            partial_matches(ids, len(self.texts)) for ids in self.required_ids
        ]
        start_X = np.cumsum([0, *map(len, tables)])[:-1]
        next_ZV = np.vstack([table + start for table, start in zip(tables, start_X, strict=True)])
        banned_2ZV = np.concatenate([one.banned_2SV for one in automata], 1)
        complete_Z = np.concatenate([one.complete_S for one in automata])
        ids_QT = (
            Ragged.of(self.required_ids).padded(np.arange(len(required)), 0) if required else np.zeros((0, 1), np.int64)
        )
        length_Q = np.array([len(ids) for ids in self.required_ids], np.int64)
        self.start_X, self.next_ZV, self.banned_2ZV, self.complete_Z, self.ids_QT, self.length_Q = (
            torch.from_numpy(table).to(device)
            for table in (start_X, next_ZV.astype(np.int32), banned_2ZV, complete_Z, ids_QT, length_Q)
        )

    # ------------------------------------------------------------------------------ phrases, id by id

    def start(self, B: int, K: int) -> Tensor | None:
        """Return the states of all automata before the first id."""
        return self.start_X.expand(B, K, -1) if self.has_phrases else None

    def advance(self, states_BKX: Tensor, ids_BK: Tensor) -> Tensor:
        return self.next_ZV[states_BKX, ids_BK[..., None]].long()

    def banned(self, states_RX: Tensor, final_R: Tensor) -> Tensor:
        """Return the ids that may not follow; after `final_R` only END can."""
        Q, final_R = len(self.required_ids), final_R.long()
        first_R, *others = states_RX[:, : states_RX.shape[1] - Q].unbind(1)
        banned_RV = self.banned_2ZV[final_R, first_R]
        for state_R in others:
            banned_RV |= self.banned_2ZV[final_R, state_R]
        return banned_RV

    # --------------------------------------------- required words: dynamic beam allocation (Post & Vilar 2018)

    def missing(self, states_BKX: Tensor) -> Tensor:
        """Return which required phrases each hypothesis still lacks."""
        Q = len(self.required_ids)
        return ~self.complete_Z[states_BKX[..., -2 * Q : -Q]]

    def matched(self, states_BKX: Tensor) -> Tensor:
        """Return how many ids of each required phrase end each hypothesis."""
        Q = len(self.required_ids)
        return states_BKX[..., -Q:] - self.start_X[-Q:]

    def wanted(self, states_RX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids that begin or continue a required phrase, and which of them count: of a missing one, once."""
        matched_RQ, phrase_Q = self.matched(states_RX), torch.arange(len(self.ids_QT), device=states_RX.device)
        ids_RY = torch.cat((self.ids_QT[:, 0].expand_as(matched_RQ), self.ids_QT[phrase_Q, matched_RQ]), 1)
        counts_RY = self.missing(states_RX).repeat(1, 2)
        earlier_RYY = (_equal_pairs(ids_RY) & counts_RY[:, None]).tril(-1)
        return ids_RY, counts_RY & ~earlier_RYY.any(-1)

    def progress(self, states_BCX: Tensor) -> Tensor:
        """Count the ids of required phrases generated so far: complete phrases, and the one in progress."""
        missing_BCQ = self.missing(states_BCX)
        return (self.length_Q * ~missing_BCQ).sum(-1) + (self.matched(states_BCX) * missing_BCQ).amax(-1)

    def allocate(
        self, score_BC: Tensor, ids_BC: Tensor, origin_BC: Tensor, states_BKX: Tensor, remaining_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the K candidates of each sentence that continue: the best of every degree of progress.

        Also return which of them are mere fillers.
        """
        K, C, total = states_BKX.shape[1], ids_BC.shape[1], self.required_length
        score_BC, order_BC = score_BC.sort(stable=True, dim=1, descending=True)
        ids_BC, origin_BC = ids_BC.gather(1, order_BC), origin_BC.gather(1, order_BC)
        # Possible hypotheses of a sentence differ, so candidates are equal if origin and id are.
        same_BCC = _equal_pairs(origin_BC) & _equal_pairs(ids_BC)
        possible_BC = (ids_BC != self.end) & (score_BC > NEG_INF) & ~same_BCC.tril(-1).any(-1)
        missing_BC = total - self.progress(self.advance(states_BKX.take_along_dim(origin_BC[:, :, None], 1), ids_BC))
        in_time_BC = possible_BC & (missing_BC < remaining_B[:, None])
        # A last resort: candidates that cannot add all that is missing, and end, within the length limit.
        any_in_time_B1 = in_time_BC.any(1, keepdim=True)
        pool_BC = in_time_BC.where(any_in_time_B1, possible_BC)
        ordinal_BC = (_equal_pairs(missing_BC) & pool_BC[:, None]).tril(-1).sum(-1)
        # The best of every degree come first; the rest goes to the candidates with the most progress.
        reserved_BC = (ordinal_BC < K // (total + 1)) | ~any_in_time_B1
        tier_BC = (1 + missing_BC).masked_fill(reserved_BC, 0).masked_fill(~pool_BC, total + 2)
        position_C = torch.arange(C, device=ids_BC.device)
        chosen_BK = (tier_BC * C + position_C).topk(K, dim=1, largest=False).indices
        # Best first, and last the fillers: the best of what cannot continue.
        filler_BK = ~pool_BC.gather(1, chosen_BK)
        chosen_BK, index_BK = chosen_BK.masked_fill(filler_BK, C).sort(1)
        first_B1 = possible_BC.int().argmin(1, keepdim=True)
        filler_BK = filler_BK.gather(1, index_BK)
        return order_BC.gather(1, first_B1.where(filler_BK, chosen_BK)), filler_BK


def _equal_pairs(x_BC: Tensor) -> Tensor:
    return x_BC[:, :, None] == x_BC[:, None]


def ban_repeats(logits_RV: Tensor, prefix_RT: Tensor, n: int) -> None:
    """Set ids that would repeat an n-gram to −∞."""
    if prefix_RT.shape[1] < n:
        return
    seen_RXn = prefix_RT.unfold(1, n, 1)
    tail_R1n = prefix_RT[:, None, prefix_RT.shape[1] - n + 1 :]
    repeats_RX = (seen_RXn[:, :, : n - 1] == tail_R1n).all(-1)
    bound_RX = torch.full_like(repeats_RX, -NEG_INF, dtype=logits_RV.dtype).masked_fill(repeats_RX, NEG_INF)
    logits_RV.scatter_reduce_(1, seen_RXn[:, :, n - 1], bound_RX, "amin")
