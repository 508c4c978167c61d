"""Search by CTranslate2: a checkpoint is exported once, verified, and kept beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import ModelConfig, SearchConfig, TransformerConfig
from seq2seq.data.batching import split_by_token_budget
from seq2seq.data.tokenizer import BEGIN, END, FILES, PAD, Tokenizer
from seq2seq.decoding.scoring import Hypothesis, length_penalty, special_keys
from seq2seq.inference.checkpoint import CONFIG, inference_weights
from seq2seq.inference.ctranslate2 import (
    SPECIAL_PIECES,
    TOLERANCE,
    CTranslate2Engine,
    TorchEngine,
    compare_engines,
    import_ctranslate2,
    is_installed,
    save_ctranslate2,
    unsupported,
    vocabulary_pieces,
)
from seq2seq.model.interface import Seq2Seq
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import folder_written_atomically

QUANTIZATION = "int8"
RECORD = "export.json"  # what an export was made from, and the digest of what was written
BATCH_TOKENS = 1024  # source subwords × beam of a batch: each thread translates one
PROBES, PROBE_LENGTH = 32, 24  # sentences of random subwords that verify an export


def open_engine(
    name: str,
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    model: Seq2Seq,
    device: torch.device,
    fast: bool = False,
) -> CTranslate2Search | None:
    """Return the engine that searches for a checkpoint's model, given in float32; None is this project's own search.

    "auto" is the faster one on a CPU (docs/benchmarks.md): this project's where it is `fast`, in int8 with vector
    instructions, and else CTranslate2 for everything that it supports.
    """
    if name == "torch" or (name == "auto" and fast):
        return None
    problems = [] if device.type == "cpu" else [f"engine: ctranslate2 runs on a CPU, not on {device}; set device=cpu"]
    problems += [f"{problem}, or use engine=torch" for problem in unsupported(config)]
    if name == "auto" and (problems or not is_installed()):
        return None
    if problems:
        raise UserError(*problems)
    import_ctranslate2("engine=ctranslate2")
    assert isinstance(config, TransformerConfig)
    return CTranslate2Search.from_checkpoint(folder, config, tokenizer, model, required=name == "ctranslate2")


# ---------------------------------------------------------------------------------------- the export


def up_to_date_export(folder: Path, config: TransformerConfig, tokenizer: Tokenizer, model: Seq2Seq) -> Any:
    """Load the export beside a checkpoint, made again if it is stale or damaged; or one that is not kept."""
    exported = folder / f"ctranslate2-{QUANTIZATION}"
    source = {"checkpoint": digest(checkpoint_files(folder)), "ctranslate2": import_ctranslate2().__version__}
    try:
        with FileLock(f"{exported}.lock"):
            if read_record(exported) != {**source, "export": digest_of_folder(exported)}:
                with folder_written_atomically(exported) as tmp_dir:
                    write_export(tmp_dir, config, tokenizer, model, source)
            return load(exported)
    except OSError:  # the run's folder cannot be written
        with TemporaryDirectory() as tmp:
            write_export(Path(tmp), config, tokenizer, model, source)
            return load(Path(tmp))


def write_export(
    folder: Path, config: TransformerConfig, tokenizer: Tokenizer, model: Seq2Seq, source: dict[str, str]
) -> None:
    """Convert in float32, verify that, convert in the final quantization, and record the origin."""
    with TemporaryDirectory() as full:
        save_ctranslate2(model.eval(), config, tokenizer, Path(full), "float32")
        verify(Path(full), tokenizer, model)
    save_ctranslate2(model, config, tokenizer, folder, QUANTIZATION)
    record = {**source, "export": digest_of_folder(folder)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, tokenizer: Tokenizer, model: Seq2Seq) -> None:
    """Compare the log probabilities of both engines on random subwords, which need no corpus."""
    random = np.random.default_rng(1)
    lengths = random.integers(1, PROBE_LENGTH, PROBES)
    sources = [[*random.integers(END + 1, tokenizer.vocabulary.source, n).tolist(), END] for n in lengths]
    names = [tokenizer.decode_source(ids) for ids in sources]
    ours = TorchEngine(model, search_preset("greedy"), PROBE_LENGTH)
    comparison = compare_engines(ours, CTranslate2Engine(folder, tokenizer, PROBE_LENGTH), names, sources, beam=1)
    if not comparison.difference <= TOLERANCE:
        raise UserError(f"engine: CTranslate2 and seq2seq disagree ({comparison.problem()}); use engine=torch")


def load(folder: Path) -> Any:
    """Load an export with one thread per batch, as many batches as torch has threads: fastest on a CPU."""
    threads = torch.get_num_threads()
    return import_ctranslate2().Translator(str(folder), inter_threads=threads, intra_threads=1)


def checkpoint_files(folder: Path) -> list[Path]:
    return [folder / CONFIG, inference_weights(folder), *(folder / name for name in FILES.values())]


def read_record(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def digest_of_folder(folder: Path) -> str:
    return digest(sorted(path for path in folder.glob("*") if path.name != RECORD))


def digest(paths: Sequence[Path]) -> str:
    """Return a digest of the names and contents of files."""
    content = blake2b(digest_size=16)
    for path in paths:
        content.update(path.name.encode())
        content.update(path.read_bytes())
    return content.hexdigest()


# ---------------------------------------------------------------------------------------- the search


def unsupported_search(search: SearchConfig) -> list[str]:
    """List the search keys that CTranslate2 does not follow exactly as this project does."""
    return [
        f"search.{key}: engine=ctranslate2 does not support {getattr(search, key)}; use engine=torch"
        for key in (*special_keys(search), *(["shortlist"] if search.shortlist else []))
    ]


@dataclass(frozen=True)
class CTranslate2Search:
    """Beam search by CTranslate2 with this project's length penalty, length limits and prefixes."""

    translator: Any
    source: list[str]  # the pieces of both vocabularies
    target: list[str]
    required: bool  # raise an error for a search that it does not support

    @classmethod
    def from_checkpoint(
        cls, folder: Path, config: TransformerConfig, tokenizer: Tokenizer, model: Seq2Seq, required: bool
    ) -> CTranslate2Search:
        pieces = vocabulary_pieces(tokenizer.source), vocabulary_pieces(tokenizer.target)
        return cls(up_to_date_export(folder, config, tokenizer, model), *pieces, required)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.target)}

    @property
    def description(self) -> str:
        return f"ctranslate2 {import_ctranslate2().__version__} {QUANTIZATION}"

    def supports(self, search: SearchConfig, prefixes: bool = False) -> bool:
        problems = unsupported_search(search)
        if prefixes and kept_hypotheses(search) > 1:
            problems.append("prefixes: engine=ctranslate2 supports them with one translation; use engine=torch")
        if problems and self.required:
            raise UserError(*problems, code=2)
        return not problems

    def search(
        self,
        sources: list[list[int]],
        prefixes: list[list[int]],
        max_lengths: list[int],
        search: SearchConfig,
        probabilities: bool,
    ) -> list[list[Hypothesis] | None]:
        """Return each sentence's hypotheses, best first; None where the length limit decides, which is not the same.

        The sentences are sorted by length.
        """
        budget = BATCH_TOKENS if search.tokens == "auto" else search.tokens
        parts = split_by_token_budget(np.array([len(ids) * search.beam for ids in sources], np.int64), budget)
        waiting = [self._submit(sources[part], prefixes[part], max(max_lengths[part]), search) for part in parts]
        found = [self._ranked(future.result(), exponent, search) for exponent, futures in waiting for future in futures]
        kept = [
            i
            for i, (ranked, longest) in enumerate(zip(found, max_lengths, strict=True))
            if all(len(one.ids) + 1 < longest for one in ranked)
        ]
        # With a prefix, whose log probability CTranslate2 leaves out, all compete again.
        counts = [search.beam if prefixes[i] else kept_hypotheses(search) for i in kept]
        chosen = [found[i][:count] for i, count in zip(kept, counts, strict=True)]
        if probabilities or any(prefixes):
            chosen = self._scored([sources[i] for i in kept], chosen, search)
        by_sentence = dict(zip(kept, chosen, strict=True))
        return [by_sentence.get(i) for i in range(len(sources))]

    def _submit(
        self, sources: list[list[int]], prefixes: list[list[int]], max_length: int, search: SearchConfig
    ) -> tuple[float, list[Any]]:
        """Start a batch; return the exponent of the length in its scores, and the results to wait for."""
        pieces = [[self.source[i] for i in ids[:-1]] for ids in sources]  # CTranslate2 adds END itself
        begun = [[self.target[i] for i in ids] for ids in prefixes]
        exponent = average_penalty(search, len(sources[-1]))
        futures: list[Any] = self.translator.translate_batch(
            pieces,
            begun if any(begun) else None,
            asynchronous=True,
            beam_size=search.beam,
            num_hypotheses=search.beam,
            return_scores=True,
            length_penalty=exponent,
            disable_unk=True,
            suppress_sequences=[[SPECIAL_PIECES[PAD]], [SPECIAL_PIECES[BEGIN]]],
            max_input_length=0,
            min_decoding_length=0,
            max_decoding_length=max_length,
        )
        return exponent, futures

    def _ranked(self, result: Any, exponent: float, search: SearchConfig) -> list[Hypothesis]:
        """Return a sentence's hypotheses, ranked with this project's length penalty.

        CTranslate2 leaves banned subwords out of the normalisation, and a prefix out of the sum.
        """
        found = []
        for pieces, score in zip(result.hypotheses, result.scores, strict=True):
            n = len(pieces) + 1
            total = score * n**exponent
            found.append(Hypothesis([self.ids[p] for p in pieces], total, total / length_penalty(n, search), ()))
        return sorted(found, key=lambda one: -one.score)

    def _scored(
        self, sources: list[list[int]], found: list[list[Hypothesis]], search: SearchConfig
    ) -> list[list[Hypothesis]]:
        """Score hypotheses subword by subword, prefixes included, and rank them."""
        pairs = [
            (source, ids) for source, ranked in zip(sources, found, strict=True) for ids in (one.ids for one in ranked)
        ]
        results = self.translator.score_batch(
            [[self.source[i] for i in source[:-1]] for source, _ in pairs],
            [[self.target[i] for i in ids] for _, ids in pairs],
            max_batch_size=BATCH_TOKENS,
            batch_type="tokens",
            max_input_length=0,
        )
        one = iter([hypothesis(ids, r.log_probs, search) for (_, ids), r in zip(pairs, results, strict=True)])
        ranked = (sorted((next(one) for _ in each), key=lambda one: -one.score) for each in found)
        return [each[: kept_hypotheses(search)] for each in ranked]


def kept_hypotheses(search: SearchConfig) -> int:
    """Return how many hypotheses a search returns: all of them where they are compared with one another."""
    return search.n_best if search.select_by == "score" else search.beam


def average_penalty(search: SearchConfig, length: int) -> float:
    """Return the exponent of a length average that ranks hypotheses of about this length as the search's penalty.

    It chooses among more than `beam` finished hypotheses, and is never 0, with which CTranslate2 stops earlier.
    """
    slope = length / (5 + length) if search.length_normalization == "gnmt" else 1.0
    return max(search.length_penalty * slope, 1e-6)


def hypothesis(ids: list[int], log_probabilities: list[float], search: SearchConfig) -> Hypothesis:
    total = sum(log_probabilities)
    return Hypothesis(ids, total, total / length_penalty(len(ids) + 1, search), tuple(log_probabilities))
