"""Laws of checkpoints: everything a run needs is in them, and no interruption loses the one before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seq2seq.inference import checkpoint as checkpoint_module
from seq2seq.inference.checkpoint import damaged_error, load_checkpoint, read_plain_config, write_weights
from seq2seq.model.factory import build_model
from seq2seq.training.checkpoint import Checkpoints, Progress, load_initial_weights
from seq2seq.training.distributed import ProcessGroup
from seq2seq.training.pipeline import resolve_origin
from seq2seq.training.trainer import Trainer
from seq2seq.utils.errors import REASON_LENGTH, UserError
from seq2seq.utils.io import temporary_path
from seq2seq.utils.run import Run
from tests.helpers.configs import FAMILIES
from tests.helpers.corpora import random_corpus
from tests.helpers.trainers import LENGTHS, Threads, make_trainer, small_tokenizer, updates_of, varied, weights

NOISY = {"model__dropout": 0.3, "training__updates": 12, "training__validate_every": 100}


def trained(folder: Path, updates: int = 2, family: str = "lstm", **changes: Any) -> Trainer:
    made = make_trainer(varied(family, **{**NOISY, **changes}), folder)
    for rank_batches in updates_of(made, updates):
        made.update(rank_batches)
    return made


def last(made: Trainer) -> Path:
    return made.checkpoints.run.checkpoint("last")


def same_weights(made: Trainer, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, expected[name]) for name, p in made.state.model.named_parameters())


# --------------------------------------------------------------------------------- what a checkpoint holds


@pytest.mark.usefixtures("fast")
def test_every_count_of_the_progress_is_kept(tmp_path: Path) -> None:
    """Each field has a value of its own, and comes back as it was."""
    made = trained(tmp_path, 0)
    progress = Progress(**{field.name: n + 5 for n, field in enumerate(fields(Progress))})
    progress.best_score, progress.line_loss, progress.seconds = 12.25, 0.1, 1e9 / 3
    made.state.progress = replace(progress)
    made.save()
    other = trained(tmp_path, 0)
    other.state.read(last(made))
    assert other.state.progress == progress


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("adamw", "none"),
        ("adamw", "ema"),
        ("adamw", "last"),
        ("muon", "ema"),
        ("adafactor", "last"),
        ("schedule_free", "none"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_read_from_its_checkpoint_goes_on_to_the_same_bits(
    family: str, average: str, name: str, tmp_path: Path
) -> None:
    """Weights, moments, averages, batches and dropout, in a process that has drawn other random numbers since."""
    changes = {"optimizer__name": name, "training__average": average, "training__update_tokens": 30}
    made = trained(tmp_path, 3, family, **changes)
    made.save(best=True, validated=True)
    torch.manual_seed(99)
    other = make_trainer(made.state.config, tmp_path, resume=True)
    moments = [other.state.optimizer.state_dict(), made.state.optimizer.state_dict()]
    torch.testing.assert_close(*(one[0]["state"] for one in moments), rtol=0, atol=0)
    losses = [made.update(rank_batches) for rank_batches in updates_of(made, 2)], torch.rand(3)
    other.state.read(last(made))  # the random generators are one for both
    again = [other.update(rank_batches) for rank_batches in updates_of(other, 2)], torch.rand(3)
    assert losses[0] == again[0] and torch.equal(losses[1], again[1])
    assert same_weights(other, weights(made.state.model))
    if made.state.average:
        assert other.state.average is not None
        averaged = other.state.average.weights()
        for key, mean in made.state.average.weights().items():
            assert torch.equal(mean, averaged[key]), key
    assert asdict(other.state.progress) == asdict(made.state.progress)
    assert other.state.batches.state_dict() == made.state.batches.state_dict()


@pytest.mark.usefixtures("fast")
def test_an_average_that_begins_later_begins_from_the_weights_of_then(tmp_path: Path) -> None:
    """A run that continues with training.average=ema averages what it has learned, not its initial weights."""
    made = trained(tmp_path, 3)
    made.save()
    config = varied(made.state.config, training__average="ema", training__ema_decay=0.998, seed=5)
    other = make_trainer(config, tmp_path, resume=True)
    assert other.state.average is not None
    live = weights(made.state.model)
    assert all(torch.equal(mean, live[name]) for name, mean in other.state.average.weights().items())


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("size", [2, 3])
def test_every_process_has_its_own_random_numbers_again(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its rank; a run of another number of processes draws new ones."""
    made = trained(tmp_path, 0)
    states = [{"cpu": torch.Generator().manual_seed(rank).get_state()} for rank in range(size)]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    made.state.write(folder, [{**made.state.part(), "random": state} for state in states])
    for rank in range(size):
        made.state.process_group = ProcessGroup(rank, size)
        torch.manual_seed(50)
        made.state.read(folder)
        assert torch.equal(torch.get_rng_state(), states[rank]["cpu"])
    for process_group in (ProcessGroup(0, size + 1), ProcessGroup(0, 1)):
        made.state.process_group = process_group
        before = torch.manual_seed(50).get_state()
        made.state.read(folder)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("fast")
