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
from seq2seq.decoding.constraints import NEG_INF
from seq2seq.decoding.scoring import Hypothesis, Specials, Task, length_penalty, masked_log_probabilities
from seq2seq.model.decoder_state import State

Seeds = NDArray[np.uint64]


@torch.inference_mode()
def sample(step: Step, state: State, task: Task, config: SearchConfig, specials: Specials) -> list[list[Hypothesis]]:
    """Draw `samples` translations of each sentence, best first; log probabilities are the model's, before shaping.

    The draws of a sentence depend only on its seed, not on the rest of the batch.
    """
    B, n = len(task.max_length_B), config.samples
    task = task.repeat(n)
    row_R = torch.arange(B * n, device=task.max_length_B.device)
    seed_R = seeds(task.seeds, n, config.seed)
    state = state.select(row_R // n, 1)
    last_R1 = torch.full((B * n, 1), specials.begin, device=row_R.device)
    prefix_RT = last_R1 if task.rules else None
    generated_ids: list[list[int]] = [[] for _ in range(B * n)]
    log_probabilities: list[list[float]] = [[] for _ in range(B * n)]
    for length in range(1, int(task.max_length_B.max()) + 1):
        logits_R1V, state, *_ = step(last_R1, state)
        next_RV = masked_log_probabilities(logits_R1V[:, -1], length, task, specials, prefix_RT, row_R // n)
        uniform_R = torch.from_numpy(uniform(seed_R[row_R.cpu().numpy()], length)).to(next_RV.device)
        last_R1 = draw(sampling_probabilities(next_RV, config), uniform_R)[:, None]
        log_R1 = next_RV.gather(1, last_R1)
        for row, id_, log in zip(row_R.tolist(), last_R1[:, 0].tolist(), log_R1[:, 0].tolist(), strict=True):
            generated_ids[row].append(id_)
            log_probabilities[row].append(log)
        prefix_RT = None if prefix_RT is None else torch.cat((prefix_RT, last_R1), 1)
        live_R = last_R1[:, 0] != specials.end
        if not live_R.all():
            kept_R = live_R.nonzero()[:, 0]
            if len(kept_R) == 0:
                break
            row_R, last_R1, task, state = row_R[kept_R], last_R1[kept_R], task.select(kept_R), state.select(kept_R, 1)
            prefix_RT = None if prefix_RT is None else prefix_RT[kept_R]
    drawn = [
        Hypothesis(ids[:-1], sum(log), sum(log) / length_penalty(len(ids), config), tuple(log))
        for ids, log in zip(generated_ids, log_probabilities, strict=True)
    ]
    per_sentence = (drawn[b * n : (b + 1) * n] for b in range(B))
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis.score) for hypotheses in per_sentence]


def sampling_probabilities(logits_RV: Tensor, config: SearchConfig) -> Tensor:
    """Return the probabilities to draw from, after temperature and truncation.

    Each truncation applies to the result of the one before it.
    """
    logits_RV = logits_RV / config.temperature
    if 0 < config.top_k < logits_RV.shape[1]:
        threshold_R1 = logits_RV.topk(config.top_k).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < threshold_R1, NEG_INF)
    probability_RV = logits_RV.softmax(-1)
    if config.top_p < 1:
        sorted_RV, index_RV = probability_RV.sort(-1, descending=True)
        # Keep an id while the likelier ones sum to less than top_p.
        excluded_RV = cumulative(sorted_RV) - sorted_RV >= config.top_p
        probability_RV = probability_RV.masked_fill(excluded_RV.gather(1, index_RV.argsort(-1)), 0)
    if config.min_p > 0:
        threshold_R1 = config.min_p * probability_RV.amax(-1, keepdim=True)
        probability_RV = probability_RV.masked_fill(probability_RV < threshold_R1, 0)
    if config.epsilon_cutoff > 0:
        normalized_RV = probability_RV / probability_RV.sum(-1, keepdim=True)
        small_RV = (normalized_RV < config.epsilon_cutoff) & (normalized_RV < normalized_RV.amax(-1, keepdim=True))
        probability_RV = probability_RV.masked_fill(small_RV, 0)
    return probability_RV


def draw(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Return the id at which the cumulative probability passes a random fraction of the total."""
    cumulative_RV = cumulative(probability_RV.double())
    target_R1 = (uniform_R.to(cumulative_RV) * cumulative_RV[:, -1])[:, None]
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]


def cumulative(x_RV: Tensor) -> Tensor:
    """Return the running sums of rows; where results must be reproducible on the CPU, as CUDA's are not."""
    if torch.are_deterministic_algorithms_enabled():
        return x_RV.cpu().cumsum(-1).to(x_RV.device)
    return x_RV.cumsum(-1)


def seeds(sentences: Sequence[int], samples: int, seed: int) -> Seeds:
    """Return a seed for each sample of each sentence."""
    seed_B1 = hash_splitmix64(np.array(sentences, np.uint64)[:, None] + hash_splitmix64(np.array([seed], np.uint64)))
    return hash_splitmix64(seed_B1 + strides(np.arange(1, samples + 1))).reshape(-1)


def uniform(seed_R: Seeds, step: int) -> NDArray[np.float64]:
    """Return numbers in [0, 1) for these seeds at this step."""
    return (hash_splitmix64(seed_R + strides(np.array([step]))) >> np.uint64(32)) / 2.0**32


def strides(counts: NDArray[np.int64]) -> Seeds:
    return counts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def hash_splitmix64(x: Seeds) -> Seeds:
    """Hash by SplitMix64 (Steele et al. 2014): inputs that differ in one bit give unrelated outputs."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
