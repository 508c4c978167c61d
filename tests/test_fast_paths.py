"""Each fast path computes what its plain form does, alone and with all others replaced."""

from __future__ import annotations

import pytest
import torch

from seq2seq.config.loading import search_preset
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.scoring import DecodingTask, Specials
from seq2seq.inference import translator
from seq2seq.training.loss import loss_sum
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import padded, random_sentences, tiny_batch
from tests.helpers.models import tiny_model
from tests.reference.fast_paths import EVERY, PATHS, do_without

ALL = "all of them"
# Other draws; no numbers at all; other rounding, which tests/model/test_int8.py bounds.
OTHER_NUMBERS = ("dropout masks from one table", "freed memory kept", "int8")


def cases(search: bool) -> list[tuple[str, str]]:
    """Each family with each path of training or search that a plain form replaces."""
    names = [n for n, path in EVERY.items() if path.plain and n.startswith("search") == search]
    return [
        (family, name)
        for family in FAMILIES
        for name in (*names, ALL)
        if name not in OTHER_NUMBERS and (name == ALL or EVERY[name].family in ("", family))
    ]


def replace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    do_without([*PATHS] if name == ALL else [name], monkeypatch.setattr)


def loss_and_gradients(family: str) -> list[torch.Tensor | None]:
    model = tiny_model(family)
    loss = loss_sum(model, tiny_batch(), 0.1)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(("family", "name"), cases(search=False))
def test_the_plain_form_has_the_same_loss_and_gradients(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loss_and_gradients(family)
    replace(name, monkeypatch)
    torch.testing.assert_close(loss_and_gradients(family), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def translations(family: str) -> list[tuple[list[int], float]]:
    """Two batches, so that sentences of the first may wait for the second."""
    model = vars(translator)["optimize_for_cpu"](tiny_model(family))
    batches = []
    for lengths, longest in (([2, 5, 3], [12, 4, 14]), ([6, 7, 9], [16, 5, 3])):
        zeros = torch.zeros(len(lengths), dtype=torch.int64)
        task = DecodingTask(torch.tensor(longest), zeros, zeros, [*range(len(lengths))])
        batches.append((model.start(*padded(random_sentences(lengths, seed=3))), task))
    found = beam_search(model.step, batches, search_preset("beam"), Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN)))
    return [(hypothesis.ids, hypothesis.score) for hypotheses in found for hypothesis in hypotheses]


@pytest.mark.parametrize(("family", "name"), cases(search=True))
def test_the_plain_form_finds_the_same_translations(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = translations(family)
    replace(name, monkeypatch)
    found = translations(family)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4)
