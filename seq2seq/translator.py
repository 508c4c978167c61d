"""Text in, text out: the one path from raw sentences to raw translations.

Shapes: B sentences, R rows, S source and T target positions, V vocabulary, L layers, N heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.config import SearchConfig, search_preset
from seq2seq.device import choose_device, choose_precision
from seq2seq.errors import UserError
from seq2seq.model.seq2seq import Seq2Seq
from seq2seq.model.state import State
from seq2seq.run import Run
from seq2seq.search.beam import Hypothesis, Specials, beam_search, length_penalty
from seq2seq.text.batches import by_budget
from seq2seq.text.store import Ragged
from seq2seq.text.tokenizer import BEGIN, END, PAD, UNKNOWN, Tokenizer
from seq2seq.training.checkpoint import load_checkpoint

SPECIALS = Specials(BEGIN, END, banned=(PAD, UNKNOWN, BEGIN))
FORCED_TOKENS = 2048  # target subwords read together: their logits are float32, and as wide as the vocabulary


@dataclass(frozen=True)
class Translation:
    text: str
    pieces: tuple[str, ...]  # the subwords of the text
    score: float  # what translations of a sentence are ranked by
    log_probability: float  # of all pieces and the end
    cut: bool  # the source was longer than the model reads, and its end was left out
    source_pieces: tuple[str, ...]  # what the model read, with its end mark
    token_log_probabilities: tuple[float, ...]  # of each piece, then of the end
    # Attention to the source, on request: from each piece and the end to each source piece.
    weights_LNTS: Tensor | None = field(repr=False, compare=False)

    def attention(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """How much each piece and the end look at each source piece; the mean over layers or heads not named."""
        if self.weights_LNTS is None:
            raise ValueError("no attention weights here; ask for them with attention=True")
        weights_NTS = self.weights_LNTS.mean(0) if layer is None else self.weights_LNTS[layer]
        return weights_NTS.mean(0) if head is None else weights_NTS[head]


EMPTY = Translation("", (), 0.0, 0.0, False, (), (), None)  # of an empty sentence: no model was asked


class Member(NamedTuple):
    """One model, and how it reads the source."""

    model: Seq2Seq
    tokenizer: Tokenizer
    max_length: int


class Forced(NamedTuple):
    """What the model gives a target that it is told."""

    log_probabilities: list[float]  # of each id, then of END
    weights_LNTS: Tensor | None


class Translator:
    """One model or an ensemble with its tokenizer, ready to translate raw sentences.

    Nothing in it changes after loading, so several threads may translate with one.
    """

    def __init__(self, model: Seq2Seq, tokenizer: Tokenizer, device: torch.device, max_length: int) -> None:
        self.members = (Member(model, tokenizer, max_length),)
        self.tokenizer, self.device, self.max_length = tokenizer, device, max_length

    @classmethod
    def load(
        cls,
        run: str | Sequence[str] | None = None,
        checkpoint: str = "best",
        *,
        outputs: str = "outputs",
        device: str = "auto",
        precision: str = "auto",
    ) -> Translator:
        """The translator of a run's checkpoint; of the newest run without a name; of an ensemble for several names."""
        names = [run] if run is None or isinstance(run, str) else list(run)
        folders = [Run.find(name, outputs).checkpoint(checkpoint) for name in names]
        return cls.ensemble([cls.from_checkpoint(folder, device, precision) for folder in folders], names)

    @classmethod
    def from_checkpoint(cls, folder: Path, device: str = "auto", precision: str = "auto") -> Translator:
        place, _ = choose_device(device)
        dtype, _ = choose_precision(precision, place)
        config, tokenizer, model = load_checkpoint(folder)
        return cls(model.to(place, dtype).eval(), tokenizer, place, config.model.max_length)

    @classmethod
    def ensemble(cls, translators: Sequence[Translator], names: Sequence[str | None]) -> Translator:
        """Models of either family that average their probabilities; each may read the source in its own pieces."""
        if not translators:
            raise UserError("run: an ensemble needs at least one run", code=2)
        first = translators[0]
        together = cls(*first.members[0][:2], first.device, min(t.max_length for t in translators))
        for other, name in zip(translators[1:], names[1:], strict=True):
            if other.tokenizer.target_pieces != first.tokenizer.target_pieces:
                raise UserError(f"run: {names[0]} and {name} write other subwords; an ensemble shares the target ones")
        together.members = tuple(member for translator in translators for member in translator.members)
        return together

    # ------------------------------------------------------------------------------------- translate

    def translate(
        self,
        sentences: Sequence[str],
        search: SearchConfig | None = None,
        *,
        prefixes: Sequence[str] | None = None,
        attention: bool = False,
    ) -> list[list[Translation]]:
        """For each sentence its translations, best first; an empty sentence has one, the empty one.

        A translation begins with its sentence's prefix, where there is one. Attention weights cost another pass of the
        model over what was found.
        """
        if isinstance(sentences, str):
            raise TypeError("translate takes a list of sentences, not one string")
        if prefixes is not None:
            raise NotImplementedError("prefixes")
        search = search or search_preset("beam")
        sources = self._read(sentences)
        found: list[list[Hypothesis]] = [[] for _ in sentences]
        # Short sentences with short ones: little padding, and every batch ends early.
        filled = [i for i, source in enumerate(sources) if len(source.ids[0]) > 1]
        order = sorted(filled, key=lambda i: len(sources[i].ids[0]))
        widths = np.array([max(map(len, sources[i].ids)) for i in order])
        for batch in by_budget(widths * search.beam, search.tokens):
            hypotheses = self._search([sources[i] for i in order[batch]], search)
            for i, ranked in zip(order[batch], hypotheses, strict=True):
                found[i] = ranked
        weights = self._attention(sources, found) if attention else {}
        return [
            [self._translation(source, hypothesis, weights.get(id(hypothesis))) for hypothesis in ranked] or [EMPTY]
            for source, ranked in zip(sources, found, strict=True)
        ]

    def _search(self, sources: list[Source], search: SearchConfig) -> list[list[Hypothesis]]:
        lengths_B = torch.tensor([len(source.ids[0]) for source in sources], device=self.device)
        longest_B = (lengths_B * search.length_factor).long() + search.length_extra
        with torch.inference_mode():
            state = self._start(sources)
            return beam_search(self._step, state, search, SPECIALS, longest_B.clamp(1, self.max_length))

    def _translation(self, source: Source, hypothesis: Hypothesis, weights_LNTS: Tensor | None) -> Translation:
        return Translation(
            self.tokenizer.decode(hypothesis.ids),
            tuple(self.tokenizer.pieces(hypothesis.ids)),
            hypothesis.score,
            hypothesis.log_probability,
            source.cut,
            source.pieces,
            hypothesis.token_log_probabilities,
            weights_LNTS,
        )

    def _attention(self, sources: list[Source], found: list[list[Hypothesis]]) -> dict[int, Tensor | None]:
        """The weights of every hypothesis, which is told to the model once more."""
        pairs = [(source, hypothesis) for source, ranked in zip(sources, found, strict=True) for hypothesis in ranked]
        forced = self._force([source for source, _ in pairs], [hypothesis.ids for _, hypothesis in pairs], True)
        return {id(hypothesis): told.weights_LNTS for (_, hypothesis), told in zip(pairs, forced, strict=True)}

    # ----------------------------------------------------------------------------------------- score

    def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        search: SearchConfig | None = None,
        attention: bool = False,
    ) -> list[Translation]:
        """Each target as a translation of its source: what the model gives it, piece by piece."""
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources and {len(targets)} targets are no pairs")
        search = search or search_preset("beam")
        read, ids = self._read(sources), self.tokenizer.encode_target(targets)
        forced = self._force(read, [target[:-1] for target in ids], attention)
        scored = []
        for source, text, target, told in zip(read, targets, ids, forced, strict=True):
            total = sum(told.log_probabilities)
            scored.append(
                Translation(
                    text,
                    tuple(self.tokenizer.pieces(target[:-1])),
                    total / length_penalty(len(target), search.length_penalty),
                    total,
                    source.cut,
                    source.pieces,
                    tuple(told.log_probabilities),
                    told.weights_LNTS,
                )
            )
        return scored

    def alternatives(self, source: str, prefix: str, count: int) -> list[tuple[str, float]]:
        """The likeliest next pieces after a forced prefix, with their probabilities."""
        ids = self.tokenizer.encode_target([prefix])[0][:-1]
        with torch.inference_mode():
            logits_1TV, _ = self._step(
                torch.tensor([[BEGIN, *ids]], device=self.device), self._start(self._read([source]))
            )
            best = logits_1TV[0, -1].float().softmax(-1).topk(min(count, logits_1TV.shape[-1]))
        return list(zip(self.tokenizer.pieces(best.indices.tolist()), best.values.tolist(), strict=True))

    def _force(self, sources: list[Source], targets: list[list[int]], attention: bool) -> list[Forced]:
        """Teacher forcing: targets without END, told to the model beside their sources."""
        order = sorted(range(len(targets)), key=lambda i: (len(targets[i]), len(sources[i].ids[0])))
        forced: list[Forced] = [Forced([], None)] * len(targets)
        for batch in by_budget(np.array([len(targets[i]) + 1 for i in order], np.int64), FORCED_TOKENS):
            chosen = order[batch]
            told = self._force_batch([sources[i] for i in chosen], [targets[i] for i in chosen], attention)
            for i, one in zip(chosen, told, strict=True):
                forced[i] = one
        return forced

    @torch.inference_mode()
    def _force_batch(self, sources: list[Source], targets: list[list[int]], attention: bool) -> Iterator[Forced]:
        out_BT = self._padded([[*target, END] for target in targets])
        in_BT = torch.cat((torch.full_like(out_BT[:, :1], BEGIN), out_BT[:, :-1]), 1)
        state = self._start(sources)
        logits_BTV, _ = self._step(in_BT, state)
        logits_BTV = logits_BTV.float()
        chosen_BT = logits_BTV.gather(2, out_BT[:, :, None])[:, :, 0] - logits_BTV.logsumexp(-1)
        weights = self._weights(in_BT, sources) if attention else None
        for b, (source, target) in enumerate(zip(sources, targets, strict=True)):
            T = len(target) + 1
            looked = None if weights is None else weights[b, :, :, :T, : len(source.ids[0])].clone()
            yield Forced(chosen_BT[b, :T].tolist(), looked)

    def _weights(self, in_BT: Tensor, sources: list[Source]) -> Tensor:
        """The first model's attention to its source pieces: B × L × N × T × S."""
        state = self._start_member(0, sources)
        decoded = self.members[0].model.decode(in_BT, state, weights=True)
        return torch.stack([weights_BNTS.float().cpu() for weights_BNTS in decoded.weights], 1)

    # ---------------------------------------------------------------------------------------- models

    def _read(self, sentences: Sequence[str]) -> list[Source]:
        """Each sentence as every model of the ensemble reads it."""
        texts = [text if text.strip() else "" for text in sentences]
        by_member = [member.tokenizer.encode_source(texts) for member in self.members]
        return [self._source(ids) for ids in zip(*by_member, strict=True)]

    def _source(self, ids: tuple[list[int], ...]) -> Source:
        kept = tuple(_cut(one, member.max_length) for one, member in zip(ids, self.members, strict=True))
        return Source(kept, kept != ids, tuple(self.tokenizer.source_pieces(kept[0])))

    def _start(self, sources: list[Source]) -> State:
        states = [self._start_member(i, sources) for i in range(len(self.members))]
        return states[0] if len(states) == 1 else State(tuple(s.fixed for s in states), tuple(s.moving for s in states))

    def _start_member(self, place: int, sources: list[Source]) -> State:
        source_BS = self._padded([source.ids[place] for source in sources])
        return self.members[place].model.start(source_BS, source_BS != PAD)

    def _step(self, target_RT: Tensor, state: State) -> tuple[Tensor, State]:
        """More target tokens → the logits after each, and the state after them; an ensemble averages probabilities."""
        if len(self.members) == 1:
            return self.members[0].model.step(target_RT, state)
        logs, moving = [], []
        for member, fixed, moved in zip(self.members, state.fixed, state.moving, strict=True):
            logits_RTV, after = member.model.step(target_RT, replace(state, fixed=fixed, moving=moved))
            logs.append(logits_RTV.float().log_softmax(-1))
            moving.append(after.moving)
        return torch.stack(logs).logsumexp(0), state.advance(tuple(moving), target_RT.shape[1])

    def _padded(self, rows: list[list[int]]) -> Tensor:
        ragged = Ragged.of(rows)
        every: NDArray[np.int64] = np.arange(len(rows), dtype=np.int64)
        return torch.from_numpy(ragged.padded(every, PAD)).to(self.device)


class Source(NamedTuple):
    """A sentence as each model of the ensemble reads it."""

    ids: tuple[list[int], ...]
    cut: bool
    pieces: tuple[str, ...]  # of the first model


def _cut(ids: list[int], length: int) -> list[int]:
    return ids if len(ids) <= length else [*ids[: length - 1], END]
