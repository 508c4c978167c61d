"""Beam search over a step function, independent of the model; greedy search is a beam of one.

Shapes: B unfinished sentences, K hypotheses of each, R = B × K rows, S source and T target positions, V vocabulary,
C candidates, G groups. With G > 1 a sentence occupies G entries of B, one per group, with K hypotheses each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.backtrack import Trellis
from seq2seq.decoding.constraints import NEG_INF, Rules
from seq2seq.decoding.processors import (
    Processor,
    StepInput,
    next_candidates,
    next_log_probabilities,
    step_processors,
)
from seq2seq.decoding.progress import Progress
from seq2seq.decoding.scoring import (
    Beams,
    Candidates,
    DecodingTask,
    Hypothesis,
    Specials,
    coverage_penalty,
    length_penalty,
    top_candidates,
)
from seq2seq.model.decoder_state import State

WAIT_FRACTION = 0.25  # fraction of a batch that waits for the next one
SIZES_PER_DOUBLING = 4  # allowed batch sizes between a number of sentences and its double

# tokens_R1, state, perhaps shortlist_BU → logits_R1V, state; with a coverage penalty, also attention to the source_RS.
Step = Callable[..., tuple[Tensor, State] | tuple[Tensor, State, Tensor]]


@dataclass(frozen=True)
class LiveBatch:
    """Undecided sentences, all after the same number of steps, and decided ones that fill the batch."""

    state: State
    beams: Beams
    task: DecodingTask
    decided_B: Tensor
    length: int
    processors: Sequence[Processor]
    library: CDLL | None  # compiled code that chooses the next words of float32 logits

    def __len__(self) -> int:
        return self.undecided

    @cached_property
    def undecided(self) -> int:
        return int(np.count_nonzero(self.remaining_B))

    @cached_property
    def remaining_B(self) -> NDArray[np.int64]:
        return self.task.remaining(self.length, self.decided_B)

    def join(self, other: LiveBatch) -> LiveBatch:
        """Concatenate two batches of the same length."""
        state, task = self.state.join(other.state.independent()), self.task.join(other.task)
        decided_B = torch.cat((self.decided_B, other.decided_B))
        return replace(self, state=state, beams=self.beams.join(other.beams), task=task, decided_B=decided_B)

    def shrink(self, groups: int) -> LiveBatch:
        """Drop decided sentences, down to one of a few sizes: a CPU builds new kernels for each new shape."""
        decided_S, count = self.decided_B[::groups], len(self) // groups
        step = 1 << max(0, (count // SIZES_PER_DOUBLING).bit_length() - 1)
        size = -(-count // step) * step
        if size >= len(decided_S):
            return self
        kept_S = decided_S.int().argsort(stable=True)[:size]

        def indices_of(per_sentence: int) -> Tensor:
            """Return the indices of kept entries if a sentence has `per_sentence` of them."""
            return (kept_S[:, None] * per_sentence + torch.arange(per_sentence, device=kept_S.device)).flatten()

        kept_B, beam = indices_of(groups), self.state.beam
        state = self.state.select(indices_of(beam), beam) if size else self.state
        beams, task, decided_B = self.beams.select(kept_B), self.task.select(kept_B), self.decided_B[kept_B]
        return replace(self, state=state, beams=beams, task=task, decided_B=decided_B)


@torch.inference_mode()
def beam_search(
    step: Step,
    batches: Iterable[tuple[State, DecodingTask]],
    config: SearchConfig,
    specials: Specials,
    progress: Progress | None = None,
    library: CDLL | None = None,
) -> list[list[Hypothesis]]:
    """Return the best finished hypotheses of every sentence, best first; those found after it is decided are ignored.

    Steps with few sentences cost nearly as much as steps with many, so the last sentences of a batch wait until the
    next batch reaches their length, and join it. No result depends on neighbouring sentences.
    """
    trellis = Trellis(config.beam // config.groups, progress)
    waiting: LiveBatch | None = None
    for state, task in batches:
        live = start(state, task, config, specials, trellis.sentences, library)
        trellis.sentences += len(live)
        threshold = len(live) * WAIT_FRACTION
        while len(live) and (waiting or len(live) > threshold):
            live = advance(step, live, config, specials, trellis)
            if waiting and waiting.length == live.length:
                live, waiting = live.join(waiting) if len(live) else waiting, None
        waiting = waiting or (live if len(live) else None)
    while waiting:
        waiting = advance(step, waiting, config, specials, trellis)
    return trellis.hypotheses(config.groups, config.n_best if config.select_by == "score" else config.beam)


def advance(step: Step, live: LiveBatch, config: SearchConfig, specials: Specials, trellis: Trellis) -> LiveBatch:
    """Extend every hypothesis by one token, and drop the sentences that this decides."""
    beams, task, length = live.beams, live.task, live.length + 1
    logits_R1V, state, *attention = step(beams.last_BK.view(-1, 1), live.state, *task.shortlist)
    if attention:
        beams = add_coverage(beams, attention[0], task)
    candidates = expand(logits_R1V[:, -1], beams, live, config, specials.end)
    beams = finish(beams, candidates, config, specials.end, length)
    beams, origin_BK = extend(beams, candidates, specials.end, task, length)
    trellis.add(length, beams, origin_BK, live.decided_B)
    decided_B = decided(beams, config, task, length)
    if config.beam > 1:
        K = beams.last_BK.shape[1]
        row_BK = origin_BK + torch.arange(0, origin_BK.numel(), K, device=origin_BK.device)[:, None]
        state = state.reorder(row_BK.flatten())
    after = replace(live, state=state, beams=beams, decided_B=live.decided_B | decided_B, length=length)
    if len(after) == len(live):
        return after
    trellis.finish(beams, decided_B & ~live.decided_B)
    return after.shrink(config.groups)


def start(
    state: State,
    task: DecodingTask,
    config: SearchConfig,
    specials: Specials,
    first: int,
    library: CDLL | None,
) -> LiveBatch:
    """Return one empty hypothesis per sentence; its K − 1 others are impossible.

    `first` is the index of the first sentence over all batches.
    """
    G, device = config.groups, task.max_length_B.device
    B, K = len(task.max_length_B) * G, config.beam // G
    impossible_BK = torch.full((B, K), NEG_INF, device=device)
    log_probability_BK = impossible_BK.clone()
    log_probability_BK[:, 0] = 0.0
    last_BK = torch.full((B, K), specials.begin, device=device)
    beams = Beams(
        index_B=torch.arange(first, first + B, device=device),
        last_BK=last_BK,
        log_probability_BK=log_probability_BK,
        finished_score_BK=impossible_BK,
        finished_log_probability_BK=impossible_BK,
        finished_node_BK=torch.zeros_like(last_BK),
        prefix_BKT=last_BK[:, :, None] if task.rules and task.rules.no_repeat else None,
        phrase_states_BKX=task.rules.start(B, K) if task.rules else None,
        coverage_BKS=None,
    )
    if config.beam > 1:
        rows_R = torch.arange(B // G, device=device).repeat_interleave(config.beam)
        state = state.select(rows_R, config.beam)
    decided_B = torch.zeros(B, dtype=torch.bool, device=device)
    return LiveBatch(state, beams, task.repeat(G), decided_B, 0, step_processors(task, specials), library)


def add_coverage(beams: Beams, attention_RS: Tensor, task: DecodingTask) -> Beams:
    """Accumulate this step's attention; padding counts as covered."""
    attention_BKS = attention_RS.unflatten(0, beams.last_BK.shape)
    if beams.coverage_BKS is None:
        padding_BS = torch.arange(attention_RS.shape[1], device=attention_RS.device) >= task.source_length_B[:, None]
        return replace(beams, coverage_BKS=attention_BKS + padding_BS[:, None].float())
    return replace(beams, coverage_BKS=beams.coverage_BKS + attention_BKS)


