"""The loop that trains every model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from seq2seq.errors import UserError
from seq2seq.model.seq2seq import Seq2Seq
from seq2seq.text.batches import Batch
from seq2seq.training.checkpoint import Checkpoints, Progress, RunState
from seq2seq.training.logbook import Logbook
from seq2seq.training.loss import loss_sum
from seq2seq.training.optimizer import WorkingCopy, clip
from seq2seq.training.schedule import rate_at


@dataclass(frozen=True)
class UpdateStats:
    loss: float  # per real target token
    target_tokens: int
    gradient_norm: float


@dataclass(frozen=True)
class Validation:
    """What a validation found: named scores, and lines worth reading."""

    scores: dict[str, float]
    samples: list[str]


class Trainer:
    """Updates, and every so often a validation with a checkpoint; `validate` sees the model that computes."""

    def __init__(
        self,
        state: RunState,
        precision: torch.dtype,
        validate: Callable[[Seq2Seq], Validation],
        checkpoints: Checkpoints,
        logbook: Logbook,
    ) -> None:
        self.state, self.settings = state, state.config.training
        self.validate_model, self.checkpoints, self.logbook = validate, checkpoints, logbook
        self.working = WorkingCopy(state.model, precision)
        self.device = next(state.model.parameters()).device
        self.stopping = False  # set from outside: finish the update, save, and stop

    def fit(self) -> Progress:
        """Train until the last update, or until validations stop improving."""
        progress, settings = self.state.progress, self.settings
        batches = iter(self.state.batches)
        meter = Meter(progress, settings.updates)
        while progress.update < settings.updates and not self.out_of_patience() and not self.stopping:
            stats = self.update(islice(batches, settings.accumulate))
            meter.count(stats)
            self.logbook.status(meter.line(stats, self.rate()))
            if progress.update % settings.log_every == 0 or progress.update == settings.updates:
                self.logbook.say(meter.line(stats, self.rate()))
                self.logbook.scalars("train", progress.update, meter.scalars(stats, self.rate()))
                meter.restart()
            if progress.update % settings.validate_every == 0 or progress.update == settings.updates:
                self.validate()
                meter.restart()
        if self.stopping and progress.update < settings.updates:
            self.checkpoints.save(self.state, best=False)
        return progress

    def update(self, batches: Iterator[Batch]) -> UpdateStats:
        """One optimizer step from the summed loss of all its batches, per real target token."""
        began = time.perf_counter()
        progress, model = self.state.progress, self.working.model
        model.train()
        losses, tokens = [], 0
        for batch in batches:
            tokens += batch.target_tokens
            loss = loss_sum(model, batch.to(self.device), self.settings.label_smoothing)
            loss.backward()
            self.working.hand_over_gradients()
            losses.append(loss.detach())
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / tokens)
        norm = clip(gradients, self.state.config.optimizer.clip)
        loss_value = float(sum(losses)) / tokens
        if not math.isfinite(norm + loss_value):
            raise UserError(
                f"update {progress.update + 1}: loss {loss_value}, gradient norm {norm}; "
                "the last checkpoint is intact; lower optimizer.rate, or set precision=float32"
            )
        progress.update += 1
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.rate()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.working.take_weights()
        progress.target_tokens += tokens
        progress.seconds += time.perf_counter() - began
        return UpdateStats(loss_value, tokens, norm)

    def validate(self) -> None:
        """Score the model, keep a checkpoint, and remember whether it is the best so far."""
        progress, monitor = self.state.progress, self.settings.monitor
        self.logbook.status(f"update {progress.update}: validating …")
        model = self.working.model.eval()
        found = self.validate_model(model)
        loss = found.scores["loss"]
        score = -loss if monitor == "loss" else found.scores[monitor]
        best = (score, -loss) > (progress.best_score, -progress.best_loss)
        if best:
            progress.best_score, progress.best_loss = score, loss
            progress.best_update, progress.without_gain = progress.update, 0
        else:
            progress.without_gain += 1
        self.checkpoints.save(self.state, best)
        shown = f"loss {loss:.3f}  BLEU {found.scores['bleu']:.2f}  chrF {found.scores['chrf']:.2f}"
        note = "best so far" if best else f"best: update {progress.best_update:,}"
        self.logbook.say(f"validation after update {progress.update:,}: {shown}  ({note})")
        for line in found.samples:
            self.logbook.say(f"    {line}")
        self.logbook.scalars("validation", progress.update, found.scores)
        self.logbook.text("samples", progress.update, "\n\n".join(found.samples))

    def rate(self) -> float:
        return rate_at(max(1, self.state.progress.update), self.state.config.optimizer, self.settings.updates)

    def out_of_patience(self) -> bool:
        return 0 < self.settings.patience <= self.state.progress.without_gain


class Meter:
    """Speed and mean loss since the last line, and the time that is left."""

    def __init__(self, progress: Progress, updates: int) -> None:
        self.progress, self.updates = progress, updates
        self.restart()

    def restart(self) -> None:
        self.loss, self.tokens, self.first = 0.0, 0, self.progress.update
        self.began = time.perf_counter()

    def count(self, stats: UpdateStats) -> None:
        self.loss += stats.loss * stats.target_tokens
        self.tokens += stats.target_tokens

    def scalars(self, stats: UpdateStats, rate: float) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "loss": self.loss / self.tokens,
            "tokens_per_second": self.tokens / seconds,
            "gradient_norm": stats.gradient_norm,
            "rate": rate,
            "target_tokens": self.progress.target_tokens,
        }

    def line(self, stats: UpdateStats, rate: float) -> str:
        values, progress = self.scalars(stats, rate), self.progress
        left = (self.updates - progress.update) * progress.seconds / max(1, progress.update)
        width = len(f"{self.updates:,}")
        return (
            f"update {progress.update:{width},}/{self.updates:,}  loss {values['loss']:.3f}  "
            f"{values['tokens_per_second']:6,.0f} tokens/s  gradient {stats.gradient_norm:.2f}  "
            f"rate {rate:.1e}  left {clock(left)}"
        )


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
