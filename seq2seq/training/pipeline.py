"""A training run from its corpus to its test score."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from seq2seq.config import loading as configs
from seq2seq.config.schema import TrainConfig, settled
from seq2seq.data.batching import Batches, temperature_mix
from seq2seq.data.corpus import Corpora, Corpus, open_corpora
from seq2seq.data.doctor import quick, sizes
from seq2seq.data.encoding import encode_corpus, encode_training, resegmenter
from seq2seq.data.sources import with_languages
from seq2seq.data.tokenizer import Tokenizer, make_tokenizer
from seq2seq.evaluation.metrics import RESAMPLES, corpus_warning
from seq2seq.evaluation.testsets import translate_and_score
from seq2seq.inference.checkpoint import WEIGHTS, to_yaml
from seq2seq.inference.translator import Translator
from seq2seq.inference.workers import choose_processes
from seq2seq.model.factory import build_model, parameter_table
from seq2seq.model.interface import Seq2Seq
from seq2seq.training import environment
from seq2seq.training.averaging import build_average
from seq2seq.training.checkpoint import Checkpoints, Progress, RunState, load_initial_weights
from seq2seq.training.distributed import ProcessGroup, join_processes
from seq2seq.training.forked import ForkedProcesses, Shards, run_forked
from seq2seq.training.length import describe_length, settle_length
from seq2seq.training.logger import RunLogger
from seq2seq.training.memory_check import MIN_TOKENS, check_memory, try_batch
from seq2seq.training.meter import format_duration
from seq2seq.training.optimizers import build_optimizer, optimizer_table
from seq2seq.training.resume import compare_validation_sets, list_changes, lock_run, prepare_run_folder
from seq2seq.training.schedule import settle_rate
from seq2seq.training.sharding import ShardedProcesses, shard_weights
from seq2seq.training.trainer import Trainer
from seq2seq.training.validation import Validation, select_examples, validate
from seq2seq.utils.console import hint
from seq2seq.utils.device import (
    choose_device,
    choose_precision,
    deterministic,
    reset_peak_memory,
    tune_cpu,
)
from seq2seq.utils.errors import STOPPED, UserError
from seq2seq.utils.run import Run

TOKENS_PER_PROCESS = 128  # with fewer, products are too small for another process to gain anything

# Settings that TensorBoard's table of runs shows beside the scores.
HPARAM_KEYS = ("data.name", "model.", "optimizer.", "precision", "seed", "tokenizer.", "training.")


def train(config: TrainConfig) -> Run:
    """Train or resume a run, and translate the test set with its best checkpoint."""
    config = settle_rate(replace(config, data=with_languages(config.data)))
    device, device_reason = choose_device(config.device)
    precision, precision_reason = choose_precision(config.precision, device)
    run = Run(Path(config.outputs) / config.name)
    with (
        join_processes(device) as process_group,
        RunLogger(silent=not process_group.is_main) as logger,
        lock_run(run, process_group),
    ):
        if config.training.parallel == "fsdp" and process_group.world_size > 1:
            process_group = ShardedProcesses(process_group.rank, process_group.world_size)
        logger.field("run", str(run.folder))
        logger.field("device", f"{device} ({device_reason}), {str(precision)[6:]} ({precision_reason})")
        count = choose_count(config, device, process_group)
        log_processes(count, device, process_group, logger)
        for change in list_changes(run, config):
            logger.field("changed", str(change))
        corpora = open_corpora(config.data, config.seed, logger.status)
        log_corpora(config, corpora, logger)
        tune_cpu()
        if config.deterministic:
            deterministic()
        state = build_state(run, config, corpora.train, device, process_group, logger)
        trainer = build_trainer(state, corpora.validation, precision, run, logger)
        if count == 1:
            fit(trainer, corpora, run)
        else:
            shards = Shards(state.model, trainer.working.model, count)
            run_forked(count, shards, partial(fit_divided, trainer, corpora, run))
        if report_end(trainer) and process_group.is_main:
            score_test_set(run, state, corpora.test, logger)
        logger.field("run", str(run.folder))
    return run


def choose_count(config: TrainConfig, device: torch.device, process_group: ProcessGroup) -> int:
    """Return the number of processes to fork: 1 on a GPU and under torchrun, and few where batches are small."""
    compiled = config.compile and config.processes == "auto"  # each process would compile the same graphs
    if process_group.world_size > 1 or compiled:
        return 1
    count, tokens = choose_processes(config.processes, device), config.training.tokens
    if config.processes == "auto" and tokens != "auto":
        count = max(1, min(count, tokens // TOKENS_PER_PROCESS))
    return count


def log_processes(count: int, device: torch.device, process_group: ProcessGroup, logger: RunLogger) -> None:
    """Log how the processors of this machine, or several machines, divide the work."""
    if process_group.world_size > 1:
        weights = "sharded" if process_group.shards_weights else "whole in each"
        logger.field("processes", f"{process_group.world_size}; each update is divided among them, weights {weights}")
    elif device.type == "cpu":
        threads = torch.get_num_threads() if count == 1 else 1
        logger.field("processes", f"{count}, {'one thread' if threads == 1 else f'{threads} threads'} each")


def fit_divided(trainer: Trainer, corpora: Corpora, run: Run, processes: ForkedProcesses) -> None:
    trainer.join(processes)
    fit(trainer, corpora, run)


def fit(trainer: Trainer, corpora: Corpora, run: Run) -> None:
    """Train, in each of several processes, until the end or a reason to stop."""
    state, logger = trainer.state, trainer.logger
    settle_budget(trainer, corpora.validation)
    settle(state, logger)
    if note := compare_validation_sets(run, state.progress, state.config.data, corpora.validation):
        logger.field("changed", note)
    state.process_group.barrier()  # all processes have read the folder before it changes
    if state.process_group.is_main:
        prepare_run_folder(run, state.config, state.progress.update)
        if state.progress.update < settled(state.config.training.updates):
            environment.record(run, state.progress.update, state.config.seed, corpora, state.tokenizer)
    logger.open(run, state.progress.update)
    logger.text("config", state.progress.update, f"```yaml\n{to_yaml(state.config)}```")
    with stop_gracefully(trainer):
        trainer.fit()


def log_corpora(config: TrainConfig, corpora: Corpora, logger: RunLogger) -> None:
    """Log sizes, omitted pairs, and the doctor's quick findings."""
    sizes(config.data, corpora, logger.field)
    if warning := corpus_warning(config.data):
        logger.field("warning", warning)
    for finding in quick(corpora):
        if finding.serious:
            logger.field("", f"{finding.name}: {finding.count:,} ({finding.fraction:.1%}); {finding.advice}")


