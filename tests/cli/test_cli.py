"""Laws of the command line: instant help, helpful errors, each default defined once."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import hydra
import pytest
from omegaconf import OmegaConf

from seq2seq.cli.commands import COMMANDS
from seq2seq.cli.compose import _compose_groups, compose_job, hydra_session
from seq2seq.cli.help import command_help, examples, overview
from seq2seq.cli.jobs import call
from seq2seq.cli.main import load_config
from seq2seq.cli.overrides import parse_overrides
from seq2seq.cli.sweep import check_sweep
from seq2seq.config.loading import build_config, search_preset
from seq2seq.config.paths import CONFIGS, choices
from seq2seq.config.schema import Precision
from seq2seq.inference.checkpoint import write_config
from seq2seq.utils.errors import UserError, nearest
from tests.helpers.program import Program
from tests.helpers.runs import empty_run


def refused(program: Program, *arguments: str) -> list[str]:
    """The error lines of a command line that must be refused before anything happens."""
    result = program(*arguments)
    assert result.returncode == 2 and result.stdout == "", result
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_the_comment_of_a_precision_names_every_one(command: str) -> None:
    """In the file that explains the keys of a command, if it has this key."""
    text = (CONFIGS / f"{command}.yaml").read_text(encoding="utf-8")
    comments = re.findall(r"^precision: .*# (.*)$", text, re.MULTILINE)
    assert bool(comments) == any(field.name == "precision" for field in dataclasses.fields(load_config(command)))
    assert all(set(get_args(Precision)) <= set(re.findall(r"\w+", comment)) for comment in comments)


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from seq2seq.cli.main import main; sys.argv[1:] = sys.argv[1:]; main(); "
        "print('HEAVY', *sorted({'torch', 'datasets', 'sacrebleu', 'hydra', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "HEAVY"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_groups_choices_keys_and_five_examples(command: str) -> None:
    text = command_help(command, [])
    head = text.splitlines()[0]
    assert (CONFIGS / f"{command}.yaml").read_text(encoding="utf-8").startswith(f"# {head}.\n")
    assert head.partition(": ")[2] in overview()
    config = load_config(command)
    for field in dataclasses.fields(config):
        assert f" {field.name}" in text, field.name
    for group in (f.name for f in dataclasses.fields(config) if (CONFIGS / f.name).is_dir()):
        assert ", ".join(choices(group)) in text
    examples = text.partition("Examples\n")[2].partition("\nMore")[0].split("\n  ")
    assert sum("seq2seq" in example for example in examples) == 5


def test_help_explains_every_key_of_every_choice() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# "), f"{path} says in its first line what it is"
    text = command_help("train", ["model=transformer", "training"])
    assert "width: 256" in text and "# of embeddings" in text and "validate_every" in text
    with pytest.raises(UserError, match="did you mean lstm"):
        command_help("train", ["model=lstn"])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_is_a_valid_command_line(command: str) -> None:
    for line in examples(command):
        words = line.split("  ")[0].partition(f"seq2seq {command}")[2].split()
        words = words[: next((i for i, word in enumerate(words) if word in "<>|"), None)]
        texts = [word for word in words if word != "-m"]
        with hydra_session():
            check_sweep(command, parse_overrides(command, texts, multirun="-m" in words))


# ------------------------------------------------------------------------------------------- configs


def every_choice() -> list[str]:
    return [f"{group.name}={choice}" for group in CONFIGS.iterdir() if group.is_dir() for choice in choices(group.name)]


@pytest.mark.parametrize("choice", every_choice())
def test_every_config_composes(choice: str) -> None:
    files = ["data.train=[a,b]"] if choice in ("data=files", "data=flores") else []
    load_config("train", choice, *files)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_is_in_yaml(command: str) -> None:
    """Typed objects have no defaults of their own: a config without any one value is refused under its key."""
    plain = dataclasses.asdict(load_config(command))
    for name in plain:
        with pytest.raises(UserError, match=f"{name}: missing"):
            build_config(COMMANDS[command], {k: v for k, v in plain.items() if k != name})


def test_presets_are_the_same_in_python_and_on_the_command_line() -> None:
    assert search_preset("beam") == load_config("evaluate").search
    assert search_preset("greedy") == load_config("train").search


@pytest.mark.parametrize("given", ["[a.en,a.de]", "a.en,a.de", "c.tsv", "dir/c.jsonl.gz"])
def test_naming_training_files_replaces_the_default_corpus(given: str) -> None:
    data = load_config("train", f"data.train={given}").data
    assert (data.path, data.validation, data.test) == (None, None, None)
    assert data.train == (["a.en", "a.de"] if "," in given else given)


def test_the_resolved_config_is_printed(program: Program) -> None:
    result = program("train", "model=lstm", "name=${data.name}-x", "--cfg", "job")
    assert result.returncode == 0
    assert "name: toy-x" in result.stdout and "family: lstm" in result.stdout and "${" not in result.stdout


def test_a_config_folder_of_the_user_adds_choices(program: Program, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "small.yaml").write_text("defaults: [lstm, _self_]\nwidth: 48\nname: small\n")
    result = program("train", "--config-dir", "mine", "model=small", "--cfg", "job")
    assert result.returncode == 0 and "width: 48" in result.stdout
    assert "possible: lstm, lstm_large, small" in refused(program, "train", "--config-dir", "mine", "model=smal")[0]
    assert refused(program, "train", "--config-dir", "nowhere") == ["--config-dir: nowhere is not a folder"]


# -------------------------------------------------------------------------------------------- errors


def test_all_problems_are_reported_at_once(program: Program, tmp_path: Path) -> None:
    lines = refused(program, "train", "modle=lstm", "model=lstn", "training.udpates=5", "model.width=abc", "seed=-1")
    assert len(lines) == 5
    output = "\n".join(lines)
    assert "modle: no such key; did you mean model?" in output
    assert "model: 'lstn' is not a choice; possible: lstm, " in output and "did you mean lstm?" in output
    assert "training.udpates: no such key; did you mean training.updates?" in output
    assert "model.width: 'abc' is not a whole number" in output
    assert "seed: -1 is out of range; it must be between 0 and" in output
    assert not list(tmp_path.iterdir()), "nothing was written"


CONTRADICTIONS = {
    "model.attention.heads: 3 does not divide the width 256": ["model.attention.heads=3"],
    "rotary positions rotate pairs": ["model.position=rotary", "model.width=36", "model.attention.heads=12"],
    "model.heads: no such key; did you mean model.attention.heads?": ["model.heads=3"],
    "model.tie_embeddings: 'all' shares one embedding table": ["tokenizer.joint=false"],
    "model.max_length: 20 learned positions are too few": ["model.position=learned", "model.max_length=20"],
    "data.target: en is also the source": ["data.source=en", "data.target=en"],
    "search.n_best: 3 exceeds beam=1": ["search.n_best=3"],
    "optimizer.betas: [0.9] must be two numbers": ["optimizer.betas=[0.9]"],
    "model.dropout: 1.5 is out of range; it must be between 0 and 0.999": ["model.dropout=1.5"],
    "model.kernel_size: 4 is even": ["model=lstm", "model.kernel_size=4"],
    "data.train: no training data; give two files": ["data=files"],
    "model: 2 choices given; to try each in turn, add -m": ["model=lstm,transformer"],
    "seed: [1, 2] is not a whole number; to try several values in turn, add -m": ["seed=1,2"],
    "the list is not closed; quote it if it has spaces: 'data.train=[a.en, a.de]'": ["data.train=[a.en,", "a.de]"],
    "search.forbid=[a: the list is not closed": ["search.forbid=[a"],
    "did you mean model.norm_position?": ["model.norm_positon=pre"],
    "'blue' is not a choice; possible: bleu, chrf, loss; did you mean bleu?": ["training.monitor=blue"],
}  # fmt: skip


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_name_key_value_and_remedy(message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("train", *CONTRADICTIONS[message])
    assert message in str(error.value) and error.value.code == 2


def test_every_job_of_a_sweep_is_checked_before_the_first_starts(program: Program) -> None:
    lines = refused(program, "train", "-m", "model=lstm,transformr", "model.width=256,x", "seed=1,2")
    assert len(lines) == 2 and "transformr" in lines[1] and "'x' is not a whole number" in lines[0]


def test_unknown_commands_flags_and_devices_are_named(program: Program) -> None:
    commands = ", ".join(COMMANDS)
    assert refused(program, "trian") == [f"trian: no such command; possible: {commands}; did you mean train?"]
    assert refused(program, "train", "--fast")[0].startswith("unrecognized arguments: --fast")
    assert "cuda:99 is unavailable; this machine has cpu" in refused(program, "train", "device=cuda:99")[0]


def test_missing_runs_and_files_are_named(program: Program, tmp_path: Path) -> None:
    for command in ("evaluate", "translate"):
        result = program(command, "run=nothing", input="x\n")
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr == "error: run: no run nothing in outputs; train one with seq2seq train\n"
    (tmp_path / "text.en").write_text("x\n", encoding="utf-8")
    assert "it is a file: write input=FILE" in program("translate", "text.en", input="x\n").stderr
    missing: list[Any] = ["data=files", "data.train=[no.en,no.de]", "data.validation=[no.en,no.de]"]
    result = program("train", *missing)
    assert (result.returncode, result.stderr) == (1, "error: no.en: cannot be read (No such file or directory)\n")
    assert not (tmp_path / "outputs").exists(), "a run that could not start leaves nothing behind"


@pytest.mark.parametrize(
    "word,hint",
    [("lstn", "; did you mean lstm?"), ("heads", "; did you mean attention.heads?"), ("zzz", "")],
)
def test_the_nearest_spelling_is_suggested(word: str, hint: str) -> None:
    assert nearest(word, ["lstm", "attention.heads", "width"]) == hint


# -------------------------------------------------------------------------------------------- Hydra


def test_each_job_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a sweep composes its groups once for each choice, however many values it tries."""
    composed: list[list[str]] = []
    compose = hydra.compose

    def noted(name: str, texts: list[str]) -> Any:
        composed.append(texts)
        return compose(name, texts)

    monkeypatch.setattr("hydra.compose", noted)
    _compose_groups.cache_clear()
    load_config("train", "model=lstm", "seed=3")
    assert composed == [["model=lstm"]]
    with hydra_session():
        check_sweep("train", parse_overrides("train", ["model=lstm,transformer", "seed=1,2,3"], multirun=True))
    assert composed == [["model=lstm"], ["model=transformer"]]


