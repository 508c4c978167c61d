"""Translations take the positions of their sentences in the text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seq2seq.inference.translator import EMPTY
from seq2seq.serving.interface import SentenceResult
from seq2seq.serving.text import clean, text_result


def result(source: str, text: str, update: int | None = 1) -> SentenceResult:
    return SentenceResult(source, (replace(EMPTY, text=text),), update)


def test_line_ends_and_spaces_stay_and_translations_add_none() -> None:
    found = text_result(" A b.  C\r\n\r\nD\n", [result("A b.", "x\ny"), result("C", ""), result("D", "z")])
    assert found.text == " x y  \r\n\r\nz\n" and found.gaps == (" ", "  ", "\r\n\r\n", "\n")


@pytest.mark.parametrize(("output", "gap"), [("Ja.", " "), ("好。", ""), ("", "")])
def test_sentences_without_space_between_them_get_one_where_their_translation_needs_it(output: str, gap: str) -> None:
    found = text_result("是。犬", [result("是。", output), result("犬", "Hund")])
    assert (found.text, found.gaps) == (f"{output}{gap}Hund", ("", gap, ""))


def test_a_text_names_the_newest_update_of_its_sentences() -> None:
    assert text_result("A B", [result("A", "a", 3), result("B", "b", 2)]).update == 3
    assert text_result("A", [result("A", "a", None)]).update is None and text_result("", []).update is None


def test_lone_surrogates_are_replaced() -> None:
    assert clean("a\ud800é日😀") == "a?é日😀"
