"""Laws of the benchmarks: they measure the product's own updates with the product's own settings."""

from __future__ import annotations

import benchmarks
import pytest
import torch

from seq2seq.training.prefetch import iterate
from seq2seq.training.schedule import settle_rate
from tests.helpers.configs import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_of_the_benchmarks_learns_at_the_automatic_rate(family: str) -> None:
    config, device = tiny_config(family, "optimizer.lr=auto", "training.tokens=256"), torch.device("cpu")
    trainer = benchmarks.trainer_of(config, benchmarks.synthetic(64, 50, 5.0), 50, device)
    before = [parameter.detach().clone() for parameter in trainer.state.model.parameters()]
    trainer.update(next(iterate(trainer.state.batches, device)))
    assert trainer.state.config.optimizer.lr == settle_rate(config).optimizer.lr
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.state.model.parameters(), strict=True))
