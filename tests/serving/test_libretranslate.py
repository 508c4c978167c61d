"""Laws of the LibreTranslate protocol: shapes and errors as its clients know them."""

from __future__ import annotations

from html import escape, unescape
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libretranslatepy import LibreTranslateAPI

from seq2seq.config.loading import search_preset
from seq2seq.serving.interface import WorkerLost
from seq2seq.serving.libretranslate import reading, with_alternatives
from seq2seq.serving.markup import joined_markup, split_markup
from tests.helpers.serving import FakeService, Web, backwards, model_info, running

LAW = settings(max_examples=50, deadline=None, derandomize=True, database=None)
PAIR = {"source": "en", "target": "de"}


def two_way() -> FakeService:
    return FakeService([model_info("there", "en", "de"), model_info("back", "de", "en")])


def test_json_and_forms_are_answered_alike() -> None:
    fields = {"q": "A dog.", **PAIR, "alternatives": "2"}
    by_form, by_json = Web().post("/translate", data=fields), Web().post("/translate", fields)
    assert (
        by_form.json()
        == by_json.json()
        == {
            "translatedText": "dog. A",
            "alternatives": ["dog. A!", "dog. A!!"],
        }
    )


def test_a_list_is_answered_by_lists() -> None:
    body = {"q": ["A dog.", "B"], **PAIR, "source": "auto", "alternatives": 1}
    answer = Web().post("/translate", body).json()
    assert answer["translatedText"] == ["dog. A", "B"]
    assert answer["alternatives"] == [["dog. A!"], ["B!"]]
    assert [detected["language"] for detected in answer["detectedLanguage"]] == ["en", "en"]


def test_alternatives_and_detection_are_on_request_only() -> None:
    assert list(Web().post("/translate", {"q": "A", **PAIR}).json()) == ["translatedText"]
    service = FakeService(search=search_preset("diverse"))  # three translations of each sentence
    Web(service).post("/translate", {"q": "A", **PAIR})
    assert service.calls[0]["search"].n_best == 1


@pytest.mark.parametrize("format", ["text", "html"])
def test_an_engine_need_not_compute_probabilities_that_no_answer_has(format: str) -> None:
    service = FakeService()
    Web(service).post("/translate", {"q": "A b.", **PAIR, "format": format})
    assert [call["probabilities"] for call in service.calls] == [False]
    Web(service).post("/v1/translate", {"text": "A b."})
    assert service.calls[-1]["probabilities"]


def test_alternatives_of_several_sentences_join_theirs() -> None:
    answer = Web().post("/translate", {"q": "A b.\nC d.", **PAIR, "alternatives": 1}).json()
    assert answer["alternatives"] == ["b. A!\nd. C!"]


@pytest.mark.parametrize("choice", ["greedy", "beam", "diverse", "sample", "mbr"])
@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_a_search_is_wide_enough_for_its_alternatives(choice: str, count: int) -> None:
    search = with_alternatives(search_preset(choice), count)
    assert search.n_best == count + 1
    assert not list(search.problems())
    assert search.rows >= search_preset(choice).rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": None}, "Invalid request: missing q parameter"),
        ({"q": ""}, "Invalid request: missing q parameter"),
        ({"q": []}, "Invalid request: missing q parameter"),
        ({"source": None}, "Invalid request: missing source parameter"),
        ({"target": ""}, "Invalid request: missing target parameter"),
        ({"target": "zz"}, "zz is not supported"),
        ({"source": "zz"}, "zz is not supported"),
        ({"source": "de"}, "de is not available as a target language from de"),
        ({"format": "xml"}, "xml format is not supported"),
        ({"alternatives": "x"}, 'Invalid request: alternatives: "x" is not a whole number'),
        ({"alternatives": 11}, "Invalid request: alternatives: input should be less than or equal to 10"),
        ({"q": 5}, "Invalid request: q: 5 is not text or a list"),
    ],
)
def test_a_wrong_field_is_400(changes: dict[str, Any], message: str) -> None:
    body = {key: value for key, value in {"q": "A", **PAIR, **changes}.items() if value is not None}
    response = Web(two_way()).post("/translate", body)
    assert (response.status_code, response.json()) == (400, {"error": message})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"q=%ff&source=en&target=de", "body: a field is not UTF-8"),
        (b"q=\xff&source=en&target=de", "body: not UTF-8 at byte 2"),
        (b"a=1&" * 101, "body: more than 100 fields"),
    ],
)
def test_what_is_no_form_is_explained(raw: bytes, message: str) -> None:
    response = Web().post("/translate", content=raw, headers={"content-type": "application/x-www-form-urlencoded"})
    assert (response.status_code, response.json()) == (400, {"error": message})


