"""What search a request may ask for."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from typing import Any

from seq2seq.config.loading import build_config, not_a_choice, search_preset, to_dict
from seq2seq.config.paths import CONFIGS, choices
from seq2seq.config.schema import Range, SearchConfig
from seq2seq.utils.errors import UserError

# Of the options that a request sets: a batch must stay affordable, and a score finite.
LIMITS: dict[str, Range] = {
    "beam": Range(1, 32),
    "n_best": Range(1, 32),
    "samples": Range(0, 128),
    "groups": Range(1, 32),
    "length_penalty": Range(0, 10),
    "coverage_penalty": Range(0, 10),
    "diversity": Range(0, 100),
    "length_factor": Range(0, 20),
    "length_extra": Range(1, 500),
    "min_length_factor": Range(0, 20),
    "min_length_extra": Range(0, 500),
    "no_repeat_ngram": Range(0, 50),
    "temperature": Range(0.05, 20),
    "top_k": Range(0, 1_000_000),
}
SERVER_KEYS = ("shortlist", "tokens", "graphs")  # no request sets them, nor does a preset that it names
PHRASES, PHRASE_CHARACTERS = 50, 200  # of `require` and of `forbid`
WHOLE = 2**63  # integers of a checkpoint's tensors are smaller


@dataclass(frozen=True)
class Options:
    """The search below its key, so that errors name `search.beam` as on the command line."""

    search: SearchConfig


def search_of(value: str | dict[str, Any] | None, default: SearchConfig) -> SearchConfig:
    """Return the server's search with what a request changes: a preset's name, or values of some keys."""
    if value is None:
        return default
    if isinstance(value, str):
        if value not in (presets := choices("search")):
            raise UserError(not_a_choice("search", value, presets))
        return replace(search_preset(value), **{key: getattr(default, key) for key in SERVER_KEYS})
    if len(value) > (options := len(to_dict(default))):
        raise UserError(f"search: {len(value):,} keys, but there are only {options} options")
    if problems := [f"search.{key}: {problem}" for key, part in value.items() if (problem := _excess(key, part))]:
        raise UserError(*problems)
    return build_config(Options, {"search": {**to_dict(default), **value}}).search


def _excess(key: str, value: Any) -> str:
    """Return why a server does not accept this value, or an empty string."""
    if key in SERVER_KEYS:
        return "only the server's config sets it; remove it"
    if key in ("require", "forbid") and isinstance(value, list):
        if len(value) > PHRASES:
            return f"{len(value)} phrases exceed this server's limit of {PHRASES}"
        if any(isinstance(phrase, str) and len(phrase) > PHRASE_CHARACTERS for phrase in value):
            return f"a phrase exceeds this server's limit of {PHRASE_CHARACTERS} characters"
    numbers = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, (int, float))]
    if any(isinstance(number, int) and abs(number) >= WHOLE for number in numbers):
        return f"out of range; whole numbers are below {WHOLE}"
    if key in LIMITS and numbers and not isinstance(value, (bool, list)) and value not in LIMITS[key]:
        return f"{value} is out of range on this server; it must be {LIMITS[key]}"
    return ""


def search_options(default: SearchConfig) -> list[dict[str, Any]]:
    """Describe the options that a request may set, with the comments of configs/search/greedy.yaml."""
    helps = option_comments()
    hints = typing.get_type_hints(SearchConfig)
    return [
        {"name": name, **_type_of(hints[name]), "default": value, "help": helps[name], **_maximum(name)}
        for name, value in to_dict(default).items()
        if name not in SERVER_KEYS
    ]


def _type_of(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) is typing.Literal:
        return {"type": "string", "choices": list(typing.get_args(hint))}
    if typing.get_origin(hint) is list:
        return {"type": "array"}
    return {"type": "integer" if hint is int else "number"}


def _maximum(name: str) -> dict[str, Any]:
    return {"maximum": LIMITS[name].high} if name in LIMITS else {}


def option_comments() -> dict[str, str]:
    """Return the comment of each key: on its line and on indented ones below, or else that of the key before."""
    comments: dict[str, list[str]] = {}
    key = ""
    for line in (CONFIGS / "search" / "greedy.yaml").read_text(encoding="utf-8").splitlines():
        code, _, comment = line.partition("#")
        if ":" in code:
            before, key = key, code.partition(":")[0]
            comments[key] = [comment.strip()] if comment else comments[before]
        elif key and code and not code.strip() and comment:
            comments[key].append(comment.strip())
    return {key: " ".join(parts) for key, parts in comments.items()}
