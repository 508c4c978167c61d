"""Loss, speed and resources of a run: the numbers of a progress line."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from seq2seq.config.schema import settled
from seq2seq.data.batching import RankBatches
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.checkpoint import RunState
from seq2seq.utils.device import matmul_flops

BAR_WIDTH = 16  # characters
TIMED_UPDATES = 10  # before the time of a run is estimated
RECENT_UPDATES = 200  # of whose time the remaining time is estimated


@dataclass(frozen=True)
class UpdateStats:
    loss: float  # per real target token
    gradient_norm: float
    skipped: bool = False


class Meter:
    """Means since the last line, and the remaining time."""

    def __init__(self, state: RunState, precision: torch.dtype) -> None:
        self.progress, self.settings, self.batches = state.progress, state.config.training, state.batches
        self.process_group = state.process_group
        self.device = next(state.model.parameters()).device
        self.precision, self.matmul_rate = precision, 0.0
        self.multiply_adds = multiply_adds(state.model)
        self.epoch = state.batches.batches_per_epoch()
        self.stats = UpdateStats(0.0, 0.0)
        self.times = deque[float](maxlen=RECENT_UPDATES)  # after each of the last updates of this process
        self.calibrate()

    def calibrate(self) -> None:
        """Measure the device's rate, then speeds; a shared machine may look slower, so the highest rate counts."""
        self.matmul_rate = max(self.matmul_rate, matmul_flops(self.device, self.precision))
        self.reset_speed()

    def reset_speed(self) -> None:
        """Measure speeds from now on."""
        self.tokens = self.positions = self.sources = self.targets = self.waiting_seconds = 0.0
        self.started, self.seconds_before = time.perf_counter(), self.progress.seconds

    def reset_line(self) -> None:
        self.progress.line_loss, self.progress.line_tokens = 0.0, 0
        self.reset_speed()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.waiting_seconds += time.perf_counter() - started

    def count(self, stats: UpdateStats, rank_batches: RankBatches) -> None:
        """Count an update of this process: its loss, and the real tokens and positions of its batches."""
        self.stats = stats
        if not stats.skipped:
            self.progress.line_loss += stats.loss * rank_batches.target_tokens
            self.progress.line_tokens += rank_batches.target_tokens
        self.tokens += rank_batches.target_tokens
        for batch in rank_batches.micro_batches:
            self.sources += len(batch.source_index_M)
            self.targets += batch.target_tokens
            self.positions += batch.source_BS.numel() + batch.target_out_BT.numel()
        # Validations are not counted: the meter is calibrated after each.
        self.progress.seconds = self.seconds_before + time.perf_counter() - self.started
        self.times.append(self.progress.seconds)

    def seconds_per_update(self) -> float:
        """Return the mean of the last updates: an earlier part of the run may have had other settings or load."""
        if len(self.times) < 2:
            return self.progress.seconds / max(1, self.progress.update)
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    def expected_time(self) -> str | None:
        """Estimate the remaining time, once: after the first few updates, of which the very first is slower."""
        left = settled(self.settings.updates) - self.progress.update
        if len(self.times) != TIMED_UPDATES or left < TIMED_UPDATES:
            return None
        per_update = self.seconds_per_update()
        return f"{per_update:.2g} s per update: about {format_duration(left * per_update)} left, without validations"

    def scalars(self, lr: float) -> dict[str, float]:
        progress = self.progress
        seconds, encoder, decoder = time.perf_counter() - self.started, *self.multiply_adds
        # The backward pass costs twice the forward pass; a multiply-add is two operations.
        flops = 6 * (encoder * self.sources + decoder * self.targets) / seconds
        return {
            "loss": progress.line_loss / progress.line_tokens if progress.line_tokens else float("nan"),
            "tokens_per_second": self.tokens / seconds,
            "epoch": self.batches.epochs_done(self.epoch),
            "padding": 1 - (self.sources + self.targets) / max(1.0, self.positions),
            "waiting": self.waiting_seconds / seconds,
            "gradient_norm": self.stats.gradient_norm,
            "rate": lr,  # the key in existing metrics files
            "memory_gb": self.process_group.peak_memory(self.device) / 1e9,
            "utilisation": flops / self.matmul_rate,
            "skipped": progress.skipped,
            "target_tokens": progress.target_tokens,
        }

    def line(self, v: dict[str, float], bar: bool = False) -> str:
        """Format the numbers of an update as one line."""
        progress, settings, gradient = self.progress, self.settings, v["gradient_norm"]
        seconds_per_update = self.seconds_per_update()
        interval, updates = settled(settings.validate_every), settled(settings.updates)
        next_validation = min(interval - progress.update % interval, updates - progress.update)
        width = len(f"{updates:,}")
        parts = [
            f"update {progress.update:{width},}/{updates:,}",
            f"epoch {v['epoch']:.1f}",
            f"loss {v['loss']:.3f}",
            f"{v['tokens_per_second']:6,.0f} tokens/s",
            f"mfu {v['utilisation']:.0%}",
            f"padding {v['padding']:.0%}",
            f"waiting {v['waiting']:.0%}",
            f"gradient {gradient:{'.2f' if gradient < 1000 else '.1e'}}",
            f"lr {v['rate']:.1e}",
            f"{v['memory_gb']:.1f} GB",
            f"{format_duration((updates - progress.update) * seconds_per_update)} left",
            f"validation in {format_duration(next_validation * seconds_per_update)}",
            *([f"skipped {progress.skipped}"] if progress.skipped else []),
        ]
        if bar:
            filled = round(BAR_WIDTH * progress.update / updates)
            parts.insert(0, "━" * filled + "─" * (BAR_WIDTH - filled))
            # A terminal cuts the line to its width: the times come first.
            parts = [*parts[:5], *parts[11:13], *parts[5:11], *parts[13:]]
        return "  ".join(parts)


def multiply_adds(model: Seq2Seq) -> tuple[int, int]:
    """Count the weights applied to each source token (encoder) and each target token (decoder and output)."""
    sizes = {name: sum(p.numel() for p in part.parameters() if p.dim() >= 2) for name, part in model.named_children()}
    return sizes["encoder"], sizes["decoder"] + model.output.weight.numel()


def format_duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