def test_the_first_process_saves_the_random_numbers_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of ranks, and no other process writes."""
    made = [make_trainer("lstm", tmp_path / str(rank), process_group=ProcessGroup(rank, 3)) for rank in range(3)]
    for rank, one in enumerate(made):
        monkeypatch.setattr(one.state, "rng_states", lambda rank=rank: {"cpu": torch.full((2,), rank)})
    Threads(3, monkeypatch).run(lambda process_group: made[process_group.rank].save())
    stored = torch.load(last(made[0]) / "training.pt", weights_only=True)["random"]
    assert [one["cpu"].tolist() for one in stored] == [[0, 0], [1, 1], [2, 2]]
    assert [one.checkpoints.folder.exists() for one in made] == [True, False, False]


def test_a_gpu_has_random_numbers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept beside the CPU's; what a checkpoint of another device lacks stays as it is."""
    made, states = trained(tmp_path, 0), {"cuda": torch.ones(2)}
    model = torch.nn.Linear(1, 1, device="meta")
    monkeypatch.setattr(made.state, "model", model)
    monkeypatch.setattr("torch.meta", type("Device", (), {"get_rng_state": lambda: torch.ones(2)}), raising=False)
    found = made.state.rng_states()
    assert found.keys() == {"cpu", "meta"} and torch.equal(found["meta"], states["cuda"])
    assert torch.equal(found["cpu"], torch.get_rng_state())
    wanted = torch.Generator().manual_seed(8).get_state()
    made.state.set_rng_states({"cpu": wanted})
    assert torch.equal(torch.get_rng_state(), wanted)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("average", ["none", "ema", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_translates_has_the_averaged_weights(family: str, average: str, tmp_path: Path) -> None:
    """Where there are any; the live ones go on being trained."""
    made = trained(tmp_path, 3, family, training__average=average, model__tie_embeddings="output")
    made.save(best=True, validated=True)
    [rank_batches] = updates_of(made, 1)
    made.update(rank_batches)
    expected = made.state.average.weights() if made.state.average else weights(made.state.model)
    expected = {name: weight.clone() for name, weight in expected.items()}
    made.save(best=True, validated=True)
    config, tokenizer, model = load_checkpoint(last(made))
    assert config == made.state.config and tokenizer.models == small_tokenizer().models
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=0)
    assert same_weights(made, weights(make_trainer(config, tmp_path, resume=True).state.model))
    # Another run begins with these as well.
    fresh = build_model(varied(config, seed=7).model, tokenizer.vocabulary)
    load_initial_weights(fresh, last(made))
    for name, p in fresh.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=0)


