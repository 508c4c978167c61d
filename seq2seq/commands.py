"""What each command does, from a typed config to the last line it prints."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch

from seq2seq import config as configs
from seq2seq.config import EvaluateConfig, ModelConfig, TrainConfig, TranslateConfig
from seq2seq.device import choose_device, choose_precision, tune_cpu
from seq2seq.errors import UserError
from seq2seq.evaluation import Scores, translate_and_score
from seq2seq.model.seq2seq import Seq2Seq, build_model, parameter_table
from seq2seq.run import Run
from seq2seq.text.batches import Batches, EncodedCorpus, encode_corpus, in_order
from seq2seq.text.corpus import Corpus, from_files, load_corpus, read_lines
from seq2seq.text.tokenizer import Tokenizer, train_tokenizer
from seq2seq.training.checkpoint import (
    CONFIG,
    Checkpoints,
    Progress,
    RunState,
    read_config,
    read_plain_config,
    write_aside,
    write_config,
)
from seq2seq.training.logbook import Logbook
from seq2seq.training.loss import loss_sum
from seq2seq.training.optimizer import build_optimizer
from seq2seq.training.trainer import Trainer, Validation, clock
from seq2seq.translator import Translator

KEPT = ("model.", "tokenizer.", "data.source", "data.target", "seed")  # what a run that continues cannot change
FILTER_LINES = 256  # sentences that a filter reads before it writes


# --------------------------------------------------------------------------------------------- train


def train(config: TrainConfig) -> None:
    """Train a run, or continue it, and translate the test set with its best checkpoint."""
    device, device_reason = choose_device(config.device)
    precision, precision_reason = choose_precision(config.precision, device)
    run = Run(Path(config.outputs) / config.name)
    print(f"run        {run.folder}")
    changes = changes_of(run, config)
    corpora = {split: load_corpus(config.data, split) for split in ("train", "validation", "test")}
    tune_cpu()
    open_folder(run, config)
    with Logbook(run) as logbook:
        logbook.fact("device", f"{device} ({device_reason}), {str(precision)[6:]} ({precision_reason})")
        for change in changes:
            logbook.fact("changed", change)
        counts = ", ".join(f"{len(corpus):,} {split}" for split, corpus in corpora.items() if corpus)
        logbook.fact("corpus", f"{config.data.name} {config.data.source}→{config.data.target}: {counts} pairs")
        state = prepare_state(run, config, corpora["train"], device, logbook)
        if done := state.progress.update:
            finished = done >= config.training.updates
            more = "; it is finished, to train longer raise training.updates" if finished else ""
            logbook.fact("continues", f"after update {done:,}{more}")
        fit(state, corpora["validation"], precision, run, logbook)
        finish(run, config, state, corpora["test"], logbook)
    print(f"run        {run.folder}")


def changes_of(run: Run, config: TrainConfig) -> list[str]:
    """What differs from the run that is continued; nothing for a new one."""
    if config.overwrite or not run.exists:
        return []
    changes = differences(read_plain_config(run.config), configs.plain(config))
    refused = [c for c in changes if c.startswith(KEPT)]
    if refused:
        raise UserError(
            *(f"{change}: a run keeps its model, tokenizer, languages and seed" for change in refused),
            f"{run.folder} exists; choose another name=…, or overwrite=true to start again",
            code=2,
        )
    return changes


def open_folder(run: Run, config: TrainConfig) -> None:
    if config.overwrite and run.exists:
        shutil.rmtree(run.folder)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_config(config, run.config)
    except OSError as error:
        raise UserError(f"outputs: {run.folder} cannot be written ({error.strerror or error})") from None


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Each value that differs, as "key: old → new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if name not in ("overwrite", "name", "outputs")]
        return [
            d for name in names for d in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [f"{key}: {old} → {new}"]


def prepare_state(
    run: Run, config: TrainConfig, corpus: Corpus | None, device: torch.device, logbook: Logbook
) -> RunState:
    """Tokenizer, model, optimizer and batches, new or from the run's last checkpoint."""
    assert corpus is not None  # the config has no null for the training split
    checkpoints = Checkpoints(run.checkpoints)
    last = checkpoints.find("last") if checkpoints.index() else None
    tokenizer = Tokenizer.load(last) if last else make_tokenizer(corpus, config, logbook)
    encoded = encode_corpus(corpus, tokenizer, config.data.max_length)
    if len(encoded) == 0:
        raise UserError(
            f"data.max_length: no training pair has two sides of 1 to {config.data.max_length} subwords; raise it"
        )
    if encoded.dropped:
        logbook.fact("left out", f"{encoded.dropped:,} training pairs, empty or over {config.data.max_length} subwords")
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer.vocabulary).to(device)
    batches = Batches(encoded, config.training.tokens, config.seed)
    describe(config.model, model, tokenizer, batches, logbook)
    state = RunState(config, tokenizer, model, build_optimizer(model, config.optimizer), batches, Progress())
    if last:
        state.read(last)
    return state


