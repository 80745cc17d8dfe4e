"""The queue of a study: each worker takes the next run that can start, until none is left. All state is in files.

A run has ended when its result file exists, and is taken while its claim file is locked. So any number of workers, in
one process or on many machines with one folder, share a study. A run that was cut off resumes from its newest
checkpoint.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_tf.durable import take_lock
from megatron_tf.errors import STOPPED_EXIT_CODE, RunStopped, UserError, write_errors
from megatron_tf.study.file import Study
from megatron_tf.study.plan import Node, Plan, make_plan
from megatron_tf.study.result import (
    begin_again,
    changed,
    failure_file,
    failure_time,
    failure_times,
    has_diverged,
    has_ended,
    loss_of,
    measure,
    of_diverged,
    reason_of,
    write_config,
    write_failure,
    write_result,
)
from megatron_tf.telemetry.meters import format_duration

POLL_SECONDS = 3.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Queue:
    """Runs what is left of `study`, `workers` runs at a time.

    `threads`: of each process of a run.  `devices`: CUDA_VISIBLE_DEVICES of each worker; empty: it is not changed.
    `say`: is called with a line when a run begins or ends, and once for each run that another process has.
    """

    def __init__(
        self,
        study: Study,
        *,
        workers: int,
        threads: int,
        devices: Sequence[str] = (),
        say: Callable[[str], Any] = print,
    ):
        self._study = study
        self._workers = workers
        self._threads = threads
        self._devices = devices
        self._say = say
        self._lock = threading.Lock()
        self._seen: tuple[Plan, frozenset[str]] | None = None
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._held: set[str] = set()  # runs whose claims this process has, or asks for
        self._told: set[str] = set()  # runs of other processes that were told of
        self._failed: dict[str, str] = {}
        self._conflicts: dict[str, str] = {}
        self._bug: BaseException | None = None
        self._marks: Mapping[str, int] = {}  # times of failures before this process began, by file
        self._stop = threading.Event()
        self._ended = threading.Condition()

    def run(self) -> None:
        """Returns when all runs have ended. RunStopped when a signal asked it to stop and the runs have saved.
        UserError, with the paths of their logs, when runs have failed; all others that could start have ended then."""
        self._marks = failure_times(self._study.dir)
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(self._workers)]
        with self._signals():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        if self._bug is not None:
            raise self._bug
        plan, ended = self._current()
        # Another process may have repeated a run that failed here.
        failed = {name: why for name, why in self._failed.items() if name not in ended or name in self._conflicts}
        if failed:
            told = "".join(f"\n  - {name}: {why}" for name, why in failed.items())
            raise UserError(f"{len(failed)} of the runs failed:{told}\nCorrect it and start the study again.")
        if len(ended) < len(plan.nodes):
            raise RunStopped(
                f"stopped: {len(ended)} of {len(plan.nodes)} runs have ended. Start the study again to go on."
            )

    def _work(self, worker: int) -> None:
        try:
            while not self._stop.is_set() and self._step(worker):
                pass
        except BaseException as error:  # raised again by `run`
            self._bug = error
            self._ask_to_stop()

    def _step(self, worker: int) -> bool:
        """Takes one run, or waits while others have all that can start; False when no run is left."""
        is_busy = False
        ready = self._ready()
        if self._conflicts:
            # runs that began with the former value and runs that would begin now must not be compared
            return False
        for node in ready:
            with self._claim(node) as claim:
                if claim is None:
                    is_busy = True
                elif (why := self._failed_meanwhile(node)) is not None:
                    self._failed[node.name] = why
                    return True
                else:
                    if not has_ended(node):
                        self._do(node, worker, claim)
                    return True
        if is_busy:
            with self._ended:
                self._ended.wait(POLL_SECONDS)
        return is_busy

    def _current(self) -> tuple[Plan, frozenset[str]]:
        """The plan, and the names of the runs that had ended when it was made; made anew only when more have."""
        with self._lock:
            if self._seen is not None:
                plan, ended = self._seen
                if all(node.name in ended or not has_ended(node) for node in plan.nodes):
                    return self._seen
            losses: dict[str, float | None] = {}

            def outcome(node: Node) -> float | None:
                if node.name not in losses:
                    losses[node.name] = loss_of(node)
                return losses[node.name]

            plan = make_plan(self._study, outcome)
            # A sweep that has ended since may have chosen another value than the one that runs have begun with.
            known = [node for node in plan.nodes if node.waits is None]
            self._conflicts = {
                node.name: problem for node in known if (problem := changed(node, self._study.dir)) is not None
            }
            self._failed.update(self._conflicts)
            # A trial that has ended while the plan was made has not: the plan still waits for it.
            ended = frozenset(
                node.name
                for node in plan.nodes
                if (losses[node.name] is not None if node.name in losses else has_ended(node))
            )
            self._seen = plan, ended
            return self._seen

    def _ready(self) -> list[Node]:
        """The runs that can start. Empty only when no run is left, but for those that wait for one that has failed."""
        plan, ended = self._current()
        return [
            node
            for node in plan.nodes
            if node.waits is None
            and node.name not in self._failed
            and node.name not in ended
            and (node.parent is None or node.parent.name in ended)
        ]

    @contextmanager
    def _claim(self, node: Node) -> Iterator[int | None]:
        """The descriptor of a run's locked claim file; None while another worker has it. The lock ends with the last
        process that holds the descriptor."""
        path = Path(self._study.dir, "claims", node.name.replace("/", "_"))
        with self._lock:
            is_ours = node.name in self._held
            self._held.add(node.name)
        if is_ours:  # of another thread here
            yield None
            return
        try:
            with write_errors(UserError, path, "Choose another dir."):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not take_lock(descriptor):
                    self._tell_holder(node, path)
                    yield None
                else:
                    _sign(descriptor, os.getpid())
                    yield descriptor
            finally:
                os.close(descriptor)
        finally:
            self._held.discard(node.name)

    def _tell_holder(self, node: Node, claim: Path) -> None:
        """Says once who runs what this process waits for: it may be left over from a study that was killed."""
        if node.name not in self._told:
            self._told.add(node.name)
            self._say(f"{node.name}: is being run by {claim.read_text('utf-8') or 'another process'}")

    def _failed_meanwhile(self, node: Node) -> str | None:
        """Why another process has failed at a run since this one began; None when none has."""
        file = failure_file(node, self._study.dir)
        return reason_of(file) if failure_time(file) != self._marks.get(file.name) else None

    def _do(self, node: Node, worker: int, claim: int) -> None:
        """Trains a run, unless its parent has diverged: then it has, too."""
        if node.parent is None or (loss := loss_of(node.parent)) is None or not math.isnan(loss):
            return self._train(node, worker, claim)
        with write_errors(UserError, node.folder, "Choose another dir."):
            node.folder.mkdir(parents=True, exist_ok=True)
        write_result(node, of_diverged(node))
        self._say(f"{node.name}: does not begin, because {node.parent.name} has diverged")

    def _train(self, node: Node, worker: int, claim: int) -> None:
        if (kept := begin_again(node, self._study.dir)) is not None:
            self._say(f"{node.name}: has failed with another configuration, begins anew; what it was is in {kept}")
        config = write_config(node, self._study.dir)
        log = Path(self._study.dir, "logs", f"{node.name.replace('/', '_')}.log")
        with write_errors(UserError, log, "Choose another dir."):
            log.parent.mkdir(parents=True, exist_ok=True)
            output = open(log, "ab")
        began = time.monotonic()
        with output:
            # The run inherits the claim, so it stays locked while the run lives, even if this process is killed.
            process = subprocess.Popen(
                command(config, self._study.ranks),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(worker),
                pass_fds=(claim,),
                start_new_session=True,
            )
            _sign(claim, process.pid)
            with self._lock:
                self._running[node.name] = process
            self._say(f"{node.name}: {node.own_flops:.2e} FLOPs, log in {log}")
            if self._stop.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
        with self._lock:
            del self._running[node.name]
        if code == 0 or (not self._stop.is_set() and has_diverged(node)):
            result = measure(node)
            write_result(node, result)
            end = "has diverged" if math.isnan(result.loss) else f"loss {result.loss:.4f}"
            self._say(f"{node.name}: {end} after {format_duration(time.monotonic() - began)}")
        elif code == STOPPED_EXIT_CODE or self._stop.is_set():
            self._ask_to_stop()
        else:
            self._failed[node.name] = f"exit code {code}, see {log}"
            write_failure(node, self._study.dir, self._failed[node.name])
            self._say(f"{node.name}: failed with exit code {code}, see {log}")
        with self._ended:
            self._ended.notify_all()

    def _environment(self, worker: int) -> Mapping[str, str]:
        """Of a run. SLURM's variables are left out: a job around the study is not the launcher of its runs."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        own = {"OMP_NUM_THREADS": str(self._threads), "PYTHONUNBUFFERED": "1"}
        if self._devices:
            own["CUDA_VISIBLE_DEVICES"] = self._devices[worker]
        return {**kept, **own}

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """In the block, a signal that ends a job lets the runs save, and ends the study."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._noted) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        self._stop.set()
        for process in list(self._running.values()):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


def _sign(claim: int, process: int) -> None:
    """Writes who has a claim into its file, for those who wait."""
    os.ftruncate(claim, 0)
    os.pwrite(claim, f"process {process} on {socket.gethostname()}".encode(), 0)


def command(config: Path, ranks: int) -> list[str]:
    """The command that starts a run with `ranks` processes on this machine."""
    own = ["-m", "megatron_tf", "train", str(config)]
    if ranks == 1:
        return [sys.executable, *own]
    return [sys.executable, "-m", "megatron_tf.study.launch", "--standalone", "--nproc-per-node", str(ranks), *own]
