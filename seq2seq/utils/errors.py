"""Errors that a user can fix: reported in one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

STOPPED = 130  # exit code of an interrupted program, by the convention of shells
REASON_LENGTH = 200  # characters: other libraries' messages may be as long as a file


class UserError(Exception):
    """Unusable input from the user; each problem is one line that says what to do."""

    def __init__(self, *problems: str, code: int = 1) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.code = code


def reason_of(error: BaseException | str, limit: int | None = REASON_LENGTH) -> str:
    """Return the message of another library's error in one line, or the name of its class if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the hint "; did you mean X?" if some choice is spelled like the word, else an empty string."""
    choices = list(choices)
    by_last_part = {choice.rpartition(".")[2]: choice for choice in choices}
    last_part = word.rpartition(".")[2]
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if last_part in by_last_part:
        matches = [by_last_part[last_part]]
    elif not matches:
        matches = [by_last_part[part] for part in difflib.get_close_matches(last_part, by_last_part, n=1)]
    return f"; did you mean {matches[0]}?" if matches else ""
