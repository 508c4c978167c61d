"""Searches with every kind of rule on the pretend GPU, and the comparison of what they find."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.inference.translator import Translation, Translator
from tests.helpers.configs import FAMILIES
from tests.helpers.runs import saved_run

SOURCES = ["Some dogs see cats.", "the birds", "a cow and dogs", "", "Some cats see a cow, the birds and dogs.", "x"]
BEAM = search_preset("beam")
# Untrained models end at once or never.
LENGTHS: dict[str, Any] = {"length_factor": 0.0, "length_extra": 9, "min_length_extra": 3}
SEARCHES: dict[str, SearchConfig] = {
    "greedy": search_preset("greedy"),
    "beam": replace(BEAM, n_best=3),
    "prefix": BEAM,
    "forbid": replace(BEAM, forbid=["dogs", "cats"]),
    "require": replace(BEAM, require=["Birds"]),
    "no_repeat_ngram": replace(BEAM, no_repeat_ngram=2),
    "groups": search_preset("diverse"),
    "coverage": replace(BEAM, coverage_penalty=0.2),
    "sample": replace(search_preset("sample"), samples=2, top_k=20, top_p=0.9, min_p=0.01),
}
searches = pytest.mark.parametrize(("kind", "family"), list(itertools.product(SEARCHES, FAMILIES)))


def translator(folder: Path, family: str, device: str) -> Translator:
    run = saved_run(folder, family, "model.attention.score=scaled_dot")
    return Translator.from_checkpoint(run.checkpoint("best"), device, "float32")


def translate(made: Translator, kind: str, sources: Sequence[str] = SOURCES, **lengths: Any) -> list[list[Translation]]:
    prefixes = list(itertools.islice(itertools.cycle(["Some Dogs", "", "The"]), len(sources)))
    search = replace(SEARCHES[kind], **{**LENGTHS, **lengths})
    return made.translate(sources, search, prefixes=prefixes if kind == "prefix" else None)


def same(cuda: Sequence[Translation], cpu: Sequence[Translation]) -> None:
    assert [one.pieces for one in cuda] == [one.pieces for one in cpu]
    for a, b in zip(cuda, cpu, strict=True):
        np.testing.assert_allclose(a.token_log_probabilities, b.token_log_probabilities, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(a.score, b.score, rtol=1e-3, atol=1e-4)
        if a.weights_LNTS is not None and b.weights_LNTS is not None:
            torch.testing.assert_close(a.weights_LNTS, b.weights_LNTS, rtol=1e-3, atol=1e-4)
