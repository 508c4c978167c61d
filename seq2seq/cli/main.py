"""Command line → checked, typed config → one call. Each command is a Hydra application."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from seq2seq import __version__
from seq2seq.config import loading, schema
from seq2seq.config.paths import CONFIGS
from seq2seq.config.renamed import RENAMED
from seq2seq.utils.errors import STOPPED, UserError, nearest, reason_of

COMMANDS: dict[str, tuple[type, str]] = {
    "train": (schema.TrainConfig, "train a model on a parallel corpus"),
    "doctor": (schema.DoctorConfig, "check a corpus for problems before training"),
    "evaluate": (schema.EvaluateConfig, "score trained runs on test sets, with confidence intervals"),
    "compare": (schema.CompareConfig, "test whether one run is significantly better than another"),
    "report": (schema.ReportConfig, "write an offline HTML report on a run: curves, scores, attention, examples"),
    "reproduce": (schema.ReproduceConfig, "retrain a run and compare the scores"),
    "translate": (schema.TranslateConfig, "translate interactively, or translate files and pipes"),
    "export": (schema.ExportConfig, "convert a run to CTranslate2 and verify its output"),
    "score": (schema.ScoreConfig, "compute the probability of given translations"),
}

EXAMPLES = {
    "train": """\
seq2seq train                                     a Transformer on the built-in corpus, a few minutes
seq2seq train model=lstm name=my-lstm             an LSTM under its own run name
seq2seq train data=multi30k data.path=FOLDER      a local copy of a hub corpus
seq2seq train data.train=[a.en,a.de]              your own files; validation and test pairs are split off
seq2seq train -m model=lstm,transformer seed=1,2  a sweep: one run per combination""",
    "doctor": """\
seq2seq doctor                                    the built-in corpus
seq2seq doctor data=multi30k data.path=FOLDER     a local copy of a hub corpus
seq2seq doctor data.train=[a.en,a.de]             two plain text files
seq2seq doctor data.train=corpus.tsv data.source=en data.target=de
seq2seq doctor data=multi30k json=true            the findings as JSON""",
    "evaluate": """\
seq2seq evaluate                                  the newest run on its test set with beam search
seq2seq evaluate my-lstm search=greedy            another run, greedy search
seq2seq evaluate my-lstm source=a.en reference=[a.de,b.de]   your own files, with two references
seq2seq evaluate a b split=[validation,test] detail=true     two runs, two test sets, detailed scores
seq2seq evaluate my-lstm public=wmt14 metrics=[bleu,comet]   a public test set from sacreBLEU""",
    "compare": """\
seq2seq compare my-lstm my-transformer            the second against the first, on their test set
seq2seq compare a b c search=greedy sentences=5   two runs against the first, greedy search
seq2seq compare a b source=a.en reference=a.de    on your own files
seq2seq compare a b metrics=[bleu,chrf++,ter]     other metrics
seq2seq compare run=[a,b] split=validation        the same as seq2seq compare a b split=validation""",
    "report": """\
seq2seq report                                    the newest run: outputs/<name>/report.html
seq2seq report my-lstm output=page.html           another run, to a given file
seq2seq report my-lstm show=[3,17]                also show attention for these sentences
seq2seq report my-lstm source=a.en reference=a.de   on your own files
seq2seq report my-lstm search=greedy              with greedy search""",
    "reproduce": """\
seq2seq reproduce                                 retrain the newest run
seq2seq reproduce my-lstm                         another run; the new one is my-lstm-again
seq2seq reproduce my-lstm name=second             under a given name
seq2seq reproduce my-lstm data_path=FOLDER        the corpus has moved to FOLDER
seq2seq reproduce my-lstm device=cpu              on another device""",
    "translate": """\
seq2seq translate                                 an interactive prompt with the newest run
seq2seq translate run=my-lstm < a.en > a.de       a filter: one output line per input line
seq2seq translate run=my-lstm input=a.en output=a.de      the same, with files
seq2seq translate run=my-lstm search.beam=8 search.n_best=3
echo "The dog sleeps." | seq2seq translate search=greedy""",
    "export": """\
