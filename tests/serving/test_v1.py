"""Laws of the server's own API: answers in full, errors that name the field, streams that end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.config.loading import build_config, search_preset, to_dict
from seq2seq.config.paths import choices
from seq2seq.config.schema import SearchConfig
from seq2seq.serving import service
from seq2seq.serving.answers import LONGEST, dumps
from seq2seq.serving.interface import TooLarge, WorkerLost
from seq2seq.serving.limits import LIMITS, SERVER_KEYS, search_of
from seq2seq.utils.errors import UserError
from tests.helpers.serving import FakeService, Web, backwards, model_info

LAW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
TEXT = "A dog runs.\n\n  It sleeps. \r\n"


def events(body: str) -> list[tuple[str, Any]]:
    """Server-sent events as a browser reads them."""
    parsed = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        parsed.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return parsed


def error_of(web: Web, body: Any, path: str = "/v1/translate", status: int = 400) -> str:
    response = web.post(path, body)
    assert response.status_code == status, response.text
    (message,) = response.json().values()
    assert "\n" not in message
    return str(message)


# ------------------------------------------------------------------------------------------------- translate


def test_a_translation_is_shown_in_full() -> None:
    answer = Web().post("/v1/translate", {"text": TEXT, "search": {"n_best": 2}, "attention": True}).json()
    (result,) = answer["results"]
    assert (answer["model"], answer["update"]) == ("toy", 7)
    assert [sentence["source"] for sentence in result["sentences"]] == ["A dog runs.", "It sleeps."]
    for sentence in result["sentences"]:
        assert [t["text"] for t in sentence["translations"]] == [
            backwards(sentence["source"]) + "!" * n for n in range(2)
        ]
        for translation in sentence["translations"]:
            assert len(translation["probabilities"]) == len(translation["pieces"]) + 1
            log_probability = sum(map(math.log, translation["probabilities"]))
            assert log_probability == pytest.approx(translation["log_probability"])
            weights = translation["attention"]["weights"]
            assert {len(row) for layer in weights for head in layer for row in head} == {len(sentence["source_pieces"])}
            assert {len(head) for layer in weights for head in layer} == {len(translation["pieces"]) + 1}


def test_text_and_gaps_join_the_sentences() -> None:
    answer = Web().post("/v1/translate", {"text": [TEXT, "", " \n"]}).json()
    for result, source in zip(answer["results"], [TEXT, "", " \n"], strict=True):
        best = [sentence["translations"][0]["text"] for sentence in result["sentences"]]
        sources = [sentence["source"] for sentence in result["sentences"]]
        for parts, whole in ((best, result["text"]), (sources, source)):
            joined = "".join(gap + part for gap, part in zip(result["gaps"], [*parts, ""], strict=True))
            assert joined == whole


def test_attention_is_sent_on_request_only() -> None:
    (sentence,) = Web().post("/v1/translate", {"text": "A dog."}).json()["results"][0]["sentences"]
    assert "attention" not in sentence["translations"][0]


def test_options_reach_the_service() -> None:
    service = FakeService([model_info("a"), model_info("b")])
    body = {
        "text": ["x", "y"],
        "prefix": ["p", "q"],
        "model": "b",
        "split": False,
        "search": {"beam": 3, "stop": "likely"},
    }
    Web(service).post("/v1/translate", body)
    (call,) = service.calls
    assert (call["model"], call["split"], call["prefixes"]) == ("b", False, ["p", "q"])
    assert to_dict(call["search"]) == {**to_dict(service.search), "beam": 3, "stop": "likely"}


def test_a_prefix_of_one_text_needs_no_list() -> None:
    service = FakeService()
    Web(service).post("/v1/translate", {"text": "x", "prefix": "p"})
    assert service.calls[0]["prefixes"] == ["p"]


def test_too_many_attention_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * 3 * 3 * 3  # of two words each way, with their ends
    monkeypatch.setattr(service, "MOST_WEIGHTS", count)
    assert Web().post("/v1/translate", {"text": "A dog", "attention": True}).status_code == 200
    monkeypatch.setattr(service, "MOST_WEIGHTS", count - 1)
    assert f"{count} weights" in error_of(Web(), {"text": "A dog", "attention": True}, status=413)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "text: missing"),
        ({"text": 5}, "text: 5 is not text or a list"),
        ({"text": None}, "text: null is not text or a list"),
        ({"text": ["a", 5]}, "text[1]: 5 is not text"),
        ({"text": "a", "txt": "b"}, "txt: no such key; did you mean text?"),
        ({"text": "a", "attention": "yes"}, 'attention: "yes" is not true or false'),
        ({"text": "a", "split": 1}, "split: 1 is not true or false"),
        ({"text": "a", "model": 5}, "model: 5 is not text"),
        ({"text": "a", "search": 5}, "search: 5 is not text or an object"),
        ({"text": "a", "search": "gredy"}, "did you mean greedy?"),
        ({"text": "a", "search": {"bem": 5}}, "search.bem: no such key; did you mean search.beam?"),
        ({"text": "a", "search": {"beam": "x"}}, "search.beam: 'x' is not a whole number"),
        ({"text": "a", "search": {"stop": "x"}}, "search.stop: 'x' is not a choice"),
        ({"text": "a", "search": {"n_best": 9}}, "search.n_best: 9 exceeds beam=5"),
        ({"text": "a", "search": {"seed": 10**30}}, "search.seed: out of range"),
        ({"text": "a", "search": {"length_penalty": 10**400}}, "search.length_penalty: out of range"),
        *(({"text": "a", "search": {key: 10}}, f"search.{key}: only the server's config") for key in SERVER_KEYS),
        ({"text": "a", "search": {"require": ["a"] * 51}}, "search.require: 51 phrases"),
        ({"text": "a", "search": {"forbid": ["a" * 201]}}, "search.forbid: a phrase exceeds"),
        ([], "body: [] is not a JSON object"),
    ],
)
def test_a_wrong_field_is_named(body: Any, message: str) -> None:
    assert message in error_of(Web(), body)


def test_all_wrong_fields_are_named_together() -> None:
    message = error_of(Web(), {"text": 5, "split": 1, "search": "greedy"})
    assert "text:" in message and "split:" in message and "search" not in message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "\xff"}', "body: not UTF-8 at byte 10"),
        (b'{"text": ', "body: invalid JSON"),
        (b"", "body: invalid JSON"),
        (rb'{"text": "\ud800"}', "body: invalid JSON"),
        (b"[" * 100_000, "body: invalid JSON"),
    ],
)
def test_what_is_no_json_is_explained(raw: bytes, message: str) -> None:
    response = Web().post("/v1/translate", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_forms_are_for_libretranslate_only() -> None:
    for body in ({"data": {"text": "a"}}, {"files": {"text": b"a"}}):
        response = Web().post("/v1/translate", **body)
        assert response.status_code == 415
        assert "application/json" in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"text": [1] * 20_000},
        {"text": "a", **{f"k{i}": 1 for i in range(2_000)}},
        {"text": "a", "search": {f"k{i}": 1 for i in range(2_000)}},
        {"text": "a", "search": {"stop": "k" * 20_000}},
    ],
)
def test_many_wrong_fields_are_named_in_part(body: Any) -> None:
    assert len(error_of(Web(), body)) <= LONGEST + 1


def test_a_long_wrong_value_is_quoted_in_part() -> None:
    assert len(error_of(Web(), {"text": {"a": "b" * 10_000}})) < 200


@pytest.mark.parametrize("path", ["/v1/translate", "/v1/stream", "/v1/alternatives", "/v1/attention"])
def test_an_unknown_model_is_named(path: str) -> None:
    message = error_of(Web(), {"text": "a", "model": "tyo"}, path, 404)
    assert "'tyo'" in message and "did you mean toy?" in message


@pytest.mark.parametrize("key", sorted(LIMITS))
def test_the_cost_of_a_search_is_bounded(key: str) -> None:
    """Each end of a limit is accepted as such, and one beyond it is named with the limit."""
    low, high = LIMITS[key].low, LIMITS[key].high
    for outside in (high + 1, low - 1):
        if outside > 0:
            with pytest.raises(UserError, match=rf"search\.{key}: {outside} is out of range on this server"):
                search_of({key: outside}, search_preset("beam"))
    for inside in (low, high):
        try:
            search_of({key: int(inside) if float(inside).is_integer() else inside}, search_preset("beam"))
        except UserError as error:
            assert "on this server" not in str(error)


@pytest.mark.parametrize("choice", choices("search"))
def test_every_preset_is_accepted_by_name_and_by_value(choice: str) -> None:
    values = {key: value for key, value in to_dict(search_preset(choice)).items() if key not in SERVER_KEYS}
    assert search_of(choice, search_preset("beam")) == search_of(values, search_preset("beam")) == search_preset(choice)


@pytest.mark.parametrize("choice", choices("search"))
def test_a_preset_keeps_what_only_the_server_sets(choice: str) -> None:
    own: dict[str, Any] = {"shortlist": 100, "tokens": 4096, "graphs": True}
    found = search_of(choice, replace(search_preset("beam"), **own))
    assert {key: getattr(found, key) for key in SERVER_KEYS} == own
    assert replace(found, **{key: getattr(search_preset(choice), key) for key in own}) == search_preset(choice)


def test_a_limit_does_not_bind_the_server_itself() -> None:
    wide = build_config(SearchConfig, {**to_dict(search_preset("beam")), "beam": 100})
    assert search_of({"n_best": 2}, wide).beam == 100


def test_texts_over_the_limits_are_refused_before_the_service() -> None:
    web = Web(max_characters=10, max_sentences=3)
    assert "11 characters" in error_of(web, {"text": ["a" * 6, "b" * 5]}, status=413)
    assert "4 sentences" in error_of(web, {"text": ["a"] * 4}, status=413)
    assert "12 characters" in error_of(web, {"text": "a", "prefix": "a" * 11}, status=413)
    for path, body in {
        "/v1/stream": {"text": "a" * 11},
        "/v1/score": {"source": ["a" * 6], "target": ["b" * 5]},
        "/v1/alternatives": {"text": "a" * 6, "prefix": "b" * 5},
        "/v1/attention": {"text": "a" * 6, "target": "b" * 5},
    }.items():
        assert "11 characters" in error_of(web, body, path, 413)
    assert web.service.calls == []
    assert web.post("/v1/translate", {"text": ["a" * 4, "b" * 4, "cc"]}).status_code == 200


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=6,
)
KEYS = sorted({"text", "q", "prefix", "source", "target", "model", "attention", "count", "layer", "head", "split"})
SEARCHES = st.dictionaries(st.sampled_from(sorted(to_dict(search_preset("beam")))), ANY_JSON, max_size=3)
BODIES = st.dictionaries(st.sampled_from(KEYS), ANY_JSON | st.text(), max_size=5)
POSTS = ["/v1/translate", "/v1/stream", "/v1/score", "/v1/alternatives", "/v1/attention", "/translate", "/detect"]


@LAW
@given(st.sampled_from(POSTS), st.one_of(ANY_JSON, BODIES), SEARCHES | ANY_JSON)
def test_no_body_is_an_error_of_the_server(path: str, body: Any, search: Any) -> None:
    if isinstance(body, dict) and search is not None:
        body = {**body, "search": search}
    response = WEB.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    assert response.status_code == 200 or list(response.json()) == ["error"]


WEB = Web()

# ------------------------------------------------------------------------------------------------- stream


def test_a_stream_shows_each_sentence_as_translate_does() -> None:
    response = Web().post("/v1/stream", {"text": TEXT})
    whole = Web().post("/v1/translate", {"text": TEXT}).json()["results"][0]
    parsed = events(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert "content-length" not in response.headers
    assert [data for name, data in parsed if name == "sentence"] == [
        {"index": i, **sentence} for i, sentence in enumerate(whole["sentences"])
    ]
    done = {"text": whole["text"], "gaps": whole["gaps"], "model": "toy", "update": 7}
    assert parsed[-1] == ("done", done)
    assert [name for name, _ in parsed] == ["partial", "sentence"] * 2 + ["done"]
    assert parsed[2] == ("partial", {"sentence": 1, "text": whole["sentences"][1]["translations"][0]["text"][:1]})


@pytest.mark.parametrize("text", ["", " \n "])
def test_an_empty_text_streams_its_gaps(text: str) -> None:
    ((name, data),) = events(Web().post("/v1/stream", {"text": text}).text)
    assert (name, data["text"], data["gaps"]) == ("done", text, [text])


def test_an_error_before_the_first_event_has_its_status() -> None:
    service = FakeService()
    service.failure = TooLarge("too many sentences")
    assert error_of(Web(service), {"text": "a"}, "/v1/stream", 413) == "too many sentences"


def test_a_later_error_ends_the_stream_with_an_event() -> None:
    service = FakeService()
    service.breaks = WorkerLost("the worker died")
    response = Web(service).post("/v1/stream", {"text": TEXT})
    assert response.status_code == 200
    assert events(response.text)[1:] == [("error", {"error": "the worker died"})]


# ------------------------------------------------------------------------------------------------- the other routes


def test_scores_are_of_the_given_targets() -> None:
    body = {"source": ["A dog", "B"], "target": ["Hund", "x y"], "attention": True}
    answer = Web().post("/v1/score", body).json()
    assert [result["text"] for result in answer["results"]] == body["target"]
    for result in answer["results"]:
        assert len(result["attention"]["weights"][0][0]) == len(result["probabilities"])


def test_alternatives_are_as_many_as_asked_for() -> None:
    body = {"text": "A dog", "prefix": "Ein", "count": 3}
    found = Web().post("/v1/alternatives", body).json()["alternatives"]
    assert [set(alternative) for alternative in found] == [{"piece", "probability", "text"}] * 3
    for count in (0, 51, 2.5):
        assert error_of(Web(), {**body, "count": count}, "/v1/alternatives").startswith("count: ")


def test_attention_is_the_mean_of_what_is_not_named() -> None:
    web = Web()
    weights = {
        (layer, head): web.post("/v1/attention", {"text": "A dog", "layer": layer, "head": head}).json()["weights"]
        for layer in (None, 0, 1)
        for head in (None, 0, 1, 2)
    }
    every = web.post("/v1/translate", {"text": "A dog", "attention": True}).json()["results"][0]["sentences"][0]
    full = every["translations"][0]["attention"]["weights"]
    for layer, head in ((0, 0), (1, 2)):
        assert weights[layer, head] == full[layer][head]
    assert weights[1, None][0][0] == pytest.approx(sum(full[1][h][0][0] for h in range(3)) / 3, abs=1e-5)
    assert weights[None, 2][0][0] == pytest.approx(sum(full[i][2][0][0] for i in range(2)) / 2, abs=1e-5)


def test_attention_of_a_given_target() -> None:
    answer = Web().post("/v1/attention", {"text": "A dog", "target": "x y z"}).json()
    assert answer["pieces"] == ["▁x", "▁y", "▁z"]
    assert (len(answer["weights"]), len(answer["weights"][0])) == (4, len(answer["source_pieces"]))
    assert (answer["layers"], answer["heads"]) == (2, 3)


@pytest.mark.parametrize(("key", "value"), [("layer", 2), ("layer", -1), ("head", 3)])
def test_a_layer_or_head_must_exist(key: str, value: int) -> None:
    assert f"{key}: {value} is out of range" in error_of(Web(), {"text": "a", key: value}, "/v1/attention")


def test_an_empty_text_has_no_attention() -> None:
    answer = Web().post("/v1/attention", {"text": " "}).json()
    assert (answer["weights"], answer["pieces"]) == ([], [])


def test_models_are_listed_in_order() -> None:
    answer = Web(FakeService([model_info("b"), model_info("a")])).get("/v1/models").json()
    assert [model["name"] for model in answer["models"]] == ["b", "a"]
    assert answer["default"] == "b"
    assert answer["models"][0]["scores"] == {"bleu": 30.5}


def test_the_options_of_the_search_are_those_that_requests_may_set() -> None:
    web = Web(FakeService(search=search_preset("diverse")))
    answer = web.get("/v1/search").json()
    options = {option["name"]: option for option in answer["options"]}
    preset = to_dict(search_preset("diverse"))
    assert {name: option["default"] for name, option in options.items()} == {
        key: value for key, value in preset.items() if key not in SERVER_KEYS
    }
    for name, option in options.items():
        assert option["help"] and "#" not in option["help"], name
        assert web.post("/v1/translate", {"text": "a", "search": {name: option["default"]}}).status_code == 200
    assert options["stop"]["choices"] == ["filled", "likely", "certain", "longest"]
    assert {options[name]["type"] for name in ("require", "forbid")} == {"array"}
    kinds: dict[str, type | tuple[type, ...]]
    kinds = {"integer": int, "number": (int, float), "string": str, "array": list}
    for name, option in options.items():
        assert isinstance(option["default"], kinds[option["type"]]) and not isinstance(option["default"], bool), name
    assert "longest: at the length limit" in options["stop"]["help"]  # the last line of its comment
    assert set(answer["presets"]) == set(choices("search"))
    assert all(values.keys() == options.keys() for values in answer["presets"].values())
    assert answer["presets"]["mbr"]["samples"] == search_preset("mbr").samples


def test_reload_answers_the_models_after_it() -> None:
    web = Web()
    for body in ({}, None, {"model": "toy"}):
        answer = web.post("/v1/reload", body).json()
        assert [model["update"] for model in answer["models"]] == [8]
    assert [call["reload"] for call in web.service.calls] == [None, None, "toy"]
    assert "no model 'x'" in error_of(web, {"model": "x"}, "/v1/reload", 404)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_json_cannot_write_becomes_null(value: float) -> None:
    assert json.loads(dumps({"a": [1.5, value, {"b": (value,)}], "c": "é"})) == {
        "a": [1.5, None, {"b": [None]}],
        "c": "é",
    }
