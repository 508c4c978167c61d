"""Help: the purpose of a command, its config groups, keys and examples, all read from configs/."""

from __future__ import annotations

from itertools import takewhile

from seq2seq import __version__
from seq2seq.cli.commands import COMMANDS
from seq2seq.config.loading import base_choices, default_choices, not_a_choice
from seq2seq.config.paths import CONFIGS, choices
from seq2seq.utils.errors import UserError, nearest


def overview() -> str:
    commands = "\n".join(f"  seq2seq {name:10} {purpose(name)}" for name in COMMANDS)
    shown = [*examples("train"), examples("evaluate")[0], examples("translate")[0]]
    return (
        f"seq2seq {__version__}: train a translator from scratch, measure it, and use it.\n\n{commands}\n\n"
        f"Examples\n{_indented(shown)}\n\n"
        "seq2seq COMMAND --help lists the groups, choices and keys of a command."
    )


def command_help(command: str, topics: list[str]) -> str:
    """Describe a command: its purpose, groups with their choices, keys, and examples."""
    if topics:
        return "\n".join(group_help(topic) for topic in topics)
    defaults = {group: f"{group}={choice or 'null'}" for group, choice in default_choices(command).items()}
    groups = [f"{default:22} {', '.join(choices(group))}" for group, default in defaults.items()]
    keys = [line for line in _lines(command) if line[:1].isalpha() and "#" in line]
    return (
        f"seq2seq {command}: {purpose(command)}\n\n"
        f"Config groups: default, then all choices\n{_indented(groups)}\n\n"
        f"Keys: default, then description\n{_indented(keys)}\n\n"
        f"Examples\n{_indented(examples(command))}\n\n"
        f"More\n  seq2seq {command} --help GROUP=CHOICE  the documented keys of one choice\n"
        f"  seq2seq {command} --cfg job            print the resolved config without running\n"
        f"  seq2seq {command} --config-dir FOLDER  add your own YAML files to the groups\n"
        f"  seq2seq {command} -m KEY=A,B           a sweep: one run per value"
    )


def purpose(command: str) -> str:
    """Return the purpose of a command, from the first line of its YAML file."""
    return _lines(command)[0].partition(": ")[2].removesuffix(".")


def examples(command: str) -> list[str]:
    """Return the examples in the head comment of a command's YAML file."""
    _, _, *lines = takewhile(lambda line: line.startswith("#"), _lines(command))
    return [line.removeprefix("#").strip() for line in lines]


def group_help(topic: str) -> str:
    """Return the commented YAML of a group's choice and of its bases (`model=lstm`), or of all choices (`model`)."""
    group, _, choice = topic.partition("=")
    group = group.partition(".")[0]
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
    if group not in groups:
        raise UserError(f"{group}: no such group; possible: {', '.join(groups)}{nearest(group, groups)}", code=2)
    if choice and choice not in choices(group):
        raise UserError(not_a_choice(group, choice, choices(group)), code=2)
    sections = []
    for name in [choice] if choice else choices(group):
        sections.append(f"{group}={name}\n{_indented(_lines(f'{group}/{name}'))}\n")
        if choice:
            sections += [group_help(f"{group}={base}") for base in base_choices(f"{group}/{name}")]
    return "\n".join(sections)


def _lines(name: str) -> list[str]:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()


def _indented(lines: list[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)
