"""Validation: loss, scores, and a few example translations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from seq2seq.config.schema import SearchConfig
from seq2seq.data.batching import in_order
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.evaluation.metrics import score
from seq2seq.inference.translator import Translator
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.checkpoint import RunState
from seq2seq.training.loss import loss_sum
from seq2seq.utils.images import attention_image

Sample = tuple[str, str, str]  # source, reference, output


@dataclass(frozen=True)
class Validation:
    """The result of a validation: named scores, example translations, and images by name."""

    scores: dict[str, float]
    samples: list[Sample]
    pictures: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def validate(model: Seq2Seq, state: RunState, corpus: Corpus, encoded: EncodedCorpus) -> Validation:
    """Compute loss per target token, BLEU, chrF and a few examples; processes divide the work."""
    config, world = state.config, state.world
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for i, batch in enumerate(in_order(encoded, config.training.budget)):
        if i % world.size == world.rank:
            total += float(loss_sum(model, batch.to(device), 0.0))
            tokens += batch.target_tokens
    translator = Translator(model, state.tokenizer, device, config.model.max_length)
    own = range(world.rank, len(corpus), world.size)
    said = [best.text for best, *_ in translator.translate([corpus.source[i] for i in own], config.search)]
    parts = world.gather((total, tokens, said))
    hypotheses = [parts[i % world.size][2][i // world.size] for i in range(len(corpus))]
    scores = score(hypotheses, corpus.target, config.data.target)
    loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    count = config.training.examples
    seen = pictures(translator, [corpus.source[i] for i in spread(corpus, count)], config.search) if world.leads else {}
    values = {"loss": loss, "bleu": scores.bleu, "chrf": scores.chrf}
    return Validation(values, samples(corpus, hypotheses, count), seen)


def spread(corpus: Corpus, count: int) -> list[int]:
    """Return indices spread over a corpus, always the same."""
    return sorted({round((i + 0.5) * len(corpus) / count - 0.5) for i in range(count)})


def samples(corpus: Corpus, hypotheses: list[str], count: int) -> list[Sample]:
    """Return some sentences with their references and translations."""
    return [(corpus.source[i], corpus.target[i], hypotheses[i]) for i in spread(corpus, count)]


def pictures(translator: Translator, sentences: list[str], search: SearchConfig) -> dict[str, Any]:
    """Draw the attention of translations, averaged over all layers and heads."""
    found = [best for best, *_ in translator.translate(sentences, search, attention=True)]
    return {
        f"attention/{number}": attention_image(best.attention(), best.source_pieces, [*best.pieces, "</s>"])
        for number, best in enumerate(found, 1)
        if best.weights_LNTS is not None
    }
