"""seq2seq compare: test whether runs differ significantly, and show where."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from seq2seq.config.loading import as_written, flatten, to_dict
from seq2seq.config.schema import CompareConfig
from seq2seq.evaluation.diagnostics import grouped_score, length_groups
from seq2seq.evaluation.metrics import (
    LOWER_IS_BETTER,
    TITLES,
    TestSet,
    print_tokenizer_warning,
    require_tokenizer,
    sentence_scores,
)
from seq2seq.evaluation.significance import Paired, paired_tests
from seq2seq.evaluation.testsets import (
    cached_translations,
    describe_search,
    find_test_sets,
    is_held_out,
    seen_in_training,
    stored_config,
    translations_path,
)
from seq2seq.inference.checkpoint import CONFIG, read_config
from seq2seq.utils.console import status
from seq2seq.utils.device import tune_cpu
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run

NAMES = ("name", "outputs", "overwrite", "device", "data.cache")  # keys that do not describe how a run was trained


def compare(config: CompareConfig) -> None:
    """Compare each run with the first: significance, configs, lengths, and the sentences that differ most."""
    runs = find_runs(config)
    notes = check_languages(runs, config)
    tests = find_test_sets(config, runs[0])
    if len(tests) > 1:
        raise UserError("split, source, public: compare uses one test set; name one", code=2)
    test = tests[0]
    require_tokenizer(test.tokenize)
    for run in runs:
        print(
            f"{'run' if run is not runs[0] else 'baseline':10} {run.folder}, {run.checkpoint(config.checkpoint).name}"
        )
    print(f"test set   {test.name}: {len(test):,} pairs, {describe_search(config.search)}")
    for note in notes:
        print(f"note       {note}")
    for warning in contaminations(test, runs, config):
        print(f"warning    {warning}")
    print_tokenizer_warning(test)
    tune_cpu()
    hypotheses = [cached_translations(run, test, config) for run in runs]
    for run in runs:
        print(f"written    {translations_path(run, test, config)}")
    names = [run.folder.name for run in runs]
    status("testing …")
    results = paired_tests(config.metrics, hypotheses, test)
    status("")
    print_scores(names, results, config.metrics)
    print_config_differences(names, [to_dict(read_config(run.checkpoint(config.checkpoint) / CONFIG)) for run in runs])
    print_scores_by_length(names, hypotheses, test)
    for name, others in zip(names[1:], hypotheses[1:], strict=True):
        print_sentence_differences((names[0], name), (hypotheses[0], others), test, config.sentences)


def check_languages(runs: list[Run], config: CompareConfig) -> list[str]:
    """Note runs trained on another corpus than the first; other languages are an error."""
    first, *others = (stored_config(run, config).data for run in runs)
    notes = []
    for run, data in zip(runs[1:], others, strict=True):
        if (data.source, data.target) != (first.source, first.target):
            raise UserError(
                f"run: {runs[0].folder.name} translates {' → '.join(first.languages)}, {run.folder.name} "
                f"{' → '.join(data.languages)}; only runs of the same languages can be compared",
                code=2,
            )
        if (data.name, data.path, data.train) != (first.name, first.path, first.train):
            notes.append(f"{run.folder.name} was trained on another corpus ({data.name}) than {runs[0].folder.name}")
    return notes


def contaminations(test: TestSet, runs: list[Run], config: CompareConfig) -> list[str]:
    """Warn of runs that were trained on pairs held out for the first one: seed, filters and data.extra choose them."""
    if not is_held_out(config, stored_config(runs[0], config).data):
        return []
    seen = {run.folder.name: seen_in_training(test, run, config) for run in runs[1:]}
    return [
        f"{name} was trained on {count:,} of these {len(test):,} sources: another seed or other data hold out other "
        "pairs; give source=… reference=…, or name data.validation and data.test in both trainings"
        for name, count in seen.items()
        if count
    ]


def find_runs(config: CompareConfig) -> list[Run]:
    """Return the named runs, or the two newest, the older one first."""
    if config.run is not None:
        return [Run.find(name, config.outputs) for name in config.run]
    newest = Run.all(config.outputs)[-2:]
    if len(newest) < 2:
        raise UserError(f"{config.outputs}: fewer than two runs found; name them: seq2seq compare A B")
    return newest


def print_scores(names: list[str], results: dict[str, list[Paired]], metrics: Sequence[str]) -> None:
    """Print scores with intervals, and the probability of so large a difference between equal systems."""
    width = max(map(len, names)) + 4
    print("\n" + " " * width + "".join(f"{TITLES[metric]:<20}" for metric in metrics))
    for i, name in enumerate(names):
        rows = [results[metric][i] for metric in metrics]
        print(f"{name:{width}}" + "".join(f"{f'{row.value:.2f} ± {row.interval:.2f}':<20}" for row in rows).rstrip())
        if i:
            # No resample of equal systems differs by more than zero, so their p-values would be the smallest possible.
            equal = [row.value == results[metric][0].value for row, metric in zip(rows, metrics, strict=True)]
            for title, values in (
                ("bootstrap", [row.bootstrap for row in rows]),
                ("randomised", [row.randomised for row in rows]),
            ):
                p_values = ("–" if same else f"p = {p:.4f}" for p, same in zip(values, equal, strict=True))
                cells = "".join(f"{cell:<20}" for cell in p_values)
                print(f"{f'  {title}':{max(width, 13)}}{cells}".rstrip())
    print()
    for metric in metrics:
        for name, row in zip(names[1:], results[metric][1:], strict=True):
            print(describe_significance(metric, names[0], name, results[metric][0], row))
    for metric in metrics:
        for signature in results[metric][0].signatures:
            print(f"{TITLES[metric]:10} {signature}")


def describe_significance(metric: str, baseline: str, name: str, first: Paired, other: Paired) -> str:
    """Interpret two p-values in a sentence."""
    difference = other.value - first.value
    sign = -1 if metric in LOWER_IS_BETTER else 1
    p = max(other.bootstrap, other.randomised)
    if difference == 0:
        return f"{TITLES[metric]:10} {name} and {baseline} are equal"
    word = "better" if sign * difference > 0 else "worse"
    if p >= 0.05:
        return f"{TITLES[metric]:10} {name} and {baseline}: {difference:+.2f}, not significant (p = {p:.2f})"
    return f"{TITLES[metric]:10} {name} is {word} than {baseline}: {difference:+.2f} (p < 0.05 in both tests)"


def print_config_differences(names: list[str], configs: list[dict[str, Any]]) -> None:
    """Print every config value in which the runs differ."""
    values = [flatten(config) for config in configs]
    every = {
        key: [as_written(one[key]) if key in one else "–" for one in values]
        for one in values
        for key in one
        if key not in NAMES
    }
    keys = [key for key, several in every.items() if len(set(several)) > 1]
    rows = [["config", *names], *([key, *every[key]] for key in keys)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    print()
    for row in rows if keys else [["config", "identical"]]:
        print("".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())


def print_scores_by_length(names: list[str], hypotheses: list[list[str]], test: TestSet) -> None:
    groups = length_groups(test.source)
    by_run = [grouped_score("bleu", lines, test, groups) for lines in hypotheses]
    widths = [max(len(name), 6) + 2 for name in names]
    print(f"\n{'BLEU by words of the source':30}" + "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True)))
    for same in zip(*by_run, strict=True):
        cells = "".join(f"{group.value:{width}.2f}" for group, width in zip(same, widths, strict=True))
        print(f"    {same[0].label:>10}  {f'({same[0].count:,})':14}{cells}")


def print_sentence_differences(
    names: tuple[str, str], hypotheses: tuple[list[str], list[str]], test: TestSet, count: int
) -> None:
    """Print the sentences that gained and lost most in chrF, one translation below the other."""
    before, after = (sentence_scores(lines, test) for lines in hypotheses)
    gains = [b - a for a, b in zip(before, after, strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    changes = (
        ("most improved", [i for i in reversed(order) if gains[i] > 0]),
        ("most degraded", [i for i in order if gains[i] < 0]),
    )
    for title, rows in changes:
        print(f"\n{title} in {names[1]} against {names[0]}, by chrF of the sentence" if rows else f"\n{title}: none")
        for i in rows[:count]:
            print(f"{gains[i]:+6.1f}  sentence {i + 1:,}")
            lines = [("source", test.source[i]), *(("reference", lines[i]) for lines in test.references)]
            for name, text in [*lines, (names[0], hypotheses[0][i]), (names[1], hypotheses[1][i])]:
                label = f"        {name:{max(9, *map(len, names))}}  "
                print(textwrap.fill(text, 110, initial_indent=label, subsequent_indent=" " * len(label)) or label)
