"""How the program ends after an error: one line for each problem, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from seq2seq.utils.errors import UserError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with one line for each problem that the user can fix; other errors keep their traceback."""
    try:
        yield
    except UserError as error:
        fail(*error.problems, code=error.code)
    except BrokenPipeError:
        # Exit quietly after a closed pipe, as in `seq2seq translate | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(141) from None
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        from seq2seq.utils.device import out_of_memory

        if not out_of_memory(error):
            raise
        fail("out of memory; lower training.tokens or search.tokens, or use a smaller model")


def fail(*problems: str, code: int = 1) -> NoReturn:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(code)
