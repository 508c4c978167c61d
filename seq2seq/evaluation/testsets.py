"""Test sets of a run (its own splits, files or public sets), and its translations of them."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from seq2seq.config.loading import search_preset, to_dict
from seq2seq.config.schema import DataConfig, SearchConfig, ShortlistConfig, TestConfig, TrainConfig
from seq2seq.data.corpus import Corpus, hashes_of, load_split
from seq2seq.data.languages import code_of, is_unknown
from seq2seq.data.sources import from_text, read_lines, with_languages
from seq2seq.data.store import key_of
from seq2seq.evaluation.metrics import TestSet, TranslationScores, score
from seq2seq.inference.checkpoint import CONFIG, read_config
from seq2seq.inference.translator import Translator
from seq2seq.utils.console import status
from seq2seq.utils.errors import UserError, nearest, reason_of
from seq2seq.utils.io import write_atomically
from seq2seq.utils.run import Run
from seq2seq.utils.text import one_line


def translate_and_score(
    translator: Translator, corpus: Corpus, search: SearchConfig, data: DataConfig, resamples: int = 0
) -> tuple[list[str], TranslationScores]:
    """Return the best translation of every source sentence, and their scores against the targets."""
    hypotheses = [translations[0].text for translations in translator.translate(corpus.source, search)]
    return hypotheses, score(hypotheses, corpus.target, data, resamples)


def find_test_sets(config: TestConfig, run: Run) -> list[TestSet]:
    """Return all test sets that a command line names, for one run."""
    stored = stored_config(run, config)
    tests = _find_test_sets(config, stored)
    for test in tests:
        if not len(test):
            raise UserError(f"split: {test.name} is empty; give two files: source=… reference=…")
    return [replace(test, tokenize=config.tokenize or test.tokenize) for test in tests]


def _find_test_sets(config: TestConfig, stored: TrainConfig) -> list[TestSet]:
    if config.source is not None:
        sources, references = as_list(config.source), config.reference or []
        # Several files beside one source are several references.
        by_source = [references] if isinstance(config.source, str) else as_list(references)
        return [
            test_set_from_files(source, as_list(several), stored.data)
            for source, several in zip(sources, by_source, strict=True)
        ]
    if config.public is not None:
        return [test_set_from_sacrebleu(name, stored.data) for name in as_list(config.public)]
    return [test_set_from_split(split, stored, config.data) for split in as_list(config.split)]


def stored_config(run: Run, config: TestConfig | ShortlistConfig) -> TrainConfig:
    """Return the training config of a run, whose corpus may have moved."""
    stored = read_config(run.checkpoint(config.checkpoint) / CONFIG)
    return replace(stored, data=relocate(stored.data, config.data_path)) if config.data_path else stored


def test_set_from_files(source: str, references: list[str], data: DataConfig) -> TestSet:
    """Read a test set from files with one sentence per line."""
    several = [list(from_text(Path(source), Path(reference))) for reference in references]
    if not several[0]:
        raise UserError(f"{source} is empty; it must contain one sentence per line")
    sources, translations = [s for s, _ in several[0]], [[t for _, t in pairs] for pairs in several]
    return TestSet(Path(source).name, sources, translations, data.target or "", tokenize=data.tokenize)


def test_set_from_split(split: str, stored: TrainConfig, other: DataConfig | None) -> TestSet:
    """Load a split of the run's own corpus, or of another."""
    data = stored.data
    if other:  # without languages of its own, it has the run's
        data = replace(other, source=other.source or data.source, target=other.target or data.target)
        data = with_languages(data)
    corpus: Corpus | None = load_split(data, split, stored.seed)
    if corpus is None:
        raise UserError(f"split: {data.name} has no {split} set; give two files: source=… reference=…")
    name, is_grammar = f"{data.name}.{split}", data.path == "toy"
    return TestSet(name, corpus.source, [corpus.target], data.target or "", is_grammar, data.tokenize)


def test_set_from_sacrebleu(name: str, data: DataConfig) -> TestSet:
    """Load a public test set, which sacreBLEU downloads once, into the folder $SACREBLEU."""
    from sacrebleu.dataset import DATASETS

    pair = "-".join(code_of(language) or language for language in data.languages)
    if name not in DATASETS:
        raise UserError(f"public: {name!r} is not a test set of sacreBLEU{nearest(name, DATASETS)}")
    dataset = DATASETS[name]
    if is_unknown(data.source) or is_unknown(data.target):
        raise UserError(
            f"public: the languages of the run are unknown; train with data.source=… data.target=…, "
            f"or give the files of {name}: source=… reference=…"
        )
    if pair not in dataset.langpairs:
        known = ", ".join(sorted(dataset.langpairs)[:12])
        raise UserError(f"public: {name} has no pair {pair}; possible: {known}")
    try:
        with redirect_stderr(StringIO()):
            files = [dataset.get_source_file(pair), *dataset.get_reference_files(pair)]  # type: ignore[no-untyped-call]
    except (Exception, SystemExit) as error:  # its downloads and readers may raise anything
        reason = reason_of(error)
        raise UserError(f"public: {name} cannot be fetched ({reason}); give files: source=… reference=…") from None
    source, *references = [list(read_lines(Path(file))) for file in files]
    return TestSet(f"{name.replace('/', '_')}.{pair}", source, references, data.target or "")


