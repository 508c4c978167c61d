"""Laws of runs made by version 0.1.0, one of each family, stored before its config keys were renamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from seq2seq.config.loading import flatten, rename_old_keys, to_dict
from seq2seq.config.renamed import RENAMED
from seq2seq.inference.checkpoint import read_config
from seq2seq.utils.run import Run
from tests.helpers import REPOSITORY
from tests.helpers.configs import FAMILIES
from tests.helpers.program import Program

STORED = REPOSITORY / "tests" / "fixtures" / "runs-0.1.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An outputs folder with both runs, beside the files that they were trained on."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    for family in FAMILIES:
        shutil.move(tmp_path / family, tmp_path / "old" / family)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_value_is_read_under_its_new_key(family: str) -> None:
    path = Run(STORED / family).checkpoint("last") / "config.yaml"
    stored, config = flatten(yaml.safe_load(path.read_text(encoding="utf-8"))), flatten(to_dict(read_config(path)))
    assert set(RENAMED) & set(stored), "it was written under old keys"
    assert {RENAMED.get(key, key): value for key, value in stored.items()} == {
        key: config[key] for key in (RENAMED.get(key, key) for key in stored)
    }
    assert not set(RENAMED) & set(config)


def test_a_config_with_new_keys_stays_as_it_is() -> None:
    new = {"name": "x", "optimizer": {"lr": 1.0, "param_groups": {"vectors": {"lr_scale": 2.0}}}, "data": {"extra": []}}
    assert rename_old_keys(new) == new


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_run_translates_as_it_did(family: str, program: Program, folder: Path) -> None:
    search = ["search=beam", "search.n_best=3", "precision=float32", "processes=1"]
    source = (STORED / "valid.en").read_text(encoding="utf-8")
    result = program("translate", f"run={family}", "outputs=old", "checkpoint=last", *search, input=source, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (STORED / family / "translations.tsv").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_old_run_resumes_where_it_stopped(family: str, program: Program, folder: Path) -> None:
    """With the losses that version 0.1.0 went on with."""
    result = program("train", f"name={family}", "outputs=old", "training.updates=6", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "changed    training.updates: 3 → 6" in result.stdout and result.stdout.count("changed ") == 1
    metrics = [
        [(row["kind"], row["update"], row["loss"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (Run(folder / "old" / family).metrics, STORED / family / "continued.jsonl")
    ]
    for (kind, update, loss), (old_kind, old_update, old_loss) in zip(*metrics, strict=True):
        assert (kind, update) == (old_kind, old_update) and loss == pytest.approx(old_loss, rel=1e-4)


def test_an_old_key_names_the_new_one(program: Program) -> None:
    result = program("train", "optimizer.rate=1", "optimizer.kinds.vectors.decay=0", "model.tie=all")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: optimizer.rate: this key is now optimizer.lr",
        "error: optimizer.kinds.vectors.decay: this key is now optimizer.param_groups.vectors.weight_decay",
        "error: model.tie: this key is now model.tie_embeddings",
    ]