@pytest.mark.usefixtures("fast")
def test_other_weights_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    """Each parameter that is missing, new, or of another shape; four are named and the rest counted."""
    made = trained(tmp_path, 0, "transformer", training__average="ema")
    made.save(best=True)
    folder, model = last(made), made.state.model
    stored = {name: weight.clone() for name, weight in load_file(folder / "averaged.safetensors").items()}
    live = weights(model)

    def problems(changed: dict[str, Tensor]) -> list[str]:
        save_file(changed, folder / "averaged.safetensors")
        with pytest.raises(UserError) as raised:
            load_initial_weights(model, folder)
        assert raised.value.code == 2 and all(torch.equal(p, live[n]) for n, p in model.named_parameters())
        return list(raised.value.problems)

    names = list(dict(model.named_parameters()))
    *shown, advice = problems({**stored, names[0]: torch.ones(3, 8)})
    difference = f"init_from: {names[0]} is (3, 8) in the checkpoint, {tuple(live[names[0]].shape)} in this model"
    assert len(shown) == 1 and difference in shown[0]
    assert str(folder / "config.yaml") in advice
    *shown, _ = problems({name: weight for name, weight in stored.items() if name != names[1]})
    assert len(shown) == 1 and f"{names[1]} is None in the checkpoint" in shown[0]
    *shown, _ = problems({**stored, "more": torch.ones(2)})
    assert len(shown) == 1 and "more is (2,) in the checkpoint, None in this model" in shown[0]
    *shown, more, _ = problems({name: weight for name, weight in stored.items() if name not in names[:6]})
    assert [line.split()[1] for line in shown] == names[:4] and more == "… and 2 more"
    *shown, _ = problems({name: weight for name, weight in stored.items() if name not in names[:4]})
    assert [line.split()[1] for line in shown] == names[:4], "no more than there are"
    save_file({name: weight + 1 for name, weight in stored.items()}, folder / "averaged.safetensors")
    load_initial_weights(model, folder)
    assert all(torch.equal(p, stored[name] + 1) for name, p in model.named_parameters())


@pytest.mark.usefixtures("fast")
def test_damaged_files_are_named_and_change_nothing_of_the_model(tmp_path: Path) -> None:
    """Cut in half or missing, also the averaged weights; and parameters that the model does not have."""
    made = trained(tmp_path, 2, training__average="ema")
    made.save()
    for file in ("model.safetensors", "averaged.safetensors", "training.pt"):
        whole = (last(made) / file).read_bytes()
        for broken in (whole[: len(whole) // 2], b""):
            (last(made) / file).write_bytes(broken)
            with pytest.raises(UserError, match=f"{file}: missing or damaged"):
                made.state.read(last(made))
        (last(made) / file).write_bytes(whole)
    (last(made) / "training.pt").unlink()
    with pytest.raises(UserError, match=r"training\.pt: missing or damaged"):
        made.state.read(last(made))
    stored = load_file(last(made) / "model.safetensors")
    first = min(stored)
    save_file({name: weight for name, weight in stored.items() if name != first}, last(made) / "model.safetensors")
    with pytest.raises(UserError, match=f"parameters differ from the config's model: {first}"):
        made.state.read(last(made))


@pytest.mark.usefixtures("fast")
def test_a_missing_or_renamed_field_of_the_training_state_is_a_damaged_file(tmp_path: Path) -> None:
    """Every part, and every field of the batches and of the progress."""
    made = trained(tmp_path, 2)
    made.save()
    path = last(made) / "training.pt"
    whole = torch.load(path, weights_only=True)

    def without(part: dict[str, Any], field: str) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name != field}

    broken = [without(whole, part) for part in whole]
    for part in ("batches", "progress"):
        for field, value in whole[part].items():
            if field == "mix":  # which version 0.1.0 did not store
                continue
            missing = without(whole[part], field)
            broken += [{**whole, part: missing}, {**whole, part: {**missing, f"new_{field}": value}}]
    for state in broken:
        torch.save(state, path)
        with pytest.raises(UserError, match=r"training\.pt: missing or damaged") as error:
            made.state.read(last(made))
        assert len(error.value.problems) == 1 and "\n" not in error.value.problems[0]
    torch.save(whole, path)
    made.state.read(last(made))


@pytest.mark.parametrize("text", ["", "- 1\n", "word", "a: [1"])
def test_a_config_that_is_none_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"config\.yaml: missing or damaged \((it contains no keys|while parsing).*restore"
    ):
        read_plain_config(tmp_path / "config.yaml")


def test_init_from_an_unknown_run_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^init_from: no run nowhere in "):
        resolve_origin("nowhere", str(tmp_path))


def test_a_damaged_file_has_a_reason_in_one_short_line(tmp_path: Path) -> None:
    """What the system calls it, else what the error says, else the kind of error."""
    path = tmp_path / "training.pt"
    for error, reason in (
        (OSError(2, "No such file or directory", "somewhere"), "No such file or directory"),
        (OSError("a network\n  drive"), "a network drive"),
        (RuntimeError("x" * 2 * REASON_LENGTH), "x" * REASON_LENGTH),
        (EOFError(), "EOFError"),
    ):
        [line] = damaged_error(path, error).problems
        assert line.startswith(f"{path}: missing or damaged ({reason});")