def expand(logits_RV: Tensor, beams: Beams, live: LiveBatch, config: SearchConfig, end: int) -> Candidates:
    """Return the best continuations of each sentence, best first."""
    K, rules, task = beams.last_BK.shape[1], live.task.rules, live.task
    if rules:
        logits_RV, task = task.spread(logits_RV, len(rules.texts))
    # K of them may end, and K must go on; in greedy search the first hypothesis to end is the result.
    count = 1 if K == 1 and config.stop == "filled" else 2 * K
    prefix_RT, phrase_states_RX = (
        None if x is None else x.flatten(0, 1) for x in (beams.prefix_BKT, beams.phrase_states_BKX)
    )
    at_limit = bool((live.remaining_B == 1).any())
    inputs = StepInput(logits_RV, live.length + 1, task, at_limit, prefix_RT, phrase_states_RX)
    if config.groups > 1:
        found = diverse_candidates(next_log_probabilities(inputs, live.processors), beams, config, end, count)
    elif rules and rules.required_ids and phrase_states_RX is not None:
        found = candidates_with_required(
            next_log_probabilities(inputs, live.processors), beams, rules, phrase_states_RX
        )
    else:
        found = next_candidates(inputs, live.processors, beams.log_probability_BK, count, live.library)
    return found if task.shortlist_BU is None else replace(found, ids_BC=task.ids(found.ids_BC))


