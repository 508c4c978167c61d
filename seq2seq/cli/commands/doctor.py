"""seq2seq doctor: check a corpus, and print its problems on one page."""

from __future__ import annotations

import json
from dataclasses import asdict

from seq2seq.config.schema import DoctorConfig
from seq2seq.data.batching import Batches
from seq2seq.data.corpus import open_corpora
from seq2seq.data.doctor import examine, page, sizes
from seq2seq.data.encoding import encode_training
from seq2seq.data.sources import with_languages
from seq2seq.data.tokenizer import UNKNOWN, make_tokenizer
from seq2seq.evaluation.metrics import corpus_warning
from seq2seq.training.logger import RunLogger
from seq2seq.utils.console import status


def doctor(config: DoctorConfig) -> None:
    """Print one page on a corpus: its sizes, its problems, and the cost of an epoch."""
    data = with_languages(config.data)
    corpora = open_corpora(data, config.seed, status)
    tokenizer, notes = make_tokenizer(corpora.train, config.tokenizer, config.data.cache)
    encoded, _ = encode_training(corpora.train, tokenizer, config.data.max_length, config.data.cache, status)
    status("examining …")
    findings = examine(corpora)
    cut = len(corpora.train) - len(encoded)
    unknown = sum(int((side.flat[:] == UNKNOWN).sum()) for side in (encoded.source, encoded.target))
    tokens = [int(side.ends[-1]) if len(side) else 0 for side in (encoded.source, encoded.target)]
    batches, padding = Batches(encoded, config.tokens, config.seed).estimate_padding() if len(encoded) else (0, 0.0)
    status("")
    if config.json:
        counts = {"pairs": len(corpora.train), "source_tokens": tokens[0], "target_tokens": tokens[1]}
        summary = {**counts, "batches": batches, "padding": padding, "cut": cut, "unknown": unknown}
        print(
            json.dumps({**summary, "findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False)
        )
        return
    logger = RunLogger()
    sizes(data, corpora, logger.field)
    if warning := corpus_warning(data):
        logger.field("warning", warning)
    for note in notes:
        logger.field("", note)
    page(findings, logger.field)
    logger.field(
        "subwords", f"{tokenizer.vocabulary.source:,}; unknown {unknown / max(1, sum(tokens)):.3%} of all tokens"
    )
    if cut:
        logger.field("omitted", f"{cut:,} pairs: a side is empty or over {config.data.max_length} subwords")
    logger.field(
        "epoch",
        f"{tokens[0]:,} source and {tokens[1]:,} target tokens; about {batches:,} updates, padding {padding:.1%}",
    )
