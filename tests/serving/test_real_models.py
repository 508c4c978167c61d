"""Laws over HTTP with real models: every route answers what the Translator does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from seq2seq.config.loading import search_preset
from seq2seq.inference.translator import Translator
from seq2seq.serving.app import create_app
from seq2seq.serving.service import Service
from tests.helpers.runs import saved_run
from tests.helpers.serving import serve_config

pytestmark = pytest.mark.slow
TEXT = "Some dogs see cats.\n\n Some birds see a cow. "
SENTENCES = ["Some dogs see cats.", "Some birds see a cow."]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("runs") / "tiny", "transformer", "data.source=en", "data.target=de").folder


@pytest.fixture(scope="module")
def translator(run: Path) -> Translator:
    return Translator.load(str(run), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[httpx.Client]:
    """Requests to a server with one worker."""
    config = serve_config(run=str(run), precision="float32", device="cpu", processes=1)
    server: list[uvicorn.Server] = []

    async def serve() -> None:
        service = await Service.start(config)
        server.append(uvicorn.Server(uvicorn.Config(create_app(service, config), port=0, log_level="error")))
        try:
            await server[0].serve()
        finally:
            await service.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not (server and server[0].started):
        assert thread.is_alive()
        time.sleep(0.02)
    port = server[0].servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
        yield client
    server[0].should_exit = True
    thread.join()


def answer(client: httpx.Client, path: str, body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_is_translated_as_its_sentences_are(client: httpx.Client, translator: Translator) -> None:
    expected = [ranked[0] for ranked in translator.translate(SENTENCES, attention=True)]
    (result,) = answer(client, "/v1/translate", {"text": TEXT, "attention": True})["results"]
    assert result["gaps"] == ["", "\n\n ", " "]
    for sentence, translation in zip(result["sentences"], expected, strict=True):
        (best,) = sentence["translations"]
        assert (best["text"], tuple(best["pieces"])) == (translation.text, translation.pieces)
        assert tuple(sentence["source_pieces"]) == translation.source_pieces
        assert best["score"] == pytest.approx(translation.score, abs=1e-5)
        assert best["attention"]["weights"][0][0] == pytest.approx(translation.attention(0, 0).numpy(), abs=1e-4)
    assert answer(client, "/translate", {"q": TEXT, "source": "en", "target": "de"}) == {
        "translatedText": result["text"]
    }


def test_a_stream_ends_as_a_translation(client: httpx.Client) -> None:
    (whole,) = answer(client, "/v1/translate", {"text": TEXT})["results"]
    lines = client.post("/v1/stream", json={"text": TEXT}).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines[::3]]
    data = [json.loads(line.removeprefix("data: ")) for line in lines[1::3]]
    assert names[-1] == "done" and names.count("sentence") == 2
    assert (data[-1]["text"], data[-1]["gaps"]) == (whole["text"], whole["gaps"])
    texts = [one["translations"][0]["text"] for name, one in zip(names, data, strict=True) if name == "sentence"]
    assert texts == [sentence["translations"][0]["text"] for sentence in whole["sentences"]]


def test_scores_alternatives_and_attention_are_the_models(client: httpx.Client, translator: Translator) -> None:
    targets = ["Some Cats", "A Cow"]
    scored = translator.score(SENTENCES, targets)
    results = answer(client, "/v1/score", {"source": SENTENCES, "target": targets})["results"]
    assert [result["log_probability"] for result in results] == pytest.approx(
        [one.log_probability for one in scored], abs=1e-4
    )
    found = answer(client, "/v1/alternatives", {"text": SENTENCES[0], "prefix": "Some", "count": 3})["alternatives"]
    expected = translator.alternatives(SENTENCES[0], "Some", 3)
    assert [one["piece"] for one in found] == [piece for piece, _ in expected]
    body = {"text": SENTENCES[0], "target": targets[0], "layer": 0}
    weights = answer(client, "/v1/attention", body)["weights"]
    (forced,) = translator.score(SENTENCES[:1], targets[:1], attention=True)
    assert weights[0] == pytest.approx(forced.attention(0)[0].tolist(), abs=1e-4)


def test_what_the_model_cannot_read_is_not_its_language(client: httpx.Client) -> None:
    confidences = [answer(client, "/detect", {"q": q})[0]["confidence"] for q in ("Some dogs", "Some 犬", "犬猫")]
    assert confidences[0] == 100 and confidences[2] == 0 < confidences[1] < 100


def test_an_error_of_a_worker_is_the_users(client: httpx.Client) -> None:
    response = client.post("/v1/translate", json={"text": "Some dogs", "search": {"require": ["犬"]}})
    assert response.status_code == 400
    assert response.json()["error"].startswith("search.require: ")


@pytest.mark.parametrize("choice", ["greedy", "beam", "diverse", "sample", "mbr"])
def test_every_preset_is_the_same_search(client: httpx.Client, translator: Translator, choice: str) -> None:
    (result,) = answer(client, "/v1/translate", {"text": SENTENCES[0], "search": choice})["results"]
    (expected,) = translator.translate(SENTENCES[:1], search_preset(choice))
    shown = [translation["text"] for translation in result["sentences"][0]["translations"]]
    assert shown == [translation.text for translation in expected]


@pytest.mark.parametrize("text", ["", " \n", []])
def test_nothing_is_translated_into_nothing(client: httpx.Client, text: str | list[str]) -> None:
    results = answer(client, "/v1/translate", {"text": text})["results"]
    assert results == ([{"text": text, "gaps": [text], "sentences": []}] if text != [] else [])
    page = {"q": "<br>", "source": "en", "target": "de", "format": "html"}
    assert answer(client, "/translate", page) == {"translatedText": "<br>"}


def test_an_empty_text_streams_its_end(client: httpx.Client) -> None:
    assert client.post("/v1/stream", json={"text": " "}).text.startswith("event: done\ndata: ")


def test_what_belongs_together_is_as_many(client: httpx.Client) -> None:
    for path, body in {
        "/v1/translate": {"text": SENTENCES, "prefix": "Some"},
        "/v1/score": {"source": SENTENCES, "target": ["Some"]},
    }.items():
        response = client.post(path, json=body)
        assert response.status_code == 400 and "give one for each" in response.json()["error"]


def test_attention_that_would_fill_the_memory_is_refused_unworked(client: httpx.Client) -> None:
    text = "\n".join(["Some dogs see cats " * 200] * 20)
    counted = client.get("/metrics").text
    response = client.post("/v1/translate", json={"text": text, "attention": True, "search": {"n_best": 5}})
    assert response.status_code == 413 and "attention" in response.json()["error"]
    batches = [line for line in counted.splitlines() if line.startswith("seq2seq_batches_total")]
    assert batches[0] in client.get("/metrics").text