def is_held_out(config: TestConfig, data: DataConfig) -> bool:
    """Whether the test set was held out of the training pairs of these data."""
    named = config.source or config.public or config.data
    return not named and any(getattr(data, split) is None for split in as_list(config.split))


def seen_in_training(test: TestSet, run: Run, config: TestConfig) -> int:
    """Count the sources that are among the training pairs of a run; none if its corpus cannot be opened."""
    stored = stored_config(run, config)
    try:
        train = load_split(stored.data, "train", stored.seed)
    except UserError:
        return 0
    if train is None:
        return 0
    wanted = hashes_of(source.encode("utf-8", "replace") for source in test.source)
    return int(np.isin(wanted, train.hashes["source"]).sum())


def relocate(data: DataConfig, folder: str) -> DataConfig:
    """Return the same corpus at another path: its folder, or the folder of its files."""
    if not Path(folder).is_dir():
        raise UserError(f"data_path: {folder} is not a folder; give the folder that contains the run's corpus")

    def relocate_files(files: str | list[str] | None) -> str | list[str] | None:
        if data.path is not None or files is None:
            return files
        moved = [str(Path(folder) / Path(file).name) for file in ([files] if isinstance(files, str) else files)]
        return moved[0] if isinstance(files, str) else moved

    splits = {split: relocate_files(getattr(data, split)) for split in ("train", "validation", "test")}
    return replace(data, path=None if data.path is None else folder, **splits)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- translations


def cached_translations(run: Run, test: TestSet, config: TestConfig) -> list[str]:
    """Return a run's translations of a test set, stored by the same checkpoint and search, or new."""
    path, made_by = translations_path(run, test, config), translation_settings(run, test, config)
    try:
        metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if {name: metadata.get(name) for name in made_by} == made_by:
            return path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError, AttributeError):
        pass
    status(f"translating {len(test):,} sentences with {run.folder.name} …")
    folder = run.checkpoint(config.checkpoint)
    translator = Translator.from_checkpoint(folder, config.device, config.precision).use_processes(config.processes)
    hypotheses = translate(translator, test, config.search)
    write_translations(run, test, hypotheses, config, {})
    return hypotheses


def translate(translator: Translator, test: TestSet, search: SearchConfig) -> list[str]:
    """Return the best translation of each sentence, on one line; a terminal shows how many are done."""

    def show(done: int) -> None:
        status(f"translating {test.name}: {done:,} of {len(test):,} sentences …")

    show(0)
    found = translator.translate(test.source, search, on_done=show, probabilities=False)
    status("")
    return [one_line(best[0].text) for best in found]


def write_translations(
    run: Run, test: TestSet, hypotheses: list[str], config: TestConfig, measured: dict[str, Any], engine: str = "torch"
) -> Path:
    """Write the hypotheses, one per line, and beside them their origin and scores."""
    path = translations_path(run, test, config, engine)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in hypotheses))
    metadata = {**translation_settings(run, test, config), "test": test.name, "sentences": len(hypotheses), **measured}
    write_atomically(path.with_suffix(".json"), json.dumps(metadata, indent=1, ensure_ascii=False) + "\n")
    return path


def translations_path(run: Run, test: TestSet, config: TestConfig, engine: str = "torch") -> Path:
    """Return a path unique to the test set, checkpoint, search, precision and engine."""
    parts = [test.name, test.key, Path(config.checkpoint).name, search_name(config.search)]
    parts += [config.precision] if config.precision != "auto" else []
    parts += [engine.replace(" ", "-")] if engine != "torch" else []
    return run.evaluation / f"{'.'.join(parts)}.txt"


def search_name(search: SearchConfig) -> str:
    """Name a search by beam, length penalty, and all other settings that differ from the default."""
    defaults = to_dict(search_preset("greedy"))
    named = ("beam", "length_penalty", "n_best", "tokens")
    changed = {key: value for key, value in to_dict(search).items() if key not in named and value != defaults[key]}
    parts = [f"beam{search.beam}", f"penalty{search.length_penalty:g}", *(f"{k}{v}" for k, v in changed.items())]
    return ".".join(re.sub(r"[^\w.]+", "-", part)[:40].strip("-") for part in parts)


def describe_search(search: SearchConfig) -> str:
    """Describe a search in words."""
    method = f"{search.samples} samples" if search.samples else f"beam {search.beam}" if search.beam > 1 else "greedy"
    return method if search.select_by == "score" else f"{method} selected by {search.select_by}"


def translation_settings(run: Run, test: TestSet, config: TestConfig) -> dict[str, Any]:
    """Return everything that translations depend on."""
    return {
        "checkpoint": run.checkpoint(config.checkpoint).name,
        "sources": key_of(*test.source),
        "search": to_dict(config.search),
        "precision": config.precision,
    }


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