def test_hydra_composes_the_same_values() -> None:
    """Values are set in the composed groups as Hydra sets them, whatever their type."""
    texts = ["model=lstm", "seed=3", "name=${data.name}-${seed}", "data.train=[a.en,a.de]", "init_from=null"]
    texts += ["model.attention={heads: 2, dropout: 0.5}", "data.extra=[{train: x}]", "++training.updates=7"]
    with hydra_session():
        expected = OmegaConf.to_container(hydra.compose("train", ["data=files", *texts]), resolve=True)
        assert compose_job("train", parse_overrides("train", texts)) == (expected, [])


def test_a_choice_of_the_user_overrides_the_built_in_one(program: Program, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "lstm_large.yaml").write_text("defaults: [lstm, _self_]\nwidth: 48\nname: small\n")
    result = program("train", "--config-dir", "mine", "model=lstm_large", "--cfg", "job")
    assert result.returncode == 0 and "width: 48" in result.stdout, result.stderr


def test_an_override_that_contradicts_a_stored_value_is_named(tmp_path: Path) -> None:
    """The problems are those of one command line with both values; only a stored config at fault is called damaged."""
    both = ["training.r_drop=1", "training.simcut=1"]
    with pytest.raises(UserError) as contradiction:
        load_config("train", *both)
    run = empty_run(tmp_path / "mine", last="update-0000001")
    path = run.checkpoint("last") / "config.yaml"
    for stored, given in (both, both[::-1]):
        write_config(load_config("train", f"outputs={tmp_path}", "name=mine", stored), path)
        with pytest.raises(UserError) as error:
            call("train", f"outputs={tmp_path}", "name=mine", given)
        *problems, advice = error.value.problems
        assert tuple(problems) == contradiction.value.problems and str(run.folder) in advice
    path.write_text(path.read_text(encoding="utf-8").replace("simcut: 1", "simcut: high"), encoding="utf-8")
    with pytest.raises(UserError, match="mine: its stored config is missing or damaged"):
        call("train", f"outputs={tmp_path}", "name=mine", "training.updates=5")


