"""Summary of a sweep: mean and deviation of every setting over its seeds, as a table, a CSV and a chart."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev

from seq2seq.inference.checkpoint import read_config
from seq2seq.utils.run import Run

SEED = "seed"  # only repeats a setting


@dataclass(frozen=True)
class Job:
    """One run of a sweep, with its swept values, such as {"model": "lstm", "seed": "1"}."""

    run: Run
    swept: dict[str, str]

    def scores(self) -> dict[str, float]:
        """Return the test scores; without a test set, the best validation score; nothing for an unfinished run."""
        try:
            result = json.loads(self.run.result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if "test" in result:
            return {name: result["test"][name] for name in ("bleu", "chrf")}
        return {"validation": result["progress"]["best_score"]}

    def held_out_by(self) -> str | None:
        """Return the settings that chose the pairs of the scores; None if these sets were given."""
        config = read_config(self.run.config)
        data = config.data
        if data.validation is not None or data.test is not None:
            return None
        corpora = (data.path, data.subset, data.revision, data.train, data.extra)
        return repr((config.seed, *corpora, data.filters, data.held_out))


@dataclass(frozen=True)
class Setting:
    """The scores of runs that differ only in their seeds."""

    values: dict[str, str]
    scores: dict[str, list[float]]  # by metric, one for each run

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.values.items()) or "all"


def settings_of(jobs: list[Job]) -> list[Setting]:
    """Group the jobs of a sweep by all values but the seed, in the order of the command line."""
    grouped: dict[tuple[tuple[str, str], ...], list[dict[str, float]]] = {}
    for job in jobs:
        values = tuple((key, value) for key, value in job.swept.items() if key != SEED)
        grouped.setdefault(values, []).append(job.scores())
    names = list(dict.fromkeys(name for repeats in grouped.values() for scores in repeats for name in scores))
    return [
        Setting(dict(values), {name: [scores[name] for scores in repeats if name in scores] for name in names})
        for values, repeats in grouped.items()
    ]


def write_summary(jobs: list[Job], folder: Path) -> list[str]:
    """Write table.csv, runs.csv and table.svg into a folder; return the lines of the table to print."""
    settings = settings_of(jobs)
    metrics = list(settings[0].scores)
    if not metrics:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.csv").write_text(settings_csv(settings), encoding="utf-8")
    (folder / "runs.csv").write_text(runs_csv(jobs), encoding="utf-8")
    (folder / "table.svg").write_text(draw_chart(settings, metrics[0]), encoding="utf-8")
    warnings = [DIFFERENT_SETS] if len({job.held_out_by() for job in jobs}) > 1 else []
    return [*table(settings), *warnings, f"written    {folder}: table.csv, runs.csv, table.svg"]


TITLES = {"bleu": "BLEU", "chrf": "chrF", "validation": "validation"}
LEGEND = "*          the best mean of its column"
DIFFERENT_SETS = (
    "warning    these runs have different test sets, as the seed, the corpus or its filters chose the held-out pairs; "
    "give data.validation and data.test"
)


def best_mean(settings: list[Setting], metric: str) -> float | None:
    """Return the highest mean of a metric; None unless several settings have one."""
    means = [mean(setting.scores[metric]) for setting in settings if setting.scores[metric]]
    return max(means) if len(means) > 1 else None


def table(settings: list[Setting]) -> list[str]:
    """Format mean ± standard deviation of each setting, with the best of each metric starred and a legend."""
    metrics = list(settings[0].scores)
    best = {name: best_mean(settings, name) for name in metrics}
    keys = list(settings[0].values) or [SEED]
    rows = [[*keys, "runs", *(TITLES[name] for name in metrics)]]
    for setting in settings:
        values = list(setting.values.values()) or ["any"]
        rows.append([*values, str(len(setting.scores[metrics[0]]))])
        rows[-1] += [
            format_mean(scores, mean(scores) == best[name]) if scores else "–"
            for name, scores in setting.scores.items()
        ]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines if set(best.values()) == {None} else [*lines, LEGEND]


def format_mean(scores: list[float], best: bool) -> str:
    spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{mean(scores):.2f}{spread}{' *' if best else ''}"


def settings_csv(settings: list[Setting]) -> str:
    """Format a row for each setting; a mean without scores and a deviation of one score are empty."""
    metrics = list(settings[0].scores)
    header = [*settings[0].values, "runs", *(f"{m}_{what}" for m in metrics for what in ("mean", "deviation"))]
    rows: list[list[object]] = [[*header]]
    for setting in settings:
        rows.append([*setting.values.values(), len(setting.scores[metrics[0]])])
        for scores in setting.scores.values():
            rows[-1] += [mean(scores) if scores else "", stdev(scores) if len(scores) > 1 else ""]
    return as_csv(rows)


def runs_csv(jobs: list[Job]) -> str:
    """Format a row for each run."""
    metrics = list(dict.fromkeys(name for job in jobs for name in job.scores()))
    rows = [[job.run.folder.name, *job.swept.values(), *(job.scores().get(m, "") for m in metrics)] for job in jobs]
    return as_csv([["run", *jobs[0].swept, *metrics], *rows])


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


STYLE = """text{font:13px system-ui,sans-serif;fill:#1f2933}.soft{fill:#66717d}.grid{stroke:#d9dee3}
.mean{stroke:#1b5fa8;stroke-width:3}.spread{stroke:#1b5fa8;stroke-width:8;stroke-opacity:.25}
.dot{fill:#1b5fa8;fill-opacity:.75}.best{font-weight:600}
@media(prefers-color-scheme:dark){svg{background:#14181d}text{fill:#e3e8ed}.soft{fill:#93a0ad}.grid{stroke:#313943}
.mean,.spread{stroke:#6db1f2}.dot{fill:#6db1f2}}"""


def band(scores: list[float]) -> tuple[float, float]:
    """Return mean ± deviation, cut at zero if no score is negative."""
    middle, spread = mean(scores), stdev(scores) if len(scores) > 1 else 0.0
    low = middle - spread
    return max(0.0, low) if min(scores) >= 0 else low, middle + spread


def axis(points: list[float]) -> tuple[float, float, list[float]]:
    """Return the ends of an axis that holds all points, and round ticks on it."""
    low, high = min(points), max(points)
    length = max(high - low, 0.05)
    step = 10.0 ** math.floor(math.log10(length))
    step *= next(multiple for multiple in (0.2, 0.5, 1, 2) if length / (step * multiple) <= 5)
    first = math.floor(low / step)
    ticks = [round(i * step, 6) for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
    return ticks[0], ticks[-1], ticks


PLOT_WIDTH, ROW_HEIGHT = 430, 34  # pixels
ScoreToX = Callable[[float], float]


def draw_chart(settings: list[Setting], metric: str) -> str:
    """Draw a row for each setting: each run a dot, their mean a stroke, their deviation a band."""
    rows = [(setting.name, setting.scores[metric]) for setting in settings if setting.scores[metric]]
    low, high, ticks = axis([point for _, scores in rows for point in (*scores, *band(scores))])
    left = 24 + 7.5 * max(len(name) for name, _ in rows)
    width, height = left + 570, 62 + ROW_HEIGHT * len(rows)

    def x(score: float) -> float:
        return round(left + PLOT_WIDTH * (score - low) / (high - low), 1)

    best = best_mean(settings, metric)
    title = TITLES[metric] + ("" if best is None else " (* the best mean)")
    parts = [f'<text class="soft" x="{left}" y="20">{title}</text>', *draw_grid(ticks, x, height)]
    for i, (name, scores) in enumerate(rows):
        y, is_best = 50 + ROW_HEIGHT * i, mean(scores) == best
        name_class = ' class="best"' if is_best else ""
        parts.append(f'<text{name_class} x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        parts += draw_scores(scores, x, y)
        parts.append(f'<text{name_class} x="{left + 440}" y="{y + 4}">{format_mean(scores, is_best)}</text>')
    size = f'width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(parts)}</svg>\n'


def draw_grid(ticks: list[float], x: ScoreToX, height: int) -> list[str]:
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="30" y2="{height - 28}"/>')
        parts.append(f'<text class="soft" x="{x(tick)}" y="{height - 10}" text-anchor="middle">{tick:g}</text>')
    return parts


def draw_scores(scores: list[float], x: ScoreToX, y: int) -> list[str]:
    (first, last), middle = map(x, band(scores)), x(mean(scores))
    return [
        f'<line class="spread" x1="{first}" x2="{last}" y1="{y}" y2="{y}"/>',
        *(f'<circle class="dot" cx="{x(score)}" cy="{y}" r="4"/>' for score in scores),
        f'<line class="mean" x1="{middle}" x2="{middle}" y1="{y - 9}" y2="{y + 9}"/>',
    ]
