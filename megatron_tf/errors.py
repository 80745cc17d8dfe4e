"""What a user can get wrong, as exceptions. Commands print these as one message and exit with code 2.

A message names the key or file, both numbers, and the remedy. Our own bugs stay plain exceptions
(`assert`, `RuntimeError`), so that a traceback always means a bug and never a user's mistake.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Base of everything that the user can mend."""


class ConfigError(UserError):
    """One or more problems of a run configuration, reported together.

    `problems`: one sentence each, of the form "section.field: what is wrong. Remedy."
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the configuration:\n  - "
        super().__init__(head + "\n  - ".join(self.problems))


class DataError(UserError):
    """Training data or a tokenizer is missing, broken, or does not fit the configuration."""


class CheckpointError(UserError):
    """A checkpoint is missing, broken, or belongs to another architecture."""


class LaunchError(UserError):
    """The launcher's environment contradicts itself, or the ranks cannot meet."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and turn what the user can mend into one message and an exit code.

    `UserError`: `error: <message>` on stderr, exit code 2. Control-C: exit code 130. A reader that closed
    the pipe (`... | head`): exit code 1, without a word. Everything else is our bug and keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()  # a closed pipe shows itself here and not in the interpreter's shutdown
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # What is still buffered would raise again when Python closes stdout: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