def make_tokenizer(corpus: Corpus, config: TrainConfig, logbook: Logbook) -> Tokenizer:
    logbook.status("training the tokenizer …")
    tokenizer, notes = train_tokenizer(corpus, config.tokenizer)
    for note in notes:
        logbook.fact("tokenizer", note)
    return tokenizer


def describe(config: ModelConfig, model: Seq2Seq, tokenizer: Tokenizer, batches: Batches, logbook: Logbook) -> None:
    """Vocabulary, parameter table and batches."""
    sizes = tokenizer.vocabulary
    joint = f"{sizes.source:,} joint" if sizes.joint else f"{sizes.source:,} source, {sizes.target:,} target"
    logbook.fact("subwords", joint)
    table = parameter_table(model)
    logbook.fact("model", f"{config.name}: {sum(count for _, count in table):,} parameters")
    for name, count in table:
        logbook.fact("", f"{name:17} {count:>12,}")
    real = batches.corpus.source.lengths.sum() + batches.corpus.target.lengths.sum()
    rows = batches.rows(0)
    places = sum(
        len(r) * (batches.corpus.source.lengths[r].max() + batches.corpus.target.lengths[r].max()) for r in rows
    )
    logbook.fact("batches", f"{len(rows):,} an epoch, padding {1 - real / places:.1%}")


def fit(state: RunState, corpus: Corpus | None, precision: torch.dtype, run: Run, logbook: Logbook) -> None:
    """Train with validations on a corpus; an interruption says how to go on."""
    assert corpus is not None
    encoded = encode_corpus(corpus, state.tokenizer)

    def check(model: Seq2Seq) -> Validation:
        return validate(model, state, corpus, encoded)

    trainer = Trainer(state, precision, check, Checkpoints(run.checkpoints), logbook)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        saved = Checkpoints(run.checkpoints).index().get("last", "nothing")
        logbook.say(
            f"interrupted after update {state.progress.update:,}; saved so far: {saved}; the same command continues"
        )
        raise
    if trainer.out_of_patience():
        logbook.say(f"stopped: no better score in {state.progress.without_gain} validations")


@torch.inference_mode()
def validate(model: Seq2Seq, state: RunState, corpus: Corpus, encoded: EncodedCorpus) -> Validation:
    """Loss per target token, BLEU and chrF, and the first few translations."""
    config = state.config
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for batch in in_order(encoded, config.training.tokens):
        total += float(loss_sum(model, batch.to(device), 0.0))
        tokens += batch.target_tokens
    translator = Translator(model, state.tokenizer, device, config.model.max_length)
    hypotheses, scores = translate_and_score(translator, corpus, config.search)
    return Validation(
        {"loss": total / tokens, "bleu": scores.bleu, "chrf": scores.chrf},
        samples(corpus, hypotheses, config.training.samples),
    )


def samples(corpus: Corpus, hypotheses: list[str], count: int) -> list[str]:
    """Sentences spread over the corpus, with what was said and what was meant."""
    places = [round((i + 0.5) * len(corpus) / count - 0.5) for i in range(count)]
    return [
        line
        for i in sorted(set(places))
        for line in (
            f"source     {corpus.source[i]}",
            f"reference  {corpus.target[i]}",
            f"output     {hypotheses[i]}",
        )
    ]


def finish(run: Run, config: TrainConfig, state: RunState, corpus: Corpus | None, logbook: Logbook) -> None:
    """The best checkpoint on the test set, and what to do next."""
    progress = state.progress
    result: dict[str, Any] = {"progress": asdict(progress)}
    logbook.say(
        f"trained {progress.update:,} updates, {progress.target_tokens:,} target tokens in {clock(progress.seconds)}"
    )
    if corpus:
        translator = Translator.load(
            str(run.folder), outputs=config.outputs, device=config.device, precision=config.precision
        )
        hypotheses, scores = translate_and_score(translator, corpus, config.search)
        for line in samples(corpus, hypotheses, config.training.samples):
            logbook.say(f"    {line}")
        logbook.say(
            f"test       {scores}  (beam {config.search.beam}, best checkpoint: update {progress.best_update:,})"
        )
        logbook.say(f"           {scores.bleu_signature}")
        result["test"] = asdict(scores)
    run.write_result(result)
    where = f" outputs={config.outputs}" if config.outputs != "outputs" else ""
    logbook.say(f"try it     seq2seq translate run={config.name}{where}")


