"""Typed config objects from plain values; errors of type, range and contradiction are reported together."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

from seq2seq.config.paths import CONFIGS
from seq2seq.config.renamed import RENAMED
from seq2seq.config.schema import SearchConfig, comma_separated
from seq2seq.utils.errors import UserError, nearest

T = TypeVar("T")
SELF = "_self_"  # Hydra's name for the file itself in its list of defaults


def build_config(cls: type[T], values: dict[str, Any]) -> T:
    """Return plain values as one checked object, or raise a UserError that lists every problem."""
    problems: list[str] = []
    result = _build(cls, values, "", problems)
    if problems:
        raise UserError(*problems, code=2)
    return typing.cast(T, result)


def search_preset(choice: str) -> SearchConfig:
    """Load `configs/search/<choice>.yaml`, for translating from Python."""
    return build_config(SearchConfig, _preset(f"search/{choice}"))


def default_choices(command: str) -> dict[str, str | None]:
    """Return the config groups of a command with their default choices, from the head of its YAML file."""
    entries = _read_yaml(command).get("defaults", [])
    return {group: choice for entry in entries if entry != SELF for group, choice in entry.items()}


def base_choices(preset: str) -> list[str]:
    """Return the choices that a preset such as "model/lstm_large" extends."""
    return [entry for entry in _read_yaml(preset).get("defaults", []) if isinstance(entry, str) and entry != SELF]


@cache
def _read_yaml(name: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")))


def _preset(name: str) -> dict[str, Any]:
    """Read a file of configs/, merged into the choices that it extends."""
    values = {key: value for key, value in _read_yaml(name).items() if key != "defaults"}
    for base in base_choices(name):
        values = _merge(_preset(f"{name.partition('/')[0]}/{base}"), values)
    return values


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of configs/ for keys that are newer than a stored train config."""
    stored = rename_old_keys(stored)
    choices = default_choices("train")
    choices["model"] = stored.get("model", {}).get("family", choices["model"])
    groups = {group: _preset(f"{group}/{choice}") for group, choice in choices.items() if choice}
    return deepcopy(_merge({**_preset("train"), **groups}, stored))


def _merge(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(merged[key], dict):
            merged[key] = _merge(default, merged[key])
    return merged


def to_dict(config: Any) -> dict[str, Any]:
    """Return the values of a config object, as written to config.yaml."""
    return dataclasses.asdict(config)


def not_a_choice(key: str, value: Any, possible: Iterable[str]) -> str:
    """Return the error for a value that is none of the possible ones."""
    return f"{key}: {value!r} is not a choice; possible: {comma_separated(possible)}{nearest(str(value), possible)}"


def _build(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Convert one value to its field's type; add what does not fit to `problems`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value == "???":
        problems.append(f"{key}: required; set {key}=…")
    elif dataclasses.is_dataclass(hint):
        return _build_dataclass(typing.cast(type, hint), value, key, problems)
    elif origin is Annotated:
        number = _build(arguments[0], value, key, problems)
        if number is not None and number not in arguments[1]:
            problems.append(f"{key}: {value} is out of range; it must be {arguments[1]}")
        return number
    elif origin is Literal:
        if value in arguments:
            return value
        problems.append(not_a_choice(key, value, arguments))
    elif origin in (Union, types.UnionType):
        return _build_union(arguments, value, key, problems)
    elif origin is list:
        if isinstance(value, dict) or value is None:
            problems.append(f"{key}: {value!r} is not a list; write {key}=[a,b]")
            return None
        values = value if isinstance(value, list) else [value]  # one value is a list of one
        return [_build(arguments[0], part, f"{key}[{i}]", problems) for i, part in enumerate(values)]
    else:
        return _build_scalar(hint, value, key, problems)
    return None


def _build_union(choices: tuple[Any, ...], value: Any, key: str, problems: list[str]) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    if len(choices) == 1:
        return _build(choices[0], value, key, problems)
    if all(dataclasses.is_dataclass(choice) for choice in choices):
        by_family = {typing.get_args(_hints(c)["family"])[0]: c for c in choices}
        family = value.get("family") if isinstance(value, dict) else value
        if family in by_family:
            return _build_dataclass(by_family[family], value, key, problems)
        problems.append(not_a_choice(f"{key}.family", family, by_family))
        return None
    words = [word for choice in choices if typing.get_origin(choice) is Literal for word in typing.get_args(choice)]
    if value in words:
        return value
    wants_list = [choice for choice in choices if typing.get_origin(choice) is list]
    hint = wants_list[0] if isinstance(value, list) and wants_list else choices[0]
    before = len(problems)
    result = _build(hint, value, key, problems)
    if words and typing.get_origin(hint) is not Literal and len(problems) > before:
        problems[-1] += f"; also possible: {comma_separated(words)}"
    return result


def _build_dataclass(cls: type, values: Any, key: str, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{key}: expected a mapping, got {values!r}")
        return None
    hints = _hints(cls)
    prefix = f"{key}." if key else ""
    before = len(problems)
    optional = {field.name for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}
    for name in values:
        if name not in hints:
            problems.append(f"{prefix}{name}: no such key{nearest(prefix + name, (prefix + h for h in hints))}")
    fields = {}
    for name, hint in hints.items():
        if name in values:
            fields[name] = _build(hint, values[name], prefix + name, problems)
        elif name not in optional:
            problems.append(f"{prefix}{name}: missing; configs/ gives its default")
    if len(problems) > before:
        return None
    result = cls(**fields)
    if hasattr(result, "problems"):
        problems.extend(f"{prefix}{name}: {problem}" for name, problem in result.problems())
    return result


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _build_scalar(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        return _as_float(value)
    if hint is int and number and value % 1 == 0:
        return int(value)
    if hint is str and (isinstance(value, str) or number):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    sweep = "; to try several values in turn, add -m" if isinstance(value, list) else ""
    problems.append(f"{key}: {value!r} is not {wanted}{sweep}")
    return None


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.inf if value > 0 else -math.inf


def flatten(tree: dict[str, Any], key: str = "") -> dict[str, Any]:
    """Flatten a nested config into dotted keys and plain values."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{key}{name}.") if isinstance(value, dict) else {f"{key}{name}": value}
    return leaves


def rename_old_keys(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config with every renamed key under its new name."""
    renamed: dict[str, Any] = {}
    for key, value in flatten(stored).items():
        *parents, leaf = RENAMED.get(key, key).split(".")
        level = renamed
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = value
    return renamed


def as_written(value: Any) -> str:
    """Format a config value as an override names it."""
    if isinstance(value, list):
        return f"[{','.join(map(as_written, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Change(NamedTuple):
    """A value that differs."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new}"


def differences(old: Any, new: Any, key: str = "") -> list[Change]:
    """List each value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for name in {**old, **new}
            for change in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [Change(key, old, new)]
