"""Laws of merged configs: what each field accepts, and every problem named at once."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.cli.main import load_config
from seq2seq.config.loading import build_config, differences, flatten, search_preset, to_dict, with_defaults
from seq2seq.config.paths import CONFIGS
from seq2seq.config.schema import Range, TrainConfig
from seq2seq.utils.errors import UserError
from tests.helpers.configs import files_config

pytestmark = pytest.mark.usefixtures("yaml_parsed_once")
LAW = settings(max_examples=40, deadline=None, derandomize=True, database=None)

# ------------------------------------------------------------------------------------------- configs

TREES = st.recursive(
    st.one_of(st.none(), st.integers(0, 3), st.sampled_from(["a", "b"]), st.lists(st.integers(0, 1), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    max_leaves=8,
)
TREE = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@LAW
@given(TREE)
def test_a_flat_config_has_a_dotted_key_for_every_leaf(tree: dict[str, Any]) -> None:
    """In order, lists as they stand, and without groups that are empty."""
    assert list(flatten(tree).items()) == [(".".join(path), value) for path, value in leaves(tree)]


@LAW
@given(TREE, TREE)
def test_differences_name_every_leaf_that_is_not_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Once each, with the old value and the new; a group against a value is one difference."""

    def walk(a: Any, b: Any, path: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in [*a, *(name for name in b if name not in a)]:
                yield from walk(a.get(name), b.get(name), f"{path}.{name}".lstrip("."))
        elif a != b:
            yield f"{path}: {a} → {b}"

    found = differences(old, new)
    assert [str(change) for change in found] == list(walk(old, new, ""))
    assert differences(old, copy.deepcopy(old)) == []
    assert len(found) == len(differences(new, old))


@LAW
@given(
    st.integers(-3, 3), st.integers(-3, 3) | st.just(float("inf")), st.booleans(), st.floats(-4, 4) | st.integers(-4, 4)
)
def test_a_range_holds_its_ends_unless_it_is_open(low: int, high: float, is_open: bool, value: float) -> None:
    """The upper end always, the lower one unless excluded; nothing that is not finite."""
    allowed = (value > low if is_open else value >= low) and not value > high
    assert (value in Range(low, high, is_open)) is allowed
    assert (low in Range(low, low + 1, is_open)) is not is_open and low + 1 in Range(low, low + 1, is_open)
    assert all(wrong not in Range(-9) for wrong in (float("inf"), float("-inf"), float("nan")))


@lru_cache
def defaults(family: str) -> TrainConfig:
    config: TrainConfig = load_config("train", f"model={family}", "data.extra=[{train: train, path: x, weight: 2}]")
    return config


def test_numbers_in_configs_are_numbers_to_every_reader() -> None:
    """A plain YAML reader takes 1e-9 for text, Hydra's does not: both read these files."""
    for path in CONFIGS.rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        texts = [value for _, value in leaves(values) if isinstance(value, str)]
        assert not [text for text in texts if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", text)], path


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_a_config_survives_being_written_and_read(family: str) -> None:
    """Plain values make the same object again, and no default replaces what is stored."""
    config = defaults(family)
    assert build_config(TrainConfig, to_dict(config)) == config
    assert with_defaults(to_dict(config)) == to_dict(config)


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_keys_newer_than_a_stored_config_have_the_defaults_of_their_family(family: str) -> None:
    """A missing key in each group at a time, groups inside groups too, and all others as they were stored."""
    everything = to_dict(
        dataclasses.replace(defaults(family), data=dataclasses.replace(defaults(family).data, extra=[]))
    )
    of_group: dict[str, list[tuple[str, ...]]] = {}
    for path, _ in leaves(everything):
        if path[0] != "name" and path[-1] != "family":  # composed from others; what the family is known by
            of_group.setdefault(path[0] if len(path) > 1 else "", []).append(path)
    for paths in itertools.zip_longest(*of_group.values()):
        stored = copy.deepcopy(everything)
        for path in filter(None, paths):
            group = stored
            for name in path[:-1]:
                group = group[name]
            del group[path[-1]]
        assert with_defaults(stored) == everything, paths
    groups = ("search", "training", "optimizer", "tokenizer", "data")
    assert with_defaults({name: value for name, value in everything.items() if name not in groups}) == everything


def test_stored_values_go_before_defaults_at_every_depth() -> None:
    """Where a value is a group, a list or nothing as well."""
    stored = to_dict(defaults("lstm"))
    rng = random.Random(0)
    changed_: dict[tuple[str, ...], Any] = {}
    for path, _ in list(leaves(stored)):
        if rng.random() < 0.5 and path[-1] != "family":
            group = stored
            for name in path[:-1]:
                group = group[name]
            group[path[-1]] = changed_[path] = rng.choice([None, "mine", 7, ["x"], False])
    found = dict(leaves(with_defaults(stored)))
    assert {path: found[path] for path in changed_} == changed_
    assert "unknown" in with_defaults({**stored, "unknown": 1})


FIELDS: list[tuple[str, Any, Any, str | None]] = [
    ("seed", 0, 0, None),
    ("seed", -1, None, "seed: -1 is out of range; it must be between 0 and"),
    ("seed", 10**400, None, "0000 is out of range; it must be between 0 and"),
    ("seed", math.inf, None, "seed: inf is not a whole number"),
    ("seed", 2.0, 2, None),
    ("seed", 2.5, None, "seed: 2.5 is not a whole number"),
    ("seed", True, None, "seed: True is not a whole number"),
    ("seed", "1", None, "seed: '1' is not a whole number"),
    ("seed", 2**63 - 1, 2**63 - 1, None),
    ("seed", 2**63, None, "out of range"),
    ("compile", 1, None, "compile: 1 is not true or false"),
    ("name", 5, "5", None),
    ("name", None, None, "name: None is not text"),
    ("init_from", None, None, None),
    ("init_from", 3, "3", None),
    ("device", "???", None, "device: required; set device=…"),
    ("precision", "float", None, "precision: 'float' is not a choice; possible: auto, float32, tf32, bfloat16"),
    ("precision", "float16", None, "precision: 'float16' is not a choice; possible: auto, float32, tf32, bfloat16"),
    ("training.tokens", "auto", "auto", None),
    ("training.tokens", 1, 1, None),
    ("training.tokens", 0, None, "training.tokens: 0 is out of range; it must be at least 1; also possible: auto"),
    ("training.tokens", "car", None, "training.tokens: 'car' is not a whole number; also possible: auto"),
    ("optimizer.lr", 10**400, None, "0000 is out of range; it must be greater than 0"),
    ("optimizer.lr", -(10**400), None, "0000 is out of range; it must be greater than 0"),
    ("optimizer.lr", 0, None, "optimizer.lr: 0 is out of range; it must be greater than 0"),
    ("optimizer.lr", 1, 1.0, None),
    ("optimizer.betas", None, None, "optimizer.betas: None is not a list; write optimizer.betas=[a,b]"),
    ("optimizer.betas", 0.5, None, "optimizer.betas: [0.5] must be two numbers"),
    ("search.require", "Hund", ["Hund"], None),
    ("optimizer.betas", [0.5, "x"], None, "optimizer.betas[1]: 'x' is not a number"),
    ("optimizer.betas", [0.5, 1], None, "optimizer.betas: [0.5, 1.0] must be two numbers"),
    ("model.dropout", 0.999, 0.999, None),
    ("model.dropout", 1, None, "model.dropout: 1 is out of range; it must be between 0 and 0.999"),
    ("model.dropout", float("nan"), None, "model.dropout: nan is out of range"),
    ("model.embedding_dropout", 0.5, 0.5, None),
    ("model.attention", 5, None, "model.attention: expected a mapping, got 5"),
    ("model.attention.heads", [1, 2], None, "not a whole number; to try several values in turn, add -m"),
    ("model.family", "rnn", None, "model.family: 'rnn' is not a choice; possible: transformer, lstm"),
    ("data.train", ["a", "b"], ["a", "b"], None),
    ("data.train", ["a"], None, "data.train: ['a'] must name two files"),
    ("data.train", 5, "5", None),
    ("data.filters.emtpy", True, None, "data.filters.emtpy: no such key"),
    ("data.extra", [{"train": "x"}], None, None),
    ("data.extra", [{"path": "x"}], None, "data.extra[0].train: missing"),
    ("data.extra", [{"train": "x", "weight": 0}], None, "data.extra[0].weight: 0 is out of range"),
    ("search.top_p", 1, 1.0, None),
    ("search.top_p", 0, None, "search.top_p: 0 is out of range; it must be between 0 and 1"),
    ("tokenizer.character_coverage", 0.98, 0.98, None),
    ("tokenizer.character_coverage", 0.97, None, "coverage: 0.97 is out of range; it must be between 0.98 and 1"),
]  # fmt: skip


@lru_cache
def plain_config() -> dict[str, Any]:
    return to_dict(files_config())


@pytest.mark.parametrize(("key", "value", "expected", "problem"), FIELDS, ids=lambda x: str(x)[:24])
def test_values_become_what_their_field_asks_for_or_a_problem_that_names_it(
    key: str, value: Any, expected: Any, problem: str | None
) -> None:
    """Whole floats are whole numbers, numbers are text where text belongs, and booleans are neither."""
    values = copy.deepcopy(plain_config())
    *groups, name = key.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[name] = value
    if problem is None:
        built: Any = build_config(TrainConfig, values)
        for part in key.split("."):
            built = getattr(built, part)
        if key != "data.extra":
            assert built == expected and type(built) is type(expected)
        else:
            assert [(more.train, more.path, more.subset, more.weight) for more in built] == [("x", None, None, 1.0)]
    else:
        with pytest.raises(UserError) as error:
            build_config(TrainConfig, values)
        assert len(error.value.problems) == 1 and problem in error.value.problems[0]
        assert error.value.code == 2


def test_all_problems_are_named_at_once() -> None:
    """Of every group; contradictions inside a group only once its values are sound."""
    values = copy.deepcopy(plain_config())
    values["seed"] = -1
    del values["outputs"]
    values["extra"] = 1
    values["model"]["attention"]["heads"] = 0
    values["data"]["source"] = " "
    values["search"]["n_best"] = 7
    with pytest.raises(UserError) as error:
        build_config(TrainConfig, values)
    keys = sorted(problem.partition(":")[0] for problem in error.value.problems)
    assert keys == ["data.source", "extra", "model.attention.heads", "outputs", "search.n_best", "seed"]


@pytest.mark.parametrize(
    ("cls", "changes", "problem"),
    [
        ("data", {"source": "de", "target": "de"}, "target: de is also the source"),
        ("data", {"validation": ["a", "b", "c"]}, "validation: ['a', 'b', 'c'] must name two files"),
        ("tokenizer", {"type": "word", "sampling": 0.1}, "sampling: 0.1 requires alternative"),
        ("tokenizer", {"type": "char", "sampling": 0.1}, "sampling: 0.1 requires alternative"),
        ("tokenizer", {"model": ["a"]}, "model: ['a'] names 1 files"),
        ("optimizer", {"betas": [0.9]}, "betas: [0.9] must be two"),
        ("optimizer", {"betas": [-0.1, 0.9]}, "must be two numbers"),
        ("optimizer", {"name": "schedule_free"}, "schedule: cosine is incompatible with"),
        (
            "optimizer",
            {"name": "schedule_free", "schedule": "constant", "betas": [0, 0.9]},
            "betas: schedule_free",
        ),
        ("training", {"r_drop": 1.0, "simcut": 1.0}, "simcut: simcut and r_drop"),
        ("search", {"n_best": 2}, "n_best: 2 exceeds beam=1"),
        ("search", {"samples": 2, "n_best": 3}, "n_best: 3 exceeds samples=2"),
        ("search", {"min_length_factor": 2.5}, "min_length_factor: the minimum length exceeds"),
        ("search", {"min_length_extra": 11, "min_length_factor": 2.0}, "min_length_factor: the minimum length exceeds"),
        ("search", {"beam": 4, "groups": 3}, "groups: 3 does not divide"),
        ("search", {"diversity": 0.5}, "diversity: 0.5"),
        ("search", {"beam": 4, "groups": 2, "require": ["a"]}, "require: require and groups"),
        ("search", {"select_by": "bleu"}, "select_by: bleu compares"),
        ("search", {"samples": 2, "beam": 2}, "beam: this key applies to beam search"),
        ("search", {"samples": 2, "coverage_penalty": 0.1}, "coverage_penalty: this key applies to beam search"),
        ("search", {"samples": 2, "require": ["a"]}, "require: this key applies to beam search"),
        ("search", {"top_k": 1}, "top_k: this key applies to sampling"),
        ("search", {"top_p": 0.9}, "top_p: this key applies to sampling"),
        ("search", {"min_p": 0.1}, "min_p: this key applies to sampling"),
        ("search", {"epsilon_cutoff": 0.1}, "epsilon_cutoff: this key applies to sampling"),
        ("search", {"temperature": 0.5}, "temperature: this key applies to sampling"),
        ("search", {"require": [" "]}, "require: an entry is empty"),
        ("search", {"forbid": ["a", ""]}, "forbid: an entry is empty"),
        ("search", {"beam": 5, "forbid": ["a"], "require": ["a"]}, "forbid: a is also required"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_contradictions_inside_a_group_are_named(cls: str, changes: dict[str, Any], problem: str) -> None:
    """Each under the key to change, and alone."""
    config: Any = search_preset("greedy") if cls == "search" else getattr(files_config(), cls)
    assert not list(config.problems())
    found = [f"{key}: {text}" for key, text in dataclasses.replace(config, **changes).problems()]
    assert len(found) == 1 and problem in found[0]


FINE: list[tuple[str, dict[str, Any]]] = [
    ("search", {"beam": 2, "n_best": 2}),
    ("search", {"min_length_factor": 2.0, "min_length_extra": 10}),
    ("search", {"beam": 4, "groups": 2, "diversity": 0.5}),
    (
        "search",
        {"samples": 3, "n_best": 3, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "epsilon_cutoff": 0.1, "temperature": 2.0},
    ),
    ("search", {"samples": 2, "select_by": "chrf"}),
    ("tokenizer", {"type": "bpe", "sampling": 0.1}),
    ("optimizer", {"betas": [0.0, 0.0]}),
    ("training", {"r_drop": 1.0}),
]


@pytest.mark.parametrize(("cls", "changes"), FINE, ids=lambda x: str(x)[:30])
def test_what_is_allowed_at_its_limits_is_no_contradiction(cls: str, changes: dict[str, Any]) -> None:
    """As many translations as hypotheses, as long at least as at most, groups that divide a beam."""
    config = search_preset("greedy") if cls == "search" else getattr(files_config(), cls)
    assert not list(dataclasses.replace(config, **changes).problems())

    assert not list(dataclasses.replace(config, **changes).problems())


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer=muon", "optimizer=muon needs whole matrices; set optimizer=adamw, or training.parallel=ddp"),
        ("optimizer=adafactor", "optimizer=adafactor needs whole matrices; set optimizer=adamw, or "),
        ("compile=true", "compile=true needs whole weights; set compile=false, or "),
        ("training.tokens=auto", "tokens=auto tries other batches in each process; set training.tokens=8192, or "),
        ("optimizer=schedule_free", ""),
    ],
)
def test_what_sharded_weights_do_not_support_is_refused(setting: str, named: str) -> None:
    """With the key, and both ways out; whole weights support all of it."""
    load_config("train", setting)
    if not named:
        load_config("train", setting, "training.parallel=fsdp")
        return
    with pytest.raises(UserError) as raised:
        load_config("train", setting, "training.parallel=fsdp")
    [problem] = raised.value.problems
    assert f"training.parallel: fsdp: {named}" in problem


@pytest.mark.parametrize("family", ["transformer", "lstm"])
def test_only_transformer_layers_can_be_recomputed(family: str) -> None:
    """The setting has no layers to act on in the LSTM, and the problem names it."""
    config = defaults(family)
    assert not list(config.problems())
    training = dataclasses.replace(config.training, recompute=True)
    keys = [key for key, _ in dataclasses.replace(config, training=training).problems()]
    assert keys == ([] if family == "transformer" else ["training.recompute"])
