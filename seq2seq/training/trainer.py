"""The training loop for every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from operator import itemgetter
from textwrap import shorten
from typing import Any, cast

import torch
from torch import nn

from seq2seq.config.schema import settled
from seq2seq.data.batching import RankBatches, example_batches
from seq2seq.data.encoding import Batch
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.checkpoint import Checkpoints, RunState
from seq2seq.training.forked import ForkedProcesses
from seq2seq.training.logger import RunLogger
from seq2seq.training.meter import Meter, UpdateStats
from seq2seq.training.mixed_precision import WorkingCopy
from seq2seq.training.optimizers import clip_gradients
from seq2seq.training.passes import Passes, ReducedPasses
from seq2seq.training.prefetch import iterate
from seq2seq.training.recompute import recompute_layers
from seq2seq.training.schedule import lr_at
from seq2seq.training.sharding import ShardedPasses, ShardedWeights
from seq2seq.training.validation import Validation
from seq2seq.utils.device import out_of_memory
from seq2seq.utils.errors import UserError, reason_of

ONLY_GRADIENT = "a gradient; every output is finite"
MAX_SKIPPED_IN_A_ROW = 5  # consecutive non-finite updates that end a run


class Trainer:
    """Run updates, with regular validations and checkpoints; `validate` receives the model that translates."""

    def __init__(
        self,
        state: RunState,
        precision: torch.dtype,
        validate: Callable[[Seq2Seq], Validation],
        checkpoints: Checkpoints,
        logger: RunLogger,
    ) -> None:
        self.state, self.validate_model = state, validate
        self.checkpoints, self.logger = checkpoints, logger
        self.passes = build_passes(state, precision)
        self.working = self.passes.working
        if state.config.training.recompute:
            recompute_layers(self.working.model)
        self.forward_model = self.working.model  # runs forward; possibly compiled
        self.device = next(state.model.parameters()).device
        self.stop_reason = ""  # the reason to finish the update, save and stop
        self.stop_agreed = False  # a process had a reason when the last update was summed
        self.stopped_by_signal = False
        self.saved_update = state.progress.update
        self.precision = precision

    def fit(self) -> None:
        """Train until the last update, or until a reason to stop earlier."""
        progress, settings = self.state.progress, self.state.config.training
        updates_to_take, interval = settled(settings.updates), settled(settings.validate_every)
        started, meter = time.monotonic(), Meter(self.state, self.precision)
        with closing(iterate(self.state.batches, self.device)) as updates:
            while progress.update < updates_to_take and not self.out_of_patience() and not self.stopping:
                with self.explaining_lack_of_memory():
                    with meter.waiting():
                        rank_batches = next(updates)
                    stats = self.update(rank_batches)
                meter.count(stats, rank_batches)
                if expected := meter.expected_time():
                    self.logger.field("time", expected)
                self.logger.status(meter.line(meter.scalars(self.lr()), bar=True))
                last = progress.update == updates_to_take
                if progress.update % settings.log_every == 0 or last:
                    self.log(meter)
                if progress.update % interval == 0 or last:
                    self.validate()
                    meter.calibrate()
                # One clock for all processes, as they start at different times.
                if self.state.process_group.is_main and 0 < settings.max_minutes * 60 < time.monotonic() - started:
                    self.stop(f"training.max_minutes={settings.max_minutes:g}")
        if self.saved_update < progress.update:
            self.save()

    def stop(self, reason: str, by_signal: bool = False) -> None:
        """Request a stop, from outside and at any time; the first reason stays."""
        if not self.stop_reason:
            self.stop_reason, self.stopped_by_signal = reason, by_signal

    @property
    def stopping(self) -> bool:
        """Whether to stop now; several processes stop after the same update, whichever of them has the reason."""
        return self.stop_agreed if self.state.process_group.world_size > 1 else bool(self.stop_reason)

    def join(self, processes: ForkedProcesses) -> None:
        """Become one of several processes that share this trainer's weights."""
        self.state.join(processes)
        self.working.divide(processes.owned, processes.gradient_buffers)
        self.logger.silent = not processes.is_main

    def update(self, rank_batches: RankBatches) -> UpdateStats:
        """Take one optimizer step on the loss per real target token over all batches of all processes."""
        state, settings, model = self.state, self.state.config.training, self.working.model
        state.model.zero_grad()
        model.train()
        totals = torch.zeros(3, device=self.device)  # summed loss; processes asked to stop; those of them by a signal
        batches = rank_batches.micro_batches
        for batch in batches:
            last = batch is batches[-1]
            totals[0] += self.passes.run(self.forward_model, batch.to(self.device), settings, last)
        totals[1] = float(bool(self.stop_reason))
        totals[2] = float(self.stopped_by_signal)
        gradients = state.process_group.reduce(list(state.model.parameters()), totals)
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / rank_batches.target_tokens)
        gradient_norm = clip_gradients(gradients, state.config.optimizer.clip_norm, state.process_group.all_norms)
        norm, loss, stop_requests, signals = torch.stack([gradient_norm, *totals]).tolist()
        loss /= rank_batches.target_tokens
        self.stop_agreed = bool(stop_requests)
        if stop_requests:
            self.stop("another process received a signal" if signals else "another process stopped")
            self.stopped_by_signal = bool(signals)  # in all processes alike, as it decides their exit code
        state.progress.update += 1
        state.progress.target_tokens += rank_batches.target_tokens
        if math.isfinite(norm + loss):
            state.progress.skipped_in_a_row = 0
            state.optimizer.step(self.lr())
            self.working.sync_weights()
        else:
            self.skip(rank_batches, loss, norm)
        if state.average:
            state.average.update(state.progress.update)
        state.process_group.finish_update()
        return UpdateStats(loss, norm, skipped=not math.isfinite(norm + loss))

    @contextmanager
    def explaining_lack_of_memory(self) -> Iterator[None]:
        """Turn a lack of memory in an update into an error that recommends smaller batches."""
        update = self.state.progress.update + 1
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            tokens = self.state.config.training.budget
            raise UserError(
                f"update {update:,}: out of memory with training.tokens={tokens}; "
                f"{advise_budget(self.state, max(1, tokens // 2))}; {self.checkpoints.describe_last()}"
            ) from None

    def skip(self, rank_batches: RankBatches, loss: float, norm: float) -> None:
        """Keep the weights; after several such updates in a row, stop with a diagnosis."""
        progress = self.state.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.logger.info(f"update {progress.update:,}: loss {loss:.3g}, gradient norm {norm:.3g}; skipped")
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"update {progress.update:,}: {MAX_SKIPPED_IN_A_ROW} consecutive non-finite updates (loss {loss:.3g}, "
                f"gradient norm {norm:.3g}); lower optimizer.lr, or set precision=float32",
                *self.diagnose(rank_batches),
                self.checkpoints.describe_last(),
            )

    def diagnose(self, rank_batches: RankBatches) -> list[str]:
        """Describe the first non-finite number and the pairs, of the first process whose rows have one."""
        found = self.first_non_finite(rank_batches)
        lines = [f"first non-finite number: {found}"]
        for batch in rank_batches.micro_batches[:1]:
            lines += describe_pairs(batch, self.state.tokenizer)
        findings = self.state.process_group.all_gather((found == ONLY_GRADIENT, lines))
        return list(min(findings, key=itemgetter(0))[1])

    def first_non_finite(self, rank_batches: RankBatches) -> str:
        """Name the first non-finite weight or module output, found by rerunning the update's batches."""
        non_finite, own_part = list[str](), self.state.process_group.own_part

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    non_finite.append(f"the output of {name} ({type(module).__name__})")

            return hook

        hooks = [m.register_forward_hook(watch(name)) for name, m in self.working.model.named_modules() if name]
        with torch.no_grad():
            for batch in rank_batches.micro_batches:
                self.working.model(batch.to(self.device))
        for hook in hooks:
            hook.remove()
        weights = [name for name, p in self.working.model.named_parameters() if not own_part(p).isfinite().all()]
        if weights:
            return f"the weight {weights[0]}"
        return non_finite[0] if non_finite else ONLY_GRADIENT

    def validate(self) -> None:
        """Score the model that translates, keep a checkpoint, and remember whether it is the best so far."""
        state, progress = self.state, self.state.progress
        monitor, optimizer = state.config.training.monitor, state.config.optimizer
        started = time.perf_counter()
        self.logger.status(f"update {progress.update:,}: validating …")
        with self.working.with_weights(state.average.weights() if state.average else None) as model:
            state.process_group.wait_for_weights()
            validation = self.validate_model(model.eval())
            state.process_group.wait_for_weights()
        state.process_group.wait_for_weights()
        loss = validation.scores["loss"]
        score = -loss if monitor == "loss" else validation.scores[monitor]
        best = (score, -loss) > (progress.best_score, -progress.best_loss)
        if best:
            progress.best_score, progress.best_loss = score, loss
            progress.best_update, progress.without_gain = progress.update, 0
        else:
            progress.without_gain += 1
            if optimizer.schedule == "plateau" and progress.without_gain % optimizer.plateau_patience == 0:
                progress.halved += 1
        note = "best so far" if best else f"best: update {progress.best_update:,}"
        scores = {**validation.scores, "seconds": time.perf_counter() - started}
        # Log before saving: resuming drops duplicates, but could not restore a missing entry.
        self.logger.validation(progress.update, scores, validation.examples, validation.images, note)
        self.save(best, validated=True)

    def save(self, best: bool = False, validated: bool = False) -> None:
        self.checkpoints.save(self.state, best, validated)
        self.saved_update = self.state.progress.update

    def log(self, meter: Meter) -> None:
        """Log a permanent line, and the numbers behind it."""
        update, values = self.state.progress.update, meter.scalars(self.lr())
        self.logger.info(meter.line(values))
        uniform_loss = math.log(len(self.state.model.output.weight))
        if values["loss"] > 1.5 * uniform_loss:
            self.logger.info(f"    the loss exceeds that of a uniform guess ({uniform_loss:.1f}); lower optimizer.lr")
        compiled = {"graphs": float(graphs())} if self.forward_model is not self.working.model else {}
        self.logger.scalars("train", update, {**values, **compiled})
        # Named to sort after the most important curves.
        self.logger.tensorboard("weights", update, self.norms())
        meter.reset_line()

    def norms(self) -> dict[str, float]:
        """Return the norms of weights and gradients, by part of the model."""
        names, squares, process_group = [], [], self.state.process_group
        for name, p in self.state.model.named_parameters():
            part = ".".join(name.split(".")[:-1][:3])
            for kind, x in (("norms", p.detach()), ("gradients", p.grad)):
                if x is not None:
                    names.append(f"{kind}/{part}")
                    squares.append(process_group.own_part(x).square().sum())
        totals = dict.fromkeys(names, 0.0)
        sums = process_group.sum_of_parts(torch.stack(squares)).tolist()  # fetched in one transfer
        for name, square in zip(names, sums, strict=True):
            totals[name] += square
        return {name: math.sqrt(total) for name, total in totals.items()}

    def lr(self) -> float:
        progress, config = self.state.progress, self.state.config
        return lr_at(max(1, progress.update), config.optimizer, settled(config.training.updates), progress.halved)

    def out_of_patience(self) -> bool:
        return 0 < settled(self.state.config.training.patience) <= self.state.progress.without_gain

    def compile(self, try_batch: Callable[[Trainer, Batch], None]) -> str:
        """Compile the model and try two small batches → a summary; after a failure, train uncompiled."""
        model = self.working.model
        eager = [(part, name) for part in model.modules() for name in getattr(part, "uncompiled", ())]
        for part, name in eager:
            setattr(part, name, torch.compiler.disable(getattr(part, name)))
        self.forward_model = cast(Seq2Seq, torch.compile(model, dynamic=True))  # one graph for all shapes of batches
        try:
            for batch in example_batches(self.state.batches.encoded):
                try_batch(self, batch)
        except Exception as error:  # a compiler may raise anything
            self.forward_model = model
            return f"failed ({reason_of(error)}); training continues without it"
        return f"{graphs()} graphs so far, for all batch shapes" + ("; recurrences stay uncompiled" if eager else "")


