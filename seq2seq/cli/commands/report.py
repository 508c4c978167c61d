"""seq2seq report: write one offline page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from seq2seq import __version__
from seq2seq.config.loading import search_preset, to_dict
from seq2seq.config.paths import CONFIGS
from seq2seq.config.schema import ReportConfig, SearchConfig, TrainConfig
from seq2seq.evaluation.alignment import alignment_of
from seq2seq.evaluation.diagnostics import grouped_score, length_groups, subset
from seq2seq.evaluation.metrics import (
    RESAMPLES,
    TestSet,
    measure,
    print_tokenizer_warning,
    require_tokenizer,
    sentence_scores,
)
from seq2seq.evaluation.testsets import cached_translations, describe_search, find_test_sets, stored_config
from seq2seq.inference.checkpoint import count_parameters
from seq2seq.inference.translator import Translator
from seq2seq.reporting import report as pages
from seq2seq.training import environment
from seq2seq.utils.console import hint, status
from seq2seq.utils.device import tune_cpu
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import output_stream
from seq2seq.utils.run import Run

GROUPS = ("data", "search")  # config groups, each given by a preset's name
METRICS = ("bleu", "bleu_lc", "chrf", "chrf++", "ter")


def report(config: ReportConfig) -> None:
    """Measure and inspect a run, and write the page."""
    run = Run.find(config.run, config.outputs)
    tests = find_test_sets(config, run)
    if len(tests) > 1:
        raise UserError("split, source, public: report uses one test set; name one", code=2)
    test = tests[0]
    wrong = [row for row in config.show if row > len(test)]
    if wrong:
        raise UserError(f"show: there is no sentence {wrong[0]}; {test.name} has {len(test):,}", code=2)
    print(f"run        {run.folder}, {run.checkpoint(config.checkpoint).name}")
    print(f"test set   {test.name}: {len(test):,} pairs")
    require_tokenizer(test.tokenize)
    print_tokenizer_warning(test)
    tune_cpu()
    output = Path(config.output) if config.output else run.folder / "report.html"
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(
            f"output: {output} cannot be written (the folder does not exist, or the path is a folder); name a file"
        )
    page = pages.page(gather(run, test, config))
    with output_stream(str(output)) as out:
        out.write(page)
    status("")
    print(f"written    {output} ({output.stat().st_size / 1e6:.1f} MB)")


def gather(run: Run, test: TestSet, config: ReportConfig) -> pages.Report:
    """Collect the contents of the page."""
    stored = stored_config(run, config)
    hypotheses = cached_translations(run, test, config)
    status("measuring …")
    groups = length_groups(test.source)
    metrics, starts = pages.read_metrics(run), environment.read(run)
    folder = run.checkpoint(config.checkpoint)
    translator = Translator.from_checkpoint(folder, config.device, config.precision).use_processes(config.processes)
    sentences = pages.sentences(hypotheses, test, config.sentences)
    status("reading attention …")
    return pages.Report(
        run=run_facts(run, test, config, stored, count_parameters(folder)),
        totals=pages.training_totals(run),
        scores=[measure(name, hypotheses, test, resamples=RESAMPLES) for name in METRICS],
        lengths=grouped_score("bleu", hypotheses, test, groups),
        curves=pages.curves(metrics),
        time=pages.time_spent(metrics),
        sentences=sentences,
        attention=attention_plots(translator, test, sentences, config),
        alignment=pages.alignment(alignment_of(translator, test)),
        config=yaml.safe_dump(to_dict(stored), sort_keys=False, allow_unicode=True),
        environment=starts[-1] if starts else None,
        commands=reproduction_commands(run, config),
        version=__version__,
    )


def run_facts(run: Run, test: TestSet, config: ReportConfig, stored: TrainConfig, parameters: int) -> pages.RunFacts:
    return pages.RunFacts(
        name=stored.name,
        checkpoint=run.checkpoint(config.checkpoint).name,
        model=stored.model.name,
        family=stored.model.family,
        parameters=parameters,
        corpus=stored.data.name,
        source_language=stored.data.languages[0],
        target_language=stored.data.languages[1],
        test_set=test.name,
        pairs=len(test),
        search=describe_search(config.search),
    )


def attention_plots(
    translator: Translator, test: TestSet, sentences: pages.Sentences, config: ReportConfig
) -> list[pages.AttentionPlot]:
    """Return attention for the requested sentences, some of every length, and a few of the worst and best."""
    worst, best = ([example.index for example in group.examples] for group in sentences.groups[:2])
    rows = [*(row - 1 for row in config.show), *pages.typical(test, 8), *worst[:4], *best[:2]]
    # An empty sentence has no attention.
    rows = [row for row in dict.fromkeys(rows) if test.source[row].strip()]
    translations = translator.translate([test.source[row] for row in rows], config.search, attention=True)
    plots = []
    for row, (translation, *_) in zip(rows, translations, strict=True):
        (score,) = sentence_scores([translation.text], subset(test, [row]))
        plots.append(pages.attention_plot(pages.example(row, translation.text, test, score), translation))
    return plots


def reproduction_commands(run: Run, config: ReportConfig) -> list[str]:
    """Return the commands that reproduce the run, its scores and this page, with its settings."""
    defaults = yaml.safe_load((CONFIGS / "report.yaml").read_text(encoding="utf-8"))
    overrides = {key: value for key, value in vars(config).items() if key not in GROUPS and value != defaults[key]}
    if config.data:
        overrides["data"] = config.data.name
    overrides |= search_overrides(config.search)
    overrides["run"] = run.folder.name if run.folder.parent == Path(config.outputs) else str(run.folder)
    common: dict[str, Any] = {
        key: overrides[key] for key in ("run", "outputs", "device", "data_path") if key in overrides
    }
    scores = {key: value for key, value in overrides.items() if key not in ("output", "show", "sentences")}
    commands: dict[str, dict[str, Any]] = {"reproduce": common, "evaluate": scores, "report": overrides}
    return [
        hint(command, **{key: format_override(value) for key, value in settings.items()})
        for command, settings in commands.items()
    ]


def search_overrides(search: SearchConfig) -> dict[str, Any]:
    """Name the preset of a search, or its differences from the default."""
    for preset in sorted((CONFIGS / "search").glob("*.yaml")):
        if search == search_preset(preset.stem):
            return {} if preset.stem == "beam" else {"search": preset.stem}
    defaults = vars(search_preset("beam"))
    return {f"search.{key}": value for key, value in vars(search).items() if value != defaults[key]}


def format_override(value: Any) -> str:
    """Format a value as on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(format_override, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
