"""seq2seq reproduce: retrain a run from its stored config, and compare the scores."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from seq2seq.config.schema import ReproduceConfig, TrainConfig
from seq2seq.data.corpus import load_split
from seq2seq.evaluation.metrics import RESAMPLES
from seq2seq.evaluation.testsets import relocate, translate_and_score
from seq2seq.inference.checkpoint import read_config
from seq2seq.inference.translator import Translator
from seq2seq.training import environment
from seq2seq.training.pipeline import train
from seq2seq.training.resume import list_changes
from seq2seq.utils.console import hint
from seq2seq.utils.errors import STOPPED, UserError
from seq2seq.utils.run import Run


def reproduce(config: ReproduceConfig) -> None:
    """Train a new run under a new name; its score must lie in the interval of the old one."""
    old = Run.find(config.run, config.outputs)
    new_config = config_of(old, config)
    new = Run(Path(new_config.outputs) / new_config.name)
    if new.exists and list_changes(new, new_config):
        raise UserError(f"name: {new.folder} is another run; choose another name with name=…", code=2)
    expected = scores_with_interval(old, new_config.data)
    print(f"original   {old.folder}: BLEU {expected['bleu']:.2f} ± {expected['bleu_interval']:.2f}")
    try:
        train(new_config)
    except UserError as error:
        if error.code != STOPPED:
            raise
        given = {key: value for key, value in asdict(config).items() if value is not None}
        more = hint("reproduce", **{**given, "run": str(old.folder)})
        raise UserError(f"stopped by a signal; continue with: {more}", code=STOPPED) from None
    measured = scores_with_interval(new, new_config.data)
    print()
    changes = changed_since(old, new)
    for change in changes:
        print(f"changed    {change}")
    if any(change.startswith("data.test") for change in changes):
        raise UserError("not comparable: the two runs have different test sets; restore the files of the first")
    print(f"metrics    {'identical' if same_metrics(old, new) else 'not identical'} at every logged step")
    check_reproduced(expected, measured)


def config_of(old: Run, config: ReproduceConfig) -> TrainConfig:
    """Return the new run's config: the stored one, without a time limit, in the same outputs folder."""
    stored = read_config(old.config)
    return replace(
        stored,
        name=config.name or f"{old.folder.name}-again",
        outputs=str(old.folder.parent),
        overwrite=False,
        device=config.device or stored.device,
        data=relocate(stored.data, config.data_path) if config.data_path else stored.data,
        training=replace(stored.training, max_minutes=0.0),
    )


def scores_with_interval(run: Run, data: Any) -> dict[str, Any]:
    """Return a run's test scores with their interval; measure them if none is stored."""
    try:
        test: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))["test"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run.folder}: no test score to compare with; it has no test set, or did not finish") from None
    if test.get("bleu_interval") is None:
        stored = read_config(run.config)
        corpus = load_split(data, "test", stored.seed)
        assert corpus is not None  # it was scored
        translator = Translator.from_checkpoint(run.checkpoint("best"), stored.device, stored.precision)
        translator.use_processes(stored.processes)
        _, scores = translate_and_score(translator, corpus, stored.search, data, RESAMPLES)
        test["bleu_interval"] = scores.bleu_interval
    return test


def changed_since(old: Run, new: Run) -> list[str]:
    """List the differences between the environments of the two runs."""
    before, after = environment.read(old), environment.read(new)
    if not before:
        return [f"unknown: {old.environment} is missing"]
    return environment.changes(before[0], after[0])


def same_metrics(old: Run, new: Run) -> bool:
    """Whether all logged losses and scores are equal; times never are."""
    return _logged_values(old) == _logged_values(new)


def _logged_values(run: Run) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: line.get(key) for key in ("kind", "update", "loss", "bleu", "chrf")} for line in lines]


def check_reproduced(expected: dict[str, Any], measured: dict[str, Any]) -> None:
    low, high = (expected["bleu"] + sign * expected["bleu_interval"] for sign in (-1, 1))
    result = (
        f"BLEU {measured['bleu']:.2f} (originally {expected['bleu']:.2f}); the 95 % interval is {low:.2f} to {high:.2f}"
    )
    if not low <= measured["bleu"] <= high:
        raise UserError(f"not reproduced: {result}")
    print(f"reproduced {result}")
