"""Laws of a run's folder: one training at a time, what a resumed run may change, and what its scores compare with."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from seq2seq.data.corpus import Corpus
from seq2seq.inference.checkpoint import write_config
from seq2seq.training.checkpoint import Progress
from seq2seq.training.distributed import SINGLE_PROCESS
from seq2seq.training.environment import fingerprint
from seq2seq.training.resume import compare_validation_sets, list_changes, lock_run
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run
from tests.helpers.runs import empty_run
from tests.helpers.trainers import varied


def lock_again(run: Run) -> None:
    with lock_run(run, SINGLE_PROCESS):
        pass


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    """The lock ends with the training, and leaves neither a file nor a folder that was made for it."""
    run = Run(tmp_path / "outputs" / "sweep" / "mine")
    with lock_run(run, SINGLE_PROCESS):
        with pytest.raises(UserError, match="another process is training"):
            lock_again(run)
        with pytest.raises(UserError, match="another process is training"):
            lock_again(run)
    assert list(tmp_path.iterdir()) == []
    lock_again(run)


def test_a_process_that_locks_at_the_end_of_another_excludes_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process does not remove the file that the second one has locked."""
    run, release = Run(tmp_path / "mine"), FileLock.release
    second = FileLock(tmp_path / ".mine.lock", timeout=0)

    def release_to_the_second(lock: FileLock) -> None:
        monkeypatch.undo()
        release(lock)
        second.acquire()

    with lock_run(run, SINGLE_PROCESS):
        monkeypatch.setattr(FileLock, "release", release_to_the_second)
    with pytest.raises(UserError, match="another process is training"):
        lock_again(run)
    second.release()


@pytest.mark.parametrize(
    ("changes", "fixed"),
    [
        ({"name": "other", "training__updates": 7, "data__held_out": 9}, []),
        ({"model__dropout": 0.4, "model__word_dropout": 0.1}, []),
        ({"model__width": 4, "seed": 8}, ["seed", "model.width"]),
        ({"init_from": "runs/dropout: 0.3"}, ["init_from"]),
        ({"data__target": "dropout: 1"}, ["data.target"]),
    ],
)
def test_a_resumed_run_keeps_its_model_tokenizer_languages_and_seed(
    changes: dict[str, object], fixed: list[str], tmp_path: Path
) -> None:
    """The values of other keys have no influence: a path may look like the name of a key."""
    run, stored = empty_run(tmp_path / "mine", last="update-0000001"), varied("lstm")
    write_config(stored, run.checkpoint("last") / "config.yaml")
    config = varied(stored, **changes)
    if fixed:
        with pytest.raises(UserError) as raised:
            list_changes(run, config)
        assert [problem.partition(":")[0] for problem in raised.value.problems[:-1]] == fixed
    else:
        expected = [name.replace("__", ".") for name in changes if name != "name"]
        assert sorted(change.key for change in list_changes(run, config)) == sorted(expected)
    assert list_changes(run, replace(config, overwrite=True)) == []


@pytest.mark.parametrize(
    ("starts", "anew"),
    [
        ([], False),  # a run without environment.json
        ([(0, "a")], False),
        ([(0, "b")], True),
        ([(0, "b"), (3, "a")], False),
        ([(0, "a"), (3, "b")], True),
        ([(0, "b"), (5, "a")], True),  # the last start ended before it had saved anything
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_scores_of_another_validation_set_are_not_compared(
    starts: list[tuple[int, str]], anew: bool, named: bool, tmp_path: Path
) -> None:
    """The set is that of the start which saved the checkpoint; the next validation is then the best, with patience."""
    sets = {word: Corpus([word], [word]) for word in "ab"}
    entries = [{"update": update, "data": {"validation": fingerprint(sets[word])}} for update, word in starts]
    run = Run(tmp_path)
    if entries:
        run.environment.write_text(json.dumps(entries), encoding="utf-8")
    progress = Progress(update=5, best_score=40.0, best_loss=2.0, best_update=4, without_gain=3, halved=1)
    before = replace(progress)
    data = varied("lstm", data__validation="valid.tsv" if named else None).data
    note = compare_validation_sets(run, progress, data, sets["a"])
    forgotten = replace(before, best_score=-math.inf, best_loss=math.inf, without_gain=0)
    assert progress == (forgotten if anew else before) and bool(note) == anew
    assert ("may have trained on its pairs" in note) == (anew and not named)
