"""Laws of the pictures on the concept pages: they show what the models compute."""

from __future__ import annotations

import dataclasses

import concept_pictures
import pytest
import torch

from seq2seq.config.loading import search_preset
from seq2seq.data.corpus import Corpus
from seq2seq.data.tokenizer import train_tokenizer
from seq2seq.data.toy.corpus import Pair
from seq2seq.inference.translator import Translator
from tests.helpers.configs import FAMILIES, tiny_config
from tests.helpers.models import tiny_model

PAIR = Pair("A dog runs.", "Ein Hund rennt.", ((0, 0), (1, 1), (2, 2), (3, 3)))


def translator(family: str, *overrides: str) -> Translator:
    words, _ = train_tokenizer(Corpus([PAIR.source], [PAIR.target]), tiny_config(family, "tokenizer=word").tokenizer)
    model = tiny_model(family, *overrides, vocabulary=words.vocabulary)
    return Translator(model, words, torch.device("cpu"), 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_path_of_the_tree_is_the_translation(family: str) -> None:
    model = translator(family)
    search = dataclasses.replace(search_preset("beam"), beam=concept_pictures.BEAM)
    ((best,),) = model.translate([PAIR.source], search)
    nodes, (end, *others) = concept_pictures.search_tree(model, PAIR.source)
    path = sorted(concept_pictures.path_of(end, nodes))
    assert [node.word for node in path] == concept_pictures.words_of(best.pieces)
    assert end.score == pytest.approx(best.score) and all(other.score <= end.score for other in others)
    assert [node.log_probability for node in path] == pytest.approx(
        torch.tensor(best.token_log_probabilities).cumsum(0)[:-1].tolist()
    )


@pytest.mark.parametrize("score", ["dot", "scaled_dot", "general", "cosine"])
def test_the_softmax_of_the_scores_is_the_attention_of_the_model(score: str) -> None:
    model = translator("lstm", f"model.attention.score={score}", "model.attention.heads=1")
    score_TS, value_SD = concept_pictures.scores_and_values(model, PAIR)
    attention_TS = concept_pictures.forced(model, PAIR).attention()
    torch.testing.assert_close(score_TS.softmax(-1), attention_TS)
    assert len(value_SD) == attention_TS.shape[1]
