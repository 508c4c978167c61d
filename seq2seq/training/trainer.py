"""The training loop for every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch

from seq2seq.data.batching import Share
from seq2seq.data.encoding import Batch
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.checkpoint import Checkpoints, RunState
from seq2seq.training.logger import Logbook
from seq2seq.training.loss import training_loss
from seq2seq.training.meter import Meter, UpdateStats
from seq2seq.training.mixed_precision import WorkingCopy
from seq2seq.training.optimizers import clip
from seq2seq.training.schedule import rate_at
from seq2seq.training.validation import Validation
from seq2seq.utils.errors import UserError

PATIENCE_WITH_NUMBERS = 5  # consecutive non-finite updates that end a run


class Trainer:
    """Run updates, with regular validations and checkpoints; `validate` receives the model that translates."""

    def __init__(
        self,
        state: RunState,
        precision: torch.dtype,
        validate: Callable[[Seq2Seq], Validation],
        checkpoints: Checkpoints,
        logbook: Logbook,
    ) -> None:
        self.state, self.validate_model = state, validate
        self.checkpoints, self.logbook = checkpoints, logbook
        self.working = WorkingCopy(state.model, precision)
        self.compute: Any = self.working.model  # runs forward; possibly compiled
        self.device = next(state.model.parameters()).device
        self.stopping = ""  # the reason to finish the update, save and stop
        self.stopped_by_signal = False
        self.saved = state.progress.update
        self.precision = precision

    def fit(self) -> None:
        """Train until the last update, or until a reason to stop earlier."""
        progress, settings = self.state.progress, self.state.config.training
        began, shares, meter = time.monotonic(), iter(self.state.batches), Meter(self.state, self.precision)
        while progress.update < settings.updates and not self.out_of_patience() and not self.stopping:
            with meter.waiting():
                share = next(shares)
            meter.count(self.update(share), share)
            self.logbook.status(meter.line(meter.scalars(self.rate()), bar=True))
            last = progress.update == settings.updates
            if progress.update % settings.log_every == 0 or last:
                self.log(meter)
            if progress.update % settings.validate_every == 0 or last:
                self.validate()
                meter.begin()
            if 0 < settings.max_minutes * 60 < time.monotonic() - began:
                self.stop(f"training.max_minutes={settings.max_minutes:g}")
        if self.saved < progress.update:
            self.save()

    def stop(self, reason: str, by_signal: bool = False) -> None:
        """Request a stop, from outside and at any time."""
        self.stopping, self.stopped_by_signal = reason, by_signal

    def update(self, share: Share) -> UpdateStats:
        """Take one optimizer step on the loss per real target token over all batches of all processes."""
        state, settings, model = self.state, self.state.config.training, self.working.model
        state.model.zero_grad()
        model.train()
        found = torch.zeros(2, device=self.device)  # summed loss; processes that were asked to stop
        for batch in share.batches:
            objective, plain = training_loss(self.compute, batch.to(self.device), settings)
            objective.backward()
            self.working.hand_over_gradients()
            found[0] += plain
        found[1] = float(bool(self.stopping))
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        state.world.add([*gradients, found])
        torch._foreach_mul_(gradients, 1.0 / share.target_tokens)
        norm, loss, stops = torch.stack([clip(gradients, state.config.optimizer.clip_norm), *found]).tolist()
        loss /= share.target_tokens
        if stops and not self.stopping:
            self.stop("another process was asked to", by_signal=True)
        state.progress.update += 1
        state.progress.target_tokens += share.target_tokens
        if math.isfinite(norm + loss):
            state.progress.skipped_in_a_row = 0
            state.optimizer.step(self.rate())
            self.working.take_weights()
        else:
            self.skip(share, loss, norm)
        if state.average:
            state.average.update(state.progress.update)
        return UpdateStats(loss, norm, skipped=not math.isfinite(norm + loss))

    def skip(self, share: Share, loss: float, norm: float) -> None:
        """Keep the weights; after several such updates in a row, stop with a diagnosis."""
        progress = self.state.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.logbook.say(f"update {progress.update:,}: loss {loss:.3g}, gradient norm {norm:.3g}; skipped")
        if progress.skipped_in_a_row >= PATIENCE_WITH_NUMBERS:
            raise UserError(
                f"update {progress.update}: loss {loss:.3g}, gradient norm {norm:.3g}, for the "
                f"{PATIENCE_WITH_NUMBERS}th time in a row; lower optimizer.lr, or set precision=float32",
                f"first number that is not finite: {self.first_non_finite(share)}",
                *pairs_of(share.batches[0], self.state.tokenizer),
                self.checkpoints.last(),
            )

    def first_non_finite(self, share: Share) -> str:
        """Name the first non-finite weight or module output, found by rerunning the update's batches."""
        seen: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    seen.append(f"the output of {name} ({type(module).__name__})")

            return hook

        hooks = [m.register_forward_hook(watch(name)) for name, m in self.working.model.named_modules() if name]
        with torch.no_grad():
            for batch in share.batches:
                self.working.model(batch.to(self.device))
        for hook in hooks:
            hook.remove()
        weights = [name for name, p in self.working.model.named_parameters() if not p.isfinite().all()]
        return f"the weight {weights[0]}" if weights else seen[0] if seen else "a gradient; every output is finite"

    def validate(self) -> None:
        """Score the model that translates, keep a checkpoint, and remember whether it is the best so far."""
        state, progress = self.state, self.state.progress
        monitor, plateau = state.config.training.monitor, state.config.optimizer
        began = time.perf_counter()
        self.logbook.status(f"update {progress.update:,}: validating …")
        with self.working.holding(state.average.weights() if state.average else None) as model:
            found = self.validate_model(model.eval())
        loss = found.scores["loss"]
        score = -loss if monitor == "loss" else found.scores[monitor]
        best = (score, -loss) > (progress.best_score, -progress.best_loss)
        if best:
            progress.best_score, progress.best_loss = score, loss
            progress.best_update, progress.without_gain = progress.update, 0
        else:
            progress.without_gain += 1
            if plateau.schedule == "plateau" and progress.without_gain % plateau.plateau_patience == 0:
                progress.halved += 1
        note = "best so far" if best else f"best: update {progress.best_update:,}"
        scores = {**found.scores, "seconds": time.perf_counter() - began}
        # Log before saving: resuming drops duplicates, but could not restore a missing entry.
        self.logbook.validation(progress.update, scores, found.samples, found.pictures, note)
        self.save(best, validated=True)

    def save(self, best: bool = False, validated: bool = False) -> None:
        self.checkpoints.save(self.state, best, validated)
        self.saved = self.state.progress.update

    def log(self, meter: Meter) -> None:
        """Log a permanent line, and the numbers behind it."""
        update, values = self.state.progress.update, meter.scalars(self.rate())
        self.logbook.say(meter.line(values))
        guessing = math.log(len(self.state.model.output.weight))
        if values["loss"] > 1.5 * guessing:
            self.logbook.say(f"    a loss over {guessing:.1f} is worse than guessing; a lower optimizer.lr may help")
        compiled = {"graphs": float(graphs())} if self.compute is not self.working.model else {}
        self.logbook.scalars("train", update, {**values, **compiled})
        # Named to sort after the most important curves.
        self.logbook.board("weights", update, self.norms())
        meter.next_line()

    def norms(self) -> dict[str, float]:
        """Return the norms of weights and gradients, by part of the model."""
        squares: dict[str, float] = {}
        for name, p in self.state.model.named_parameters():
            part = ".".join(name.split(".")[:-1][:3])
            for kind, x in (("norms", p.detach()), ("gradients", p.grad)):
                if x is not None:
                    squares[f"{kind}/{part}"] = squares.get(f"{kind}/{part}", 0.0) + float(x.square().sum())
        return {name: math.sqrt(square) for name, square in squares.items()}

    def rate(self) -> float:
        progress, config = self.state.progress, self.state.config
        return rate_at(max(1, progress.update), config.optimizer, config.training.updates, progress.halved)

    def out_of_patience(self) -> bool:
        return 0 < self.state.config.training.patience <= self.state.progress.without_gain

    def compile(self, rehearse: Callable[[Trainer, int], None]) -> str:
        """Compile the model and try a small batch → the result in words; after a failure, train uncompiled."""
        self.compute = torch.compile(self.working.model, dynamic=True)  # one graph for all shapes of batches
        try:
            rehearse(self, 64)
        except Exception as error:  # a compiler may raise anything
            self.compute = self.working.model
            return f"FAILED ({' '.join(str(error).split())[:160]}); training goes on without it"
        return f"{graphs()} graphs so far, for batches of every shape"


def graphs() -> int:
    """Count the compilations of torch.compile; a growing number means that shapes keep changing."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def pairs_of(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """List the pair numbers of a batch, and the text of the first ones, for looking them up."""
    numbers = [f"{int(i) + 1:,}" for i in batch.index_B[:8]]
    more = ", …" if len(batch.index_B) > len(numbers) else ""
    lines = [f"the batch: {len(batch.index_B)} pairs, numbers {', '.join(numbers)}{more} of the training corpus"]
    for number, source_S, target_T in zip(
        numbers[:3], batch.source_BS.tolist(), batch.target_out_BT.tolist(), strict=False
    ):
        texts = tokenizer.decode_source(source_S), tokenizer.decode(target_T)
        lines.append(f"pair {number}: " + " → ".join(shorten(text, 100, placeholder=" …") for text in texts))
    return lines
