"""Load on `seq2seq serve`: `python scripts/load_test.py --run NAME --source test.en`.

1, 8, 64 and 256 clients send one sentence after another, each over its own connection to a server on the loopback,
for a minute each. Every answer is compared with the direct translation of its sentence. Beside it: the Translator
called directly with the same sentences, as many at once as there are clients and all at once; and a plain server that
translates request by request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, cycle
from pathlib import Path
from threading import Lock

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.inference.streaming import sentences as sentences_of
from seq2seq.inference.translator import Translator
from seq2seq.utils.device import tune_cpu

STARTUP = 60  # seconds that a server may take to answer its first request


@dataclass
class Load:
    """Answers to one number of clients."""

    clients: int
    pair: dict[str, str] = field(default_factory=dict)  # source and target language
    latencies: list[float] = field(default_factory=list)  # of the right answers, in seconds
    answers: Counter[str] = field(default_factory=Counter)  # right, wrong, and statuses other than 200
    seconds: float = 0.0

    def row(self, direct: dict[int, float]) -> str:
        ordered = sorted(self.latencies) or [float("nan")]
        speed = len(self.latencies) / self.seconds
        refused = self.answers["429"]
        other = sum(self.answers.values()) - self.answers["right"] - refused
        middle, late = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
        ratios = f"{speed / direct[self.clients]:.0%} | {speed / max(direct.values()):.0%}"
        return (
            f"| {self.clients} | {speed:,.0f} | {ratios} | {1e3 * middle:,.1f} | {1e3 * late:,.1f} "
            f"| {self.answers['right']:,} | {refused:,} | {other:,} |"
        )


# ---------------------------------------------------------------------------------------------- clients


def request_bytes(body: bytes, path: str = "/translate") -> bytes:
    """Return a request of HTTP/1.1; written by hand, because a client library would use most of the processor."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def client(port: int, sentences: Iterator[str], expected: dict[str, str], until: float, load: Load) -> None:
    """Send one sentence after another, over one connection for as long as it lasts, and check each answer."""
    while time.perf_counter() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            load.answers["no connection"] += 1
            await asyncio.sleep(0.2)
            continue
        try:
            await converse(reader, writer, sentences, expected, until, load)
        except (asyncio.IncompleteReadError, ConnectionError):
            load.answers["connection lost"] += 1
        finally:
            writer.close()


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    sentences: Iterator[str],
    expected: dict[str, str],
    until: float,
    load: Load,
) -> None:
    headers: dict[str, str] = {}
    while time.perf_counter() < until and headers.get("connection") != "close":
        sentence, began = next(sentences), time.perf_counter()
        writer.write(request_bytes(json.dumps({"q": sentence, **load.pair}).encode()))
        status, headers, answer = await read_answer(reader)
        if status != 200:
            load.answers[str(status)] += 1
            await asyncio.sleep(float(headers.get("retry-after", 0)))
        elif json.loads(answer)["translatedText"] == expected[sentence]:
            load.answers["right"] += 1
            load.latencies.append(time.perf_counter() - began)
        else:
            load.answers["wrong"] += 1


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def send(port: int, clients: int, sentences: Sequence[str], expected: dict[str, str], seconds: float) -> Load:
    load, began = Load(clients, language_pair(port)), time.perf_counter()
    stream = (sentences[i % len(sentences)] for i in count())
    await asyncio.gather(*(client(port, stream, expected, began + seconds, load) for _ in range(clients)))
    load.seconds = time.perf_counter() - began
    return load


# ---------------------------------------------------------------------------------------------- servers


@contextmanager
def server(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for(port: int) -> None:
    """Wait until a server accepts connections."""
    for _ in range(10 * STARTUP):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"no server answered on port {port} within {STARTUP} s")


