"""Overrides → the values of one job: Hydra composes the chosen groups, the other overrides are set in a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from seq2seq.cli.commands import COMMANDS
from seq2seq.cli.overrides import Override
from seq2seq.config.loading import build_config, default_choices, not_a_choice
from seq2seq.config.paths import CONFIGS
from seq2seq.config.renamed import RENAMED
from seq2seq.utils.errors import UserError, nearest, reason_of


@contextmanager
def hydra_session(config_dir: str | None = None) -> Iterator[None]:
    """Start Hydra on configs/ and a folder of the user, which everything below requires."""
    from hydra import initialize_config_dir

    if config_dir:
        _search_first(Path(config_dir))
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3", job_name="seq2seq"):
        yield


def _search_first(folder: Path) -> None:
    """Add a folder in front of Hydra's search path, for this and all later sessions of the process."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    if not folder.is_dir():
        raise UserError(f"--config-dir: {folder} is not a folder", code=2)

    class ConfigDir(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.prepend("command-line", f"file://{folder.resolve()}")

    Plugins.instance().register(ConfigDir)


def compose_job(command: str, overrides: list[Override]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of one job, and its unknown choices and keys; values that cannot be composed are empty."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = default_choices(command)
    composed, assigned, problems = [], [], []
    for override in overrides:
        is_choice = override.key_or_group in groups and not override.is_delete()
        if is_choice and (problem := _choice_problem(override)):
            problems.append(problem)
        elif is_choice or override.is_hydra_override() or override.is_add() or override.is_delete():
            composed.append(override.input_line)
        else:
            assigned.append(override)
    try:
        base, known = _compose_groups(command, tuple(composed))
        config = deepcopy(base)
        for override in assigned:
            key = override.get_key_element().removeprefix("++")
            if key in known:
                OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
            else:
                problems.append(_unknown_key(key, [*known, *groups]))
        values: Any = OmegaConf.to_container(config, resolve=True)
        return values, problems
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return {}, [*problems, reason_of(error)]


@cache
def _compose_groups(command: str, texts: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Return a command's config with these groups, and its keys; a sweep over values composes them only once."""
    from hydra import compose
    from omegaconf import OmegaConf

    config = compose(command, list(texts))
    return config, _keys(OmegaConf.to_container(config))


def _keys(tree: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a nested config, groups included."""
    if not isinstance(tree, dict):
        return []
    return [k for key, value in tree.items() for k in (f"{prefix}{key}", *_keys(value, f"{prefix}{key}."))]


def _choice_problem(override: Override) -> str | None:
    from hydra.core.global_hydra import GlobalHydra

    group, choice = override.key_or_group, override.value()
    possible = GlobalHydra.instance().config_loader().get_group_options(group)
    if isinstance(choice, list):
        return f"{group}: {len(choice)} choices given; to try each in turn, add -m"
    return None if choice is None or str(choice) in possible else not_a_choice(group, choice, possible)


def _unknown_key(key: str, known: list[str]) -> str:
    if key in RENAMED:
        return f"{key}: this key is now {RENAMED[key]}"
    return f"{key}: no such key{nearest(key, known)}"


def check_job(command: str, overrides: list[Override]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of one job, and all its problems: choices and keys first, then types and contradictions."""
    values, problems = compose_job(command, overrides)
    if values:
        try:
            typed_config(command, values)
        except UserError as error:
            problems += error.problems
    return values, problems


def typed_config(command: str, values: dict[str, Any]) -> Any:
    return build_config(COMMANDS[command], values)
