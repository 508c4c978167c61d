"""Which sentences a run is measured on: splits of its own corpus, files, or a public test set by its name."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from seq2seq.config import DataConfig, TestConfig, TrainConfig
from seq2seq.errors import UserError, nearest
from seq2seq.evaluation import TestSet
from seq2seq.run import Run
from seq2seq.text.corpus import Corpus, load_split
from seq2seq.text.sources import from_text, read_lines
from seq2seq.training.checkpoint import CONFIG, read_config


def find_test_sets(config: TestConfig, run: Run) -> list[TestSet]:
    """All that a command line names, for one run."""
    stored = stored_config(run, config)
    if config.source is not None:
        sources, references = as_list(config.source), config.reference or []
        # Several files beside one source are several translations of it.
        by_source = [references] if isinstance(config.source, str) else as_list(references)
        return [
            of_files(source, as_list(several), stored.data.target)
            for source, several in zip(sources, by_source, strict=True)
        ]
    if config.public is not None:
        return [of_sacrebleu(name, stored.data) for name in as_list(config.public)]
    return [of_split(split, stored, config.data) for split in as_list(config.split)]


def stored_config(run: Run, config: TestConfig) -> TrainConfig:
    """What a run was trained with; its corpus may have moved."""
    stored = read_config(run.checkpoint(config.checkpoint) / CONFIG)
    return replace(stored, data=moved(stored.data, config.data_path)) if config.data_path else stored


def of_files(source: str, references: list[str], language: str) -> TestSet:
    """Files with one sentence a line."""
    several = [list(from_text(Path(source), Path(reference))) for reference in references]
    if not several[0]:
        raise UserError(f"{source} is empty; it must hold one sentence a line")
    return TestSet(
        Path(source).name, [s for s, _ in several[0]], [[t for _, t in pairs] for pairs in several], language
    )


def of_split(split: str, stored: TrainConfig, other: DataConfig | None) -> TestSet:
    """A split of the run's own corpus, or of another."""
    data = other or stored.data
    corpus: Corpus | None = load_split(data, split, stored.seed)
    if corpus is None:
        raise UserError(f"split: {data.name} has no {split} set; name two files: source=… reference=…")
    return TestSet(split if other is None else f"{data.name}.{split}", corpus.source, [corpus.target], data.target)


def of_sacrebleu(name: str, data: DataConfig) -> TestSet:
    """A public test set, which sacreBLEU fetches once and keeps in the folder that $SACREBLEU names."""
    from sacrebleu.dataset import DATASETS

    pair = f"{data.source}-{data.target}"
    if name not in DATASETS:
        raise UserError(f"public: {name!r} is not a test set of sacreBLEU{nearest(name, DATASETS)}")
    dataset = DATASETS[name]
    if pair not in dataset.langpairs:
        known = ", ".join(sorted(dataset.langpairs)[:12])
        raise UserError(f"public: {name} has no pair {pair}; possible: {known}")
    try:
        with redirect_stderr(StringIO()):
            files = [dataset.get_source_file(pair), *dataset.get_reference_files(pair)]  # type: ignore[no-untyped-call]
    except (Exception, SystemExit) as error:  # whatever its downloads and readers raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"public: {name} cannot be fetched ({reason}); name files: source=… reference=…") from None
    source, *references = [list(read_lines(Path(file))) for file in files]
    return TestSet(f"{name.replace('/', '_')}.{pair}", source, references, data.target)


def moved(data: DataConfig, folder: str) -> DataConfig:
    """The same corpus at another place: its folder, or the folder of its files."""

    def place(where: str | list[str] | None) -> str | list[str] | None:
        if data.path is not None or where is None:
            return where
        files = [str(Path(folder) / Path(file).name) for file in ([where] if isinstance(where, str) else where)]
        return files[0] if isinstance(where, str) else files

    splits = {split: place(getattr(data, split)) for split in ("train", "validation", "test")}
    return replace(data, path=None if data.path is None else folder, **splits)  # type: ignore[arg-type]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