seq2seq export                                    the newest run, in float32
seq2seq export run=my-run quantization=int8       a quarter of the size; reports its agreement with float32
seq2seq export run=my-run output=FOLDER overwrite=true
seq2seq export run=my-run sentences=1000          verify on more sentences
seq2seq export run=my-run data_path=FOLDER        the corpus has moved to FOLDER""",
    "score": """\
seq2seq score source=a.en target=a.de             one line per pair: log probability, subwords, perplexity
seq2seq score source=a.en target=a.de summary=true        the overall perplexity
seq2seq score run=my-lstm < pairs.tsv             tab-separated source and target
seq2seq score source=a.en target=a.de output=a.scores     write to a file
seq2seq score run=[my-lstm,my-transformer] source=a.en target=a.de   an ensemble""",
}

# A run keeps its own config, log and folder, so Hydra writes nothing and never changes the directory.
QUIET = (
    "hydra.job.chdir=false",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${outputs}/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir=.",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def main() -> None:
    """The `seq2seq` program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot encode an arrow shows a question mark
    # Exit as after an error, so that partial files are removed; training installs a handler that replaces this one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except BrokenPipeError:
        exit_after_broken_pipe()


def exit_after_broken_pipe() -> NoReturn:
    """Exit quietly after a closed pipe, as in `seq2seq translate | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(141)


def dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(overview())
    elif command == "--version":
        print(f"seq2seq {__version__}")
    elif command not in COMMANDS:
        possible = ", ".join(COMMANDS)
        raise UserError(f"{command}: no such command; possible: {possible}{nearest(command, COMMANDS)}", code=2)
    elif {"-h", "--help"} & set(arguments):
        print(command_help(command, [a for a in arguments[1:] if not a.startswith("-")]))
    else:
        run_command(command, arguments[1:])
    sys.stdout.flush()


def fail(error: UserError) -> NoReturn:
    """Print each problem on one line, and exit with the error's code."""
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(error.code)


# ---------------------------------------------------------------------------------------------- help


def overview() -> str:
    commands = "\n".join(f"  seq2seq {name:10} {purpose}" for name, (_, purpose) in COMMANDS.items())
    return (
        f"seq2seq {__version__}: train a translator from scratch, measure it, and use it.\n\n{commands}\n\n"
        f"Examples\n{_indented(EXAMPLES['train'])}\n{_indented(EXAMPLES['evaluate'].splitlines()[0])}\n"
        f"{_indented(EXAMPLES['translate'].splitlines()[0])}\n\n"
        "seq2seq COMMAND --help lists the groups, choices and keys of a command."
    )


def command_help(command: str, topics: list[str]) -> str:
    """Describe a command: its purpose, groups with their choices, keys, and examples."""
    if topics:
        return "\n".join(group_help(topic) for topic in topics)
    text = (CONFIGS / f"{command}.yaml").read_text(encoding="utf-8")
    defaults = groups_of(command)
    groups = "\n".join(
        f"  {f'{group}={default}':22} {', '.join(choices(group))}" for group, default in defaults.items()
    )
    keys = "\n".join(line for line in text.splitlines() if re.match(r"\w+:.*#", line))
    return (
        f"seq2seq {command}: {COMMANDS[command][1]}\n\n"
        f"Config groups: default, then all choices\n{groups}\n\n"
        f"Keys: default, then description\n{_indented(keys)}\n\n"
        f"Examples\n{_indented(EXAMPLES[command])}\n\n"
        f"More\n  seq2seq {command} --help GROUP=CHOICE  the documented keys of one choice\n"
        f"  seq2seq {command} --cfg job            print the resolved config without running\n"
        f"  seq2seq {command} --config-dir FOLDER  add your own YAML files to the groups\n"
        f"  seq2seq {command} -m KEY=A,B           a sweep: one run per value"
    )


