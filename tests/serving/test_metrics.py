"""Laws of GET /metrics: the text format of Prometheus, and counts that are true."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.serving.metrics import SECONDS, Metrics
from tests.helpers.serving import FakeService, Web, model_info

LAW = settings(max_examples=50, deadline=None, derandomize=True, database=None)
LABEL = r'(\w+)="((?:[^"\\\n]|\\[\\n"])*)"'
SAMPLE = re.compile(rf"(\w+)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> tuple[Samples, dict[str, str]]:
    """Read the format by its grammar: samples by name and labels, and types."""
    samples: Samples = {}
    types: dict[str, str] = {}
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types
            types[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            labels = tuple((key, unescaped(value)) for key, value in re.findall(LABEL, match[2] or ""))
            assert (match[1], labels) not in samples
            samples[match[1], labels] = float(match[match.lastindex or 0])
            assert re.sub("_(bucket|sum|count)$", "", match[1]) in types or match[1] in types, line
    return samples, types


def unescaped(value: str) -> str:
    return re.sub(r"\\.", lambda match: ESCAPED[match[0]], value)


def test_requests_are_counted_by_route_and_status() -> None:
    web = Web()
    for _ in range(3):
        web.get("/health")
    web.post("/translate", {})
    for path in ("/none", "/none2"):
        web.get(path)
    answer = web.get("/metrics")
    samples, types = parsed(answer.text)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    counts = {labels: n for (name, labels), n in samples.items() if name == "seq2seq_http_requests_total"}
    assert counts == {
        (("route", "/health"), ("status", "200")): 3,
        (("route", "/translate"), ("status", "400")): 1,
        (("route", "other"), ("status", "404")): 2,  # paths of clients do not become labels
    }
    assert types["seq2seq_http_requests_total"] == "counter"
    assert samples["seq2seq_http_request_duration_seconds_count", (("route", "/health"),)] == 3


@LAW
@given(st.lists(st.one_of(st.sampled_from(SECONDS), st.floats(0, 100))))
def test_a_histogram_is_cumulative(seconds: list[float]) -> None:
    metrics = Metrics()
    for second in seconds:
        metrics.observe("/a", 200, second)
    samples, _ = parsed(metrics.render(FakeService().stats(), []))
    name = "seq2seq_http_request_duration_seconds"
    buckets = {dict(labels)["le"]: n for (n_, labels), n in samples.items() if n_ == f"{name}_bucket"}
    if seconds:
        assert buckets == {
            **{str(bound): sum(second <= bound for second in seconds) for bound in SECONDS},
            "+Inf": len(seconds),
        }
        assert samples[f"{name}_sum", (("route", "/a"),)] == sum(seconds)


def test_the_service_is_shown() -> None:
    samples, types = parsed(Web().get("/metrics").text)
    shown = {name.removeprefix("seq2seq_"): value for (name, labels), value in samples.items() if not labels}
    stats = FakeService().stats()
    assert shown["queue_sentences"] == stats.queued_sentences
    assert shown["queue_characters"] == stats.queued_characters
    assert shown["running_sentences"] == stats.running_sentences
    assert shown["workers"] == stats.workers
    assert shown["worker_restarts_total"] == stats.restarts
    assert (shown["source_tokens_total"], shown["target_tokens_total"]) == (stats.source_tokens, stats.target_tokens)
    assert (shown["batches_total"], shown["sentences_total"]) == (stats.batches, stats.sentences)
    assert samples["seq2seq_batch_sentences_bucket", (("le", "2"),)] == 3
    assert (shown["batch_sentences_count"], shown["batch_sentences_sum"]) == (5, 9)
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in types.items())


@LAW
@given(st.text(st.sampled_from('a\\"\n,{}= é'), min_size=1))
def test_labels_are_escaped(name: str) -> None:
    samples, _ = parsed(Metrics().render(FakeService().stats(), [model_info(name, update=12)]))
    assert samples["seq2seq_model_update", (("model", name),)] == 12
    infos = [dict(labels) for name_, labels in samples if name_ == "seq2seq_model_info"]
    assert [(info["model"], info["source"], info["target"]) for info in infos] == [(name, "en", "de")]


def test_a_model_without_an_update_has_no_sample_of_it() -> None:
    samples, _ = parsed(Metrics().render(FakeService().stats(), [model_info(update=None)]))
    assert not [name for name, _ in samples if name == "seq2seq_model_update"]