def diverse_candidates(
    log_probability_RV: Tensor, beams: Beams, config: SearchConfig, end: int, count: int
) -> Candidates:
    """Expand group by group, penalising tokens that earlier groups chose in this step."""
    G, K = config.groups, beams.last_BK.shape[1]
    next_BGKV = log_probability_RV.view(-1, G, K, log_probability_RV.shape[-1])
    used_BV = torch.zeros_like(next_BGKV[:, 0, 0])
    parts = []
    for g in range(G):
        penalized_RV = (next_BGKV[:, g] - config.diversity * used_BV[:, None]).flatten(0, 1)
        candidates = top_candidates(penalized_RV, beams.log_probability_BK[g::G], count)
        penalty_BC = config.diversity * used_BV.gather(1, candidates.ids_BC)
        parts.append(replace(candidates, log_probability_BC=candidates.log_probability_BC + penalty_BC))
        score_BK, chosen_BK = candidates.selection_score_BC.masked_fill(candidates.ids_BC == end, NEG_INF).topk(K)
        used_BV.scatter_add_(1, candidates.ids_BC.gather(1, chosen_BK), (score_BK > NEG_INF).float())
    return Candidates.combine(parts, lambda tensors: torch.stack(tensors, 1).flatten(0, 1))


def candidates_with_required(
    log_probability_RV: Tensor, beams: Beams, rules: Rules, phrase_states_RX: Tensor
) -> Candidates:
    """Return the best and the required continuations; those of complete hypotheses, which may end, come first."""
    (B, K), device = beams.last_BK.shape, phrase_states_RX.device
    # Per hypothesis, not per sentence: hypotheses with more of the required words are less likely.
    likeliest = top_candidates(log_probability_RV, beams.log_probability_BK.view(-1, 1), 2 * K)
    rows_BX = torch.arange(K, device=device).repeat_interleave(likeliest.ids_BC.shape[1]).expand(B, -1)
    ids_RX, counts_RX = rules.wanted(phrase_states_RX)
    log_RX = log_probability_RV.gather(1, ids_RX) + beams.log_probability_BK.view(-1, 1)
    log_RX = log_RX.masked_fill(~counts_RX, NEG_INF)
    origin_BX = torch.arange(K, device=device).repeat_interleave(ids_RX.shape[1]).expand(B, -1)
    score_BC = torch.cat((likeliest.selection_score_BC.view(B, -1), log_RX.view(B, -1)), 1)
    ids_BC = torch.cat((likeliest.ids_BC.view(B, -1), ids_RX.view(B, -1)), 1)
    origin_BC = torch.cat((rows_BX, origin_BX), 1)
    incomplete_BC = counts_RX.any(1).view(B, K).gather(1, origin_BC)
    by_score_BC = score_BC.argsort(1, descending=True)
    order_BC = by_score_BC.gather(1, incomplete_BC.gather(1, by_score_BC).int().argsort(stable=True, dim=1))
    score_BC = score_BC.gather(1, order_BC)
    return Candidates(score_BC, score_BC, ids_BC.gather(1, order_BC), origin_BC.gather(1, order_BC))


