"""Faults on `seq2seq serve`: `python scripts/fault_test.py --run NAME --source test.en`.

Each fault meets a running server under load from other clients. The table shows what the faulty client received, what
the others received meanwhile, and the memory and open files of all the server's processes before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from load_test import (
    expected_texts,
    free_port,
    language_pair,
    read_answer,
    request_bytes,
    send,
    server,
    single_sentences,
    wait_for,
)

from seq2seq.config.loading import search_preset
from seq2seq.inference.translator import Translator
from seq2seq.utils.io import write_atomically
from seq2seq.utils.run import INDEX, Run

CALM = 2.0  # seconds between a fault and the measurement after it
CLIENTS = 8  # that send sentences throughout


@dataclass(frozen=True)
class Target:
    """A running server, the run's folder that it serves, and the sentences with their translations."""

    port: int
    process: int
    run: Path
    expected: dict[str, str]
    pair: dict[str, str]  # source and target language


Fault = Callable[[Target], Awaitable[str]]

# --------------------------------------------------------------------------------- what a client may do


async def exchange(target: Target, data: bytes, wait: float = 90) -> str:
    """Send bytes and return the status and text of the answer, or how the connection ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(data)
        status, _, body = await asyncio.wait_for(read_answer(reader), wait)
        return f"{status} {json.loads(body).get('error', 'translated')[:90]}"
    except (asyncio.IncompleteReadError, ConnectionError):
        return "connection closed"
    finally:
        writer.close()


async def invalid_utf8(target: Target) -> str:
    return await exchange(target, request_bytes(b'{"q": "\xff\xfe", "source": "auto", "target": "de"}'))


async def invalid_json(target: Target) -> str:
    return await exchange(target, request_bytes(b'{"q": "one", '))


async def large_body(target: Target) -> str:
    """Announce 100 MB and send it, for as long as the server reads."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    head = request_bytes(b"").replace(b"Content-Length: 0", b"Content-Length: 100000000")
    sent = 0
    try:
        writer.write(head)
        while sent < 100_000_000 and not reader.at_eof():
            writer.write(b"x" * 65_536)
            sent += 65_536
            await asyncio.wait_for(writer.drain(), 10)
            if reader._buffer:  # type: ignore[attr-defined]
                break
        status, _, body = await asyncio.wait_for(read_answer(reader), 10)
        return f"{status} {json.loads(body)['error'][:90]} (after {sent / 1e6:.1f} MB)"
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
        return f"connection closed (after {sent / 1e6:.1f} MB)"
    finally:
        writer.close()


async def long_line(target: Target) -> str:
    return await exchange(target, request_bytes(json.dumps({"q": "a" * 1_000_000, **target.pair}).encode()))


