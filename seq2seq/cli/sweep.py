"""A sweep: every job is checked before the first starts, Hydra launches them, a table compares the results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from seq2seq.cli.compose import check_job
from seq2seq.cli.errors import exit_on_error
from seq2seq.cli.jobs import run_job
from seq2seq.cli.overrides import Override, expand_sweep
from seq2seq.utils.errors import UserError

# A run keeps its own config, log and folder, so Hydra writes nothing and never changes the directory.
QUIET = (
    "hydra.mode=MULTIRUN",
    "hydra.job.chdir=false",
    "hydra.output_subdir=null",
    "hydra.sweep.dir=${outputs}/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


class FinishedJob(NamedTuple):
    """A finished job of a sweep: its run, its swept values, and the folder of the sweep."""

    run: Path
    swept: dict[str, str]
    sweep: Path


def run_sweep(command: str, overrides: list[Override]) -> None:
    """Check all jobs of a sweep, then let Hydra's sweeper and launcher run them."""
    from hydra.core.global_hydra import GlobalHydra

    check_sweep(command, overrides)
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    texts = [*QUIET, *(override.input_line for override in overrides)]
    finished: list[FinishedJob] = []
    hydra: Any = GlobalHydra.instance().hydra
    try:
        hydra.multirun(command, job_runner(command, swept, finished), texts)
    finally:
        if command == "train" and swept and finished:
            print_sweep(finished)


def check_sweep(command: str, overrides: list[Override]) -> None:
    """Raise a UserError that lists the problems of all jobs."""
    problems: dict[str, None] = {}  # in order, each once
    for job in expand_sweep(overrides):
        problems |= dict.fromkeys(check_job(command, job)[1])
    if problems:
        raise UserError(*problems, code=2)


def job_runner(command: str, swept: list[str], finished: list[FinishedJob]) -> Callable[[Any], None]:
    """Return what Hydra calls for each job; `swept` names the keys in which jobs differ, `finished` collects them."""

    def run_composed(composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        overrides = list(HydraConfig.get().overrides.task)
        given = dict(text.partition("=")[::2] for text in overrides)
        with exit_on_error():
            values: Any = OmegaConf.to_container(composed, resolve=True)
            if command == "train" and swept and "name" not in swept:
                values["name"] = sweep_name(values["name"], given, swept)
            run_job(command, values, overrides)
        if command == "train":
            run = Path(values["outputs"]) / values["name"]
            swept_values = {key: value for key, value in given.items() if key in swept}
            finished.append(FinishedJob(run, swept_values, Path(HydraConfig.get().sweep.dir)))

    return run_composed


def sweep_name(name: str, given: dict[str, str], swept: list[str]) -> str:
    """Add the swept values to the run's name, one folder per job; a model already in the name is not repeated."""
    for key, value in given.items():
        if key in swept and not ("." not in key and value in name.split("-")):
            name += "-" + re.sub(r"[^\w.+-]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")
    return name


def print_sweep(finished: list[FinishedJob]) -> None:
    """Print the results of a sweep's finished runs side by side."""
    from seq2seq.reporting.sweep import Job, write_summary
    from seq2seq.utils.run import Run

    print()
    for line in write_summary([Job(Run(run), swept) for run, swept, _ in finished], finished[0].sweep):
        print(line)