def language_pair(port: int) -> dict[str, str]:
    """Return the languages of the server's first model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/languages") as answer:
        (first, *_) = json.load(answer)
    return {"source": first["code"], "target": first["targets"][0]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plain_server(run: str, outputs: str, port: int, precision: str, search: str) -> None:
    """Answer request by request with the same model, on all of torch's threads."""
    tune_cpu()
    translator, preset, lock = Translator.load(run, outputs=outputs, precision=precision), search_preset(search), Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer([{"code": "source", "targets": ["target"]}])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                text = translator.translate([body["q"]], preset)[0][0].text
            self.answer({"translatedText": text})

        def answer(self, value: object) -> None:
            answer = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the terminal for the figures."""

    Listener.request_queue_size = 512
    Listener(("127.0.0.1", port), Handler).serve_forever()


class Listener(ThreadingHTTPServer):
    daemon_threads = True


# ------------------------------------------------------------------------------------------------- main


def single_sentences(path: Path) -> list[str]:
    """Return the distinct lines of a file that hold one sentence, which the server translates as a whole."""
    lines = dict.fromkeys(line.strip() for line in path.read_text().splitlines() if line.strip())
    return [line for line in lines if sentences_of(line, lambda _: True) == [line]]


def expected_texts(translator: Translator, sentences: Sequence[str], search: SearchConfig) -> dict[str, str]:
    """Return the direct translation of each sentence."""
    translations = translator.translate(sentences, search)
    return {sentence: n_best[0].text for sentence, n_best in zip(sentences, translations, strict=True)}


def direct_speed(
    translator: Translator, sentences: Sequence[str], search: SearchConfig, seconds: float, at_once: int
) -> float:
    """Return the sentences per second of the Translator, which receives some of them at once."""
    batches = [sentences[i : i + at_once] for i in range(0, len(sentences), at_once)]
    done, began = 0, time.perf_counter()
    for batch in cycle(batches):
        if (spent := time.perf_counter() - began) >= seconds:
            break
        translator.translate(batch, search)
        done += len(batch)
    return done / spent


def table(title: str, loads: Sequence[Load], direct: dict[int, float]) -> str:
    return "\n".join(
        [
            f"\n{title}\n",
            "| clients | sentences/s | of direct, as many at once | all at once "
            "| median, ms | 99 %, ms | right | 429 | other |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *(load.row(direct) for load in loads),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run name or folder")
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--source", type=Path, required=True, help="a file with one sentence per line")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--seconds", type=float, default=60, help="duration of each load")
    parser.add_argument("--search", default="greedy")
    parser.add_argument("--precision", default="float32", help="bfloat16 rounds differently in batches of another size")
    parser.add_argument("--plain", type=int, metavar="PORT", help="run only the plain server")
    arguments = parser.parse_args()
    if arguments.plain:
        plain_server(arguments.run, arguments.outputs, arguments.plain, arguments.precision, arguments.search)
        return
    sentences = single_sentences(arguments.source)
    tune_cpu()
    settings = {"outputs": arguments.outputs, "precision": arguments.precision}
    translator = Translator.load(arguments.run, **settings, processes="auto")
    search = search_preset(arguments.search)
    expected = expected_texts(translator, sentences, search)
    sizes = [*arguments.clients, len(sentences)]
    direct = {n: direct_speed(translator, sentences, search, arguments.seconds / 6, n) for n in sizes}
    if translator.workers:
        translator.workers.close()
    for count_at_once, speed in direct.items():
        print(f"direct     {speed:,.0f} sentences/s, {count_at_once:,} sentences at once")
    run = [f"run={arguments.run}", *(f"{key}={value}" for key, value in settings.items()), f"search={arguments.search}"]
    port = free_port()
    with server([sys.executable, "-m", "seq2seq", "serve", *run, f"port={port}"]):
        wait_for(port)
        asyncio.run(send(port, 2, sentences, expected, 3))  # the first batches compile kernels
        loads = [asyncio.run(send(port, n, sentences, expected, arguments.seconds)) for n in arguments.clients]
    print(table("seq2seq serve", loads, direct))
    port, script = free_port(), [sys.executable, __file__, "--run", arguments.run, "--outputs", arguments.outputs]
    options = ["--source", str(arguments.source), "--precision", arguments.precision, "--search", arguments.search]
    with server([*script, *options, "--plain", str(port)]):
        wait_for(port)
        loads = [asyncio.run(send(port, n, sentences, expected, arguments.seconds)) for n in arguments.clients]
    print(table("a plain server, request by request", loads, direct))


if __name__ == "__main__":
    main()
