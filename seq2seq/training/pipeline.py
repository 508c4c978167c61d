"""A training run from its corpus to its test score."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from seq2seq.config import loading as configs
from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import Batches, mix_of
from seq2seq.data.corpus import Corpora, Corpus, open_corpora
from seq2seq.data.doctor import quick, sizes
from seq2seq.data.encoding import encode_corpus, encode_training, resampler
from seq2seq.data.tokenizer import Tokenizer, make_tokenizer
from seq2seq.evaluation.metrics import RESAMPLES
from seq2seq.evaluation.testsets import translate_and_score
from seq2seq.inference.checkpoint import CONFIG, WEIGHTS, read_plain_config, write_config, yaml_of
from seq2seq.inference.translator import Translator
from seq2seq.model.factory import build_model, parameter_table
from seq2seq.model.interface import Seq2Seq
from seq2seq.training import environment
from seq2seq.training.averaging import build_average
from seq2seq.training.checkpoint import Checkpoints, Progress, RunState, start_from
from seq2seq.training.distributed import World, joined
from seq2seq.training.logger import Logbook
from seq2seq.training.memory_check import rehearse, rehearse_all
from seq2seq.training.meter import clock
from seq2seq.training.optimizers import build_optimizer, optimizer_table
from seq2seq.training.trainer import Trainer
from seq2seq.training.validation import Validation, samples, validate
from seq2seq.utils.console import hint
from seq2seq.utils.device import choose_device, choose_precision, deterministic, peak_memory, tune_cpu
from seq2seq.utils.errors import STOPPED, UserError
from seq2seq.utils.run import Run

PLACE = ("name:", "outputs:", "overwrite:")  # the path of a run, not its training
# Settings that a resumed run cannot change.
KEPT = ("model.", "tokenizer.", "data.source", "data.target", "optimizer.name", "init_from", "seed")

# Settings that TensorBoard's table of runs shows beside the scores.
COMPARED = ("data.name", "model.", "optimizer.", "precision", "seed", "tokenizer.", "training.")


def train(config: TrainConfig) -> Run:
    """Train or resume a run, and translate the test set with its best checkpoint."""
    device, device_reason = choose_device(config.device)
    precision, precision_reason = choose_precision(config.precision, device)
    run = Run(Path(config.outputs) / config.name)
    with joined(device) as world, Logbook(silent=not world.leads) as logbook, alone(run, world):
        logbook.fact("run", str(run.folder))
        logbook.fact("device", f"{device} ({device_reason}), {str(precision)[6:]} ({precision_reason})")
        if world.size > 1:
            logbook.fact("processes", f"{world.size}, each with its share of every update")
        for change in changes_of(run, config):
            logbook.fact("changed", change)
        corpora = open_corpora(config.data, config.seed, logbook.status)
        describe_corpora(config, corpora, logbook)
        tune_cpu()
        if config.deterministic:
            deterministic()
        state = prepare_state(run, config, corpora.train, device, world, logbook)
        trainer = prepare_trainer(state, corpora.validation, precision, run, logbook)
        world.wait()  # all processes have read the folder before it changes
        if world.leads:
            open_folder(run, state.config, state.progress.update)
            if state.progress.update < state.config.training.updates:
                environment.record(run, state.progress.update, config.seed, corpora, state.tokenizer)
        logbook.open(run, state.progress.update)
        logbook.text("config", state.progress.update, f"```yaml\n{yaml_of(state.config)}```")
        if fit(trainer) and world.leads:
            finish(run, state, corpora.test, logbook)
        logbook.fact("run", str(run.folder))
    return run


@contextmanager
def alone(run: Run, world: World) -> Iterator[None]:
    """Lock the run's folder against a second training process."""
    if not world.leads:
        yield
        return
    lock = FileLock(run.folder.with_name(f".{run.folder.name}.lock"), timeout=0)
    made = [folder for folder in (run.folder.parent, *run.folder.parent.parents) if not folder.exists()]
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"name: {run.folder} is being trained by another process; choose another name=…") from None
    except OSError as error:
        raise UserError(f"outputs: {run.folder} cannot be written ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        with suppress(OSError):  # a run that never began leaves no folder behind
            for folder in made:
                folder.rmdir()


def describe_corpora(config: TrainConfig, corpora: Corpora, logbook: Logbook) -> None:
    """Log sizes, omitted pairs, and the doctor's quick findings."""
    sizes(config.data, corpora, logbook.fact)
    for finding in quick(corpora):
        if finding.serious:
            logbook.fact("", f"{finding.name}: {finding.count:,} ({finding.share:.1%}); {finding.advice}")


def changes_of(run: Run, config: TrainConfig) -> list[str]:
    """List the changes to the run being resumed; none for a new run."""
    if config.overwrite or not run.exists:
        return []
    stored = configs.completed(read_plain_config(run.checkpoint("last") / CONFIG))
    changes = [change for change in configs.differences(stored, configs.plain(config)) if not change.startswith(PLACE)]
    refused = [change for change in changes if change.startswith(KEPT) and "dropout:" not in change]
    # Another model differs in every setting; its name suffices.
    refused = [change for change in refused if change.startswith("model.name")] or refused
    if refused:
        raise UserError(
            *(f"{change}: a run keeps its model, tokenizer, languages, optimizer and seed" for change in refused),
            f"{run.folder} exists; choose another name=…, or overwrite=true to start again",
            code=2,
        )
    return changes


def open_folder(run: Run, config: TrainConfig, update: int) -> None:
    """Create the run's folder, only after its data, tokenizer and model are known to be good."""
    try:
        if not update:
            run.clear()
        run.folder.mkdir(parents=True, exist_ok=True)
        run.forget_after(update)
        if update < config.training.updates:
            write_config(config, run.config)
    except OSError as error:
        raise UserError(f"outputs: {run.folder} cannot be written ({error.strerror or error})") from None


def prepare_state(
    run: Run, config: TrainConfig, corpus: Corpus, device: torch.device, world: World, logbook: Logbook
) -> RunState:
    """Build tokenizer, model, optimizer and batches: new, from the last checkpoint, or from another run's weights."""
    last = run.checkpoint("last") if run.exists and not config.overwrite else None
    origin = last or (config.init_from and origin_of(config.init_from, config.outputs))
    tokenizer = Tokenizer.load(origin) if origin else open_tokenizer(corpus, config, logbook)
    batches = open_batches(corpus, tokenizer, config, logbook)
    batches.rank, batches.world = world.rank, world.size
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer.vocabulary).to(device)
    torch.manual_seed(config.seed + world.rank)  # equal weights, but different dropout in every process
    describe(config, model, tokenizer, logbook)
    optimizer = build_optimizer(model, config.optimizer)
    logbook.fact("optimizer", f"{config.optimizer.name}, {config.optimizer.schedule} after {config.optimizer.warmup:,}")
    for kind, text in optimizer_table(optimizer, config.optimizer):
        logbook.fact("", f"{kind:17} {text}")
    average = build_average(config, model, optimizer, Checkpoints(run, config.training.recent).earlier)
    state = RunState(config, tokenizer, model, optimizer, batches, Progress(), average, world)
    if last:
        state.read(last)
        finished = state.progress.update >= config.training.updates
        more = "; it is finished: raise training.updates to train longer" if finished else ""
        logbook.fact("continues", f"after update {state.progress.update:,}{more}")
    elif origin:
        start_from(model, origin)
        logbook.fact("starts from", f"{origin}: its weights and its tokenizer")
    return state