def groups_of(command: str) -> dict[str, str]:
    """Return the config groups of a command, with their default choices."""
    text = (CONFIGS / f"{command}.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (\w+): (\w+)", text, re.MULTILINE))


def group_help(topic: str) -> str:
    """Return the commented YAML of a group's choice and of its bases (`model=lstm`), or of all choices (`model`)."""
    group, _, choice = topic.partition("=")
    group = group.partition(".")[0]
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
    if group not in groups:
        raise UserError(f"{group}: no such group; possible: {', '.join(groups)}{nearest(group, groups)}", code=2)
    if choice and choice not in choices(group):
        raise UserError(_unknown_choice(group, choice, choices(group)), code=2)
    sections = []
    for name in [choice] if choice else choices(group):
        text = (CONFIGS / group / f"{name}.yaml").read_text(encoding="utf-8")
        sections.append(f"{group}={name}\n{_indented(text)}\n")
        parents = re.findall(r"^  - (\w+)$", text, re.MULTILINE) if choice else []
        sections += [group_help(f"{group}={parent}") for parent in parents if parent != "_self_"]
    return "\n".join(sections)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _unknown_choice(group: str, choice: object, possible: Iterable[str]) -> str:
    possible = list(possible)
    return f"{group}: {choice!r} is not a choice; possible: {', '.join(possible)}{nearest(str(choice), possible)}"


# ------------------------------------------------------------------------------------------- running


def run_command(command: str, arguments: list[str]) -> None:
    """Check every job of the command line, then let Hydra run them."""
    import hydra
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _usage_error  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(arguments)
    if args.config_name or args.config_path:
        raise UserError("--config-name, --config-path: the configs are fixed; add your own with --config-dir", code=2)
    inspecting = args.cfg or args.info or args.hydra_help or args.shell_completion
    given = set(args.overrides)
    overrides, swept = check(
        command, with_runs(command, args.overrides), args.multirun, args.config_dir, bool(inspecting)
    )
    flags = [argument for argument in arguments if argument not in given]
    resolved = ["--resolve"] if args.cfg == "job" and not args.resolve else []
    sys.argv = [f"seq2seq {command}", *QUIET, *overrides, *flags, *resolved]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    logging.raiseExceptions = False  # a closed pipe, as in `--info | head`, is no error
    finished: list[FinishedJob] = []
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=command)(task(command, swept, finished))()
    finally:
        if command == "train" and swept and finished:
            print_sweep(finished)


def _usage_error(message: str) -> NoReturn:
    raise UserError(f"{message}; see seq2seq COMMAND --help", code=2)


class FinishedJob(NamedTuple):
    """A finished job of a sweep: its run, its swept values, and the folder of the sweep."""

    run: Path
    swept: dict[str, str]
    sweep: Path


def print_sweep(finished: list[FinishedJob]) -> None:
    """Print the results of a sweep's finished runs side by side."""
    from seq2seq.reporting.sweep import Job, write_summary
    from seq2seq.utils.run import Run

    print()
    for line in write_summary([Job(Run(run), swept) for run, swept, _ in finished], finished[0].sweep):
        print(line)


