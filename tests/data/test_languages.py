"""Laws of languages that are seen in the names of files and columns."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

import datasets
import pytest

from seq2seq.config.schema import DataConfig
from seq2seq.data.corpus import open_corpora
from seq2seq.data.languages import CODES, code_of, is_unknown, language_columns, languages_of_files
from seq2seq.data.sources import find_stream, with_languages
from seq2seq.utils.errors import UserError
from tests.helpers.configs import composed


@lru_cache
def base() -> DataConfig:
    return composed("data=files", "data.train=x.tsv").data


def data_of(folder: Path, **changes: object) -> DataConfig:
    return dataclasses.replace(base(), cache=str(folder / "cache"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["train.{}", "corpus.en-de.{}", "europarl-v7.de-en.{}", "news.{}.gz", "train.{}.txt", "train.tok.clean.{}.txt.xz",
     "{}/train.txt", "train_{}.txt", "train-{}", "{}_sentences.text", "a.b/it.{}", "corpus_fr-it_{}.txt"],
)  # fmt: skip
@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("deu", "eng"), ("english", "german"), ("is", "no")])
def test_files_that_differ_by_a_language_have_it(name: str, source: str, target: str) -> None:
    """In either direction, wherever the name has it."""
    assert languages_of_files(name.format(source), name.format(target)) == (source, target)
    assert languages_of_files(name.format(target), name.format(source)) == (target, source)


@pytest.mark.parametrize(
    ("source", "target", "languages"),
    [
        ("train.pt_BR", "train.zh-CN.txt", ("pt_BR", "zh-CN")),
        ("dev.eng_Latn", "dev.deu_Latn", ("eng_Latn", "deu_Latn")),
        ("train.en", "train.tlh", ("en", "tlh")),  # a language without an entry, beside the same name
        ("train.en", "korpus.txt", ("en", None)),
        ("my.txt", "other.txt", (None, None)),  # Burmese only if the other file has a language too
        ("train.src", "train.tgt", (None, None)),
        ("train.en", "train.src", ("en", None)),
        ("a.en", "b.en", (None, None)),
        ("a.en.txt", "b.eng", (None, None)),
        ("it/a.txt", "it/b.txt", (None, None)),
    ],
)
def test_names_show_no_more_than_they_say(source: str, target: str, languages: tuple[str | None, str | None]) -> None:
    assert languages_of_files(source, target) == languages


def test_each_name_is_of_one_language() -> None:
    """No code or English name is listed twice: the table would lose one of them."""
    from seq2seq.data import languages

    names = languages._LANGUAGES.replace(",", " ").split()
    assert len(names) == len(set(names)) == len(CODES)
    assert all(CODES[code] == code for code in CODES.values())


@pytest.mark.parametrize(
    ("name", "code"),
    [("sentence_deu_Latn", "de"), ("pt_BR", "pt"), ("zh-Hans", "zh"), ("Japanese", "ja"), ("JPN_Jpan", "ja"),
     ("en-de", None), ("sentence", None), ("", None), ("text_en", "en"), ("en_eng", "en")],
)  # fmt: skip
def test_a_name_has_the_code_of_its_only_language(name: str, code: str | None) -> None:
    assert code_of(name) == code


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["en", "de"], ["en", "de"]), (["de", "en"], ["de", "en"]), (["id", "en", "de"], ["en", "de"]),
        (["id", "en"], ["id", "en"]), (["no", "source", "target"], ["source", "target"]),
        (["tgt", "src"], ["src", "tgt"]),
        (["url", "text_en", "text_pt_BR"], ["text_en", "text_pt_BR"]), (["en", "de", "fr"], ["en", "de", "fr"]),
        (["a", "b"], []),
    ],
)  # fmt: skip
def test_columns_of_sentences_are_those_named_after_languages(columns: list[str], chosen: list[str]) -> None:
    """Or after their sides, whatever their order; a language's column comes in the order of the table."""
    assert language_columns(columns) == chosen


def test_the_name_of_a_side_is_no_language() -> None:
    assert all(map(is_unknown, (None, "", "source", "tgt"))) and not any(map(is_unknown, ("de", "tlh", "x")))


