"""Processes that torch's Gloo joins, forked from this one: what torchrun starts, without its seconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # here, so that no fork has to import it

from seq2seq.training.distributed import ProcessGroup
from seq2seq.training.sharding import ShardedProcesses

GROUPS = {"ddp": ProcessGroup, "fsdp": ShardedProcesses}


def joined(parallel: str, size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` returns in each process, in the order of ranks."""
    context = multiprocessing.get_context("fork")
    assert GROUPS[parallel](0, size).shards_weights == (parallel == "fsdp")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        children = [
            context.Process(target=_join, args=(GROUPS[parallel](rank, size), folder, work, sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for child in children:
            child.start()
        found: list[Any] = [receiver.recv() if receiver.poll(120) else "no answer" for receiver, _ in pipes]
        for child in children:
            child.kill()
            child.join()
    errors = [text for text in found if isinstance(text, str)]
    assert not errors, "\n".join(errors)
    return [pickle.loads(value) for value in found]


def _join(group: ProcessGroup, folder: str, work: Callable[[ProcessGroup], Any], sender: Connection) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=group.rank,
            world_size=group.world_size,
            timeout=timedelta(seconds=60),
        )
        sender.send(pickle.dumps(work(group)))
    except BaseException:
        sender.send(traceback.format_exc())
    os._exit(0)  # a fork must not run what pytest registered for its end
