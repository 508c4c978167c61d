"""An ensemble of models with the same target subwords; a single model is an ensemble of one.

Shapes: B sentences, R rows (B × beam), S source and T target positions, V vocabulary, L layers, N heads,
U words of a shortlist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.native_search import is_compiled, plain_search
from seq2seq.decoding.scoring import DecodingTask, Hypothesis, Specials
from seq2seq.model.decoder_state import State
from seq2seq.model.int8 import Int8State
from seq2seq.model.interface import Seq2Seq


@dataclass(frozen=True)
class EnsembleState(State):
    states: tuple[State, ...]  # of each model

    @classmethod
    def of(cls, states: Iterable[State]) -> EnsembleState:
        states = tuple(states)
        return cls(states, length=states[0].length, beam=states[0].beam)

    def select(self, rows_R: Tensor, beam: int) -> EnsembleState:
        return self.of(state.select(rows_R, beam) for state in self.states)

    def reorder(self, rows_R: Tensor) -> EnsembleState:
        return self.of(state.reorder(rows_R) for state in self.states)

    def fixed(self, sentences: int, steps: int) -> EnsembleState:
        return self.of(state.fixed(sentences, steps) for state in self.states)

    def plain(self, length: int) -> EnsembleState:
        return self.of(state.plain(length) for state in self.states)

    def join(self, other: EnsembleState) -> EnsembleState:
        return self.of(a.join(b) for a, b in zip(self.states, other.states, strict=True))


class Ensemble:
    """The mean of the models' probabilities; each model reads the source in its own subwords."""

    def __init__(self, models: Sequence[Seq2Seq]) -> None:
        self.models = tuple(models)

    def start(self, sources: Sequence[tuple[Tensor, Tensor]]) -> EnsembleState:
        """Encode the sources, ids and mask for each model, into the state of all models before the first token."""
        return EnsembleState.of(model.start(*source) for model, source in zip(self.models, sources, strict=True))

    def step(self, target_RT: Tensor, state: State, shortlist_BU: Tensor | None = None) -> tuple[Tensor, EnsembleState]:
        """Return the logits that follow each target token, and the state after the last one."""
        results = [model.step(target_RT, part, shortlist_BU) for model, part in self._by_model(state)]
        return self._mean([logits for logits, _ in results]), EnsembleState.of(after for _, after in results)

    @property
    def has_plain_search(self) -> bool:
        """Whether a plain beam search is one call of compiled code."""
        return len(self.models) == 1 and is_compiled(self.models[0])

    def plain_search(
        self, state: State, task: DecodingTask, config: SearchConfig, specials: Specials
    ) -> list[list[Hypothesis]]:
        ((model, part),) = self._by_model(state)
        return plain_search(model, cast(Int8State, part), task, config, specials)

    def step_with_attention(
        self, target_RT: Tensor, state: State, shortlist_BU: Tensor | None = None
    ) -> tuple[Tensor, EnsembleState, Tensor]:
        """Like `step`, and return the first model's attention weights at each token: R × L × N × T × S."""
        first, *others = self._by_model(state)
        decoded = first[0].decode(target_RT, first[1], weights=True)
        results = [model.step(target_RT, part, shortlist_BU) for model, part in others]
        logits = [first[0].logits(decoded.features_RTD, shortlist_BU), *(logits for logits, _ in results)]
        after = EnsembleState.of((decoded.state, *(after for _, after in results)))
        return self._mean(logits), after, torch.stack(decoded.weights, 1)

    def _by_model(self, state: State) -> Iterable[tuple[Seq2Seq, State]]:
        assert isinstance(state, EnsembleState)
        return zip(self.models, state.states, strict=True)

    def _mean(self, logits: list[Tensor]) -> Tensor:
        """Return log probabilities, up to a constant, of the mean of the models' probabilities."""
        return logits[0] if len(logits) == 1 else torch.stack([x.float().log_softmax(-1) for x in logits]).logsumexp(0)
