"""Random sampling of translations, independent of the model.

Shapes: R unfinished rows (one per sample), T target positions, V vocabulary, N ids of all samples,
X automata of phrases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.beam import Step
from seq2seq.decoding.constraints import NEG_INF
from seq2seq.decoding.processors import StepInput, next_log_probabilities, step_processors
from seq2seq.decoding.scoring import DecodingTask, Hypothesis, Specials, length_penalty
from seq2seq.model.decoder_state import State
from seq2seq.utils.device import float64_device

Seeds = NDArray[np.uint64]


LogitsWarper = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LiveSamples:
    """Unfinished samples, all after the same number of steps."""

    row_R: Tensor  # sentence index × samples + number of the sample
    state: State
    task: DecodingTask
    last_R1: Tensor
    prefix_RT: Tensor | None  # all tokens, if rules need them
    phrase_states_R1X: Tensor | None  # states of the automata of phrases

    @classmethod
    def start(cls, state: State, task: DecodingTask, samples: int, begin: int) -> LiveSamples:
        task = task.repeat(samples)
        row_R = torch.arange(len(task.max_length_B), device=task.max_length_B.device)
        last_R1 = torch.full_like(row_R, begin)[:, None]
        prefix_RT, phrase_states_R1X = (last_R1, task.rules.start(len(row_R), 1)) if task.rules else (None, None)
        return cls(row_R, state.select(row_R // samples, 1), task, last_R1, prefix_RT, phrase_states_R1X)

    def extend(self, ids_R1: Tensor, state: State) -> LiveSamples:
        prefix_RT = None if self.prefix_RT is None else torch.cat((self.prefix_RT, ids_R1), 1)
        rules, phrase_states_R1X = self.task.rules, self.phrase_states_R1X
        if rules and phrase_states_R1X is not None:
            phrase_states_R1X = rules.advance(phrase_states_R1X, ids_R1)
        return replace(self, state=state, last_R1=ids_R1, prefix_RT=prefix_RT, phrase_states_R1X=phrase_states_R1X)

    def select(self, kept_R: Tensor) -> LiveSamples:
        prefix_RT, phrase_states_R1X = (
            None if x is None else x[kept_R] for x in (self.prefix_RT, self.phrase_states_R1X)
        )
        state, task = self.state.select(kept_R, 1), self.task.select(kept_R)
        return LiveSamples(self.row_R[kept_R], state, task, self.last_R1[kept_R], prefix_RT, phrase_states_R1X)


@torch.inference_mode()
def sample(
    step: Step, state: State, task: DecodingTask, config: SearchConfig, specials: Specials
) -> list[list[Hypothesis]]:
    """Draw `samples` translations of each sentence, best first; log probabilities are the model's, before warping.

    The draws of a sentence depend only on its seed, not on the rest of the batch.
    """
    processors, warpers = step_processors(task, specials), build_warpers(config)
    live = LiveSamples.start(state, task, config.samples, specials.begin)
    remaining_R = live.task.remaining(0, live.row_R < 0)
    seed_R = seeds(task.seeds, config.samples, config.seed)
    uniform_TR = uniforms(seed_R, int(remaining_R.max()), live.row_R.device)
    drawn = []
    for length, uniform_R in enumerate(uniform_TR, 1):
        logits_R1V, state, *_ = step(live.last_R1, live.state, *live.task.shortlist)
        logits_RV, task = logits_R1V[:, -1], live.task
        if task.rules:
            logits_RV, task = task.spread(logits_RV, len(task.rules.texts))
        phrase_states_RX = None if live.phrase_states_R1X is None else live.phrase_states_R1X[:, 0]
        at_limit = bool((remaining_R == 1).any())
        inputs = StepInput(logits_RV, length, task, at_limit, live.prefix_RT, phrase_states_RX)
        next_RV = next_log_probabilities(inputs, processors)
        column_R1 = draw(sampling_probabilities(next_RV, warpers), uniform_R[live.row_R.to(uniform_R.device)])[:, None]
        ids_R1 = task.ids(column_R1)
        drawn.append((live.row_R, ids_R1[:, 0], next_RV.gather(1, column_R1)[:, 0]))
        ended_R = ids_R1[:, 0] == specials.end
        live, remaining_R = live.extend(ids_R1, state), live.task.remaining(length, ended_R)
        if not remaining_R.any():
            break
        if not remaining_R.all():
            remaining_R = remaining_R[remaining_R > 0]
            live = live.select(ended_R.int().argsort(stable=True)[: len(remaining_R)])
    drawn_samples = _hypotheses(drawn, config)
    per_sentence = (drawn_samples[i : i + config.samples] for i in range(0, len(drawn_samples), config.samples))
    return [sorted(hypotheses, key=lambda hypothesis: -hypothesis.score) for hypotheses in per_sentence]


def _hypotheses(drawn: Sequence[tuple[Tensor, ...]], config: SearchConfig) -> list[Hypothesis]:
    """Assemble the samples, in the order of their rows, from what each step drew: rows, ids and log probabilities."""
    row_N, ids_N, log_N = (torch.cat(column).cpu().numpy() for column in zip(*drawn, strict=True))
    order_N = row_N.argsort(kind="stable")
    ends = np.bincount(row_N).cumsum()[:-1]
    return [
        Hypothesis(ids[:-1], sum(log), sum(log) / length_penalty(len(ids), config), tuple(log))
        for ids, log in zip(
            (part.tolist() for part in np.split(ids_N[order_N], ends)),
            (part.tolist() for part in np.split(log_N[order_N], ends)),
            strict=True,
        )
    ]


def build_warpers(config: SearchConfig) -> list[LogitsWarper]:
    """Return the steps from log probabilities to the probabilities to draw from; those that are off are left out.

    Each truncation applies to the result of the one before it.
    """
    steps: list[tuple[bool, LogitsWarper]] = [
        (config.temperature != 1, Temperature(config.temperature)),
        (config.top_k > 0, TopK(config.top_k)),
        (True, partial(torch.softmax, dim=-1)),
        (config.top_p < 1, TopP(config.top_p)),
        (config.min_p > 0, MinP(config.min_p)),
        (config.epsilon_cutoff > 0, EpsilonCutoff(config.epsilon_cutoff)),
    ]
    return [warper for used, warper in steps if used]


def sampling_probabilities(x_RV: Tensor, warpers: Sequence[LogitsWarper]) -> Tensor:
    """Return the probabilities to draw from, after temperature and truncation."""
    for warper in warpers:
        x_RV = warper(x_RV)
    return x_RV


@dataclass(frozen=True)
class Temperature:
    temperature: float

    def __call__(self, logits_RV: Tensor) -> Tensor:
        return logits_RV / self.temperature


@dataclass(frozen=True)
class TopK:
    """The k likeliest ids, and those as likely as the last of them."""

    k: int

    def __call__(self, logits_RV: Tensor) -> Tensor:
        if self.k >= logits_RV.shape[1]:
            return logits_RV
        threshold_R1 = logits_RV.topk(self.k).values[:, -1:]
        return logits_RV.masked_fill(logits_RV < threshold_R1, NEG_INF)


@dataclass(frozen=True)
class TopP:
    """The smallest set of ids with this total probability."""

    p: float

    def __call__(self, probability_RV: Tensor) -> Tensor:
        sorted_RV, index_RV = probability_RV.sort(-1, descending=True)
        # Keep an id while the likelier ones sum to less than p.
        excluded_RV = cumulative(sorted_RV) - sorted_RV >= self.p
        return probability_RV.masked_fill(excluded_RV.gather(1, index_RV.argsort(-1)), 0)


@dataclass(frozen=True)
class MinP:
    """Ids with at least this fraction of the highest probability."""

    fraction: float

    def __call__(self, probability_RV: Tensor) -> Tensor:
        threshold_R1 = self.fraction * probability_RV.amax(-1, keepdim=True)
        return probability_RV.masked_fill(probability_RV < threshold_R1, 0)


@dataclass(frozen=True)
class EpsilonCutoff:
    """Ids with at least this probability, and always the likeliest."""

    epsilon: float

    def __call__(self, probability_RV: Tensor) -> Tensor:
        normalized_RV = probability_RV / probability_RV.sum(-1, keepdim=True)
        small_RV = (normalized_RV < self.epsilon) & (normalized_RV < normalized_RV.amax(-1, keepdim=True))
        return probability_RV.masked_fill(small_RV, 0)


def draw(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Return the id at which the cumulative probability passes a random fraction of the total."""
    device = probability_RV.device
    cumulative_RV = cumulative(probability_RV.to(float64_device(device), torch.float64))
    target_R1 = (uniform_R.to(cumulative_RV) * cumulative_RV[:, -1])[:, None]
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0].to(device)


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


def uniforms(seed_R: Seeds, steps: int, device: torch.device) -> Tensor:
    """Return the random numbers of all steps together: they move to the device of a search once."""
    uniform_TR = np.stack([uniform(seed_R, step) for step in range(1, steps + 1)])
    return torch.from_numpy(uniform_TR).to(float64_device(device))


def strides(counts: NDArray[np.int64]) -> Seeds:
    return counts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def hash_splitmix64(x: Seeds) -> Seeds:
    """Hash by SplitMix64 (Steele et al. 2014): inputs that differ in one bit give unrelated outputs."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
