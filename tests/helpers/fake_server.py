"""A server with canned answers that follows the HTTP contract of `seq2seq serve`: what its page is tested against."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from seq2seq.serving.assets import INDEX, assets

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
GERMAN = {"a": "ein", "the": "der", "dog": "Hund", "cat": "Katze", "runs": "rennt", "sleeps": "schläft", "in": "im"}
GERMAN |= {"snow": "Schnee", "old": "alte", "house": "Haus", "teacher": "Lehrer", "reads": "liest", "book": "Buch"}
SENTENCE = re.compile(r"\S(?:.*?[.!?](?=\s|$)|.*)")
LAYERS, HEADS = 2, 4


# ------------------------------------------------------------------------------------------------- the translator


def pieces_of(text: str) -> list[str]:
    """Return subwords: longer words in two, marks by themselves."""
    pieces: list[str] = []
    for word in text.split():
        letters, mark = re.fullmatch(r"(.*?)([.,!?]*)", word).groups()  # type: ignore[union-attr]
        parts = [letters[:4], letters[4:]] if len(letters) > 5 else [letters]
        pieces += ["▁" + parts[0], *parts[1:], *mark]
    return pieces


def text_of(pieces: list[str]) -> str:
    return "".join(pieces).replace("▁", " ").strip()


def probability(piece: str, position: int) -> float:
    return round(0.35 + 0.64 * ((7 * sum(map(ord, piece)) + 13 * position) % 100) / 100, 3)


def german(source: str, prefix: str = "", variant: int = 0) -> str:
    words = [re.sub(r"\w+", lambda m: GERMAN.get(m[0].lower(), m[0]), word) for word in source.split()]
    if variant and len(words) > variant:
        words[variant] = f"{words[variant].rstrip('.')}{'chen noch' if variant % 2 else 'lein'}"
    begun = prefix.split()
    text = " ".join([*begun, *words[len(begun) :]])
    return text[:1].upper() + text[1:]


def translation(source: str, text: str, attention: bool = False, rank: int = 0) -> dict[str, Any]:
    pieces = pieces_of(text)
    probabilities = [probability(piece, i) for i, piece in enumerate(pieces)] + [0.97]
    log_probability = sum(map(math.log, probabilities)) - rank
    found = {"text": text, "score": log_probability / 2, "log_probability": log_probability}
    found |= {"pieces": pieces, "probabilities": probabilities}
    if attention:
        found["attention"] = {"weights": weights(len(pieces) + 1, len(pieces_of(source)) + 1)}
    return found


def weights(targets: int, sources: int) -> list[list[list[list[float]]]]:
    """Return rows that add up to 1, around the diagonal, sharper in each further head."""

    def row(t: int, sharpness: float) -> list[float]:
        scores = [math.exp(-sharpness * abs(s - t * sources / targets)) for s in range(sources)]
        return [score / sum(scores) for score in scores]

    heads = [[[0.3 + 0.4 * (layer + head)] for head in range(HEADS)] for layer in range(LAYERS)]
    return [[[row(t, head[0]) for t in range(targets)] for head in layer] for layer in heads]


def sentence(source: str, search: dict[str, Any], prefix: str = "", attention: bool = False) -> dict[str, Any]:
    variants = range(search.get("n_best", 1))
    first = 1 if search.get("beam") == 1 else 0  # greedy search finds something else
    texts = [german(source, prefix, first + variant) for variant in variants]
    found = [translation(source, text, attention, rank) for rank, text in enumerate(texts)]
    return {"source": source, **source_pieces(source), "translations": found}


def source_pieces(source: str) -> dict[str, Any]:
    return {"source_pieces": [*pieces_of(source), "</s>"], "truncated": False}


def split(text: str) -> tuple[list[str], list[str]]:
    """Return the sentences of a text and what stands before, between and after them."""
    spans = [match.span() for line in re.finditer(r".+", text) for match in SENTENCE.finditer(text, *line.span())]
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), len(text)]
    gaps = [text[end:begin] for end, begin in zip(ends, begins, strict=True)]
    return [text[begin:end] for begin, end in spans], gaps


def joined(gaps: list[str], texts: list[str]) -> str:
    return gaps[0] + "".join(text + gap for text, gap in zip(texts, gaps[1:], strict=True))


def translated(text: str, prefix: str, body: dict[str, Any]) -> dict[str, Any]:
    sources, gaps = split(text) if body.get("split", True) else ([text], ["", ""])
    search, attention = body.get("search") or {}, body.get("attention", False)
    sentences = [sentence(source, search, prefix, attention) for source in sources]
    return {"text": joined(gaps, [one["translations"][0]["text"] for one in sentences]), "gaps": gaps} | {
        "sentences": sentences
    }


# ---------------------------------------------------------------------------------------------------- the answers


def model(name: str, family: str) -> dict[str, Any]:
    return {
        **{"name": name, "source": "en", "target": "de", "runs": [name], "checkpoint": "best", "update": 1000},
        **{"engine": "torch", "family": family, "parameters": 6_358_784, "max_length": 256},
        **{"layers": LAYERS, "heads": HEADS, "scores": {"bleu": 31.42, "chrf": 58.1, "loss": 2.1}, "config": {}},
    }


OPTIONS: list[dict[str, Any]] = [
    {"name": "beam", "type": "integer", "default": 5, "help": "hypotheses kept per sentence", "maximum": 32},
    {"name": "n_best", "type": "integer", "default": 1, "help": "translations returned, at most `beam`", "maximum": 32},
    {"name": "samples", "type": "integer", "default": 0, "help": "random translations; 0: beam search", "maximum": 64},
    {"name": "stop", "type": "string", "default": "filled", "help": "when to stop", "choices": ["filled", "likely"]},
    {"name": "length_penalty", "type": "number", "default": 1.0, "help": "alpha; 0 ranks by log probability"},
    {"name": "require", "type": "array", "default": [], "help": "words or phrases that must appear"},
]
DEFAULTS = {option["name"]: option["default"] for option in OPTIONS}
PRESETS: dict[str, dict[str, Any]] = {"beam": DEFAULTS, "greedy": {**DEFAULTS, "beam": 1}}


def changes(preset: str) -> dict[str, Any]:
    """Return what a preset changes."""
    return {name: value for name, value in PRESETS[preset].items() if value != DEFAULTS[name]}


@dataclass
class FakeServer:
    """What the tests set and read."""

    url: str = ""
    models: list[dict[str, Any]] = field(default_factory=lambda: [model("demo", "transformer")])
    key: str | None = None
    busy: int = 0  # so many next requests for translations are refused with 429
    held: str = ""  # texts that contain it are not translated (of a stream: no further than its partial events) until
    released: threading.Event = field(default_factory=threading.Event)  # this is set
    error: str | None = None  # of every request for a translation
    alternatives: list[dict[str, Any]] | None = None
    requests: list[tuple[str, Any]] = field(default_factory=list)  # path and body

    def bodies(self, path: str) -> list[Any]:
        return [body for requested, body in self.requests if requested == path]

    def hold(self, text: str) -> None:
        if self.held and self.held in text:
            self.released.wait(60)

    def refusal(self, path: str, authorization: str) -> tuple[int, str, dict[str, str]] | None:
        if self.key and path.startswith("/v1") and authorization != f"Bearer {self.key}":
            return 403, "the API key is wrong", {}
        if self.busy and path in ("/v1/translate", "/v1/stream"):
            self.busy -= 1
            return 429, "the queue is full", {"Retry-After": "1"}
        return (400, self.error, {}) if self.error and path in ("/v1/translate", "/v1/stream") else None

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        name = body.get("model") or self.models[0]["name"]
        if path == "/v1/translate":
            texts = [body["text"]] if isinstance(body["text"], str) else body["text"]
            self.hold(" ".join(texts))
            given = body.get("prefix") or ""
            prefixes = [given] * len(texts) if isinstance(given, str) else given
            results = [translated(text, prefix, body) for text, prefix in zip(texts, prefixes, strict=True)]
            return {"model": name, "update": 1000, "results": results}
        if path == "/v1/score":
            pairs = zip(body["source"], body["target"], strict=True)
            attention = body.get("attention", False)
            return {"results": [translation(s, t, attention) | source_pieces(s) for s, t in pairs]}
        if path == "/v1/alternatives":
            return {"alternatives": self.alternatives or self.other_words(body)}
        return GET[path](self)

    def other_words(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        words = ["Vogel", "Wolf", "kleine", "Mann"][: body["count"]]
        prefixes = [f"{body['prefix']} {word}".strip() for word in words]
        texts = [german(body["text"], prefix) for prefix in prefixes]
        return [
            {"piece": f"▁{word}", "probability": 0.5 / (i + 1), "text": text}
            for i, (word, text) in enumerate(zip(words, texts, strict=True))
        ]

    def events(self, body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the events of a stream: two partial ones before each sentence."""
        result = translated(body["text"], body.get("prefix", ""), body)
        for i, one in enumerate(result["sentences"]):
            pieces = one["translations"][0]["pieces"]
            for count in (len(pieces) // 3, 2 * len(pieces) // 3):
                yield "partial", {"sentence": i, "text": text_of(pieces[:count])}
            yield "sentence", {"index": i, **one}
        yield "done", {"text": result["text"], "gaps": result["gaps"], "model": body["model"], "update": 1000}


GET: dict[str, Callable[[FakeServer], Any]] = {
    "/health": lambda _: {"status": "ok"},
    "/v1/models": lambda server: {"models": server.models, "default": server.models[0]["name"]},
    "/v1/search": lambda _: {"options": OPTIONS, "presets": PRESETS},
}


def handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    files = {f"/static/{name}": file for name, file in assets().items()}
    files["/"] = (INDEX.read_bytes(), "text/html; charset=utf-8")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def start(self, status: int, media_type: str, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": media_type, **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()

        def send_json(self, status: int, value: Any, more: dict[str, str] | None = None) -> None:
            self.start(status, "application/json", more)
            self.wfile.write(json.dumps(value).encode())

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any]) -> None:
            server.requests.append((self.path, body))
            if refusal := server.refusal(self.path, self.headers.get("Authorization", "")):
                status, message, more = refusal
                self.send_json(status, {"error": message}, more)
            elif self.path in files:
                content, media_type = files[self.path]
                self.start(200, media_type)
                self.wfile.write(content)
            elif self.path == "/v1/stream":
                self.stream(body)
            elif self.path in GET or self.command == "POST":
                self.send_json(200, server.answer(self.path, body))
            else:
                self.send_json(404, {"error": f"there is no {self.path}"})

        def stream(self, body: dict[str, Any]) -> None:
            self.start(200, "text/event-stream")
            for name, data in server.events(body):
                if name == "sentence":
                    server.hold(body["text"])
                self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())

        def handle(self) -> None:
            with suppress(OSError):  # the page cancelled its request
                super().handle()

    return Handler


@contextmanager
def fake_server(port: int = 0) -> Iterator[FakeServer]:
    server = FakeServer()
    with ThreadingHTTPServer(("127.0.0.1", port), handler(server)) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}/"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            listening.shutdown()
            thread.join()