@pytest.mark.parametrize("given", [["data.train=[b.en,b.de]"], ["data=files", "data.train=[b.en,b.de]"]])
def test_a_resumed_run_on_other_files_keeps_its_other_settings_of_data(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held out among them; a run that was not on files takes all of data=files, as a new one does."""
    monkeypatch.setattr("seq2seq.cli.commands.train.train", lambda config: config)
    run = empty_run(tmp_path / "mine", last="update-0000001")
    kept = ["data.held_out=7", "data.max_length=100", "data.validation=[v.en,v.de]", "data.name=own"]
    for stored, expected in (
        (["data.train=[a.en,a.de]", *kept], [*given, *kept]),
        (["data=toy", "data.held_out=7"], given),
    ):
        named = [f"outputs={tmp_path}", "name=mine"]
        write_config(load_config("train", *named, *stored), run.checkpoint("last") / "config.yaml")
        assert call("train", *named, *given).data == load_config("train", *expected).data


@pytest.mark.parametrize(
    ("texts", "multirun", "message"),
    [
        (["hydra.verbose=true"], False, "hydra.verbose=true: Hydra settings apply only to sweeps; add -m"),
        (["seed=interval(1,2)"], True, "seed=interval(1,2): interval sweeps are not supported; write seed=A,B"),
        (["seed@x=1"], False, "seed@x: no such key; did you mean seed?"),
        (["=3"], False, "=3: cannot be parsed; write key=value, as in training.updates=500"),
        (
            ["model.attention={hedas: 3}"],
            False,
            "model.attention.hedas: no such key; did you mean model.attention.heads?",
        ),
    ],
)
def test_overrides_without_effect_are_refused(texts: list[str], multirun: bool, message: str) -> None:
    with pytest.raises(UserError) as error, hydra_session():
        check_sweep("train", parse_overrides("train", texts, multirun=multirun))
    assert error.value.problems == (message,)
