"""The program: its arguments → help, or parse, compose, check and call a command."""

from __future__ import annotations

import io
import signal
import sys
from typing import Any, NoReturn

from seq2seq import __version__
from seq2seq.cli.commands import COMMANDS
from seq2seq.cli.compose import compose_job, hydra_session
from seq2seq.cli.errors import exit_on_error
from seq2seq.cli.help import command_help, overview
from seq2seq.cli.jobs import call, load_config
from seq2seq.cli.overrides import Override, parse_overrides
from seq2seq.cli.sweep import run_sweep
from seq2seq.utils.errors import STOPPED, UserError, nearest

__all__ = ["call", "load_config", "main"]


def main() -> None:
    """The `seq2seq` program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot encode an arrow shows a question mark
    # Exit as after an error, so that partial files are removed; training installs a handler that replaces this one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with exit_on_error():
            dispatch(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None


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


def run_command(command: str, arguments: list[str]) -> None:
    """Run one job, run a sweep, or print the composed config."""
    options = parse_arguments(arguments)
    if not (options.multirun or options.cfg):
        call(command, *options.overrides, config_dir=options.config_dir)
        return
    with hydra_session(options.config_dir):
        overrides = parse_overrides(command, options.overrides, options.multirun)
        if options.multirun:
            run_sweep(command, overrides)
        else:
            print_config(command, overrides)


def parse_arguments(arguments: list[str]) -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; see seq2seq COMMAND --help", code=2)

    parser = Parser(add_help=False)
    parser.add_argument("overrides", nargs="*")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--cfg", "-c", choices=["job"])
    modes.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--resolve", action="store_true")  # what --cfg does anyway
    parser.add_argument("--config-dir", "-cd")
    return parser.parse_intermixed_args(arguments)


def print_config(command: str, overrides: list[Override]) -> None:
    """Print the resolved config, even if its values contradict each other."""
    from omegaconf import OmegaConf

    values, problems = compose_job(command, overrides)
    if problems:
        raise UserError(*problems, code=2)
    print(OmegaConf.to_yaml(OmegaConf.create(values)), end="")
