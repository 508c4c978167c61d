"""Laws of a run's folder: its checkpoints, its metrics, what is written into it, and how it is found."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path

import pytest

from seq2seq.utils import io
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import write_atomically
from seq2seq.utils.run import INDEX, Run
from tests.helpers.runs import empty_run

# ------------------------------------------------------------------------------------------- checkpoints


def test_the_index_names_the_last_and_the_best_checkpoint(tmp_path: Path) -> None:
    """Not the newest folder; without a best one the last is taken."""
    names = ["update-0000002", "update-0000010", "update-0000003"]
    run = empty_run(tmp_path / "a", names, last=names[1], best=names[2])
    assert run.exists and run.index() == {"last": names[1], "best": names[2]}
    assert [run.checkpoint(which) for which in ("last", "best")] == [
        run.checkpoints / names[1],
        run.checkpoints / names[2],
    ]
    assert empty_run(tmp_path / "b", names, last=names[0]).checkpoint("best").name == names[0]


@pytest.mark.parametrize("text", [None, "", "{", "5", "null", "[1]"])
def test_without_a_readable_index_the_newest_checkpoint_is_the_last(text: str | None, tmp_path: Path) -> None:
    """By its number; half-made folders of other names do not count, and without any there is no run."""
    run = empty_run(tmp_path, ["update-0000009", "update-0000010", "zz", ".update-0000099"])
    if text is not None:
        (run.checkpoints / INDEX).write_text(text)
    assert run.index() == {"last": "update-0000010"} and run.exists
    assert run.checkpoint("best") == run.checkpoint("last") == run.checkpoints / "update-0000010"
    empty = Run(tmp_path / "none")
    assert not empty.exists and empty.index() == {}
    with pytest.raises(UserError, match="no checkpoint yet"):
        empty.checkpoint("best")


def test_a_checkpoint_is_found_by_its_path_or_by_its_name_in_the_run(tmp_path: Path) -> None:
    """Only where it holds a config."""
    run = empty_run(tmp_path / "run", ["update-0000001", "update-0000002"], last="update-0000002")
    other = empty_run(tmp_path / "other").checkpoints / "update-0000001"
    assert run.checkpoint(str(other)) == other
    assert run.checkpoint("update-0000001") == run.checkpoints / "update-0000001"
    for wrong in ("update-0000003", str(tmp_path), "Best"):
        with pytest.raises(UserError, match=f"checkpoint: {wrong} is not a checkpoint"):
            run.checkpoint(wrong)


# ------------------------------------------------------------------------------------------- metrics


def metrics_of(run: Run) -> list[int]:
    return [json.loads(line)["update"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("update", [0, 1, 2, 5, 9])
def test_metrics_of_later_updates_and_half_a_line_are_forgotten(update: int, tmp_path: Path) -> None:
    """Those of the update itself stay, in their order and to the byte, whatever comes between."""
    run = Run(tmp_path)
    run.drop_metrics_after(update)
    assert not run.metrics.exists(), "without metrics nothing is written"
    lines = [json.dumps({"kind": kind, "update": u, "text": "ä\u2028"}, ensure_ascii=u > 2) + "\n"
             for u, kind in itertools.product((1, 2, 3, 5, 2, 9), ("training", "validation"))]  # fmt: skip
    for rest in ("", '{"kind": "x", "update": 0', '{"kind": "x", "update": 0}'):
        run.metrics.write_text("".join(line for line in lines if "\u2028" not in line) + rest, encoding="utf-8")
        run.drop_metrics_after(update)
        kept = [line for line in lines if "\u2028" not in line and json.loads(line)["update"] <= update]
        assert run.metrics.read_text(encoding="utf-8") == "".join(kept), rest


# ------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("fails", ["write_bytes", "fsync_file", "replace"])
def test_a_file_that_was_not_written_whole_keeps_its_old_text(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a process ends on the way; the next attempt is not hindered by what is left."""
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(io if fails == "fsync_file" else Path, fails, broken)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "newer ä\n")
    assert path.read_bytes() == "newer ä\n".encode() and os.listdir(tmp_path) == ["a.json"]


def test_hidden_files_and_folders_of_the_user_stay(tmp_path: Path) -> None:
    """Such as .profile beside profile, and .git beside git."""
    (tmp_path / ".profile").write_text("mine")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text("mine")
    write_atomically(tmp_path / "profile", "new")
    with io.folder_written_atomically(tmp_path / "git") as tmp_dir:
        (tmp_dir / "file").write_text("new")
    assert (tmp_path / ".profile").read_text() == (tmp_path / ".git/HEAD").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [".git", ".profile", "git", "profile"]


