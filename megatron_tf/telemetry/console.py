"""The output of a run for people: time-stamped lines, a progress bar on a terminal, and train.log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Protocol, TextIO, cast

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from megatron_tf.caches import prepare_compiler
from megatron_tf.libraries import quiet_warnings
from megatron_tf.streams import Unfailing, discard
from megatron_tf.telemetry.line_file import LineFile

MEGABYTE = 10**6
ETA_WINDOW_SECONDS = 3600.0  # speed is averaged over this; rich's 30 s knows nothing when lines are minutes apart


class Bar(Protocol):
    def advance(self, done: int, text: str) -> None:
        """`done` of the total is reached (not: `done` more); `text` is shown next to the bar."""


class NoBar:
    """The bar without a terminal, and on every rank but the main one: it does nothing."""

    def advance(self, done: int, text: str) -> None:
        pass


class RichBar:
    def __init__(self, progress: Progress, task: TaskID):
        self._progress = progress
        self._task = task

    def advance(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, text=text)


class Console:
    """Lines of one rank.

    On rank 0 `info` and `warning` go to `output` (default stdout) and are appended to `log_path`. The other ranks keep
    `info` to themselves and send `warning` to `errors` (default stderr), with their rank, because it may be about them
    alone. A full disk, or a closed pipe at the output, loses lines but never stops the run.
    """

    def __init__(
        self,
        *,
        rank: int,
        log_path: Path | None = None,
        output: TextIO | None = None,
        errors: TextIO | None = None,
        now: Callable[[], datetime] = datetime.now,
    ):
        self._rank = rank
        self._is_main = rank == 0
        self._now = now
        self._output = sys.stdout if output is None else output
        self._errors = sys.stderr if errors is None else errors
        self._bar: Progress | None = None
        self._is_read = True
        self._log = LineFile(log_path, self.warning) if self._is_main and log_path is not None else None

    def info(self, text: str) -> None:
        if self._is_main:
            self._write(self._stamped(text))

    def warning(self, text: str) -> None:
        if self._is_main:
            self._write(self._stamped(f"WARNING: {text}"))
        else:
            _print_to(self._errors, self._stamped(f"[rank {self._rank}] WARNING: {text}"))

    @contextmanager
    def progress(self, total: int, start: int, label: str) -> Iterator[Bar]:
        """A bar that stands at `start` of `total`, while the block runs. Lines that are written then appear above it.

        The remaining time follows from the speed since `start`, so that a resumed run does not count what an
        earlier process did.
        """
        if not (self._is_main and _is_terminal(self._output)):
            yield NoBar()
            return
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=rich.console.Console(
                file=cast("TextIO", Unfailing(self._output)), force_terminal=True, force_jupyter=False
            ),
            refresh_per_second=2,
            speed_estimate_period=ETA_WINDOW_SECONDS,
        )
        task = bar.add_task(label, total=total, completed=start, text="")
        with bar:
            self._bar = bar
            try:
                yield RichBar(bar, task)
            finally:
                self._bar = None

    @contextmanager
    def bytes_written(self, total: int) -> Iterator[Callable[[int, str], None]]:
        """A bar over `total` bytes. Call what this yields with the bytes written so far and what is being written."""
        with self.progress(total // MEGABYTE, 0, "MB written") as bar:
            yield lambda done, text: bar.advance(done // MEGABYTE, text)

    def close(self) -> None:
        """Ends train.log; later lines go to the output only. May be called again."""
        self._log = None

    def _stamped(self, text: str) -> str:
        return f"{self._now():%Y-%m-%d %H:%M:%S}  {text}"

    def _write(self, line: str) -> None:
        if self._bar is None:
            is_read = _print_to(self._output, line)
            if self._is_read and not is_read and self._log is not None:
                self._log.append(self._stamped("WARNING: nobody reads the output any more; the run goes on"))
            self._is_read = is_read
        else:
            self._bar.console.print(
                _encodable(line, self._output), markup=False, highlight=False, emoji=False, soft_wrap=True
            )
        if self._log is not None:
            self._log.append(line)


def quiet_libraries() -> None:
    """Silences what libraries say about themselves; errors still show. For launch scripts, before deepspeed is
    imported.

    Without a CUDA device DeepSpeed is told to use the CPU; otherwise it would warn about it.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which torch does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a rank that is gone comes with a page of C++ stack

    prepare_compiler()

    import torch

    quiet_warnings()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _print_to(stream: TextIO, line: str) -> bool:
    """Prints a line. False when the stream cannot be used any more, because its reader has ended (`... | head`)."""
    try:
        stream.write(_encodable(line, stream) + "\n")
        stream.flush()
    except BrokenPipeError:
        discard(stream)
        return False
    except OSError:
        pass  # redirected to a full disk: what is buffered follows with a later line
    return True


def _encodable(line: str, stream: TextIO) -> str:
    """`line` without the characters that the stream's encoding lacks: a τ in a Latin-1 locale must not end a run."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)
