"""One job: checked values, merged with the stored ones when a run is resumed → one call of the command."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from seq2seq.cli.compose import check_job, hydra_session, typed_config
from seq2seq.cli.overrides import given_keys, parse_overrides
from seq2seq.config.loading import flatten, with_defaults
from seq2seq.utils.errors import UserError, reason_of


def call(command: str, *texts: str, config_dir: str | None = None) -> Any:
    """Run a command with command-line overrides, and return its result."""
    return run_job(command, *_checked(command, texts, config_dir))


def load_config(command: str, *texts: str) -> Any:
    """Return the typed config of a command line."""
    values, _ = _checked(command, texts)
    return typed_config(command, values)


def _checked(command: str, texts: Iterable[str], config_dir: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a command line and its overrides; all its problems are raised together."""
    with hydra_session(config_dir):
        overrides = parse_overrides(command, list(texts))
        values, problems = check_job(command, overrides)
    if problems:
        raise UserError(*problems, code=2)
    return values, [override.input_line for override in overrides]


def run_job(command: str, values: dict[str, Any], overrides: list[str]) -> Any:
    """Run a command on composed values; a run that exists is resumed under its stored config."""
    if command == "train":
        values = resumed_values(values, overrides)
    module = importlib.import_module(f"seq2seq.cli.commands.{command}")
    return getattr(module, command)(typed_config(command, values))


def resumed_values(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return the values of a resumed run: the stored ones, where new overrides take precedence."""
    from seq2seq.inference.checkpoint import read_plain_config
    from seq2seq.utils.run import Run

    run = Run(Path(values["outputs"]) / values["name"])
    if values["overwrite"] or not run.exists:
        return values
    try:
        stored = with_defaults(read_plain_config(run.checkpoint("last") / "config.yaml"))
        given = given_keys(overrides, on_files=stored["data"]["path"] is None)
        if "experiment" in given:
            return with_settled_values(values, stored, given)
        merged = deepcopy(stored)
        for key in [*given, "name", "outputs", "overwrite"]:
            _copy_value(key, values, merged)
        if problems := _problems(merged):
            typed_config("train", stored)  # raises if the stored values alone are at fault
    except (OSError, ValueError, TypeError, LookupError, AttributeError, UserError) as error:
        reason = reason_of(error)
        raise UserError(f"{run.folder}: its stored config is missing or damaged ({reason})") from None
    if problems:
        advice = f"{run.folder} resumes under its stored config: override both keys, or choose another name=…"
        raise UserError(*problems, advice, code=2)
    return merged


def with_settled_values(values: dict[str, Any], stored: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """Return the config of a recipe, which replaces the stored one but for what training chose: "auto", languages."""
    merged = deepcopy(values)
    for key, value in flatten(values).items():
        is_open = value == "auto" or (value is None and key in ("data.source", "data.target"))
        if is_open and key not in given:
            _copy_value(key, stored, merged)
    return merged


def _problems(values: dict[str, Any]) -> tuple[str, ...]:
    try:
        typed_config("train", values)
    except UserError as error:
        return error.problems
    return ()


def _copy_value(key: str, source: dict[str, Any], target: dict[str, Any]) -> None:
    *groups, name = key.split(".")
    for group in groups:
        source, target = source[group], target[group]
    if source[name] is not None or name in target:  # the other family has no such key
        target[name] = source[name]
