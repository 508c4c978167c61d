"""Random sampling of translations, independent of the model.

Shapes: B sentences, R unfinished rows (one per sample), T target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.beam import Step
from seq2seq.decoding.scoring import NEVER, Hypothesis, Specials, Task, length_penalty, permit
from seq2seq.model.decoder_state import State

Seeds = NDArray[np.uint64]


@torch.inference_mode()
def sample(step: Step, state: State, task: Task, config: SearchConfig, specials: Specials) -> list[list[Hypothesis]]:
    """Draw `samples` translations of each sentence, best first; log probabilities are the model's, before shaping.

    The draws of a sentence depend only on its seed, not on the rest of the batch.
    """
    B, n = len(task.longest_B), config.samples
    task = task.repeat(n)
    row_R = torch.arange(B * n, device=task.longest_B.device)
    seed_R = seeds(task.seeds, n, config.seed)
    state = state.select(row_R // n, 1)
    last_R1 = torch.full((B * n, 1), specials.begin, device=row_R.device)
    said_RT = last_R1 if task.rules else None
    said: list[list[int]] = [[] for _ in range(B * n)]
    logs: list[list[float]] = [[] for _ in range(B * n)]
    for length in range(1, int(task.longest_B.max()) + 1):
        logits_R1V, state, *_ = step(last_R1, state)
        next_RV = permit(logits_R1V[:, -1], length, task, specials, said_RT, row_R // n)
        uniform_R = torch.from_numpy(uniform(seed_R[row_R.cpu().numpy()], length)).to(next_RV.device)
        last_R1 = draw(shape(next_RV, config), uniform_R)[:, None]
        log_R1 = next_RV.gather(1, last_R1)
        for row, id_, log in zip(row_R.tolist(), last_R1[:, 0].tolist(), log_R1[:, 0].tolist(), strict=True):
            said[row].append(id_)
            logs[row].append(log)
        said_RT = None if said_RT is None else torch.cat((said_RT, last_R1), 1)
        open_R = last_R1[:, 0] != specials.end
        if not open_R.all():
            kept_R = open_R.nonzero()[:, 0]
            if len(kept_R) == 0:
                break
            row_R, last_R1, task, state = row_R[kept_R], last_R1[kept_R], task.select(kept_R), state.select(kept_R, 1)
            said_RT = None if said_RT is None else said_RT[kept_R]
    drawn = [
        Hypothesis(ids[:-1], sum(log), sum(log) / length_penalty(len(ids), config), tuple(log))
        for ids, log in zip(said, logs, strict=True)
    ]
    of_each = (drawn[b * n : (b + 1) * n] for b in range(B))
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis.score) for hypotheses in of_each]


def shape(logits_RV: Tensor, config: SearchConfig) -> Tensor:
    """Return the probabilities to draw from, after temperature and truncation.

    Each truncation applies to the result of the one before it.
    """
    logits_RV = logits_RV / config.temperature
    if 0 < config.top_k < logits_RV.shape[1]:
        least_R1 = logits_RV.topk(config.top_k).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, NEVER)
    probability_RV = logits_RV.softmax(-1)
    if config.top_p < 1:
        sorted_RV, place_RV = probability_RV.sort(-1, descending=True)
        # Keep an id while the likelier ones sum to less than top_p.
        cut_RV = sorted_RV.cumsum(-1) - sorted_RV >= config.top_p
        probability_RV = probability_RV.masked_fill(cut_RV.gather(1, place_RV.argsort(-1)), 0)
    if config.min_p > 0:
        least_R1 = config.min_p * probability_RV.amax(-1, keepdim=True)
        probability_RV = probability_RV.masked_fill(probability_RV < least_R1, 0)
    if config.epsilon_cutoff > 0:
        share_RV = probability_RV / probability_RV.sum(-1, keepdim=True)
        small_RV = (share_RV < config.epsilon_cutoff) & (share_RV < share_RV.amax(-1, keepdim=True))
        probability_RV = probability_RV.masked_fill(small_RV, 0)
    return probability_RV


def draw(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Return the id at which the cumulative probability passes a random fraction of the total."""
    upto_RV = probability_RV.double().cumsum(-1)
    wanted_R1 = (uniform_R.to(upto_RV) * upto_RV[:, -1])[:, None]
    return torch.searchsorted(upto_RV, wanted_R1, right=True)[:, 0]


def seeds(sentences: Sequence[int], samples: int, seed: int) -> Seeds:
    """Return a seed for each sample of each sentence."""
    each = mixed(np.array(sentences, np.uint64)[:, None] + mixed(np.array([seed], np.uint64)))
    return mixed(each + strides(np.arange(1, samples + 1))).reshape(-1)


def uniform(seed_R: Seeds, step: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) for these seeds at this step."""
    return (mixed(seed_R + strides(np.array([step]))) >> np.uint64(32)) / 2.0**32


def strides(counts: NDArray[np.int64]) -> Seeds:
    return counts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def mixed(x: Seeds) -> Seeds:
    """Hash by SplitMix64 (Steele et al. 2014): inputs that differ in one bit give unrelated outputs."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
