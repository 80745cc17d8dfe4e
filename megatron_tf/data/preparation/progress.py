"""The progress of a preparation: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

import rich.console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_tf.data.preparation.record_types import BadSample

SECONDS_BETWEEN_LINES = 10.0
BAD_RECORDS_SHOWN = 20
DOCUMENTS = "documents"  # what is prepared, as messages call it


@dataclass(frozen=True)
class Advance:
    """Work done since the last `Advance`."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    input_bytes: int = 0  # of the input files, before decompression


class Observer(Protocol):
    def advance(self, done: Advance) -> None: ...

    def bad_record(self, sample: BadSample) -> None:
        """Called for each record that was left out."""


class ProgressDisplay:
    """Counts, and shows the counts with their rates. Use it as a context manager once the total is known."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._clock = clock
        self._bar: Progress | None = None
        self._unit = DOCUMENTS
        self.documents = self.text_bytes = self.tokens = self.input_bytes = self.skipped = 0
        self._started = self._shown = clock()

    def start(self, total_bytes: int, unit: str = DOCUMENTS) -> None:
        """Begin. `total_bytes`: of the input files to be read. `unit`: what is counted; only documents have tokens."""
        self._unit = unit
        self._started = self._shown = self._clock()
        if self._stream.isatty():
            self._bar = Progress(
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=rich.console.Console(file=self._stream),
            )
            self._bar.add_task(self._text(), total=max(total_bytes, 1))
            self._bar.start()

    def advance(self, done: Advance) -> None:
        self.documents += done.documents
        self.text_bytes += done.text_bytes
        self.tokens += done.tokens
        self.input_bytes += done.input_bytes
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.input_bytes, description=self._text())
        elif self._clock() - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = self._clock()
            self.note(self._text())

    def bad_record(self, sample: BadSample) -> None:
        self.skipped += 1
        if self.skipped <= BAD_RECORDS_SHOWN:
            self.note(f"skipped {sample.file}:{sample.line}: {sample.reason}")
        if self.skipped == BAD_RECORDS_SHOWN:
            self.note("further bad records are counted in the report only")

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def stop(self) -> None:
        """Remove the bar, and show the final counts if anything was counted."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.documents or self.skipped:
            self.note(self._text())

    def _text(self) -> str:
        seconds = max(self._clock() - self._started, 1e-9)
        tokens = f"{self.tokens} tokens ({self.tokens / seconds:.0f}/s), " if self._unit == DOCUMENTS else ""
        return (
            f"{self.documents} {self._unit} ({self.documents / seconds:.0f}/s), {self.text_bytes / 1e6:.1f} MB "
            f"({self.text_bytes / 1e6 / seconds:.2f} MB/s), {tokens}{self.skipped} skipped"
        )