# ------------------------------------------------------------------------------- what is kept and deleted


@pytest.mark.usefixtures("fast")
def test_the_index_turns_to_what_is_saved_and_the_rest_is_deleted(tmp_path: Path) -> None:
    """The last, the best, and as many validations as are averaged; a save between validations is none of these."""
    config = varied("lstm", training__average="last", training__average_checkpoints=3)
    made = make_trainer(config, tmp_path)
    saves = [(True, True), (False, True), (False, False), (True, True), (False, True), (False, False)]
    recent: list[str] = []
    best = ""
    for n, (is_best, validated) in enumerate(saves, 1):
        made.state.progress.update = n
        made.save(is_best, validated)
        name = f"update-{n:07d}"
        best = name if is_best else best
        recent = [name, *recent][:2] if validated else recent
        index = json.loads((made.checkpoints.folder / "index.json").read_text())
        assert index == {"last": name, "best": best, "recent": recent}
        assert {p.name for p in made.checkpoints.folder.iterdir()} == {name, best, *recent, "index.json"}
        assert [p.parent.name for p in made.checkpoints.recent_weights()] == recent
        assert made.saved_update == n
    # Another process, with another number to average, knows the best one still.
    other = Checkpoints(Run(tmp_path), 1)
    assert [p.parent.name for p in other.recent_weights()] == recent[:1]
    made.state.progress.update = 7
    other.save(made.state, False, True)
    assert made.checkpoints.run.index() == {"last": "update-0000007", "best": best, "recent": ["update-0000007"]}


@pytest.mark.usefixtures("fast")
def test_saving_an_update_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    """Whole: nothing of the old folder stays, nor what a killed run has left."""
    made = trained(tmp_path, 1)
    made.save(best=True)
    (last(made) / "old").write_text("x")
    hidden = made.checkpoints.folder / f".{last(made).name}"
    hidden.mkdir()
    (hidden / "old").write_text("x")
    with torch.no_grad():
        next(made.state.model.parameters()).add_(1)
    made.save()
    assert not (last(made) / "old").exists() and not hidden.exists()
    assert same_weights(made, weights(load_checkpoint(last(made))[2]))
    assert made.checkpoints.run.index() == {"last": last(made).name, "best": last(made).name}