def test_the_first_of_several_values_counts() -> None:
    raw = b"q=A&q=B&source=en&target=de"
    response = Web().post("/translate", content=raw, headers={"content-type": "application/x-www-form-urlencoded"})
    assert response.json() == {"translatedText": "A"}


def test_multipart_is_refused() -> None:
    response = Web().post("/translate", files={"q": b"A"})
    assert response.status_code == 415
    assert "multipart/form-data is not supported" in response.json()["error"]


def test_the_model_of_the_pair_translates() -> None:
    service = two_way()
    for source, target, name in (("en", "de", "there"), ("de", "en", "back"), ("DE", "EN", "back")):
        Web(service).post("/translate", {"q": "A", "source": source, "target": target})
        assert service.calls[-1]["model"] == name


def test_languages_list_each_source_once() -> None:
    models = [
        model_info("a", "en", "de"),
        model_info("b", "en", "de"),
        model_info("c", "en", "fr"),
        model_info("d", "xx", "en"),
    ]
    assert Web(FakeService(models)).get("/languages").json() == [
        {"code": "en", "name": "English", "targets": ["de", "fr"]},
        {"code": "xx", "name": "xx", "targets": ["en"]},
    ]


def test_settings_are_those_of_the_server() -> None:
    settings = Web(two_way(), max_characters=1234, api_key="k").get("/frontend/settings").json()
    assert (settings["charLimit"], settings["keyRequired"], settings["filesTranslation"]) == (1234, True, False)
    assert settings["language"]["target"] == {"code": "de", "name": "German"}
    assert not Web().get("/frontend/settings").json()["keyRequired"]


def test_suggestions_are_refused() -> None:
    response = Web().post("/suggest", {"q": "a", "s": "b", **PAIR})
    assert (response.status_code, list(response.json())) == (403, ["error"])


def test_health() -> None:
    """It is that of the service, so that a load balancer sends no requests to a server without workers."""
    assert Web().get("/health").json() == {"status": "ok"}
    service = FakeService()
    service.failure = WorkerLost("no worker")
    answer = Web(service).get("/health")
    assert (answer.status_code, answer.json()) == (503, {"error": "no worker"})


# ------------------------------------------------------------------------------------------------- detection


def test_the_alphabet_that_reads_a_text_is_detected() -> None:
    service = FakeService([model_info("a", "ru", "en"), model_info("b", "en", "de"), model_info("c", "en", "ru")])
    service.alphabets = {"a": "▁абвгд", "b": "▁abcd", "c": "▁abcd"}
    ranked = Web(service).post("/detect", data={"q": "aa bb"}).json()
    assert ranked == [{"confidence": 100.0, "language": "en"}, {"confidence": 0.0, "language": "ru"}]
    assert Web(service).post("/detect", {"q": ["аа", "бб"]}).json()[0]["language"] == "ru"
    answer = Web(service).post("/translate", {"q": "аа", "source": "auto", "target": "en"}).json()
    assert answer["detectedLanguage"]["language"] == "ru"


def test_confidence_falls_with_what_is_unknown() -> None:
    service = FakeService()
    service.alphabets = {"toy": "▁abcd"}
    confidences = [
        Web(service).post("/detect", {"q": text}).json()[0]["confidence"] for text in ("ab", "ab ж", "жж жж")
    ]
    assert confidences[0] == 100 and confidences == sorted(confidences, reverse=True) and confidences[2] == 0