# ------------------------------------------------------------------------------------------ evaluate


def evaluate(config: EvaluateConfig) -> None:
    """Translate a test set and print its scores; hypotheses and scores are written into the run."""
    run = Run.find(config.run, config.outputs)
    print(f"run        {run.folder}")
    device, reason = choose_device(config.device)
    folder = Checkpoints(run.checkpoints).find(config.checkpoint)
    corpus, name = test_set(config, folder)
    print(f"checkpoint {folder.name}, on {device} ({reason})")
    print(f"test set   {name}: {len(corpus):,} pairs")
    tune_cpu()
    translator = load_translator(config)
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
        return from_files(config.source, config.reference), Path(config.source).stem
    data = read_config(checkpoint / CONFIG).data
    if config.data_path:
        data = replace(data, path=config.data_path)
    corpus = load_corpus(data, config.split)
    if corpus is None:
        raise UserError(f"split: the run's corpus has no {config.split} set; name two files: source=… reference=…")
    return corpus, config.split


def write_evaluation(run: Run, name: str, hypotheses: list[str], scores: Scores, config: EvaluateConfig) -> None:
    run.evaluation.mkdir(exist_ok=True)
    path = run.evaluation / f"{name}.{Path(config.checkpoint).name}.beam{config.search.beam}"
    write_aside(Path(f"{path}.txt"), "".join(f"{line}\n" for line in hypotheses))
    told = {**asdict(scores), "sentences": len(hypotheses), "config": configs.plain(config)}
    write_aside(Path(f"{path}.json"), json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    print(f"written    {path}.txt, {path}.json")


# ----------------------------------------------------------------------------------------- translate


def translate(config: TranslateConfig) -> None:
    """Lines in, lines out: a prompt where a person types, a filter everywhere else."""
    run = Run.find(config.run, config.outputs)
    if config.run is None:
        print(f"run        {run.folder} (the newest)", file=sys.stderr)
    tune_cpu()
    translator = load_translator(config)
    if config.input is None and sys.stdin.isatty():
        prompt(translator, config, run)
        return
    lines = read_lines(config.input) if config.input else read_stream(sys.stdin)
    with output_stream(config.output) as out:
        translate_lines(translator, lines, out, config)


def translate_lines(translator: Translator, lines: Iterable[str], out: TextIO, config: TranslateConfig) -> None:
    """One output line for each input line (n_best of them where asked for), in order."""
    lines, number = iter(lines), 0
    while chunk := list(islice(lines, FILTER_LINES)):
        for translations in translator.translate(chunk, config.search):
            number += 1
            if translations[0].cut:
                print(
                    f"line {number}: longer than {translator.max_length} subwords; its end is left out",
                    file=sys.stderr,
                )
            out.writelines(f"{shown}\n" for shown in listed(translations, config))
        out.flush()


def listed(translations: list[Any], config: TranslateConfig) -> list[str]:
    """The translations of a sentence as lines; with n_best > 1, ranked and scored, as many as asked for."""
    if config.search.n_best == 1:
        return [translations[0].text]
    return [f"{t.score:8.3f}\t{t.text}" for t in translations]


def prompt(translator: Translator, config: TranslateConfig, run: Run) -> None:
    """Type a sentence, read its translation, until an empty line or Ctrl-D."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (gives `input` its history and editing)
    print(f"{run.folder} on {translator.device}, beam {config.search.beam}. Type a sentence; Ctrl-D ends.")
    while True:
        try:
            sentence = input("> ")
        except EOFError:
            print()
            return
        if sentence.strip():
            began = time.perf_counter()
            translations = translator.translate([sentence], config.search)[0]
            print("\n".join(listed(translations, config)), f"  [{time.perf_counter() - began:.2f} s]")


def read_stream(stream: TextIO) -> Iterator[str]:
    """Lines of a pipe; only a line feed ends a line, and what is not UTF-8 is named by its line."""
    for number, line in enumerate(stream.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            print(f"line {number}: not UTF-8; the broken bytes are replaced", file=sys.stderr)
            yield line.decode("utf-8", "replace").rstrip("\r\n")


@contextmanager
def output_stream(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file."""
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
        yield sys.stdout
        return
    try:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


# -------------------------------------------------------------------------------------------- shared


def load_translator(config: EvaluateConfig | TranslateConfig) -> Translator:
    return Translator.load(
        config.run,
        config.checkpoint,
        outputs=config.outputs,
        device=config.device,
        precision=config.precision,
    )
