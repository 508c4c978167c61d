"""seq2seq score: compute the log probability and perplexity of given translations."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from seq2seq.config.schema import ScoreConfig
from seq2seq.data.sources import from_text
from seq2seq.inference.translator import Translator
from seq2seq.utils.device import tune_cpu
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import output_stream, require_file

CHUNK = 4096  # pairs scored together


def score(config: ScoreConfig) -> None:
    """Print for each pair log probability, target subwords with the end mark, and perplexity; or one line for all."""
    for key, path in (("source", config.source), ("target", config.target)):
        if path is not None:
            require_file(key, path)
    if config.source is None and sys.stdin.isatty():
        raise UserError("source: nothing to score; give source=FILE target=FILE, or pipe lines of source, tab, target")
    tune_cpu()
    translator = Translator.load(
        config.run,
        config.checkpoint,
        outputs=config.outputs,
        device=config.device,
        precision=config.precision,
        processes=config.processes,
    )
    if config.source is not None and config.target is not None:
        pairs = from_text(Path(config.source), Path(config.target))
    else:
        pairs = tabbed(sys.stdin.buffer)
    total, tokens, count = 0.0, 0, 0
    with output_stream(config.output) as out:
        for log_probabilities in scored(translator, pairs):
            log_probability, length = sum(log_probabilities), len(log_probabilities)
            total, tokens, count = total + log_probability, tokens + length, count + 1
            if not config.summary:
                out.write(f"{log_probability:.4f}\t{length}\t{perplexity(log_probability, length):.3f}\n")
        if config.summary:
            out.write(f"perplexity {perplexity(total, tokens):.3f}  ({tokens:,} subwords of {count:,} pairs, ")
            out.write(f"log probability {total:.2f})\n")


def scored(translator: Translator, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[float, ...]]:
    """Yield the log probabilities of each target's subwords; warn of truncated sources."""
    pairs, number = iter(pairs), 0
    while chunk := list(islice(pairs, CHUNK)):
        for translation in translator.score([source for source, _ in chunk], [target for _, target in chunk]):
            number += 1
            if translation.truncated:
                print(f"line {number}: source truncated to {translator.max_length} subwords", file=sys.stderr)
            yield translation.token_log_probabilities


def perplexity(log_probability: float, tokens: int) -> float:
    """The perplexity per subword: as uncertain as a uniform choice among that many."""
    return math.exp(min(-log_probability / max(tokens, 1), 700.0))


def tabbed(lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Yield pairs from lines of source, tab, target."""
    for number, line in enumerate(lines, 1):
        try:
            columns = line.decode("utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise UserError(f"line {number}: not UTF-8") from None
        if len(columns) != 2:
            raise UserError(f"line {number}: {len(columns)} columns; each line is a source, a tab, and a target")
        yield columns[0], columns[1]