def task(command: str, swept: list[str], finished: list[FinishedJob]) -> Callable[[Any], None]:
    """Return Hydra's task function; `swept` names the keys that differ between jobs, `finished` collects the jobs."""

    def job(composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        try:
            override_texts = list(HydraConfig.get().overrides.task)
            run_job(command, composed, override_texts, swept)
            if command == "train":
                values = dict(text.split("=", 1) for text in override_texts if text.partition("=")[0] in swept)
                run = Path(str(composed.outputs)) / str(composed.name)
                finished.append(FinishedJob(run, values, Path(HydraConfig.get().sweep.dir)))
        except UserError as error:
            fail(error)
        except BrokenPipeError:
            exit_after_broken_pipe()
        except OSError as error:
            fail(UserError(f"{error.filename or 'output'}: {error.strerror or error}"))
        except (RuntimeError, MemoryError) as error:
            from seq2seq.utils.device import out_of_memory

            if not out_of_memory(error):
                raise
            fail(UserError("out of memory; lower training.tokens or search.tokens, or use a smaller model"))

    return job


def run_job(command: str, composed: Any, override_texts: list[str], swept: list[str]) -> Any:
    """Run one job: merge its config with the stored one when resuming, check it, call the command."""
    from omegaconf import OmegaConf

    if command == "train":
        if swept and "name" not in swept:
            composed.name = sweep_name(str(composed.name), override_texts, swept)
        composed = resumed_config(composed, override_texts)
    checked = typed_config(command, OmegaConf.to_container(composed, resolve=True))
    module = importlib.import_module(f"seq2seq.cli.commands.{command}")
    return getattr(module, command)(checked)


def call(command: str, *overrides: str) -> Any:
    """Run a command from Python with command-line overrides, and return its result."""
    from hydra import compose, initialize_config_dir

    texts, _ = check(command, list(overrides), False, None)
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        composed = compose(command, texts)
    return run_job(command, composed, texts, [])


def sweep_name(name: str, override_texts: list[str], swept: list[str]) -> str:
    """Add the swept values to the run's name, one folder per job; a model already in the name is not repeated."""
    for key, _, value in (text.partition("=") for text in override_texts):
        if key in swept and not ("." not in key and value in name.split("-")):
            name += "-" + re.sub(r"[^\w.+-]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")
    return name


def resumed_config(composed: Any, override_texts: list[str]) -> Any:
    """Return the config of a resumed run: the stored one, where new overrides take precedence."""
    from omegaconf import OmegaConf

    from seq2seq.inference.checkpoint import read_plain_config
    from seq2seq.utils.run import Run

    run = Run(Path(str(composed.outputs)) / str(composed.name))
    keys = [text.lstrip("+~").partition("=")[0] for text in override_texts]
    # A recipe is a complete config: it is compared with the stored one, not merged into it.
    if composed.overwrite or not run.exists or "experiment" in keys:
        return composed
    try:
        stored = run.checkpoint("last") / "config.yaml"
        merged = OmegaConf.create(loading.with_defaults(read_plain_config(stored)))
        for key in [*keys, "name", "outputs", "overwrite"]:
            if OmegaConf.select(composed, key) is not None or OmegaConf.select(merged, key) is not None:
                OmegaConf.update(merged, key, OmegaConf.select(composed, key), merge=False)
        typed_config("train", OmegaConf.to_container(merged, resolve=True))
    except (OSError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{run.folder}: its stored config is missing or damaged ({reason_of(error)})") from None
    return merged


# ------------------------------------------------------------------------------------------ checking


def check(
    command: str, texts: list[str], multirun: bool, config_dir: str | None, inspecting: bool = False
) -> tuple[list[str], list[str]]:
    """Check every job of a command line before anything runs → (overrides for Hydra, swept keys)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if config_dir and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir: {config_dir} is not a folder", code=2)
    search_path = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3", job_name="seq2seq"):
        loader = GlobalHydra.instance().config_loader()
        overrides = parse(with_files(with_runs(command, texts)), loader)
        several = [o for o in overrides if o.is_sweep_override()]
        swept = [o.key_or_group for o in several] if multirun else []
        # Without -m, `key=a,b` is a list, such as the two files of a split.
        lists = [] if multirun else several
        texts = [_as_list(o.input_line) if o in lists else o.input_line for o in overrides]
        problems: list[str] = []
        for job in jobs(overrides) if multirun else [parse(texts, loader)]:
            problems += (p for p in job_problems(command, job, loader, search_path) if p not in problems)
    if problems and not inspecting:
        raise UserError(*problems, code=2)
    return texts, swept


def parse(texts: list[str], loader: Any) -> list[Any]:
    """Parse override texts into Hydra's override objects."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed, problems = OverridesParser.create(config_loader=loader), [], []
    for text in texts:
        for attempt in (text, *([quoted(text)] if "=" in text else [])):
            try:
                parsed += parser.parse_overrides([attempt])
                break
            except HydraException:
                continue
        else:
            problems.append(f"{text}: not understood; write key=value, as in training.updates=500")
    if problems:
        raise UserError(*problems, code=2)
    return parsed


def with_runs(command: str, texts: list[str]) -> list[str]:
    """Convert bare words to run names: `compare a b` means run=[a,b]."""
    names = [text for text in texts if "=" not in text and not text.startswith("~")]
    hints = typing.get_type_hints(COMMANDS[command][0])
    if not names or "run" not in hints:
        return texts
    several = len(names) > 1 or hints["run"] == list[str] | None
    return [
        *(text for text in texts if text not in names),
        f"run=[{','.join(names)}]" if several else f"run={names[0]}",
    ]


def with_files(texts: list[str]) -> list[str]:
    """Select data=files for named training files, which must not get the default corpus's validation pairs."""
    names = any(text.startswith("data.train=") and set(text.partition("=")[2]) & set("[,./") for text in texts)
    chosen = any(text.startswith(("data=", "data.path=", "experiment=")) for text in texts)
    return ["data=files", *texts] if names and not chosen else texts


def quoted(text: str) -> str:
    """Quote values: Hydra accepts other alphabets, spaces and symbols only inside quotes."""
    key, _, value = text.partition("=")
    parts = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
    inside = ",".join('"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' for part in parts)
    return f"{key}=[{inside}]" if len(parts) > 1 or value.startswith("[") else f"{key}={inside}"


def jobs(overrides: list[Any]) -> list[list[Any]]:
    """Expand a sweep into its jobs, each a list of plain overrides."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    batches = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [parser.parse_overrides(list(job)) for batch in batches for job in batch]


def job_problems(command: str, overrides: list[Any], loader: Any, search_path: list[str]) -> list[str]:
    """List all errors of one job: unknown groups, choices and keys first, then types and contradictions."""
    from hydra import compose
    from hydra.core.object_type import ObjectType
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = groups_of(command)
    problems: list[str] = []
    accepted = list(search_path)
    values = []
    for override in overrides:
        group = override.key_or_group.partition("@")[0]
        if group not in groups or override.is_delete():
            values.append(override)
            continue
        options = loader.get_group_options(group, ObjectType.CONFIG, command, search_path)
        if isinstance(override.value(), list):
            problems.append(f"{group}: {len(override.value())} choices given; to try each in turn, add -m")
        elif str(override.value()) in options or override.value() is None:
            accepted.append(override.input_line)
        else:
            problems.append(_unknown_choice(group, override.value(), options))
    try:
        known = _keys(OmegaConf.to_container(compose(command, accepted)))
        for override in values:
            key = override.key_or_group
            if key in known or key.startswith("hydra") or override.is_add() or override.is_delete():
                accepted.append(override.input_line)
            elif key in RENAMED:
                problems.append(f"{key}: this key is now {RENAMED[key]}")
            else:
                problems.append(f"{key}: no such key{nearest(key, [*known, *groups])}")
        composed = OmegaConf.to_container(compose(command, accepted), resolve=True)
        typed_config(command, composed)
    except UserError as error:
        problems += error.problems
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        problems.append(reason_of(error, limit=None))
    return problems


def typed_config(command: str, values: Any) -> Any:
    return loading.build_config(COMMANDS[command][0], values)


def load_config(command: str, *overrides: str) -> Any:
    """Return the typed config of a command line."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return typed_config(command, OmegaConf.to_container(compose(command, list(overrides)), resolve=True))


def _as_list(text: str) -> str:
    key, _, value = text.partition("=")
    return f"{key}=[{value}]"


def _keys(tree: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a nested config."""
    if not isinstance(tree, dict):
        return []
    return [k for key, value in tree.items() for k in (f"{prefix}{key}", *_keys(value, f"{prefix}{key}."))]
