"""seq2seq evaluate: a checkpoint's scores on a test set."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from seq2seq import config as configs
from seq2seq.config import DataConfig, EvaluateConfig
from seq2seq.device import choose_device, tune_cpu
from seq2seq.errors import UserError
from seq2seq.evaluation import Scores, translate_and_score
from seq2seq.run import Run
from seq2seq.text.corpus import Corpus, load_split
from seq2seq.text.sources import from_text
from seq2seq.training.checkpoint import (
    CONFIG,
    read_config,
    write_aside,
)
from seq2seq.translator import Translator


def evaluate(config: EvaluateConfig) -> None:
    """Translate a test set and print its scores; hypotheses and scores are written into the run."""
    run = Run.find(config.run, config.outputs)
    print(f"run        {run.folder}")
    device, reason = choose_device(config.device)
    folder = run.checkpoint(config.checkpoint)
    corpus, name = test_set(config, folder)
    print(f"checkpoint {folder.name}, on {device} ({reason})")
    print(f"test set   {name}: {len(corpus):,} pairs")
    tune_cpu()
    translator = Translator.from_checkpoint(folder, config.device, config.precision)
    began = time.perf_counter()
    hypotheses, scores = translate_and_score(translator, corpus, config.search)
    seconds = time.perf_counter() - began
    print(f"speed      {len(corpus) / seconds:,.0f} sentences/s, beam {config.search.beam}")
    print(f"BLEU       {scores.bleu:.2f}   {scores.bleu_signature}")
    print(f"chrF       {scores.chrf:.2f}   {scores.chrf_signature}")
    write_evaluation(run, name, hypotheses, scores, config)


def test_set(config: EvaluateConfig, checkpoint: Path) -> tuple[Corpus, str]:
    """The named files, or the split of the corpus that the run was trained on."""
    if config.source is not None and config.reference is not None:
        pairs = list(from_text(Path(config.source), Path(config.reference)))
        if not pairs:
            raise UserError(f"{config.source} is empty; it must hold one sentence a line")
        return Corpus([source for source, _ in pairs], [target for _, target in pairs]), Path(config.source).name
    stored = read_config(checkpoint / CONFIG)
    data = config.data or stored.data
    if config.data_path:
        data = moved(data, config.data_path)
    corpus = load_split(data, config.split, stored.seed)
    if corpus is None:
        raise UserError(f"split: {data.name} has no {config.split} set; name two files: source=… reference=…")
    return corpus, config.split if config.data is None else f"{data.name}.{config.split}"


def moved(data: DataConfig, folder: str) -> DataConfig:
    """The same corpus at another place: its folder, or the folder of its files."""

    def place(where: str | list[str] | None) -> str | list[str] | None:
        if data.path is not None or where is None:
            return where
        files = [str(Path(folder) / Path(file).name) for file in ([where] if isinstance(where, str) else where)]
        return files[0] if isinstance(where, str) else files

    splits = {split: place(getattr(data, split)) for split in ("train", "validation", "test")}
    return replace(data, path=None if data.path is None else folder, **splits)  # type: ignore[arg-type]


def write_evaluation(run: Run, name: str, hypotheses: list[str], scores: Scores, config: EvaluateConfig) -> None:
    run.evaluation.mkdir(exist_ok=True)
    search = f"beam{config.search.beam}.penalty{config.search.length_penalty:g}"
    path = run.evaluation / f"{name}.{Path(config.checkpoint).name}.{search}"
    write_aside(Path(f"{path}.txt"), "".join(f"{line}\n" for line in hypotheses))
    told = {**asdict(scores), "sentences": len(hypotheses), "config": configs.plain(config)}
    write_aside(Path(f"{path}.json"), json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print(f"written    {path}.txt, {path}.json")
