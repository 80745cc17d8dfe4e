"""Ends a run that hangs or has lost a rank, and says which rank is to blame. Works from the first collective to the
last.

A rank that is stopped, cut off or dead leaves the others waiting in a collective, where they cannot report it. So each
rank has a thread that sends heartbeats, with the rank's phase, through the store in which the ranks met. Rank 0 reads
those of all ranks and the others that of rank 0, so that the store's work grows with the number of ranks, not with its
square. In any phase the run ends when a rank sends nothing for run.hang_seconds. A rank with heartbeats may take any
time, except in training: the run also ends when no step ends for run.hang_seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tf.errors import LOST_EXIT_CODE, LostContactError, RunStopped, exit_now, first_line
from megatron_tf.telemetry.console import Console

SHORTEST_SILENCE = 0.25  # seconds between two heartbeats of a rank, however fast it steps
LEAST_PATIENCE = 10.0  # seconds: on an overloaded machine a living rank may send nothing for so long
TRAINING = "training"
_REPORT_SECONDS = 60.0
_FINDING = "finding"


@dataclass(frozen=True)
class _Word:
    """A heartbeat. `number` grows with each of them, `moves` with each phase and step, which are the same on all ranks.

    `place`: the phase and step as text. `left`: the rank has done its last collective and sends no more.
    """

    host: str
    place: str
    number: int
    moves: int
    left: bool


@dataclass(frozen=True)
class _Heard:
    """A rank's newest heartbeat as it is in the store, and the time when this rank first saw it."""

    text: bytes
    time: float

    @property
    def word(self) -> _Word:
        return _Word(**json.loads(self.text))


@contextlib.contextmanager
def watched(rank: int, world_size: int, hang_seconds: float, console: Console) -> Iterator[Watchdog]:
    """A watchdog over the block, which begins when the ranks have joined and ends after their last collective."""
    watchdog = Watchdog(rank, world_size, hang_seconds, console)
    try:
        with watchdog.naming_the_lost():
            yield watchdog
        watchdog.part()
    except RunStopped:
        watchdog.part()
        raise
    finally:
        watchdog.close()


