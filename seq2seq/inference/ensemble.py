"""An ensemble of models with the same target subwords; a single model is an ensemble of one.

Shapes: B sentences, R rows (B × beam), S source and T target positions, V vocabulary, L layers, N heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Seq2Seq


class Ensemble:
    """The mean of the models' probabilities; each model reads the source in its own subwords."""

    def __init__(self, models: Sequence[Seq2Seq]) -> None:
        self.models = tuple(models)

    def start(self, sources: Sequence[tuple[Tensor, Tensor]]) -> State:
        """Encode the sources, ids and mask for each model, into the state of all models before the first token."""
        states = [model.start(*source) for model, source in zip(self.models, sources, strict=True)]
        if len(states) == 1:
            return states[0]
        return State(tuple(state.memory for state in states), tuple(state.history for state in states))

    def step(self, target_RT: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits that follow each target token, and the state after the last one."""
        if len(self.models) == 1:
            return self.models[0].step(target_RT, state)
        results = [m.step(target_RT, part) for m, part in zip(self.models, self._split(state), strict=True)]
        return self._mean([logits for logits, _ in results]), self._combine(state, [after for _, after in results])

    def step_with_attention(self, target_RT: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        """Like `step`, and return the first model's attention weights at each token: R × L × N × T × S."""
        first, *others = zip(self.models, self._split(state), strict=True)
        decoded = first[0].decode(target_RT, first[1], weights=True)
        results = [model.step(target_RT, part) for model, part in others]
        logits = [first[0].logits(decoded.features_RTD), *(logits for logits, _ in results)]
        after = self._combine(state, [decoded.state, *(after for _, after in results)])
        return self._mean(logits), after, torch.stack(decoded.weights, 1)

    def _split(self, state: State) -> list[State]:
        """Split the state by model."""
        if len(self.models) == 1:
            return [state]
        return [
            replace(state, memory=memory, history=history)
            for memory, history in zip(state.memory, state.history, strict=True)
        ]

    def _combine(self, before: State, after: list[State]) -> State:
        return (
            after[0]
            if len(after) == 1
            else replace(after[0], memory=before.memory, history=tuple(s.history for s in after))
        )

    def _mean(self, logits: list[Tensor]) -> Tensor:
        """Return log probabilities, up to a constant, of the mean of the models' probabilities."""
        return logits[0] if len(logits) == 1 else torch.stack([x.float().log_softmax(-1) for x in logits]).logsumexp(0)
