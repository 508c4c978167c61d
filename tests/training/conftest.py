"""Fixtures of the tests of training."""

from __future__ import annotations

from functools import partial

import pytest
import yaml

from seq2seq.training import meter as meter_module


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for a disk, YAML by the C library, and no large matrix products to measure a machine by."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    if yaml.__with_libyaml__:
        monkeypatch.setattr("yaml.safe_dump", partial(yaml.dump, Dumper=yaml.CSafeDumper))
        monkeypatch.setattr("yaml.safe_load", partial(yaml.load, Loader=yaml.CSafeLoader))
    monkeypatch.setattr(meter_module, "matmul_flops", lambda *_: 1e9)