def origin_of(name: str, outputs: str) -> Path:
    """Return the checkpoint that `init_from` names: a checkpoint's folder, or a run's best one."""
    folder = Path(name)
    return folder if (folder / WEIGHTS).is_file() else Run.find(name, outputs).checkpoint("best")


def prepare_trainer(state: RunState, corpus: Corpus, precision: torch.dtype, run: Run, logbook: Logbook) -> Trainer:
    """Build a trainer that validates on a corpus, and check that training fits into memory."""
    encoded = encode_corpus(corpus, state.tokenizer)

    def check(model: Seq2Seq) -> Validation:
        return validate(model, state, corpus, encoded)

    trainer = Trainer(state, precision, check, Checkpoints(run, state.config.training.recent), logbook)
    logbook.status("trying the longest batch …")
    if state.config.compile:
        logbook.fact("compile", trainer.compile(rehearse))
    found = rehearse_all(trainer, corpus)
    logbook.fact("memory", f"{found}; {peak_memory(trainer.device) / 1e9:.1f} GB at most")
    return trainer


def open_tokenizer(corpus: Corpus, config: TrainConfig, logbook: Logbook) -> Tokenizer:
    logbook.status("training the tokenizer …")
    tokenizer, notes = make_tokenizer(corpus, config.tokenizer, config.data.cache)
    for note in notes:
        logbook.fact("tokenizer", note)
    return tokenizer


