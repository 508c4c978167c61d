"""seq2seq compare: whether one run is better than another or just lucky, and where they differ."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from seq2seq.config.loading import flat, plain
from seq2seq.config.schema import CompareConfig
from seq2seq.evaluation.diagnostics import grouped_score, length_groups
from seq2seq.evaluation.metrics import LOWER_IS_BETTER, TITLES, TestSet, require_tokenizer, sentence_scores
from seq2seq.evaluation.significance import Paired, paired_tests
from seq2seq.evaluation.testsets import find_test_sets, search_told, stored_config, translated, written_at
from seq2seq.inference.checkpoint import CONFIG, read_config
from seq2seq.utils.console import status
from seq2seq.utils.device import tune_cpu
from seq2seq.utils.errors import UserError
from seq2seq.utils.run import Run

NAMES = ("name", "outputs", "overwrite", "device", "data.cache")  # keys that do not describe how a run was trained


def compare(config: CompareConfig) -> None:
    """Compare each run with the first: significance, configs, lengths, and the sentences that differ most."""
    require_tokenizer(config.tokenize)
    runs = find_runs(config)
    notes = what_differs(runs, config)
    tests = find_test_sets(config, runs[0])
    if len(tests) > 1:
        raise UserError("split, source, public: compare takes one test set; name one", code=2)
    test = tests[0]
    for run in runs:
        print(
            f"{'run' if run is not runs[0] else 'baseline':10} {run.folder}, {run.checkpoint(config.checkpoint).name}"
        )
    print(f"test set   {test.name}: {len(test):,} pairs, {search_told(config.search)}")
    for note in notes:
        print(f"note       {note}")
    tune_cpu()
    hypotheses = [translated(run, test, config) for run in runs]
    for run in runs:
        print(f"written    {written_at(run, test, config)}")
    names = [run.folder.name for run in runs]
    status("testing …")
    found = paired_tests(config.metrics, hypotheses, test, config.tokenize)
    status("")
    tell_scores(names, found, config.metrics)
    tell_configs(names, [plain(read_config(run.checkpoint(config.checkpoint) / CONFIG)) for run in runs])
    tell_lengths(names, hypotheses, test, config.tokenize)
    for name, others in zip(names[1:], hypotheses[1:], strict=True):
        tell_sentences((names[0], name), (hypotheses[0], others), test, config.sentences)


def what_differs(runs: list[Run], config: CompareConfig) -> list[str]:
    """Note runs trained on another corpus than the first; other languages are an error."""
    first, *others = (stored_config(run, config).data for run in runs)
    notes = []
    for run, data in zip(runs[1:], others, strict=True):
        if (data.source, data.target) != (first.source, first.target):
            raise UserError(
                f"run: {runs[0].folder.name} translates {first.source} → {first.target}, {run.folder.name} "
                f"{data.source} → {data.target}; runs of the same languages can be compared",
                code=2,
            )
        if (data.name, data.path, data.train) != (first.name, first.path, first.train):
            notes.append(f"{run.folder.name} learned from another corpus ({data.name}) than {runs[0].folder.name}")
    return notes


def find_runs(config: CompareConfig) -> list[Run]:
    """Return the named runs, or the two newest, the older one first."""
    if config.run is not None:
        return [Run.find(name, config.outputs) for name in config.run]
    newest = Run.all(config.outputs)[-2:]
    if len(newest) < 2:
        raise UserError(f"{config.outputs}: fewer than two runs here; name them: seq2seq compare A B")
    return newest


def tell_scores(names: list[str], found: dict[str, list[Paired]], metrics: Sequence[str]) -> None:
    """Print scores with intervals, and the probability of so large a difference between equal systems."""
    width = max(map(len, names)) + 4
    print("\n" + " " * width + "".join(f"{TITLES[metric]:<20}" for metric in metrics))
    for i, name in enumerate(names):
        rows = [found[metric][i] for metric in metrics]
        print(f"{name:{width}}" + "".join(f"{f'{row.value:.2f} ± {row.interval:.2f}':<20}" for row in rows).rstrip())
        if i:
            # No resample of equal systems differs by more than zero, so their p-values would be the smallest possible.
            equal = [row.value == found[metric][0].value for row, metric in zip(rows, metrics, strict=True)]
            for title, values in (
                ("bootstrap", [row.bootstrap for row in rows]),
                ("randomised", [row.randomised for row in rows]),
            ):
                told = ("–" if same else f"p = {p:.4f}" for p, same in zip(values, equal, strict=True))
                cells = "".join(f"{cell:<20}" for cell in told)
                print(f"{f'  {title}':{max(width, 13)}}{cells}".rstrip())
    print()
    for metric in metrics:
        for name, row in zip(names[1:], found[metric][1:], strict=True):
            print(verdict(metric, names[0], name, found[metric][0], row))
    for metric in metrics:
        for signature in found[metric][0].signatures:
            print(f"{TITLES[metric]:10} {signature}")


def verdict(metric: str, baseline: str, name: str, first: Paired, other: Paired) -> str:
    """Interpret two p-values in a sentence."""
    difference = other.value - first.value
    sign = -1 if metric in LOWER_IS_BETTER else 1
    p = max(other.bootstrap, other.randomised)
    if difference == 0:
        return f"{TITLES[metric]:10} {name} and {baseline} are equal"
    word = "better" if sign * difference > 0 else "worse"
    if p >= 0.05:
        return f"{TITLES[metric]:10} {name} and {baseline}: {difference:+.2f}, which may be luck (p = {p:.2f})"
    return f"{TITLES[metric]:10} {name} is {word} than {baseline}: {difference:+.2f} (p < 0.05 in both tests)"


def tell_configs(names: list[str], configs: list[dict[str, Any]]) -> None:
    """Print every config value in which the runs differ."""
    values = [flat(config) for config in configs]
    every = {key: [str(one.get(key, "–")) for one in values] for one in values for key in one if key not in NAMES}
    keys = [key for key, several in every.items() if len(set(several)) > 1]
    rows = [["config", *names], *([key, *every[key]] for key in keys)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    print()
    for row in rows if keys else [["config", "the same"]]:
        print("".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())


def tell_lengths(names: list[str], hypotheses: list[list[str]], test: TestSet, tokenize: str | None) -> None:
    groups = length_groups(test.source)
    by_run = [grouped_score("bleu", lines, test, groups, tokenize) for lines in hypotheses]
    widths = [max(len(name), 6) + 2 for name in names]
    print(f"\n{'BLEU by words of the source':30}" + "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True)))
    for same in zip(*by_run, strict=True):
        cells = "".join(f"{group.value:{width}.2f}" for group, width in zip(same, widths, strict=True))
        print(f"    {same[0].label:>10}  {f'({same[0].count:,})':14}{cells}")


def tell_sentences(names: tuple[str, str], hypotheses: tuple[list[str], list[str]], test: TestSet, count: int) -> None:
    """Print the sentences that gained and lost most in chrF, one translation below the other."""
    before, after = (sentence_scores(lines, test) for lines in hypotheses)
    gains = [b - a for a, b in zip(before, after, strict=True)]
    order = sorted(range(len(gains)), key=lambda i: gains[i])
    told = (
        ("most improved", [i for i in reversed(order) if gains[i] > 0]),
        ("most harmed", [i for i in order if gains[i] < 0]),
    )
    for title, places in told:
        print(f"\n{title} in {names[1]} against {names[0]}, by chrF of the sentence" if places else f"\n{title}: none")
        for i in places[:count]:
            print(f"{gains[i]:+6.1f}  sentence {i + 1:,}")
            lines = [("source", test.source[i]), *(("reference", lines[i]) for lines in test.references)]
            for name, text in [*lines, (names[0], hypotheses[0][i]), (names[1], hypotheses[1][i])]:
                label = f"        {name:{max(9, *map(len, names))}}  "
                print(textwrap.fill(text, 110, initial_indent=label, subsequent_indent=" " * len(label)) or label)
