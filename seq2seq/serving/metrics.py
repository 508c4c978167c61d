"""GET /metrics in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate

from seq2seq.serving.interface import Histogram, ModelInfo, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = Mapping[str, object]
Samples = Iterable[tuple[Labels, float]]


class Metrics:
    """Counts and durations of requests since the start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
        self.totals: dict[str, float] = defaultdict(float)

    def observe(self, route: str, status: int, seconds: float) -> None:
        self.requests[route, status] += 1
        self.counts[route][bisect_left(SECONDS, seconds)] += 1
        self.totals[route] += seconds

    def render(self, stats: Stats, models: Iterable[ModelInfo]) -> str:
        """Return all metrics, those of the service included."""
        requests = [({"route": route, "status": status}, n) for (route, status), n in sorted(self.requests.items())]
        durations = [
            ({"route": route}, Histogram(SECONDS, tuple(counts), self.totals[route]))
            for route, counts in sorted(self.counts.items())
        ]
        blocks = [
            plain("http_requests_total", "counter", "Answered requests; status 499: the client left first.", requests),
            histogram("http_request_duration_seconds", "Time until an answer was sent.", durations),
            *of_service(stats),
            *of_models(list(models)),
        ]
        return "".join(blocks)


def of_service(stats: Stats) -> list[str]:
    gauges = {
        "queue_sentences": ("Sentences that wait for a worker.", stats.queued_sentences),
        "queue_characters": ("Their characters.", stats.queued_characters),
        "running_sentences": ("Sentences in the batches of the workers.", stats.running_sentences),
        "workers": ("Worker processes that are alive.", stats.workers),
    }
    counters = {
        "batches_total": ("Batches that workers finished.", stats.batches),
        "sentences_total": ("Sentences translated or scored.", stats.sentences),
        "source_tokens_total": ("Source subwords read.", stats.source_tokens),
        "target_tokens_total": ("Target subwords written or scored.", stats.target_tokens),
        "worker_restarts_total": ("Worker processes that died and were replaced.", stats.restarts),
        "reloads_total": ("Newer checkpoints loaded.", stats.reloads),
    }
    return [
        *(plain(name, "gauge", text, [({}, value)]) for name, (text, value) in gauges.items()),
        *(plain(name, "counter", text, [({}, value)]) for name, (text, value) in counters.items()),
        histogram("batch_sentences", "Sentences in a batch.", [({}, stats.batch_sizes)]),
        histogram("batch_duration_seconds", "Time of a worker for a batch.", [({}, stats.batch_seconds)]),
    ]


def of_models(models: list[ModelInfo]) -> list[str]:
    infos: list[tuple[Labels, float]] = [
        (
            {
                **{"model": m.name, "source": m.source, "target": m.target, "family": m.family, "engine": m.engine},
                "checkpoint": m.checkpoint,
            },
            1,
        )
        for m in models
    ]
    updates: list[tuple[Labels, float]] = [({"model": m.name}, m.update) for m in models if m.update is not None]
    return [
        plain("model_info", "gauge", "The models that are served.", infos),
        plain("model_update", "gauge", "The update of a model's checkpoint.", updates),
    ]


def plain(name: str, kind: str, text: str, samples: Samples) -> str:
    """Return a counter or a gauge."""
    return head(name, kind, text) + "".join(sample(name, labels, value) for labels, value in samples)


def histogram(name: str, text: str, series: Iterable[tuple[Labels, Histogram]]) -> str:
    """Return a histogram: its buckets are cumulative, and the last holds everything."""
    lines = [head(name, "histogram", text)]
    for labels, values in series:
        cumulative = list(accumulate(values.counts))
        for bound, count in zip([*values.bounds, "+Inf"], cumulative, strict=True):
            lines.append(sample(f"{name}_bucket", {**labels, "le": bound}, count))
        lines += [sample(f"{name}_sum", labels, values.total), sample(f"{name}_count", labels, cumulative[-1])]
    return "".join(lines)


def head(name: str, kind: str, text: str) -> str:
    return f"# HELP seq2seq_{name} {text}\n# TYPE seq2seq_{name} {kind}\n"


def sample(name: str, labels: Labels, value: float) -> str:
    pairs = ",".join(f'{key}="{str(label).translate(ESCAPES)}"' for key, label in labels.items())
    return f"seq2seq_{name}{f'{{{pairs}}}' if pairs else ''} {value!r}\n"