def open_batches(corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, logbook: Logbook) -> Batches:
    """Batch the training pairs as ids, from the cache or newly encoded."""
    data, limit = config.data, config.data.max_length
    encoded, cached = encode_training(corpus, tokenizer, limit, data.cache, logbook.status)
    if not len(encoded):
        raise UserError(f"data.max_length: no training pair has two sides of 1 to {limit} subwords; raise it")
    if encoded.dropped:
        logbook.fact("", f"{encoded.dropped:,} pairs with a side empty or over {limit} subwords left out")
    mix = None
    if data.extra:
        ends = [int(end) for end in np.searchsorted(encoded.rows, corpus.parts)]
        mix = mix_of(ends, [1.0, *(more.weight for more in data.extra)], data.temperature)
        logbook.fact(
            "mix", "an epoch draws " + ", ".join(f"{count:,}" for count in mix.counts) + " pairs of each corpus"
        )
    sampling, resample = config.tokenizer.sampling, None
    if sampling:
        resample = resampler(corpus, encoded, tokenizer, sampling, limit)
    tokens = config.training.tokens
    batches = Batches(encoded, 2**12 if tokens == "auto" else tokens, config.seed, mix, resample)
    batches.update_tokens = config.training.update_tokens
    count, padding = batches.waste()
    logbook.fact(
        "batches", f"about {count:,} an epoch, padding {padding:.1%}{', ids from the cache' if cached else ''}"
    )
    return batches


def describe(config: TrainConfig, model: Seq2Seq, tokenizer: Tokenizer, logbook: Logbook) -> None:
    """Log vocabulary sizes and parameter table."""
    sizes = tokenizer.vocabulary
    joint = f"{sizes.source:,} joint" if sizes.joint else f"{sizes.source:,} source, {sizes.target:,} target"
    logbook.fact("subwords", joint)
    table = parameter_table(model)
    logbook.fact("model", f"{config.model.name}: {sum(count for _, count in table):,} parameters")
    for name, count in table:
        logbook.fact("", f"{name:17} {count:>12,}")


def fit(trainer: Trainer) -> bool:
    """Train to the end → True; a run stopped earlier reports how to continue."""
    state, logbook = trainer.state, trainer.logbook
    with stopping_softly(trainer):
        trainer.fit()
    if state.progress.skipped:
        logbook.say(f"skipped {state.progress.skipped} updates whose numbers were not finite")
    if trainer.out_of_patience():
        logbook.say(f"stopped: no better score in {state.progress.without_gain} validations")
    elif state.progress.update < state.config.training.updates:
        logbook.say(f"stopped after update {state.progress.update:,} ({trainer.stopping}), which is saved")
        again = hint("train", name=state.config.name, outputs=state.config.outputs)
        if not trainer.stopped_by_signal:
            logbook.fact("continue", again)
            return False
        raise UserError(f"stopped by a signal; continue with: {again}", code=STOPPED)
    return True


@contextmanager
def stopping_softly(trainer: Trainer) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, finish the update and save; a second Ctrl-C stops immediately."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        trainer.stop(f"signal {signal.Signals(number).name}", by_signal=True)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in before:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def finish(run: Run, state: RunState, corpus: Corpus | None, logbook: Logbook) -> None:
    """Score the best checkpoint on the test set, and log what to do next."""
    config, progress = state.config, state.progress
    result: dict[str, Any] = {"progress": asdict(progress)}
    final = {"best_validation": progress.best_score}
    logbook.say(
        f"trained {progress.update:,} updates, {progress.target_tokens:,} target tokens in {clock(progress.seconds)}"
    )
    if corpus:
        translator = Translator.from_checkpoint(run.checkpoint("best"), config.device, config.precision)
        hypotheses, scores = translate_and_score(translator, corpus, config.search, config.data.target, RESAMPLES)
        for sample in samples(corpus, hypotheses, config.training.examples):
            logbook.sample(*sample)
        logbook.say(
            f"test       {scores}  (beam {config.search.beam}, best checkpoint: update {progress.best_update:,})"
        )
        logbook.say(f"           {scores.bleu_signature}")
        result["test"] = asdict(scores)
        final |= {"test_bleu": scores.bleu, "test_chrf": scores.chrf}
    run.write_result(result)
    logbook.result({k: v for k, v in configs.flat(configs.plain(config)).items() if k.startswith(COMPARED)}, final)
    logbook.fact("try it", hint("translate", run=config.name, outputs=config.outputs))
