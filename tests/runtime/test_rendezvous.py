"""Ranks that meet are those of one run, each of them once."""

from __future__ import annotations

import itertools
import signal
import socket
import threading

import pytest
import torch.distributed as dist
from gathering import gathering
from launching import free_port
from live import PATIENCE_SECONDS, until

from megatron_tf.errors import ConfigError, DisagreementError, LaunchError
from megatron_tf.runtime import early_mistakes, rendezvous
from megatron_tf.runtime.early_mistakes import told_to_all
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.patient_store import PatientStore, Unreachable
from megatron_tf.runtime.rendezvous import Assembly, Stuck, open_store

HOST = socket.gethostname()


def test_all_come():
    assert gathering(lambda assembly: assembly.meet("a"), 3) == [[HOST] * 3] * 3


def test_a_rank_of_another_run_never_joins():
    """The others go on without it, as they would have."""
    store = dist.HashStore()

    def rank(assembly):
        if assembly.rank == 1:
            with pytest.raises(LaunchError) as error:
                Assembly(store, 1, 2, 20).meet("step 1 of SLURM job 7")
            assert str(error.value).startswith(
                f"rank 0 ({HOST}) at this meeting point belongs to another run: step 0 of SLURM job 7, and rank 1"
            )
        return assembly.meet("step 0 of SLURM job 7")

    assert gathering(rank, 2, store=store) == [[HOST] * 2] * 2


def test_other_numbers_of_ranks():
    store = dist.HashStore()
    results = gathering(lambda assembly: Assembly(store, assembly.rank, assembly.rank + 2, 20).meet(), 2)
    (text,) = {str(result) for result in results}
    assert all(isinstance(result, DisagreementError) for result in results)
    assert text.startswith(f"the number of ranks is 2 on rank 0 ({HOST}) and 3 on rank 1 ({HOST}).")


def test_two_processes_of_one_number():
    store = dist.HashStore()
    store.set("process/1", "process 17 on n2")
    results = gathering(Assembly.meet, 2, store=store)
    (text,) = {str(result) for result in results}
    assert all(isinstance(result, DisagreementError) for result in results)
    assert text.startswith("two processes are rank 1: process 17 on n2, and process")


def test_a_second_process_after_the_meeting_disturbs_nobody():
    store = dist.HashStore()
    assert gathering(Assembly.meet, 2, store=store) == [[HOST] * 2] * 2
    store.set("process/1", "process 17 on n2")
    with pytest.raises(LaunchError, match="has met its ranks without this one: two processes are rank 1"):
        Assembly(store, 1, 2, 20).meet()


@pytest.fixture
def answering(monkeypatch):
    """A store that answers: ranks that wait for little do not take a loaded machine for one that does not."""
    monkeypatch.setattr(rendezvous, "PatientStore", lambda store, seconds: PatientStore(store, PATIENCE_SECONDS))


def come_to_the_roll_call(assembly, store, other):
    """Has ranks 0 and `other` meet there first, however late they are: only then does the patience of rank 0 begin."""
    wait = assembly._store.wait

    def wait_after_the_other(key, seconds):
        if key == "the roll call/all here":
            until(lambda: store.check([f"the roll call/here/{other}"]), f"rank {other} came")
        return wait(key, seconds)

    assembly._store.wait = wait_after_the_other
    if assembly.rank > 0:
        until(lambda: store.check(["run"]), "rank 0 came")
    assembly.meet()


@pytest.mark.usefixtures("answering")
def test_who_does_not_come_is_named():
    store = dist.HashStore()

    def rank(assembly):
        if assembly.rank != 1:
            come_to_the_roll_call(assembly, store, other=2)

    first, absent, _ = gathering(rank, 3, timeout=0.5, store=store)
    assert absent is None and isinstance(first, Stuck) and first.ranks == [1]


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("writes", range(4))
def test_who_is_lost_between_two_marks_is_named(writes):
    """Wherever in a phase a rank ends, the others know which one it was, unless they can go on without it."""
    store, lost = dist.HashStore(), threading.Event()

    def rank(assembly):
        if assembly.rank == 1:
            end_after(assembly, writes, lost)
        else:
            wait = assembly._store.wait

            def wait_when_it_is_lost(key, seconds):
                until(lambda: lost.is_set() or store.check([key]), "rank 1 was lost")
                return wait(key, seconds)

            assembly._store.wait = wait_when_it_is_lost
            assembly.timeout = 0.2
        return assembly.phase("work", lambda: "done")

    first, second = gathering(rank, 2, timeout=PATIENCE_SECONDS, store=store)
    assert isinstance(second, Lost)
    assert first.ranks == [1] if isinstance(first, Stuck) else first == "done" and writes == 3