def build_state(
    run: Run, config: TrainConfig, corpus: Corpus, device: torch.device, process_group: ProcessGroup, logger: RunLogger
) -> RunState:
    """Build tokenizer, model, optimizer and batches: new, from the last checkpoint, or from another run's weights."""
    last = run.checkpoint("last") if run.exists and not config.overwrite else None
    origin = last or (config.init_from and resolve_origin(config.init_from, config.outputs))
    tokenizer = Tokenizer.load(origin) if origin else build_tokenizer(corpus, config, logger)
    batches = build_batches(corpus, tokenizer, config, process_group, logger)
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer.vocabulary).to(device)
    torch.manual_seed(config.seed + process_group.rank)  # equal weights, but different dropout in every process
    log_model(config, model, tokenizer, logger)
    if process_group.shards_weights:
        shard_weights(model, choose_precision(config.precision, device)[0])
    optimizer = build_optimizer(model, config.optimizer)
    recent_weights = Checkpoints(run, config.training.recent).recent_weights
    average = build_average(config, model, optimizer, recent_weights, process_group)
    state = RunState(config, tokenizer, model, optimizer, batches, Progress(), average, process_group)
    if last:
        state.read(last)
    elif origin:
        load_initial_weights(model, origin, process_group)
        logger.field("initialised", f"from {origin}: weights and tokenizer")
    return state


