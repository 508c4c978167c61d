"""Laws of the length of a run by the size of its corpus."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from seq2seq.config.schema import TrainConfig, settled
from seq2seq.data.batching import Batches
from seq2seq.training.length import (
    GRAMMAR_UPDATES,
    describe_length,
    epochs_for,
    interval_for,
    patience_for,
    settle_length,
    updates_for,
    warmup_for,
)
from seq2seq.training.schedule import lr_at, settle_rate
from tests.helpers.configs import composed
from tests.helpers.corpora import random_corpus
from tests.helpers.trainers import varied

SIZES = [10, 200, 1000, 5000, 29_000, 200_000, 1_000_000, 4_500_000, 40_000_000]


def of_files() -> TrainConfig:
    return composed("data.train=[a.en,a.de]")


def batches_of(pairs: int = 64, divided: int = 1, **settings: Any) -> Batches:
    batches = Batches(random_corpus([3, 5, 2, 7] * (pairs // 4)), 24, 1, **settings)
    if divided > 1:
        batches.divide_among(0, divided)
    return batches


def test_the_built_in_corpus_has_the_length_it_always_had() -> None:
    """The scores of the README hang on it."""
    config = settle_length(composed(), batches_of())
    training = config.training
    assert (training.updates, training.validate_every, training.patience, config.optimizer.warmup) == (
        GRAMMAR_UPDATES, 250, 0, 200
    )  # fmt: skip


def test_larger_corpora_have_fewer_epochs_and_more_updates() -> None:
    """Four times the pairs: half the epochs, and twice the updates, wherever no limit holds."""
    epochs = [epochs_for(pairs) for pairs in SIZES]
    assert epochs == sorted(epochs, reverse=True)
    assert min(epochs) >= 3 and max(epochs) <= 100
    updates = [updates_for(pairs, pairs / 128) for pairs in SIZES]
    assert updates == sorted(updates)
    assert epochs_for(4 * 50_000) == pytest.approx(epochs_for(50_000) / 2)
    assert 60 <= epochs_for(29_000) <= 100, "as good runs on Multi30k have"


@pytest.mark.parametrize("pairs", SIZES)
def test_the_length_of_every_corpus_is_within_reason(pairs: int) -> None:
    """In round numbers, with up to 40 validations, at least 250 updates apart, and a warm-up that ends early."""
    updates = updates_for(pairs, max(1, pairs / 128))
    interval = interval_for(updates)
    validations = math.ceil(updates / interval)
    assert updates >= 1000 and len(str(updates).rstrip("0")) <= 2
    assert interval >= 250 and 4 <= validations <= 40 and (validations >= 10 or interval == 250)
    assert patience_for(updates, interval) <= max(0, validations - 1)
    assert warmup_for(updates) <= updates / 5
    assert warmup_for(updates // 50) <= updates / 150, "of a run that is shortened by hand, a third"


@pytest.mark.parametrize("updates", [10_000, 50_000, 100_000, 400_000, 2_000_000])
def test_a_long_run_is_validated_ten_to_forty_times_and_stops_after_half_of_them(updates: int) -> None:
    validations = math.ceil(updates / interval_for(updates))
    assert 10 <= validations <= 40
    assert patience_for(updates, interval_for(updates)) == math.ceil(validations / 2)
    assert 200 < warmup_for(updates) <= 4000


def test_given_numbers_stay_and_the_others_follow_from_them() -> None:
    config = varied(of_files(), training__updates=30_000, optimizer__warmup=7)
    found = settle_length(config, batches_of())
    assert (found.training.updates, found.optimizer.warmup) == (30_000, 7)
    assert found.training.validate_every == interval_for(30_000)
    assert found.training.patience == patience_for(30_000, interval_for(30_000))
    every = varied(config, training__validate_every=9, training__patience=3)
    assert settle_length(every, batches_of()) == every
    assert settle_length(found, batches_of(16)) == found, "what is settled stays, also beside another corpus"


def test_files_are_trained_on_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = batches_of()
    found = settle_length(of_files(), batches)
    assert found.training.updates == updates_for(64, batches.updates_per_epoch())
    monkeypatch.setattr(Batches, "pairs_per_epoch", lambda self: 30_000)
    monkeypatch.setattr(Batches, "updates_per_epoch", lambda self: 200.0)
    assert settle_length(of_files(), batches).training.updates == 80 * 200


@pytest.mark.parametrize("settings", [{}, {"update_tokens": 60}, {"update_tokens": 1}, {"world_size": 2},
                                      {"update_tokens": 100, "world_size": 2}, {"divided": 2},
                                      {"update_tokens": 100, "divided": 2}])  # fmt: skip
def test_updates_of_an_epoch_are_those_that_it_takes(settings: dict[str, Any]) -> None:
    """With batches that are accumulated, computed together by several processes, or divided among them."""
    batches = batches_of(256, **settings)
    estimate, taken = batches.updates_per_epoch(), 0
    for _ in batches:
        if batches.epoch:
            break
        taken += 1
    assert estimate == pytest.approx(taken, rel=0.25)
    assert batches_of(256).updates_per_epoch() >= estimate


@pytest.mark.parametrize("update_tokens", [0, 100])
def test_processes_that_divide_each_batch_train_as_long_as_one(update_tokens: int) -> None:
    """A run of as many updates, over as many epochs."""
    one, several = (batches_of(4000, update_tokens=update_tokens, divided=size) for size in (1, 3))
    found = settle_length(of_files(), one)
    assert settle_length(of_files(), several) == found
    assert describe_length(found, several) == describe_length(found, one)


def test_the_line_has_the_numbers_of_the_run() -> None:
    batches = batches_of()
    config = settle_length(varied(of_files(), training__updates=20_000), batches)
    line, training = describe_length(config, batches), config.training
    tokens = int(batches.encoded.target.ends[-1])
    assert line.startswith(f"64 pairs, {tokens} target tokens per epoch; 20,000 updates = ")
    assert f"{20_000 / batches.batches_per_epoch():,.1f} epochs" in line
    assert line.endswith(f"20 validations, stopping after {training.patience} without improvement")
    once = describe_length(settle_length(varied(of_files(), training__updates=3), batches), batches)
    assert once.endswith(" epochs, 1 validation")


def test_the_warm_up_of_a_settled_run_is_the_schedules() -> None:
    config = settle_rate(settle_length(varied(of_files(), training__updates=50_000), batches_of()))
    warmup, peak = settled(config.optimizer.warmup), settled(config.optimizer.lr)
    rates = [lr_at(update, config.optimizer, 50_000) for update in (warmup // 2, warmup, warmup + 1)]
    assert rates[0] == pytest.approx(peak / 2) and rates[1] == peak > rates[2]


def test_auto_is_not_trained_with() -> None:
    """A trainer that was not settled fails at once, not by a comparison of words with numbers."""
    optimizer = settle_rate(of_files()).optimizer
    for changes in ({"warmup": "auto"}, {"lr": "auto", "warmup": 1}):
        with pytest.raises(AssertionError):
            lr_at(1, dataclasses.replace(optimizer, **changes), 10)
