"""Override texts of a command line → Hydra's override objects; a sweep → the overrides of each job."""

from __future__ import annotations

import itertools
import typing
from typing import Any

from seq2seq.cli.commands import COMMANDS
from seq2seq.utils.errors import UserError

FILES = "data=files"
Override = Any  # hydra.core.override_parser.types.Override, imported only when a command runs


def parse_overrides(command: str, texts: list[str], multirun: bool = False) -> list[Override]:
    """Parse override texts; without -m, `key=a,b` is a list, such as the two files of a split."""
    require_closed_lists(texts)
    overrides = _parse(with_files(with_runs(command, texts)))
    if multirun:
        return overrides
    if settings := [o.input_line for o in overrides if o.is_hydra_override()]:
        raise UserError(*(f"{text}: Hydra settings apply only to sweeps; add -m" for text in settings), code=2)
    return [_parse([_as_list(o.input_line)])[0] if o.is_sweep_override() else o for o in overrides]


def expand_sweep(overrides: list[Override]) -> list[list[Override]]:
    """Expand a sweep into its jobs, each a list of plain overrides; the last of several equal keys counts."""
    values: dict[str, list[Override]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [override]
        elif override.is_discrete_sweep():
            values[key] = _parse([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise UserError(f"{override.input_line}: interval sweeps are not supported; write {key}=A,B", code=2)
    return [list(job) for job in itertools.product(*values.values())]


def _parse(texts: list[str]) -> list[Override]:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed, problems = [], []
    for text in texts:
        named = text.partition("=")[0].strip("+~ ")
        for attempt in (text, *([_quoted(text)] if "=" in text else [])) if named else ():
            try:
                parsed += parser.parse_overrides([attempt])
                break
            except HydraException:
                continue
        else:
            problems.append(f"{text}: cannot be parsed; write key=value, as in training.updates=500")
    if problems:
        raise UserError(*problems, code=2)
    return parsed


def require_closed_lists(texts: list[str]) -> None:
    """Refuse a list that a space has cut into several arguments."""
    for i, text in enumerate(texts):
        if text.partition("=")[2].startswith("[") and "]" not in text:
            end = next((j for j in range(i + 1, len(texts)) if "]" in texts[j]), i)
            whole = " ".join(texts[i : end + 1]) + ("" if end > i else "]")
            raise UserError(f"{text}: the list is not closed; quote it if it has spaces: '{whole}'", code=2)


def with_runs(command: str, texts: list[str]) -> list[str]:
    """Convert bare words to run names: `compare a b` means run=[a,b]."""
    names = [text for text in texts if "=" not in text and not text.startswith("~")]
    hints = typing.get_type_hints(COMMANDS[command])
    if not names or "run" not in hints:
        return texts
    several = len(names) > 1 or hints["run"] == list[str] | None
    return [
        *(text for text in texts if text not in names),
        f"run=[{','.join(names)}]" if several else f"run={names[0]}",
    ]


def given_keys(texts: list[str], on_files: bool) -> list[str]:
    """Return the keys of overrides; where a run is `on_files` already, naming others does not choose data=files."""
    named = [text for text in texts if text != FILES]
    if on_files and with_files(named) != named:
        texts = named
    return [text.partition("=")[0].strip("+~ ") for text in texts]


def with_files(texts: list[str]) -> list[str]:
    """Select data=files for named training files, which must not get the default corpus's validation pairs."""
    names = any(text.startswith("data.train=") and set(text.partition("=")[2]) & set("[,./") for text in texts)
    chosen = any(text.startswith(("data=", "data.path=", "experiment=")) for text in texts)
    return [FILES, *texts] if names and not chosen else texts


def _quoted(text: str) -> str:
    """Quote values: Hydra accepts other alphabets, spaces and symbols only inside quotes."""
    key, _, value = text.partition("=")
    parts = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
    inside = ",".join('"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' for part in parts)
    return f"{key}=[{inside}]" if len(parts) > 1 or value.startswith("[") else f"{key}={inside}"


def _as_list(text: str) -> str:
    key, _, value = text.partition("=")
    return f"{key}=[{value}]"