def test_a_file_to_read_may_be_a_pipe_but_no_folder(tmp_path: Path) -> None:
    for name, reason in (("none", "does not exist"), ("folder", "is a folder; give a file")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"^input: .*/{name} {reason}"):
            io.require_file("input", str(tmp_path / name))
    os.mkfifo(tmp_path / "pipe")
    io.require_file("input", str(tmp_path / "pipe"))


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file that was to be written, not by its temporary name."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(io, "fsync_file", full)
    with pytest.raises(OSError) as raised:
        write_atomically(tmp_path / "a.json", "text")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "a.json"))
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves the old text or the new one: first all bytes, then the name."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append("bytes") or fsync(file))  # type: ignore[func-returns-value]

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"{path.read_text()} → {target.name}")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(tmp_path / "a", "text")
    assert steps == ["bytes", "text → a"]


def test_a_result_is_readable_text(tmp_path: Path) -> None:
    """JSON with letters as they are and a line feed at the end."""
    run = Run(tmp_path)
    run.write_result({"größe": 1.5, "none": None})
    text = run.result.read_text(encoding="utf-8")
    assert json.loads(text) == {"größe": 1.5, "none": None} and "größe" in text and text.endswith("}\n")


def test_clearing_removes_what_a_run_made_and_nothing_else(tmp_path: Path) -> None:
    """Folders with all in them, files where they are, and other files of the user stay."""
    run = empty_run(tmp_path / "run", last="update-0000001")
    made = {
        run.config,
        run.log,
        run.metrics,
        run.result,
        run.environment,
        run.checkpoints,
        run.tensorboard,
        run.evaluation,
    }
    assert {path.parent for path in made} == {run.folder}
    for folder in (run.tensorboard, run.evaluation):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").touch()
    own = [run.folder / "notes.txt", run.folder / "config.yaml.bak", run.folder / "export" / "model.bin"]
    own[2].parent.mkdir()
    for path in (run.config, run.log, run.metrics, run.result, run.environment, *own):
        path.touch()
    assert {path for path in run.folder.iterdir()} >= made
    for _ in range(2):
        run.clear()
        assert {path for path in run.folder.rglob("*") if path.is_file()} == set(own)
        assert not run.exists and not any(path.exists() for path in made)


# ------------------------------------------------------------------------------------------- finding


def test_runs_are_found_by_name_folder_or_as_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is the one saved last, wherever it lies below the folder of outputs and whatever its name."""
    outputs = tmp_path / "outputs"
    runs = {name: empty_run(outputs / name, last="update-0000001") for name in ("c", "a", "deep/b")}
    for time, name in enumerate(("deep/b", "c", "a")):
        os.utime(runs[name].checkpoints / INDEX, (1000 + time, 1000 + time))
    found = [run.folder for run in Run.all(str(outputs))]
    assert found == [outputs / "deep" / "b", outputs / "c", outputs / "a"]
    assert Run.find(None, str(outputs)).folder == outputs / "a"
    os.utime(runs["c"].checkpoints / INDEX, (2000, 2000))
    assert Run.find(None, str(outputs)).folder == outputs / "c"
    assert Run.find("deep/b", str(outputs)).folder == outputs / "deep" / "b"
    elsewhere = empty_run(tmp_path / "elsewhere", last="update-0000001")
    monkeypatch.chdir(tmp_path)
    assert Run.find("elsewhere", "outputs").folder == Path("elsewhere")
    assert Run.find(str(elsewhere.folder), "outputs").folder == elsewhere.folder
    empty_run(tmp_path / "a", last="update-0000001")
    assert Run.find("a", "outputs").folder == Path("outputs") / "a", "a name goes before a folder"
    with pytest.raises(UserError, match=r"run: no run x in outputs; possible: c, a, deep/b"):
        Run.find("x", "outputs")
    with pytest.raises(UserError, match=r"no run x in .*nothing; train one with seq2seq train"):
        Run.find("x", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no runs found"):
        Run.find(None, str(tmp_path / "nothing"))


def test_a_run_that_has_only_begun_is_named_and_many_runs_are_shortened(tmp_path: Path) -> None:
    """The ten newest are enough to remember a name by."""
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").touch()
    with pytest.raises(UserError, match="begun has no checkpoint yet"):
        Run.find("begun", str(tmp_path))
    for count in (10, 11):
        for i in range(count):
            run = empty_run(tmp_path / f"run{i:02}", last="update-0000001")
            os.utime(run.checkpoints / INDEX, (1000 + i, 1000 + i))
        with pytest.raises(UserError) as error:
            Run.find("zzzzzz", str(tmp_path))
        names = str(error.value).partition("possible: ")[2].split(", ")
        assert names[:10] == [f"run{i:02}" for i in range(count - 1, count - 11, -1)]
        assert len(names) == 10 + (count > 10) and names[10:] == (["…"] if count > 10 else [])