class Lost(Exception):
    """Ends a rank that is then silent."""


def end_after(assembly, writes, lost):
    """Ends the rank instead of its next write to the store after so many."""
    left = itertools.count(writes, -1)

    def ending(method):
        def write(*arguments):
            if next(left) <= 0:
                lost.set()
                raise Lost
            return method(*arguments)

        return write

    for name in ("set", "add", "set_once"):
        setattr(assembly._store, name, ending(getattr(assembly._store, name)))


@pytest.mark.usefixtures("answering")
def test_rank_0_does_not_wait_for_the_farewell_of_who_never_came(monkeypatch):
    monkeypatch.setattr(rendezvous, "FAREWELL_SECONDS", 600.0)
    store = dist.HashStore()

    def rank(assembly):
        if assembly.rank == 2:
            return None
        with pytest.raises(Stuck):
            come_to_the_roll_call(assembly, store, other=1)
        assembly.timeout = 600.0
        if assembly.rank > 0:
            return assembly.hear()
        assembly.tell(1)
        return store.check(["told/1"])

    assert gathering(rank, 3, timeout=0.5, store=store) == [True, 1, None]


@pytest.mark.usefixtures("answering")
def test_for_whom_rank_0_waits_is_said(monkeypatch):
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.1)
    said: list[str] = []
    with pytest.raises(Stuck):
        Assembly(dist.HashStore(), 0, 7, 0.3, said.append).meet()
    missing = "rank 1, rank 2, rank 3, rank 4 and 2 more"
    assert said == [
        f"has waited 0.1 seconds for {missing} (the roll call). It waits up to 0.3: parallel.timeout_seconds"
    ]
    with pytest.raises(Stuck):
        Assembly(dist.HashStore(), 1, 2, 0.3, said.append).meet()
    assert said[1].startswith("has waited 0.1 seconds for rank 0 (the roll call)")


def test_a_store_that_does_not_answer():
    goes_on = threading.Event()

    class Stopped:
        def check(self, keys):
            goes_on.wait()

    with pytest.raises(Unreachable):
        PatientStore(Stopped(), 0.2).wait("key", 1000)
    goes_on.set()


@pytest.fixture
def signals():
    """Handlers as they were before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_mistake_of_one_rank_before_the_meeting_ends_it_for_all(monkeypatch, signals):
    monkeypatch.setattr(rendezvous, "_MEETINGS", itertools.repeat(0))  # both ranks are this process
    monkeypatch.setattr(early_mistakes, "SAYING_SECONDS", 0.0)
    places = [
        LaunchEnvironment("deepspeed", rank, 2, rank, 2, "127.0.0.1", port) for port in [free_port()] for rank in (0, 1)
    ]
    raised: list[Exception] = []

    def first() -> None:
        try:
            Assembly(open_store(places[0], 20), 0, 2, 20).meet()
        except DisagreementError as error:
            raised.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    with pytest.raises(SystemExit) as end, told_to_all(places[1], 20):
        raise ConfigError("configs/x.yml: there is no such file.")
    thread.join()
    assert end.value.code == 2
    assert str(raised[0]) == f"rank 1 ({HOST}): configs/x.yml: there is no such file."


def test_a_mistake_that_rank_0_does_not_hear_of_is_said(signals):
    place = LaunchEnvironment("deepspeed", 1, 2, 1, 2, "127.0.0.1", free_port())
    with pytest.raises(LaunchError, match=rf"^rank 1 \({HOST}\): wrong$"), told_to_all(place, 0.1):
        raise ConfigError("wrong")
    first = LaunchEnvironment("deepspeed", 0, 2, 0, 2, "127.0.0.1", free_port())
    with pytest.raises(ConfigError, match="^wrong$"), told_to_all(first, 0.1):
        raise ConfigError("wrong")
