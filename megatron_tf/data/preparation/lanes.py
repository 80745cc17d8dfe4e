"""Spreads many parts over many processes. A lane is a process that writes one part after another, with its own helpers.

With few parts each lane gets helpers, up to about as many as one reader can feed. With many parts every process is a
lane of its own, which needs no traffic between processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_tf.data.preparation.part_writer import PartJob, write_part
from megatron_tf.data.preparation.parts import Part
from megatron_tf.data.preparation.progress import Advance, Observer
from megatron_tf.data.preparation.record_types import BadSample
from megatron_tf.data.preparation.workers import WORKER_KILLED, encoding_processes, end_with_parent, one_thread
from megatron_tf.errors import DataError, UserError
from megatron_tf.interrupt import kept_from_children

WORKERS_PER_READER = 8  # one process can read, decompress and write for so many without becoming the bottleneck
PARTS_PER_WORKER = 4  # with at least so many parts the load is even enough without helpers


def share_workers(workers: int, num_parts: int) -> tuple[int, int]:
    """(lanes, processes in each); their product is at most `workers`."""
    if num_parts >= PARTS_PER_WORKER * workers:
        return workers, 1
    lanes = max(1, min(num_parts, workers // WORKERS_PER_READER))
    return lanes, workers // lanes


def write_parts(job: PartJob, parts: Sequence[Part], workers: int, observer: Observer) -> list[Part]:
    """Write all parts; returns those that other processes are at work on. Raises `DataError` as `write_part` does."""
    lanes, processes = share_workers(workers, len(parts))
    if lanes > 1:
        return _in_lanes(job, parts, lanes, processes, observer)
    with encoding_processes(processes) as encode_all:
        return [part for part in parts if not write_part(job, part, encode_all, observer)]


@dataclass(frozen=True)
class _Busy:
    """A lane's message: another process is at work on the part of this number."""

    number: int


def _in_lanes(job: PartJob, parts: Sequence[Part], lanes: int, processes: int, observer: Observer) -> list[Part]:
    context = multiprocessing.get_context("spawn")
    next_part = context.Value("q", 0)
    busy: list[Part] = []
    running: dict[Any, BaseProcess] = {}  # by the receiving end of its pipe
    try:
        with one_thread():
            for _ in range(lanes):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run_lane, args=(job, parts, next_part, processes, sender))
                with kept_from_children():  # delays Ctrl-C until the process is in `running`, which is ended then
                    process.start()
                    sender.close()  # so that the end of the process is the end of the pipe
                    running[receiver] = process
        while running:
            ready: list[Any] = wait(list(running))
            for pipe in ready:
                try:
                    message = pipe.recv()
                except EOFError:
                    _check_ended(running.pop(pipe))
                else:
                    _take(message, parts, busy, observer)
    finally:
        for left in running.values():
            left.terminate()
        for left in running.values():
            left.join()
    return busy


def _take(message: object, parts: Sequence[Part], busy: list[Part], observer: Observer) -> None:
    if isinstance(message, Advance):
        observer.advance(message)
    elif isinstance(message, BadSample):
        observer.bad_record(message)
    elif isinstance(message, _Busy):
        busy.append(parts[message.number])
    else:
        assert isinstance(message, str)
        raise DataError(message)


def _check_ended(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode is not None
    if process.exitcode < 0:
        raise DataError(WORKER_KILLED)
    if process.exitcode > 0:
        raise RuntimeError(f"a worker ended with exit code {process.exitcode}; its traceback is above")


class _Sender:
    """An observer that sends what it is told through a pipe."""

    def __init__(self, sender: Connection):
        self._sender = sender

    def advance(self, done: Advance) -> None:
        self._sender.send(done)

    def bad_record(self, sample: BadSample) -> None:
        self._sender.send(sample)


def _run_lane(job: PartJob, parts: Sequence[Part], next_part: Any, processes: int, sender: Connection) -> None:
    end_with_parent()
    try:
        with encoding_processes(processes) as encode_all:
            while True:
                with next_part.get_lock():
                    number = next_part.value
                    next_part.value += 1
                if number >= len(parts):
                    return
                if not write_part(job, parts[number], encode_all, _Sender(sender)):
                    sender.send(_Busy(number))
    except UserError as error:
        sender.send(str(error))