# ------------------------------------------------------------------------------------------- corpora


def write_table(folder: Path, header: str, name: str = "c.tsv") -> str:
    cells = header.split("\t")
    rows = [header, *("\t".join(f"{cell} {i}" for cell in cells) for i in range(60))]
    (folder / name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def test_given_languages_win_and_the_other_column_follows(tmp_path: Path) -> None:
    """Each alone, both, or none."""
    table = write_table(tmp_path, "en\tde")
    for given, expected in (
        ((None, None), ("en", "de")), (("de", None), ("de", "en")), ((None, "en"), ("de", "en")), (("de", "en"),) * 2
    ):  # fmt: skip
        data = with_languages(data_of(tmp_path, train=table, source=given[0], target=given[1]))
        assert (data.source, data.target) == expected
        assert next(find_stream(data, table).pairs()) == (f"{expected[0]} 0", f"{expected[1]} 0")
        assert with_languages(data) == data
    paths = [tmp_path / "a.en", tmp_path / "a.de"]
    for path in paths:
        path.write_text("x\n", encoding="utf-8")
    files = with_languages(data_of(tmp_path, train=[str(path) for path in paths], target="tlh"))
    assert (files.source, files.target) == ("en", "tlh")


def test_every_split_is_read_in_the_direction_of_the_training_pairs(tmp_path: Path) -> None:
    """Whatever the order of its own columns."""
    train, other = write_table(tmp_path, "de\ten", "train.tsv"), write_table(tmp_path, "en\tde", "valid.tsv")
    corpora = open_corpora(data_of(tmp_path, train=train, validation=other, source=None, target=None), 1)
    assert corpora.validation.source[0].startswith("de") and corpora.train.source[0].startswith("de")


@pytest.mark.parametrize(
    ("header", "given", "problem"),
    [
        ("en\tde\tfr", {}, "c.tsv: its columns (en, de, fr) name more than two languages; choose two with data.source"),
        ("A man walks\tEin Mann", {}, "c.tsv: its columns (A man walks, Ein Mann) do not name two languages"),
        ("A man walks\tEin Mann", {}, "the first line of a table must name its columns, such as en and de"),
        ("en\tde", {"target": "fr"}, "c.tsv: no column fr; possible: en, de"),
        ("en\tx", {}, "do not name two languages; choose two with data.source=… data.target=…"),
    ],
)  # fmt: skip
def test_columns_that_name_no_two_languages_are_asked_for(
    header: str, given: dict[str, str], problem: str, tmp_path: Path
) -> None:
    data = data_of(tmp_path, train=write_table(tmp_path, header), **given)
    with pytest.raises(UserError) as error:
        with_languages(data)
    assert problem in str(error.value)


def test_the_hub_and_folders_have_the_languages_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat columns or entries of `translation`; a corpus whose languages are given is not opened for them."""
    rows = [{"id": "1", "translation": {"fr": "chien", "it": "cane"}}]
    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    opened = []

    def load(*arguments: object, **settings: object) -> datasets.DatasetDict:
        opened.append(arguments)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = data_of(tmp_path, path="org/name", train="train")
    found = with_languages(hub)
    assert (found.source, found.target) == ("fr", "it") and len(opened) == 1
    assert list(find_stream(found, "train").pairs()) == [("chien", "cane")]
    opened.clear()
    assert find_stream(dataclasses.replace(hub, source="it", target="fr"), "train").languages == ("it", "fr")
    assert not opened
    (tmp_path / "corpus").mkdir()
    write_table(tmp_path / "corpus", "cs\tpl", "train.tsv")
    folder = with_languages(data_of(tmp_path, path=str(tmp_path / "corpus"), train="train"))
    assert (folder.source, folder.target) == ("cs", "pl")


def test_the_grammar_is_english_to_german_unless_one_side_says_otherwise(tmp_path: Path) -> None:
    for given, expected in (
        ((None, None), "en→de"), (("de", None), "de→en"), ((None, "en"), "de→en"), ((None, "de"), "en→de")
    ):  # fmt: skip
        data = with_languages(data_of(tmp_path, path="toy", train="train", source=given[0], target=given[1]))
        assert "→".join(data.languages) == expected