def build_passes(state: RunState, precision: torch.dtype) -> Passes:
    """Build the passes, and the model that they run, for the processes of a run."""
    if state.process_group.shards_weights:
        with torch.random.fork_rng(devices=[]):
            replica = build_model(state.config.model, state.tokenizer.vocabulary)
        return ShardedPasses(ShardedWeights(state.model, replica, precision))
    working = WorkingCopy(state.model, precision)
    return ReducedPasses(working) if state.process_group.world_size > 1 else Passes(working)


def graphs() -> int:
    """Count the compilations of torch.compile; a growing number means that shapes keep changing."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def advise_budget(state: RunState, tokens: int) -> str:
    """Return the settings for smaller batches, with as many accumulated as make updates of the present size."""
    settings = state.config.training
    update_tokens = max(settings.update_tokens, settings.budget * state.process_group.batches)
    return f"set training.tokens={tokens} training.update_tokens={update_tokens} for updates of about the same size"


def describe_pairs(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """List the pair numbers of a batch, and the text of the first ones, for looking them up."""
    numbers = [f"{int(i) + 1:,}" for i in batch.index_B[:8]]
    more = ", …" if len(batch.index_B) > len(numbers) else ""
    lines = [f"batch: {len(batch.index_B)} pairs, numbers {', '.join(numbers)}{more} of the training corpus"]
    for number, source_S, target_T in zip(
        numbers[:3], batch.source_BS.tolist(), batch.target_out_BT.tolist(), strict=False
    ):
        texts = tokenizer.decode_source(source_S), tokenizer.decode(target_T)
        lines.append(f"pair {number}: " + " → ".join(shorten(text, 100, placeholder=" …") for text in texts))
    return lines