def finish(beams: Beams, candidates: Candidates, config: SearchConfig, end: int, length: int) -> Beams:
    """Merge the ending candidates among the K best into the K best finished hypotheses."""
    K = beams.last_BK.shape[1]
    ends_BC = candidates.ids_BC[:, :K] == end
    origin_BC = candidates.origin_BC[:, :K]
    log_probability_BC = candidates.log_probability_BC[:, :K].masked_fill(~ends_BC, NEG_INF)
    score_BC = log_probability_BC / length_penalty(length, config)
    if beams.coverage_BKS is not None:
        coverage_BCS = beams.coverage_BKS.take_along_dim(origin_BC[:, :, None], 1)
        score_BC = score_BC + coverage_penalty(coverage_BCS, config.coverage_penalty)
    if K == 1:  # a plain comparison, in half the time
        better_BK = score_BC > beams.finished_score_BK
        return replace(
            beams,
            finished_score_BK=score_BC.where(better_BK, beams.finished_score_BK),
            finished_log_probability_BK=log_probability_BC.where(better_BK, beams.finished_log_probability_BK),
            finished_node_BK=beams.finished_node_BK.masked_fill(better_BK, length),
        )
    finished_score_BK, chosen_BK = torch.cat((beams.finished_score_BK, score_BC), 1).topk(K, dim=1)
    both_BX = torch.cat((beams.finished_log_probability_BK, log_probability_BC), 1)
    node_BX = torch.cat((beams.finished_node_BK, length * K + origin_BC), 1)
    return replace(
        beams,
        finished_score_BK=finished_score_BK,
        finished_log_probability_BK=both_BX.gather(1, chosen_BK),
        finished_node_BK=node_BX.gather(1, chosen_BK),
    )


def extend(beams: Beams, candidates: Candidates, end: int, task: DecodingTask, length: int) -> tuple[Beams, Tensor]:
    """Continue the K best candidates that do not end → the new live hypotheses, and their origins."""
    K = beams.last_BK.shape[1]
    score_BC = candidates.selection_score_BC.masked_fill(candidates.ids_BC == end, NEG_INF)
    if task.rules and task.rules.required_ids and beams.phrase_states_BKX is not None:
        chosen_BK, filler_BK = task.rules.allocate(
            score_BC, candidates.ids_BC, candidates.origin_BC, beams.phrase_states_BKX, task.max_length_B - length
        )
    else:
        # A single candidate is chosen without a search.
        chosen_BK = torch.zeros_like(candidates.ids_BC) if score_BC.shape[1] == 1 else score_BC.topk(K, dim=1).indices
        filler_BK = None
    origin_BK = candidates.origin_BC.gather(1, chosen_BK)
    last_BK = candidates.ids_BC.gather(1, chosen_BK)
    prefix_BKT, phrase_states_BKX, coverage_BKS = (
        None if x is None else x.take_along_dim(origin_BK[:, :, None], 1)
        for x in (beams.prefix_BKT, beams.phrase_states_BKX, beams.coverage_BKS)
    )
    if prefix_BKT is not None:
        prefix_BKT = torch.cat((prefix_BKT, last_BK[:, :, None]), 2)
    if task.rules and phrase_states_BKX is not None:
        phrase_states_BKX = task.rules.advance(phrase_states_BKX, last_BK)
    # An ended hypothesis never continues, even if nothing else is left.
    filler_BK = last_BK == end if filler_BK is None else filler_BK
    log_probability_BK = candidates.log_probability_BC.gather(1, chosen_BK).masked_fill(filler_BK, NEG_INF)
    beams = replace(
        beams,
        last_BK=last_BK,
        log_probability_BK=log_probability_BK,
        prefix_BKT=prefix_BKT,
        phrase_states_BKX=phrase_states_BKX,
        coverage_BKS=coverage_BKS,
    )
    return beams, origin_BK


def decided(beams: Beams, config: SearchConfig, task: DecodingTask, length: int) -> Tensor:
    """Return which sentences need no further step under `stop`; the groups of a sentence stop together."""
    decided_B = task.max_length_B <= length
    if config.stop == "filled":
        decided_B = decided_B | (beams.finished_score_BK[:, -1] > NEG_INF)
    elif config.stop != "longest":
        # Log probabilities only fall, and the longest length has the mildest penalty.
        after = task.max_length_B if config.stop == "certain" else torch.full_like(task.max_length_B, length + 1)
        best_possible_B = beams.log_probability_BK.amax(1) / length_penalty(after, config)
        needed = beams.last_BK.shape[1] if config.select_by != "score" else min(config.n_best, beams.last_BK.shape[1])
        decided_B = decided_B | (beams.finished_score_BK[:, needed - 1] >= best_possible_B)
    if config.groups > 1:
        decided_B = decided_B.view(-1, config.groups).all(1).repeat_interleave(config.groups)
    return decided_B