def test_bytes_and_marks_are_not_known_subwords() -> None:
    assert reading("ab ж", ["▁ab", "▁", "<0xD0>", "<0xB6>", "</s>"])[0] == 2 / 3
    assert reading("", [])[0] == 0


def test_detect_needs_a_text() -> None:
    for body in ({}, {"q": ""}):
        response = Web().post("/detect", body)
        assert (response.status_code, response.json()) == (400, {"error": "Invalid request: missing q parameter"})


# ------------------------------------------------------------------------------------------------- HTML


def test_html_keeps_its_tags() -> None:
    page = (
        '<!doctype html><p class="x">A dog &amp; a <b>big cat</b>.<br/></p><!-- no --><script>if (a < b) {}</script>'
        '<pre>As it <b>is</b></pre><span translate="no">Seq to <span>seq</span> model too</span> c d'
    )
    answer = Web().post("/translate", {"q": page, **PAIR, "format": "html"}).json()
    expected = page.replace("A dog &amp; a ", "a &amp; dog A ").replace("big cat", "cat big").replace(" c d", " d c")
    assert answer["translatedText"] == expected


def test_html_has_no_alternatives() -> None:
    answer = Web().post("/translate", {"q": ["<b>a b</b>"], **PAIR, "format": "html", "alternatives": 2}).json()
    assert answer == {"translatedText": ["<b>b a</b>"], "alternatives": [[]]}


def test_the_texts_of_a_page_are_counted() -> None:
    response = Web(max_sentences=2).post("/translate", {"q": "a<br>b<br>c", **PAIR, "format": "html"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    "part",
    ["<", "<!--", "<a b='", '<a b="', "<![CDATA[", "<b>", "</", "</ ", "<a b=", "<?", "<pre>", "<script>", "&", " "],
)
def test_a_page_is_read_in_linear_time(part: str) -> None:
    """Unfinished markup neither hangs nor is lost; where time grows with the square, this test takes minutes."""
    for page in (part * 20_000, f"<script>{part * 20_000}>"):
        pieces = split_markup(page)
        again = joined_markup(pieces, [piece.text for piece in pieces if piece.translatable])
        assert unescape(again) == unescape(page)


def test_a_tag_stays_as_it_was_written() -> None:
    page = "<A Title='a > b' HREF=x  >a</A ><br / >&nbsp;<TITLE>b <i></TITLE><script>'</b>'<!-- </Script>"
    pieces = split_markup(page)
    assert [piece.text for piece in pieces if piece.translatable] == ["a", "b <i>"]
    assert "".join(escape(p.text, quote=False) if p.translatable else p.text for p in pieces) == page.replace(
        "b <i>", "b &lt;i&gt;"
    )


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@LAW
@given(st.lists(st.sampled_from(["<b>", "</b>", "<br>", "a", " & ", "&lt;b&gt;", "&amp;amp;", "<code>", "</code>"])))
def test_a_page_translated_into_itself_reads_the_same(parts: list[str]) -> None:
    page = "".join(parts)
    pieces = split_markup(page)
    again = joined_markup(pieces, [piece.text for piece in pieces if piece.translatable])
    assert (Reader(again).tags, Reader(again).text) == (Reader(page).tags, Reader(page).text)


# ------------------------------------------------------------------------------------------------- the client itself


@pytest.mark.slow
def test_the_client_of_libretranslate_works_unchanged() -> None:
    text = "Ein Hund läuft & schläft."
    with running(Web(two_way(), api_key="schlüssel").app) as address:
        api = LibreTranslateAPI(address, "schlüssel")
        assert api.translate(text, "de", "en") == backwards(text)
        assert {language["code"] for language in api.languages()} == {"en", "de"}
        assert {detected["language"] for detected in api.detect(text)} == {"en", "de"}
