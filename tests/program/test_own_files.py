"""A corpus of one's own, in the shapes that people have, by the program with nothing but its files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from tests.helpers.configs import TINY
from tests.helpers.corpora import WORDS
from tests.helpers.program import QUICK, Program

SENTENCES = [random.Random(i).choices(list(WORDS), k=1 + i % 8) for i in range(200)]
PAIRS = [(" ".join(s), " ".join(WORDS[word] for word in s)) for s in SENTENCES]
SMALL = ["model=lstm", *TINY["lstm"], *QUICK, "name=mine", "device=cpu"]


def write_text(folder: Path, names: tuple[str, str], end: str = "\n", mark: str = "") -> str:
    for side, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((mark + "".join(pair[side] + end for pair in PAIRS)).encode())
    return f"[{','.join(names)}]"


def write_rows(folder: Path, name: str, columns: tuple[str, str]) -> str:
    rows = [dict(zip(columns, pair, strict=True)) for pair in PAIRS]
    separator = "," if name.endswith("csv") else "\t"
    lines = [separator.join(columns), *(separator.join(row.values()) for row in rows)]
    text = map(json.dumps, rows) if name.endswith("jsonl") else lines
    (folder / name).write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return name


@pytest.mark.slow
def test_every_shape_of_a_corpus_is_the_same_corpus(program: Program, tmp_path: Path) -> None:
    """Text of any system and tables, however named: the same pairs, with the languages that the names show."""
    shapes = {
        "en→de": [
            write_text(tmp_path, ("train.en", "train.de")),
            write_text(tmp_path, ("en/text.txt", "de/text.txt"), "\r\n", "\ufeff"),
            write_rows(tmp_path, "c.jsonl", ("en", "de")),
        ],
        "eng→deu": [write_rows(tmp_path, "c.csv", ("eng", "deu"))],
        "source→target": [
            write_text(tmp_path, ("left.txt", "right.txt")), write_rows(tmp_path, "c.tsv", ("source", "target"))
        ],
    }  # fmt: skip
    epochs = set()
    for languages, corpora in shapes.items():
        for corpus in corpora:
            checked = program("doctor", f"data.train={corpus}", "tokenizer.vocabulary=60")
            assert checked.returncode == 0, checked.stderr
            assert f"corpus     files {languages}: 180 training" in checked.stdout, corpus
            assert ("the target language is unknown" in checked.stdout) == (languages == "source→target")
            assert "180 training pairs are very few" in checked.stdout
            epochs.add(checked.stdout.splitlines()[-1])
    assert len(epochs) == 1


@pytest.mark.slow
def test_a_run_keeps_what_was_chosen_for_it(program: Program, tmp_path: Path) -> None:
    """Languages and length are stored as they were settled, a resumed run prints them again, and every command
    uses the languages."""
    corpus = write_text(tmp_path, ("train.en", "train.zh"))
    first = program("train", *SMALL, f"data.train={corpus}", "training.updates=20", "training.patience=auto")
    assert first.returncode == 0, first.stderr
    stored = yaml.safe_load((tmp_path / "outputs" / "mine" / "config.yaml").read_text(encoding="utf-8"))
    assert (stored["data"]["source"], stored["data"]["target"]) == ("en", "zh")
    training = stored["training"]
    assert (training["updates"], training["validate_every"], training["patience"]) == (20, 250, 0)
    assert stored["optimizer"]["warmup"] == 20 // 3
    assert "tok:zh" in first.stdout and "time  " in first.stdout
    again = program("train", "name=mine")
    lines = [next(line for line in made.stdout.splitlines() if line.startswith("length")) for made in (first, again)]
    assert lines[0] == lines[1] and "changed" not in again.stdout, again.stderr
    evaluated = program(
        "evaluate", "run=mine", "source=train.en", "reference=train.zh", "metrics=[bleu]", "resamples=0"
    )
    assert "tok:zh" in evaluated.stdout and "warning" not in evaluated.stdout, evaluated.stderr


@pytest.mark.slow
def test_a_run_of_unknown_languages_says_where_it_matters(program: Program, tmp_path: Path) -> None:
    """It trains and translates; BLEU warns, and public test sets ask for the languages."""
    corpus = write_text(tmp_path, ("left.txt", "right.txt"))
    trained = program("train", *SMALL, f"data.train={corpus}", "training.updates=2")
    assert trained.returncode == 0 and "name the languages with data.source=… data.target=…" in trained.stdout
    evaluated = program("evaluate", "run=mine", "metrics=[bleu]", "resamples=0")
    assert "warning    the target language is unknown" in evaluated.stdout, evaluated.stderr
    public = program("evaluate", "run=mine", "public=wmt14")
    assert public.returncode == 1 and "public: the languages of the run are unknown" in public.stderr
    refused = program("train", "name=mine", "data.target=de")
    assert refused.returncode == 2 and "data.target: None → de" in refused.stderr