async def slow_client(target: Target) -> str:
    """Send one byte of the head each half second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    began = time.perf_counter()
    try:
        for byte in request_bytes(b"{}")[:240]:
            writer.write(bytes([byte]))
            await writer.drain()
            if await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(reader.read(1))), 0.5):
                break
    except TimeoutError:
        pass
    except ConnectionError:
        return f"connection closed after {time.perf_counter() - began:.0f} s"
    finally:
        writer.close()
    return "its own connection waits; the others are served"


async def leaving_clients(target: Target) -> str:
    """Send 500 requests and close their connections at once."""
    texts = list(target.expected)

    async def leave(i: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(request_bytes(json.dumps({"q": texts[i % len(texts)] + f" {i}", **target.pair}).encode()))
        await writer.drain()
        writer.close()

    await asyncio.gather(*(leave(i) for i in range(500)))
    return "500 left without waiting"


async def kill_worker(target: Target) -> str:
    """Kill the youngest process of the server: a worker."""
    worker = max(descendants(target.process))
    os.kill(worker, signal.SIGKILL)
    return f"a worker of {len(descendants(target.process)) + 1} processes killed"


async def reload(target: Target) -> str:
    return await exchange(target, request_bytes(b"{}", "/v1/reload"))


async def replaced_checkpoint(target: Target) -> str:
    """Give the run a newer checkpoint, and reload."""
    run = Run(target.run)
    newest = run.checkpoint("best")
    shutil.copytree(newest, newest.with_name("update-99999999"))
    write_atomically(run.checkpoints / INDEX, json.dumps({**run.index(), "best": "update-99999999"}))
    return await reload(target)


async def half_checkpoint(target: Target) -> str:
    """Give the run a newer checkpoint whose weights are cut in half, and reload."""
    run = Run(target.run)
    newest = run.checkpoint("best")
    folder = shutil.copytree(newest, newest.with_name("update-999999999"))
    for weights in folder.glob("*.safetensors"):
        os.truncate(weights, weights.stat().st_size // 2)
    write_atomically(run.checkpoints / INDEX, json.dumps({**run.index(), "best": folder.name}))
    return await reload(target)


FAULTS: dict[str, Fault] = {
    "invalid UTF-8": invalid_utf8,
    "invalid JSON": invalid_json,
    "a body of 100 MB": large_body,
    "a line of a million characters": long_line,
    "a slow client": slow_client,
    "500 clients leave": leaving_clients,
    "kill -9 of a worker": kill_worker,
    "a newer checkpoint, reloaded": replaced_checkpoint,
    "half a checkpoint, reloaded": half_checkpoint,
}

# ------------------------------------------------------------------------------ what the server holds


def descendants(process: int) -> list[int]:
    """Return the processes that a process started, whichever of its threads, and those that they started."""
    children = [int(child) for path in Path(f"/proc/{process}/task").glob("*/children") for child in text_of(path)]
    return [each for child in children for each in (child, *descendants(child))]


def text_of(path: Path) -> list[str]:
    """Return the words of a file, none if its process or thread has ended."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def held(process: int) -> tuple[float, int]:
    """Return the private and shared memory in MB, and the open files, of a server's processes together."""
    memory, files = 0.0, 0
    for each in (process, *descendants(process)):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        memory += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        files += len(os.listdir(f"/proc/{each}/fd"))
    return memory, files


async def meet(name: str, target: Target) -> str:
    """Let a fault meet the server under load, and return its row of the table."""
    load = asyncio.create_task(send(target.port, CLIENTS, list(target.expected), target.expected, 2 * CALM))
    before = held(target.process)
    await asyncio.sleep(CALM / 2)
    received = await FAULTS[name](target)
    answers = (await load).answers
    await asyncio.sleep(CALM)
    after = held(target.process)
    return (
        f"| {name} | {received} | {described(answers)} | {before[0]:,.0f} → {after[0]:,.0f} "
        f"| {before[1]} → {after[1]} |"
    )


def described(answers: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in answers.most_common()) or "nothing"


async def stop_under_load(target: Target) -> str:
    """Send SIGTERM under load: every request that was accepted is answered, later ones are refused."""
    load = asyncio.create_task(send(target.port, CLIENTS, list(target.expected), target.expected, 2 * CALM))
    await asyncio.sleep(CALM)
    os.kill(target.process, signal.SIGTERM)
    return described((await load).answers)


# ------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run name or folder; a copy of it is served")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--source", type=Path, required=True, help="a file with one sentence per line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(Run.find(arguments.run, arguments.outputs).folder, Path(folder) / "copy"))
        translator = Translator.load(str(run), precision="float32")
        expected = expected_texts(translator, single_sentences(arguments.source), search_preset("greedy"))
        port = free_port()
        command = [sys.executable, "-m", "seq2seq", "serve", f"run={run}", "search=greedy", "precision=float32"]
        with server([*command, f"port={port}"]) as process:
            wait_for(port)
            print_table(Target(port, process.pid, run, expected, language_pair(port)))
            print(f"exit code of the server: {process.wait(60)}")


def print_table(target: Target) -> None:
    print("| fault | its client received | others | memory, MB | open files |\n| --- | --- | --- | --- | --- |")
    for name in FAULTS:
        print(asyncio.run(meet(name, target)), flush=True)
    print(f"| SIGTERM | | {asyncio.run(stop_under_load(target))} | | |")


if __name__ == "__main__":
    main()
