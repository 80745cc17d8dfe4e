"""Ends a run that hangs, and says which rank is to blame.

A rank that is stopped, cut off or stuck leaves all others waiting in a collective, where they can say nothing. So each
rank has a thread that says "alive" through the store in which the ranks met, with the last step that rank has finished.
When no step ends for too long, the threads look who has fallen silent, write where their own rank waits, and exit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tf.errors import exit_now
from megatron_tf.telemetry.console import Console

HANG_EXIT_CODE = 1
SHORTEST_SILENCE = 0.25  # seconds between two words of a rank, however fast it steps


@dataclass(frozen=True)
class _Word:
    """What a rank says: `number` grows each time, so one that stays is a rank that has fallen silent."""

    host: str
    step: int
    number: int


class Watchdog:
    """Watches one rank from its first `beat` until `close`; all ranks have one."""

    def __init__(self, rank: int, world_size: int, hang_seconds: float, run_dir: Path, console: Console, step: int = 0):
        """`hang_seconds`: longest time from one beat to the next. Stacks go to run_dir/hang-rank<N>.txt."""
        self._rank, self._world_size, self._hang_seconds = rank, world_size, hang_seconds
        self._run_dir, self._console = run_dir, console
        self._interval = min(2.0, hang_seconds / 4)
        self._store = dist.PrefixStore(f"alive in {run_dir}", dist.distributed_c10d._get_default_store())
        self._step, self._number = step, 0
        self._last_beat: float | None = None
        self._closed, self._has_news = threading.Event(), threading.Event()
        for work in (self._speak, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """This rank has finished `step`."""
        self._step, self._last_beat = step, time.monotonic()
        self._has_news.set()
        # in case the rank hangs with the interpreter's lock held, so that no thread of it can run
        faulthandler.dump_traceback_later(2 * self._hang_seconds, exit=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Something of unknown length, such as an evaluation, is no hang."""
        self._last_beat = None
        faulthandler.cancel_dump_traceback_later()
        yield
        self.beat(self._step)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._has_news.set()

    def silent_ranks(self) -> str:
        """Who says nothing any more, in words; "" when all are alive. Takes a few seconds.

        The answer of the first rank that finds someone is everyone's: those who look later see more ranks silent,
        which have only ended because of the first.
        """
        before = self._words()
        time.sleep(2.5 * self._interval)
        after = self._words()
        if before is None or after is None:
            return "the store of rank 0, in which the ranks met, does not answer"
        silent = []
        for rank in range(self._world_size):
            if rank not in after:
                silent.append(f"rank {rank} has not said a word")
            elif rank != self._rank and after[rank] == before.get(rank):
                silent.append(
                    f"rank {rank} on {after[rank].host} is silent, or has ended, since step {after[rank].step:,}"
                )
        return self._first_finding(", ".join(silent))

    def _first_finding(self, own: str) -> str:
        if own:
            with contextlib.suppress(RuntimeError):
                return self._store.compare_set("finding", "", own).decode()
        return own

    def _speak(self) -> None:
        host = socket.gethostname()
        while not self._closed.is_set():
            self._number += 1
            with contextlib.suppress(RuntimeError):  # a store that is gone shows itself when it is asked
                self._store.set(str(self._rank), json.dumps(asdict(_Word(host, self._step, self._number))))
            self._closed.wait(SHORTEST_SILENCE)
            self._has_news.wait(self._interval)
            self._has_news.clear()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            last = self._last_beat
            if last is not None and time.monotonic() - last > self._hang_seconds:
                self._report()
                if self._rank == 0:  # the store goes with it, and others may be about to ask
                    time.sleep(2 * self._interval)
                exit_now(HANG_EXIT_CODE)

    def _report(self) -> None:
        path = self._run_dir / f"hang-rank{self._rank}.txt"
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        self._console.warning(
            f"the run hangs and ends: no step ended for {self._hang_seconds:g} s (run.hang_seconds) since step "
            f"{self._step:,}; {self.silent_ranks() or self._last_to_come()}. Where this rank waits: {path}"
        )

    def _last_to_come(self) -> str:
        words = self._words() or {}
        first = min((word.step for word in words.values()), default=self._step)
        late = [f"{rank} on {word.host}" for rank, word in words.items() if word.step == first]
        return f"all ranks are alive; those that have come to step {first:,} only: rank {', '.join(late)}"

    def _words(self) -> dict[int, _Word] | None:
        """What every rank said last; None when the store does not answer, which can take any time."""
        answers: list[dict[int, _Word]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                keys = [str(rank) for rank in range(self._world_size)]
                spoken = [key for key in keys if self._store.check([key])]
                answers.append({int(key): _Word(**json.loads(self._store.get(key))) for key in spoken})

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * self._interval)
        return answers[0] if answers else None
