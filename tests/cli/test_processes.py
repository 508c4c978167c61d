"""Commands that measure a run: the same files and the same lines with any number of processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from seq2seq.cli.main import load_config
from seq2seq.inference.translator import Translator
from tests.helpers.program import Program, files, forks, train
from tests.helpers.runs import saved_run

COMMANDS = ("translate", "evaluate", "score", "report", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_runs_a_model_on_a_file_takes_all_cores(command: str) -> None:
    assert load_config(command).processes == "auto"


@forks
def test_no_number_depends_on_the_processes(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of evaluate, compare, report and score, translations new each time."""
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_OF_TWO_PARTS", 20)
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_PER_PART", 20)
    monkeypatch.setattr("seq2seq.inference.translator.SCORING_TOKENS", 50)
    monkeypatch.setattr("seq2seq.cli.commands.report.RESAMPLES", 2)
    train(program, tmp_path, "transformer", "name=a", "training.updates=2")
    shutil.copytree(tmp_path / "outputs" / "a", tmp_path / "outputs" / "b")
    source, target = files(tmp_path)[-1].split("[")[1].rstrip("]").split(",")
    measured = []
    for count in (1, 2):
        stored = [path for run in ("a", "b") for path in (tmp_path / "outputs" / run / "evaluation").glob("*")]
        for path in stored:
            path.unlink()
        shown = [
            program(*command.split(), f"processes={count}", "precision=bfloat16")
            for command in (
                "evaluate a resamples=0",
                "compare a b metrics=[bleu]",
                "report a sentences=2",
                f"score run=a source={source} target={target}",
            )
        ]
        assert all(result.returncode == 0 for result in shown), shown
        page = (tmp_path / "outputs" / "a" / "report.html").read_text(encoding="utf-8")
        output = "".join(re.sub(r"speed .*", "", result.stdout) for result in shown)
        measured.append((output, re.sub(r"processes=\d ?", "", page)))
    assert measured[0] == measured[1]


@forks
def test_a_killed_worker_ends_the_command_with_one_line(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out; nothing is written."""
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_OF_TWO_PARTS", 20)
    run = saved_run(tmp_path / "outputs" / "any", "transformer")
    source = tmp_path / "a.txt"
    source.write_text("a cow\n" * 40, encoding="utf-8")
    before = sorted(run.folder.rglob("*"))
    monkeypatch.setattr(Translator, "_encode_sources", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    result = program("evaluate", "any", f"source={source}", f"reference={source}", "processes=2")
    assert result.returncode == 1 and result.stderr.startswith("error: a worker process died"), result
    assert len(result.stderr.splitlines()) == 1 and sorted(run.folder.rglob("*")) == before


@forks
def test_a_number_of_processes_that_is_none_is_refused(program: Program) -> None:
    for command in COMMANDS:
        result = program(command, "processes=0")
        assert result.returncode == 2 and result.stderr.startswith("error: processes: "), result
