"""Commands that measure a run: the same files and the same lines with any number of processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seq2seq.cli.main import load_config
from tests.helpers.program import Program, files, forks, train

COMMANDS = ("translate", "evaluate", "score", "report", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_runs_a_model_on_a_file_takes_all_cores(command: str) -> None:
    assert load_config(command).processes == "auto"  # type: ignore[attr-defined]


@forks
def test_no_number_depends_on_the_processes(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of evaluate, compare, report and score, translations new each time."""
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_OF_TWO_PARTS", 20)
    monkeypatch.setattr("seq2seq.inference.translator.ROWS_PER_PART", 20)
    monkeypatch.setattr("seq2seq.inference.translator.SCORING_TOKENS", 50)
    for name in ("a", "b"):
        train(program, tmp_path, "transformer", f"name={name}", "training.updates=2", f"seed={ord(name)}")
    source, target = files(tmp_path)[-1].split("[")[1].rstrip("]").split(",")
    measured = []
    for count in (1, 2):
        stored = [path for run in ("a", "b") for path in (tmp_path / "outputs" / run / "evaluation").glob("*")]
        for path in stored:
            path.unlink()
        shown = [
            program(*command.split(), f"processes={count}", "precision=bfloat16")
            for command in ("evaluate a", "compare a b", "report a", f"score run=a source={source} target={target}")
        ]
        assert all(result.returncode == 0 for result in shown), shown
        page = (tmp_path / "outputs" / "a" / "report.html").read_text(encoding="utf-8")
        output = "".join(re.sub(r"speed .*", "", result.stdout) for result in shown)
        measured.append((output, re.sub(r"processes=\d ?", "", page)))
    assert measured[0] == measured[1]


@forks
def test_a_number_of_processes_that_is_none_is_refused(program: Program) -> None:
    for command in COMMANDS:
        result = program(command, "processes=0")
        assert result.returncode == 2 and result.stderr.startswith("error: processes: "), result
