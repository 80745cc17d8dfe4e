"""Encodes groups of records in several processes; results come in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from megatron_tf.data.preparation.encoding import EncodedBatch
from megatron_tf.data.preparation.record_types import RawRecord
from megatron_tf.errors import DataError
from megatron_tf.interrupt import kept_from_children

Encode = Callable[[Sequence[RawRecord]], EncodedBatch]
EncodeAll = Callable[[Encode, Iterable[list[RawRecord]]], Iterator[EncodedBatch]]

GROUPS_AHEAD_PER_WORKER = 3  # submitted, unfinished; no worker runs dry while this process encodes a group itself
BYTES_AHEAD_PER_WORKER = 1 << 24  # of these groups: bounds the memory when documents are long
RESULTS_AHEAD_PER_WORKER = 16  # that wait for an earlier one
WORKER_KILLED = "a worker was killed, most likely for want of memory. Use fewer workers."
THREADS_VARIABLE = "TOKENIZERS_PARALLELISM"


@contextmanager
def encoding_processes(workers: int) -> Iterator[EncodeAll]:
    """Yields a function that encodes groups, in order, on `workers` processes, of which this is one.

    This process reads and writes; when the others have enough to do it encodes as well. So all processors are busy when
    there are few workers, and reading never waits when there are many. Raises `DataError` when a worker is killed.
    """
    with one_thread():
        if workers == 1:
            yield lambda encode, groups: map(encode, groups)
            return
        # spawn: forked children would inherit the tokenizer library's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers - 1, mp_context=context, initializer=end_with_parent) as pool:
            try:
                yield lambda encode, groups: _shared(pool, workers - 1, encode, groups)
            except BrokenProcessPool:
                raise DataError(WORKER_KILLED) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _shared(
    pool: ProcessPoolExecutor, others: int, encode: Encode, groups: Iterable[list[RawRecord]]
) -> Iterator[EncodedBatch]:
    waiting: deque[tuple[Future[EncodedBatch], int]] = deque()  # with the bytes of the group
    for group in groups:
        size = sum(len(record.payload) for record in group)
        ahead = [size for result, size in waiting if not result.done()]
        room = len(ahead) < GROUPS_AHEAD_PER_WORKER * others and sum(ahead) < BYTES_AHEAD_PER_WORKER * others
        waiting.append((_submitted(pool, encode, group) if room else _finished(encode(group)), size))
        while waiting and (waiting[0][0].done() or len(waiting) > RESULTS_AHEAD_PER_WORKER * others):
            yield waiting.popleft()[0].result()
    while waiting:
        yield waiting.popleft()[0].result()


def _submitted(pool: ProcessPoolExecutor, encode: Encode, group: list[RawRecord]) -> Future[EncodedBatch]:
    with kept_from_children():  # the pool starts a process when it is given work and none is idle
        return pool.submit(encode, group)


def _finished(batch: EncodedBatch) -> Future[EncodedBatch]:
    result: Future[EncodedBatch] = Future()
    result.set_result(batch)
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps the tokenizers library to one thread in this process and its children: parallelism is by processes."""
    before = os.environ.get(THREADS_VARIABLE)
    os.environ[THREADS_VARIABLE] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS_VARIABLE]
        else:
            os.environ[THREADS_VARIABLE] = before


def end_with_parent() -> None:
    """Makes this process end when the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
