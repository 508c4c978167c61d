"""Text in, text out: the one path from raw sentences to raw translations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seq2seq.config import SearchConfig, search_preset
from seq2seq.device import choose_device, choose_precision
from seq2seq.model.seq2seq import Seq2Seq
from seq2seq.run import Run
from seq2seq.search.beam import Hypothesis, Specials, beam_search
from seq2seq.text.batches import by_budget
from seq2seq.text.store import Ragged
from seq2seq.text.tokenizer import BEGIN, END, PAD, UNKNOWN, Tokenizer
from seq2seq.training.checkpoint import load_checkpoint

SPECIALS = Specials(BEGIN, END, banned=(PAD, UNKNOWN, BEGIN))


@dataclass(frozen=True)
class Translation:
    text: str
    pieces: tuple[str, ...] = ()  # the subwords of the text
    score: float = 0.0  # what translations of a sentence are ranked by
    log_probability: float = 0.0
    cut: bool = False  # the source was longer than the model reads, and its end was left out


class Translator:
    """A model with its tokenizer, ready to translate raw sentences."""

    def __init__(self, model: Seq2Seq, tokenizer: Tokenizer, device: torch.device, max_length: int) -> None:
        self.model, self.tokenizer, self.device, self.max_length = model, tokenizer, device, max_length

    @classmethod
    def load(
        cls,
        run: str | None = None,
        checkpoint: str = "best",
        *,
        outputs: str = "outputs",
        device: str = "auto",
        precision: str = "auto",
    ) -> Translator:
        """The translator of a run's checkpoint; without a run, of the newest one."""
        folder = Run.find(run, outputs).checkpoint(checkpoint)
        return cls.from_checkpoint(folder, device, precision)

    @classmethod
    def from_checkpoint(cls, folder: Path, device: str = "auto", precision: str = "auto") -> Translator:
        place, _ = choose_device(device)
        dtype, _ = choose_precision(precision, place)
        config, tokenizer, model = load_checkpoint(folder)
        return cls(model.to(place, dtype).eval(), tokenizer, place, config.model.max_length)

    def translate(self, sentences: Sequence[str], search: SearchConfig | None = None) -> list[list[Translation]]:
        """For each sentence its translations, best first; an empty sentence has one, the empty one."""
        if isinstance(sentences, str):
            raise TypeError("translate takes a list of sentences, not one string")
        search = search or search_preset("beam")
        encoded = self.tokenizer.encode_source([text if text.strip() else "" for text in sentences])
        results = [[Translation("")] for _ in sentences]
        # Short sentences with short ones: little padding, and every batch ends early.
        order = sorted((i for i, ids in enumerate(encoded) if len(ids) > 1), key=lambda i: len(encoded[i]))
        kept = Ragged.of([_cut(encoded[i], self.max_length) for i in order])
        for batch in by_budget(kept.lengths() * search.beam, search.tokens):
            found = self._search(kept, np.arange(batch.start, batch.stop), search)
            for i, hypotheses in zip(order[batch], found, strict=True):
                cut = len(encoded[i]) > self.max_length
                results[i] = [self._translation(hypothesis, cut) for hypothesis in hypotheses]
        return results

    def _search(
        self, sources: Ragged, rows: np.ndarray[tuple[int], np.dtype[np.int64]], search: SearchConfig
    ) -> list[list[Hypothesis]]:
        source_BS = torch.from_numpy(sources.padded(rows, PAD)).to(self.device)
        longest_B = ((source_BS != PAD).sum(1) * search.length_factor).long() + search.length_extra
        with torch.inference_mode():
            state = self.model.start(source_BS, source_BS != PAD)
            return beam_search(self.model.step, state, search, SPECIALS, longest_B.clamp(1, self.max_length))

    def _translation(self, hypothesis: Hypothesis, cut: bool) -> Translation:
        return Translation(
            self.tokenizer.decode(hypothesis.ids),
            tuple(self.tokenizer.pieces(hypothesis.ids)),
            hypothesis.score,
            hypothesis.log_probability,
            cut,
        )


def _cut(ids: list[int], length: int) -> list[int]:
    return ids if len(ids) <= length else [*ids[: length - 1], END]