def resolve_origin(name: str, outputs: str) -> Path:
    """Return the checkpoint that `init_from` names: a checkpoint's folder, or a run's best one."""
    folder = Path(name)
    return folder if (folder / WEIGHTS).is_file() else Run.find(name, outputs, "init_from").checkpoint("best")


def build_trainer(state: RunState, corpus: Corpus, precision: torch.dtype, run: Run, logger: RunLogger) -> Trainer:
    """Build a trainer that validates on a corpus."""
    encoded = encode_corpus(corpus, state.tokenizer)

    def validate_model(model: Seq2Seq) -> Validation:
        return validate(model, state, corpus, encoded)

    return Trainer(state, precision, validate_model, Checkpoints(run, state.config.training.recent), logger)


def settle_budget(trainer: Trainer, corpus: Corpus) -> None:
    """Compile the model if configured, check that training fits into memory, and resolve `tokens=auto`."""
    state, logger = trainer.state, trainer.logger
    logger.status("trying the longest batch …")
    if state.config.compile:
        logger.field("compile", trainer.compile(try_batch))
    check = check_memory(trainer, corpus)
    state.process_group.barrier()
    peak, of_all = state.process_group.peak_memory(trainer.device), state.process_group.shares_weights
    logger.field("memory", f"{check.summary}; {peak / 1e9:.1f} GB peak{' of all processes' if of_all else ''}")
    reset_peak_memory(trainer.device)  # from now on, the peak of training alone
    if state.config.training.tokens == "auto":
        state.set_budget(check.tokens)
        log_batches(state.batches, logger)


def settle(state: RunState, logger: RunLogger) -> None:
    """Choose what is "auto" in the length of the run, and log the length and what depends on it."""
    state.config = config = settle_length(state.config, state.batches)
    optimizer, update = config.optimizer, state.progress.update
    logger.field("optimizer", f"{optimizer.name}, {optimizer.schedule} after {settled(optimizer.warmup):,}")
    for kind, text in optimizer_table(state.optimizer, optimizer):
        logger.field("", f"{kind:17} {text}")
    logger.field("length", describe_length(config, state.batches))
    if update:
        finished = update >= settled(config.training.updates)
        more = "; it is finished: raise training.updates to train longer" if finished else ""
        logger.field("resumed", f"after update {update:,}{more}")


def build_tokenizer(corpus: Corpus, config: TrainConfig, logger: RunLogger) -> Tokenizer:
    logger.status("training the tokenizer …")
    tokenizer, notes = make_tokenizer(corpus, config.tokenizer, config.data.cache)
    for note in notes:
        logger.field("tokenizer", note)
    return tokenizer


def build_batches(
    corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig, process_group: ProcessGroup, logger: RunLogger
) -> Batches:
    """Batch the training pairs as ids, from the cache or newly encoded; `tokens=auto` is resolved later."""
    data, limit = config.data, config.data.max_length
    encoded, cached = encode_training(corpus, tokenizer, limit, data.cache, logger.status)
    if not len(encoded):
        raise UserError(f"data.max_length: no training pair fits 1 to {limit} subwords per side; raise data.max_length")
    if encoded.dropped:
        logger.field("", f"{encoded.dropped:,} pairs omitted: a side is empty or over {limit} subwords")
    mix = None
    if data.extra:
        ends = [int(end) for end in np.searchsorted(encoded.rows, corpus.corpus_ends)]
        mix = temperature_mix(ends, [1.0, *(more.weight for more in data.extra)], data.temperature)
        logger.field(
            "mix", "an epoch draws " + ", ".join(f"{count:,}" for count in mix.counts) + " pairs of each corpus"
        )
    rate, resegment = config.tokenizer.sampling, None
    if rate:
        resegment = resegmenter(corpus, encoded, tokenizer, rate, limit)
    tokens = config.training.tokens
    batches = Batches(
        encoded,
        MIN_TOKENS if tokens == "auto" else tokens,
        config.seed,
        mix,
        resegment,
        update_tokens=config.training.update_tokens,
        rank=process_group.rank,
        world_size=process_group.world_size,
    )
    if tokens != "auto":
        log_batches(batches, logger, ", ids from the cache" if cached else "")
    return batches


