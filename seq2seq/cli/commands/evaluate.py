"""seq2seq evaluate: score one or several runs on one or several test sets, with confidence intervals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from seq2seq.config import loading as configs
from seq2seq.config.schema import EvaluateConfig
from seq2seq.data.corpus import open_corpora
from seq2seq.evaluation.alignment import AlignmentErrors, alignment_of
from seq2seq.evaluation.diagnostics import (
    Group,
    OutputErrors,
    by_target_frequency,
    count_words,
    grouped_score,
    length_groups,
    output_errors,
    source_frequency_groups,
)
from seq2seq.evaluation.metrics import (
    LOWER_IS_BETTER,
    TITLES,
    MetricResult,
    TestSet,
    comet,
    measure,
    print_tokenizer_warning,
    require_comet,
    require_tokenizer,
)
from seq2seq.evaluation.testsets import (
    as_list,
    describe_search,
    find_test_sets,
    stored_config,
    translate,
    write_translations,
)
from seq2seq.inference.translator import Translator
from seq2seq.utils.console import status
from seq2seq.utils.device import choose_device, tune_cpu
from seq2seq.utils.run import Run


@dataclass(frozen=True)
class Evaluated:
    """One run on one test set."""

    run: Run
    test: TestSet
    scores: list[MetricResult]
    errors: OutputErrors
    details: dict[str, list[Group]]
    alignment: AlignmentErrors | None  # if the true alignment is known
    engine: str = "torch"  # with version and quantization


def evaluate(config: EvaluateConfig) -> list[Evaluated]:
    """Translate test sets, print the scores, and write hypotheses and scores into the run."""
    if "comet" in config.metrics:
        require_comet()
    require_tokenizer(config.tokenize)
    runs = [Run.find(name, config.outputs) for name in as_list(config.run)]
    tests = [find_test_sets(config, run) for run in runs]
    if config.detail or any(name.startswith("bleu") for name in config.metrics):
        for test in chain(*tests):
            require_tokenizer(test.tokenize)  # which the corpus of a run may name
    several = sum(map(len, tests)) > 1
    tune_cpu()
    evaluations = [
        one for run, run_tests in zip(runs, tests, strict=True) for one in evaluate_run(run, run_tests, config, several)
    ]
    if several:
        print()
        for line in score_table(evaluations, config.metrics):
            print(line)
    return evaluations


def evaluate_run(run: Run, tests: list[TestSet], config: EvaluateConfig, several: bool) -> list[Evaluated]:
    device, reason = choose_device(config.device)
    folder = run.checkpoint(config.checkpoint)
    print(f"run        {run.folder}")
    print(f"checkpoint {folder.name}, on {device} ({reason})")
    translator = Translator.from_checkpoint(folder, config.device, config.precision, config.engine)
    translator.use_processes(config.processes)
    if config.engine != "torch":
        print(f"engine     {translator.engine_for(config.search)}")
    counts = training_counts(run, config) if config.detail else None
    evaluations = []
    for test in tests:
        print(f"test set   {test.name}: {len(test):,} pairs" + describe_references(test))
        print_tokenizer_warning(test)
        began = time.perf_counter()
        hypotheses = translate(translator, test, config.search)
        seconds = time.perf_counter() - began
        print(f"speed      {len(test) / seconds:,.0f} sentences/s, {describe_search(config.search)}")
        scores = [one_score(name, hypotheses, test, config, device.type == "cuda") for name in config.metrics]
        details = in_detail(hypotheses, test, counts) if counts else {}
        alignment = alignment_of(translator, test)
        engine = translator.engine_for(config.search)
        one = Evaluated(run, test, scores, output_errors(hypotheses, test), details, alignment, engine)
        print_evaluation(one, several)
        write_evaluation(one, hypotheses, config)
        evaluations.append(one)
    return evaluations


def describe_references(test: TestSet) -> str:
    return f", {len(test.references)} references each" if len(test.references) > 1 else ""


def one_score(name: str, hypotheses: list[str], test: TestSet, config: EvaluateConfig, cuda: bool) -> MetricResult:
    if name == "comet":
        return comet(hypotheses, test, config.comet, config.resamples, int(cuda))
    return measure(name, hypotheses, test, resamples=config.resamples)


def training_counts(run: Run, config: EvaluateConfig) -> tuple[Counter[str], Counter[str]]:
    """Count each word of the training text, in both languages."""
    status("counting the words of the training text …")
    stored = stored_config(run, config)
    train = open_corpora(stored.data, stored.seed, status).train
    counts = count_words(train.source), count_words(train.target)
    status("")
    return counts


def in_detail(
    hypotheses: list[str], test: TestSet, counts: tuple[Counter[str], Counter[str]]
) -> dict[str, list[Group]]:
    """Break the score down by short and long sentences, common and rare words."""
    by_length = grouped_score("bleu", hypotheses, test, length_groups(test.source))
    rarest = source_frequency_groups(test.source, counts[0])
    return {
        "BLEU by words of the source": by_length,
        "chrF by the rarest source word's count in training": grouped_score("chrf", hypotheses, test, rarest),
        "F1 of words by their count in training": by_target_frequency(hypotheses, test.references[0], counts[1]),
    }


def print_evaluation(one: Evaluated, several: bool) -> None:
    if not several:
        for score in one.scores:
            print(f"{score.name:10} {score!s:15} {score.signature}")
    print(f"length     {one.errors}")
    if one.alignment:
        print(f"AER        {one.alignment}")
    for title, groups in one.details.items():
        print(f"\n{title}")
        for group in groups:
            print(f"    {group.label:>14}  {group.value:6.2f}  {bar(group.value)}  ({group.count:,})")


def bar(value: float, width: int = 30) -> str:
    """Draw a value from 0 to 100 as a bar."""
    full = round(width * min(max(value, 0.0), 100.0) / 100)
    return "█" * full + "·" * (width - full)


def score_table(evaluations: Sequence[Evaluated], metrics: Sequence[str]) -> list[str]:
    """Print a table of runs for each test set, the best score of each metric starred; then the signatures."""
    tests = {(one.test.name, one.test.key): f"{one.test.name}, {len(one.test):,}" for one in evaluations}
    width = max(len(one.run.folder.name) for one in evaluations) + 2
    first = max(map(len, ["test set, pairs", *tests.values()])) + 2
    lines = [f"{'test set, pairs':{first}}{'run':{width}}" + "".join(f"{TITLES[metric]:>16}" for metric in metrics)]
    for test, name in tests.items():
        rows = [one for one in evaluations if (one.test.name, one.test.key) == test]
        best = [
            (min if metric in LOWER_IS_BETTER else max)(one.scores[i].value for one in rows)
            for i, metric in enumerate(metrics)
        ]
        for i, one in enumerate(rows):
            cells = [
                f"{score}{'*' if len(rows) > 1 and score.value == top else ' '}"
                for score, top in zip(one.scores, best, strict=True)
            ]
            shown = "".join(f"{cell:>16}" for cell in cells)
            lines.append(f"{'' if i else name:{first}}{one.run.folder.name:{width}}{shown}")
    signatures = dict.fromkeys((score.name, score.signature) for one in evaluations for score in one.scores)
    return [*lines, "", *(f"{name:10} {signature}" for name, signature in signatures)]


def write_evaluation(one: Evaluated, hypotheses: list[str], config: EvaluateConfig) -> None:
    """Write the hypotheses, one per line, and a file of all measurements."""
    measured = {
        "scores": {name: asdict(score) for name, score in zip(config.metrics, one.scores, strict=True)},
        "lengths": asdict(one.errors),
        "alignment": asdict(one.alignment) if one.alignment else None,
        "details": {title: [asdict(group) for group in groups] for title, groups in one.details.items()},
        "engine": one.engine,
        "config": configs.to_dict(config),
    }
    path = write_translations(one.run, one.test, hypotheses, config, measured, one.engine)
    print(f"written    {path}, {path.with_suffix('.json').name}")
