"""What a person reads while a run goes on: lines on the terminal and in train.log, and a progress bar."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_tf.errors import UserError


class Console:
    """Lines to the terminal and to `log_path`, from the main rank; the others only warn.

    `log_path` is appended to, so that a resumed run continues its log; None keeps no log. UserError when it cannot
    be opened; a log that fails later (a full disk) is given up with one warning, since it must not end the run.
    `terminal` and `errors` default to the standard streams; `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        is_main: bool,
        log_path: Path | None,
        rank: int = 0,
        *,
        terminal: TextIO | None = None,
        errors: TextIO | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._is_main, self._rank, self._clock = is_main, rank, clock
        self._terminal, self._errors = terminal or sys.stdout, errors or sys.stderr
        # All output to a terminal goes through rich, which keeps a live progress bar below the lines.
        self._rich = RichConsole(file=self._terminal) if is_main and self._terminal.isatty() else None
        self._log = _open_log(log_path) if is_main and log_path is not None else None

    def info(self, message: str) -> None:
        """A line with a time stamp."""
        if self._is_main:
            self._write(f"{self._now()} {message}")

    def warning(self, message: str) -> None:
        """A line that asks for attention; from other ranks than the main one to stderr, with their rank."""
        if self._is_main:
            self._write(f"{self._now()} WARNING {message}")
        else:
            print(f"{self._now()} WARNING rank {self._rank}: {message}", file=self._errors, flush=True)

    def plain(self, text: str) -> None:
        """Text as it is, such as a table."""
        if self._is_main:
            self._write(text)

    @contextmanager
    def progress(self, total: int, start: int = 0, label: str = "") -> Iterator[ProgressBar]:
        """A bar with the time that is left, from `start` to `total` steps; nothing where there is no terminal.

        The bar vanishes at the end, so that what stays on the terminal is what train.log holds.
        """
        if self._rich is None:
            yield _NoBar()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        # redirect_*: what others print would tear the bar
        with Progress(*columns, console=self._rich, transient=True, speed_estimate_period=300) as bars:
            yield _Bar(bars, bars.add_task(label, total=total, completed=start))

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _now(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._clock()))

    def _write(self, text: str) -> None:
        if self._rich is not None:
            # plain text: no markup, no colours for numbers, no breaks at the terminal's width
            self._rich.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(text, file=self._terminal, flush=True)
        if self._log is None:
            return
        try:
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as error:
            name, self._log = self._log.name, None
            self.warning(f"{name} cannot be written ({error.strerror}); the log ends here, the run goes on")


class ProgressBar(Protocol):
    def update(self, completed: int) -> None:
        """Show that `completed` steps of the total are done."""


class _NoBar:
    def update(self, completed: int) -> None:
        pass


class _Bar:
    def __init__(self, bars: Progress, task: int):
        self._bars, self._task = bars, task

    def update(self, completed: int) -> None:
        self._bars.update(self._task, completed=completed)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """Keep DeepSpeed's chatter away: everything below a warning, its guess that a CPU was not meant, and its remark
    that it has not tested our optimizer; and torch's about names that DeepSpeed still calls by.

    To be called before deepspeed is imported, because that guess is logged by the import. Calling it again is
    harmless.
    """
    logger = logging.getLogger("DeepSpeed")  # importing it sets level and handlers anew but keeps the filters
    if _is_worth_reading not in logger.filters:
        logger.addFilter(_is_worth_reading)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    remarks = ("Setting accelerator to CPU", "untested optimizer")
    return record.levelno >= logging.WARNING and not any(remark in record.getMessage() for remark in remarks)


def _open_log(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run.dir: {path} cannot be written: {error.strerror}. Choose a folder that this user may write to."
        ) from None