class Disk:
    """Intercepts every change of the file system: records it, and fails at any one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None, at: int = -1) -> None:
        self.error, self.at, self.count = error, at, 0
        self.events: list[tuple[str, str]] = []
        for owner, name in (
            (os, "fsync"),
            (os, "rename"),
            (os, "replace"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (Path, "write_text"),
            (Path, "write_bytes"),
            (torch, "save"),
            (checkpoint_module, "save_file"),
        ):
            monkeypatch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def steps(self) -> list[int]:
        """The number of each change; of several of one kind in a row the first and the last."""
        kinds = ["", *(name for name, _ in self.events), ""]
        assert self.count == len(self.events) > 15
        return [n for n in range(1, self.count + 1) if not kinds[n - 1] == kinds[n] == kinds[n + 1]]

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.at and self.error is not None:
                raise self.error
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{arguments[0]}")
                self.events.append((name, path))
                return None
            found = function(*arguments, **named)
            self.events.append(
                (name, str(arguments[1] if name in ("save", "save_file", "rename", "replace") else arguments[0]))
            )
            return found

        return call


class Killed(BaseException):
    """Stands for the kill of the process."""


def resumed(folder: Path, made: Trainer) -> Trainer:
    return make_trainer(made.state.config, folder, resume=True)


@contextmanager
def disk(error: BaseException | None = None, at: int = -1) -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as patch:
        yield Disk(patch, error, at)


@pytest.mark.usefixtures("fast")
def test_a_run_killed_at_any_step_of_a_save_goes_on(tmp_path: Path) -> None:
    """Before or after it the last checkpoint is whole, the best one too, and the same save works again."""
    made = trained(tmp_path / "run", 1, training__average="last", training__average_checkpoints=2)
    made.save(best=True, validated=True)
    states = {1: weights(made.state.model)}
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    [rank_batches] = updates_of(made, 1)
    made.update(rank_batches)
    states[2] = weights(made.state.model)
    with disk() as noted:
        made.save(best=True, validated=True)
    whole = {file.name for file in last(made).iterdir()}
    seen = set()
    for at in noted.steps():
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "first", tmp_path / "run")
        with disk(Killed(), at), pytest.raises(Killed):
            made.save(best=True, validated=True)
        run = made.checkpoints.run
        for which in ("last", "best"):
            path = run.checkpoint(which)
            n = int(path.name.removeprefix("update-"))
            stored = load_file(path / "model.safetensors")
            assert all(torch.equal(weight, states[n][name]) for name, weight in stored.items()), f"step {at}"
            assert torch.load(path / "training.pt", weights_only=True)["progress"]["update"] == n
            assert {file.name for file in path.iterdir()} == whole, f"step {at}"
            seen.add((which, n))
        assert all((file.parent / "training.pt").is_file() for file in made.checkpoints.recent_weights())
        with disk():
            made.save(best=True, validated=True)
        names = {path.name for path in made.checkpoints.folder.iterdir()}
        assert names == {"update-0000002", "index.json"}, f"nothing is left over after step {at}"
        assert run.index() == {"last": "update-0000002", "best": "update-0000002", "recent": ["update-0000002"]}
    assert seen == {("last", 1), ("best", 1), ("last", 2), ("best", 2)}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail] write")])
def test_a_disk_that_fails_at_any_step_is_one_line(error: Exception, tmp_path: Path) -> None:
    """It names the reason and the checkpoint that is left, and what was begun is removed."""
    made = trained(tmp_path / "run", 1)
    with disk():
        made.save(best=True)
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    made.state.progress.update, whole = 2, {file.name for file in last(made).iterdir()}
    with disk() as noted:
        made.save()
    for at in noted.steps():
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "first", tmp_path / "run")
        with disk(error, at), pytest.raises(UserError) as raised:
            made.save()
        text = str(raised.value)
        assert "the checkpoint of update 2 cannot be written" in text
        assert ("No space left" if isinstance(error, OSError) else "enforce fail") in text
        assert str(made.checkpoints.folder / made.checkpoints.run.index()["last"]) in text
        assert {file.name for file in last(made).iterdir()} == whole
        assert not [p for p in made.checkpoints.folder.iterdir() if p.is_dir() and p.name.startswith(".")]


def test_a_first_save_that_fails_reports_that_there_is_none_before(tmp_path: Path) -> None:
    made = trained(tmp_path, 0)
    with disk(OSError(28, "No space left on device"), 3), pytest.raises(UserError, match="there is no earlier checkp"):
        made.save()
    assert not made.checkpoints.run.exists


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    """Each file, then the folder's name, then the index; and only then what is outdated goes."""
    made = trained(tmp_path, 1, training__average="ema")
    with disk():
        made.save(best=True)
    old = last(made)
    made.state.progress.update = 2
    with disk() as noted:
        made.save(best=True)
    events, folder = noted.events, made.checkpoints.folder
    named = events.index(("rename", str(last(made))))
    writes = ("save", "save_file", "write_text", "write_bytes", "replace")
    for file in last(made).iterdir():
        written = str(temporary_path(last(made)) / file.name)
        parts = [(i, name) for i, (name, path) in enumerate(events[:named]) if path == written]
        changed, synced = ([i for i, name in parts if (name == "fsync") == kind] for kind in (False, True))
        assert changed and max(changed) < max(synced), f"{file.name} is written, then synced, then named"
        assert all(name in writes for _, name in parts if name != "fsync")
    turned = events.index(("replace", str(folder / "index.json")))
    assert named < events.index(("fsync", str(folder))) < turned
    assert ("fsync", str(temporary_path(folder / "index.json"))) in events[named:turned]
    assert turned < events.index(("rmtree", str(old)))


@pytest.mark.usefixtures("fast")
def test_batches_of_another_corpus_begin_their_next_epoch(tmp_path: Path) -> None:
    made = trained(tmp_path, 3)
    made.save()
    other = make_trainer(made.state.config, tmp_path, encoded=random_corpus(LENGTHS))
    other.state.read(last(made))
    batches = other.state.batches
    assert (batches.epoch, batches.pool, batches.position) == (made.state.batches.epoch + 1, 0, 0)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_weights_may_be_read_by_whoever_may_read_a_new_file(tmp_path: Path) -> None:
    """A server under another user, or in a container, reads the runs of the one who trained them."""
    (tmp_path / "new").touch()
    write_weights({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
