"""Validation: loss, scores, and a few example translations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from seq2seq.config.schema import SearchConfig
from seq2seq.data.batching import sequential_batches
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.evaluation.metrics import score
from seq2seq.inference.translator import Translator
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.checkpoint import RunState
from seq2seq.training.loss import loss_sum
from seq2seq.utils.images import attention_image

Example = tuple[str, str, str]  # source, reference, output


@dataclass(frozen=True)
class Validation:
    """The result of a validation: named scores, example translations, and images by name."""

    scores: dict[str, float]
    examples: list[Example]
    images: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def validate(model: Seq2Seq, state: RunState, corpus: Corpus, encoded: EncodedCorpus) -> Validation:
    """Compute loss per target token, BLEU, chrF and a few examples; processes divide the work."""
    config, process_group = state.config, state.process_group
    device = next(model.parameters()).device
    losses, tokens = [], 0
    for i, batch in enumerate(sequential_batches(encoded, config.training.budget)):
        if i % process_group.world_size == process_group.rank:
            losses.append((i, float(loss_sum(model, batch.to(device), 0.0))))
            tokens += batch.target_tokens
    translator = Translator(model, state.tokenizer, device, config.model.max_length)
    search = training_search(config.search)
    indices = range(process_group.rank, len(corpus), process_group.world_size)
    outputs = [best.text for best, *_ in translator.translate([corpus.source[i] for i in indices], search)]
    gathered = process_group.all_gather((losses, tokens, outputs))
    hypotheses = [gathered[i % process_group.world_size][2][i // process_group.world_size] for i in range(len(corpus))]
    scores = score(hypotheses, corpus.target, config.data)
    # In the order of batches: the same digits for any number of processes.
    by_batch = sorted(pair for part in gathered for pair in part[0])
    loss = sum(loss for _, loss in by_batch) / sum(part[1] for part in gathered)
    count = config.training.examples
    shown = [corpus.source[i] for i in spread_indices(corpus, count)]
    images = attention_images(translator, shown, search) if process_group.is_main else {}
    values = {"loss": loss, "bleu": scores.bleu, "chrf": scores.chrf}
    return Validation(values, select_examples(corpus, hypotheses, count), images)


def training_search(search: SearchConfig) -> SearchConfig:
    """Return the search without CUDA graphs: a capture that fails could spoil the memory that training needs."""
    return replace(search, graphs=False)


def spread_indices(corpus: Corpus, count: int) -> list[int]:
    """Return indices spread over a corpus, always the same."""
    return sorted({round((i + 0.5) * len(corpus) / count - 0.5) for i in range(count)})


def select_examples(corpus: Corpus, hypotheses: list[str], count: int) -> list[Example]:
    """Return some sentences with their references and translations."""
    return [(corpus.source[i], corpus.target[i], hypotheses[i]) for i in spread_indices(corpus, count)]


def attention_images(translator: Translator, sentences: list[str], search: SearchConfig) -> dict[str, Any]:
    """Draw the attention of translations, averaged over all layers and heads."""
    translations = [best for best, *_ in translator.translate(sentences, search, attention=True)]
    return {
        f"attention/{number}": attention_image(best.attention(), best.source_pieces, [*best.pieces, "</s>"])
        for number, best in enumerate(translations, 1)
        if best.weights_LNTS is not None
    }