class Watchdog:
    """Watches one rank until `close`; all ranks have one. Between `begin` and the next `beat` no step limit holds."""

    def __init__(self, rank: int, world_size: int, hang_seconds: float, console: Console):
        """`hang_seconds`: longest time from one `beat` to the next, and longest silence of a rank, for which it is at
        least LEAST_PATIENCE."""
        self._rank = rank
        self._world_size = world_size
        self._hang_seconds = hang_seconds
        self._interval = max(2 * SHORTEST_SILENCE, min(2.0, hang_seconds / 4))
        # Two intervals more, for a heartbeat to be sent and read
        self._patience = max(hang_seconds, LEAST_PATIENCE) + 2 * self._interval
        self._console = console
        self._folder: Path | None = None
        self._phase = "starting"
        self._step: int | None = None
        self._moves = 0
        self._last_beat: float | None = None
        self._began = time.monotonic()
        self._answered = self._began  # when the store answered last
        self._heard: dict[int, _Heard] = {}
        self._rounds = 0  # how often this rank has listened
        self._listens_to_all = rank == 0
        self._is_asking = False  # another thread waits for what this rank hears
        self._proposal = ""
        self._finding = ""
        self._left = False
        self._ending = threading.Lock()  # held by the one thread that reports
        self._closed = threading.Event()
        self._has_news = threading.Event()
        self._has_said_goodbye = threading.Event()
        for work in (self._talk, self._watch) if world_size > 1 else (self._watch,):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def report_to(self, console: Console, folder: Path, step: int | None = None) -> None:
        """From here on reports go to `console`, and stacks to folder/hang-rank<N>.txt. The run is at `step`."""
        self._console = console
        self._folder = folder
        self._step = step

    def begin(self, phase: str) -> None:
        """This rank begins `phase`, such as "loading the weights", which may take any time."""
        self._move(phase, self._step, None)

    def beat(self, step: int) -> None:
        """This rank has finished training step `step`; the next one must end within the time limit."""
        self._move(TRAINING, step, time.monotonic())

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Context of `phase`, which may take any time. After it the earlier phase goes on, with its time limit."""
        before = self._phase
        is_limited = self._last_beat is not None
        self.begin(phase)
        yield
        self._move(before, self._step, time.monotonic() if is_limited else None)

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Turns the error of a collective in the block that fails because a rank is gone into a LostContactError that
        names the rank."""
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_contact(error):
                raise
            raise self._lost_contact(error) from error

    def part(self) -> None:
        """This rank has done its last collective. Its silence from now on does not end the others.

        The store may end with rank 0, so rank 0 waits a moment until the others have parted as well.
        """
        self._left = True
        self._wait_until(self._has_said_goodbye.is_set)

    def close(self) -> None:
        self._closed.set()
        self._has_news.set()
        faulthandler.cancel_dump_traceback_later()

    def _move(self, phase: str, step: int | None, last_beat: float | None) -> None:
        self._phase = phase
        self._step = step
        self._moves += 1
        self._last_beat = last_beat
        self._has_news.set()

    @property
    def _place(self) -> str:
        return self._phase if self._step is None else f"step {self._step:,} ({self._phase})"

    # The thread that talks: the only one that uses the store, because a store that does not answer blocks its caller.

    def _talk(self) -> None:
        host = socket.gethostname()
        number = 0
        next_round = 0.0
        with contextlib.suppress(RuntimeError):  # the others then find that this rank is silent
            # A connection of its own: the main thread may wait in the store's own one, for another rank.
            store = dist.PrefixStore("alive", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
            while not self._closed.is_set() and not self._has_said_goodbye.is_set():
                number += 1
                word = _Word(host, self._place, number, self._moves, self._left)
                store.set(str(self._rank), json.dumps(asdict(word)))
                # Rank 0 reads the heartbeats of all ranks, so it does that only once an interval
                if self._rank > 0 or self._is_in_a_hurry() or time.monotonic() >= next_round:
                    next_round = time.monotonic() + self._interval
                    self._listen(store)
                if word.left and (self._rank > 0 or self._all_have_left()):
                    self._has_said_goodbye.set()
                if self._is_in_a_hurry():
                    self._closed.wait(SHORTEST_SILENCE / 5)
                    continue
                self._closed.wait(SHORTEST_SILENCE)
                self._has_news.wait(self._interval - SHORTEST_SILENCE)
                self._has_news.clear()

    def _is_in_a_hurry(self) -> bool:
        """Whether to read heartbeats without pause: for a report, when leaving, and until each rank was heard once, so
        that the message on a rank that is lost early can name its host."""
        return self._is_asking or self._left or len(self._heard) < len(self._others())

    def _others(self) -> list[int]:
        """The ranks that this one listens to."""
        ranks = range(self._world_size) if self._listens_to_all else range(1)
        return [rank for rank in ranks if rank != self._rank]

    def _listen(self, store: dist.Store) -> None:
        spoken = [rank for rank in self._others() if rank in self._heard or store.check([str(rank)])]
        texts = store.multi_get([str(rank) for rank in spoken]) if spoken else []  # one request for all of them
        now = time.monotonic()
        for rank, text in zip(spoken, texts):
            if rank not in self._heard or self._heard[rank].text != text:
                self._heard[rank] = _Heard(text, now)
        # The first finding is everyone's: those who look later see more ranks silent, which ended because of the first.
        if self._proposal or store.check([_FINDING]):
            self._finding = store.compare_set(_FINDING, "", self._proposal).decode()
        self._answered = now
        self._rounds += 1

    def _all_have_left(self) -> bool:
        return all(rank in self._heard and self._heard[rank].word.left for rank in range(1, self._world_size))

    # The thread that watches.

    def _watch(self) -> None:
        while not self._closed.wait(self._interval):
            if self._left or not self._ending.acquire(blocking=False):
                return
            # Ends the process when some thread holds the interpreter's lock for ever, so that this one cannot run.
            _end_later(2 * self._patience)
            if cause := self._cause():
                self._report(cause)
                exit_now(LOST_EXIT_CODE)
            self._ending.release()
        faulthandler.cancel_dump_traceback_later()

    def _cause(self) -> str:
        """Why the run must end now, or ""."""
        now = time.monotonic()
        limit = f"{self._hang_seconds:g} s (run.hang_seconds)"
        if self._last_beat is not None and now - self._last_beat > self._hang_seconds:
            return f"no step ended for {limit} since step {self._step:,}; {self._culprit()}"
        if silent := self._finding or self._silent_since(now - self._patience):
            return (
                f"{self._agreed(silent)}; a rank may be silent for {limit} at most, in any phase. "
                f"This rank is in {self._place}"
            )
        return ""

    def _report(self, cause: str) -> None:
        _end_later(_REPORT_SECONDS)  # in case printing blocks, because the output is not read
        where = ""
        if self._folder is not None:
            path = self._folder / f"hang-rank{self._rank}.txt"
            with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
                where = f". Where this rank waits: {path}"
        self._console.warning(f"the run hangs and ends: {cause}{where}")
        self._wait_for_listeners()

    def _lost_contact(self, error: RuntimeError) -> LostContactError:
        self._ending.acquire()  # never released: only one thread reports. If the other one has it, the process ends
        faulthandler.cancel_dump_traceback_later()
        lost = LostContactError(
            f"rank {self._rank} lost contact with another rank in {self._place}: {self._culprit()}. "
            f"({first_line(error)})"
        )
        self._wait_for_listeners()
        return lost

    def _culprit(self) -> str:
        """The ranks that are silent now, or, when all live, those that are behind, in words. Takes some seconds."""
        self._listens_to_all = True
        self._is_asking = True
        began = time.monotonic()
        heard_everyone = self._rounds + 2
        self._wait_until(lambda: self._rounds >= heard_everyone or self._finding)
        if self._rounds >= heard_everyone:
            began = time.monotonic()
            self._wait_until(lambda: self._finding, 2.5)  # until every living rank has sent another heartbeat
        if silent := self._finding or self._silent_since(began):
            return self._agreed(silent)
        return self._last_to_come()

    def _silent_since(self, time_limit: float) -> str:
        """The ranks of which nothing was heard since `time_limit` (monotonic seconds), in words; "" for none."""
        others = self._others()
        if self._world_size > 1 and self._answered < time_limit:
            if self._rank == 0:
                return "the store in which the ranks met does not answer"
            others = [0]  # which may hold the store; nothing is known of the others
        silent = []
        for rank in others:
            heard = self._heard.get(rank)
            if heard is None and self._began < time_limit:
                silent.append(f"rank {rank} has not said a word since the ranks met")
            elif heard is not None and heard.time < time_limit and not heard.word.left:
                word = heard.word
                silent.append(f"rank {rank} on {word.host} is silent, or has ended, and was last heard in {word.place}")
        return ", ".join(silent)

    def _agreed(self, own: str) -> str:
        """The finding that all ranks report: the first one made, or `own` when the store no longer answers."""
        self._is_asking = True
        self._proposal = own
        store_answers = time.monotonic() - self._answered < 2 * self._interval
        self._wait_until(lambda: self._finding or not store_answers)
        return self._finding or own

    def _wait_until(self, holds: Callable[[], object], intervals: float = 2.0) -> None:
        """Waits until `holds()`, at most `intervals` intervals, and keeps the talking thread from pausing meanwhile."""
        deadline = time.monotonic() + intervals * self._interval
        while self._world_size > 1 and not holds() and time.monotonic() < deadline:
            self._has_news.set()
            time.sleep(SHORTEST_SILENCE / 10)

    def _last_to_come(self) -> str:
        words = {rank: heard.word for rank, heard in self._heard.items()}
        words[self._rank] = _Word(socket.gethostname(), self._place, 0, self._moves, False)
        behind = min(word.moves for word in words.values())
        late = {rank: word for rank, word in sorted(words.items()) if word.moves == behind}
        names = ", ".join(f"{rank} on {word.host}" for rank, word in late.items())
        place = next(iter(late.values())).place
        return f"all ranks are alive; those that have come to {place} only: rank {names}"

    def _wait_for_listeners(self) -> None:
        if self._rank == 0 and self._world_size > 2:  # the store goes with this rank, and others may be about to ask
            time.sleep(2 * self._interval)


def _end_later(seconds: float) -> None:
    """Ends the process after `seconds` with its stacks on stderr, whichever thread holds the interpreter's lock
    then."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone. gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