def log_batches(batches: Batches, logger: RunLogger, note: str = "") -> None:
    count, padding = batches.estimate_padding()
    logger.field("batches", f"about {count:,} per epoch, padding {padding:.1%}{note}")


def log_model(config: TrainConfig, model: Seq2Seq, tokenizer: Tokenizer, logger: RunLogger) -> None:
    """Log vocabulary sizes and parameter table."""
    sizes = tokenizer.vocabulary
    joint = f"{sizes.source:,} joint" if sizes.joint else f"{sizes.source:,} source, {sizes.target:,} target"
    logger.field("subwords", joint)
    table = parameter_table(model)
    logger.field("model", f"{config.model.name}: {sum(count for _, count in table):,} parameters")
    for name, count in table:
        logger.field("", f"{name:17} {count:>12,}")


def report_end(trainer: Trainer) -> bool:
    """Return True if the run has reached its end; a run stopped earlier reports how to continue."""
    state, logger = trainer.state, trainer.logger
    if state.progress.skipped:
        logger.info(f"skipped {state.progress.skipped} updates with a non-finite loss or gradient")
    if trainer.out_of_patience():
        logger.info(f"stopped early: no better score in {state.progress.without_gain} validations")
    elif state.progress.update < settled(state.config.training.updates):
        logger.info(f"stopped after update {state.progress.update:,} ({trainer.stop_reason}), saved")
        command = hint("train", name=state.config.name, outputs=state.config.outputs)
        if not trainer.stopped_by_signal:
            logger.field("continue", command)
            return False
        raise UserError(f"stopped by a signal; continue with: {command}", code=STOPPED)
    return True


@contextmanager
def stop_gracefully(trainer: Trainer) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, finish the update and save; a second Ctrl-C stops immediately."""

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        trainer.stop(f"signal {signal.Signals(number).name}", by_signal=True)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread of a Python program may handle signals
        return
    forked = not trainer.state.process_group.is_main and trainer.state.process_group.shares_weights
    handled = (signal.SIGTERM,) if forked else (signal.SIGINT, signal.SIGTERM)  # Ctrl-C reaches forks too
    before = {s: signal.getsignal(s) for s in handled}
    for s in before:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def score_test_set(run: Run, state: RunState, corpus: Corpus | None, logger: RunLogger) -> None:
    """Score the best checkpoint on the test set, and log what to do next."""
    config, progress = state.config, state.progress
    result: dict[str, Any] = {"progress": asdict(progress)}
    final = {"best_validation": progress.best_score}
    logger.info(
        f"trained {progress.update:,} updates, {progress.target_tokens:,} target tokens "
        f"in {format_duration(progress.seconds)}"
    )
    if corpus:
        translator = Translator.from_checkpoint(run.checkpoint("best"), config.device, config.precision)
        translator.use_processes(config.processes)
        hypotheses, scores = translate_and_score(translator, corpus, config.search, config.data, RESAMPLES)
        for example in select_examples(corpus, hypotheses, config.training.examples):
            logger.example(*example)
        logger.info(
            f"test       {scores}  (beam {config.search.beam}, best checkpoint: update {progress.best_update:,})"
        )
        logger.info(f"           {scores.bleu_signature}")
        result["test"] = asdict(scores)
        final |= {"test_bleu": scores.bleu, "test_chrf": scores.chrf}
    run.write_result(result)
    logger.result(
        {k: v for k, v in configs.flatten(configs.to_dict(config)).items() if k.startswith(HPARAM_KEYS)}, final
    )
    logger.field("try it", hint("translate", run=config.name, outputs=config.outputs))
