"""Batches prepared one update ahead of a GPU, in a thread and on a separate stream."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from seq2seq.data.batching import Batches, RankBatches


class Upload:
    """Copy batches to a GPU without waiting, from pinned memory and on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, rank_batches: RankBatches) -> RankBatches:
        with torch.cuda.stream(self.stream):
            moved = [batch.pin_memory().to(self.device) for batch in rank_batches.micro_batches]
        return rank_batches._replace(micro_batches=moved)

    def receive(self, rank_batches: RankBatches) -> None:
        """Let the computation wait for the copies, and their memory for the computation."""
        computation = torch.cuda.current_stream(self.device)
        computation.wait_stream(self.stream)
        for batch in rank_batches.micro_batches:
            for x in batch.tensors.values():
                x.record_stream(computation)


def prefetch(
    batches: Batches, upload: Callable[[RankBatches], RankBatches], receive: Callable[[RankBatches], None]
) -> Generator[RankBatches]:
    """Yield the updates of `batches`, each uploaded in a thread while the one before it computes.

    `batches` itself advances only to what was yielded, so that a checkpoint states what was trained on.
    """
    ahead = copy.copy(batches)
    updates = iter(ahead)

    def prepare() -> tuple[RankBatches, Batches]:
        return upload(next(updates)), copy.copy(ahead)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(prepare)
        while True:
            rank_batches, reached = future.result()
            receive(rank_batches)  # before the next upload begins, for which nothing needs to wait
            future = thread.submit(prepare)
            batches.catch_up(reached)
            yield rank_batches


def iterate(batches: Batches, device: torch.device) -> Generator[RankBatches]:
    """Iterate over the updates: prefetched for a GPU; a CPU, which would share its cores, builds each when needed."""
    if device.type != "cuda":
        return iter(batches)
    upload = Upload(device)
    return prefetch(batches, upload, upload.receive)
