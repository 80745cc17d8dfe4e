"""Bringing ranks together step by step, so that a rank that is missing or stuck is known by name.

torch's own rendezvous and collectives only say that somebody did not come. Here every rank leaves a mark in the
key-value store before and after each phase; whoever waits too long reads who left none.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from megatron_tf.errors import LaunchError
from megatron_tf.parallel.environment import LaunchEnvironment, check_port_free, wait_for_port

Result = TypeVar("Result")
STORE_ERRORS = (
    dist.DistError,
    RuntimeError,
)  # also of a wait that took too long: one or the other, by version of torch
FAREWELL_SECONDS = 5.0


class Stuck(Exception):
    """Ranks did not come, or did not come back. `ranks`: which; `phase`: where."""

    def __init__(self, ranks: list[int], phase: str, what: str):
        super().__init__(f"{what} in {phase}")
        self.ranks, self.phase, self.what = ranks, phase, what


def open_store(environment: LaunchEnvironment, timeout_seconds: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 opens (torchrun: its agent). LaunchError when it is not found."""
    address, port, rank = environment.master_addr, environment.master_port, environment.rank
    by_agent = environment.launcher == "torchrun"
    if rank > 0 or by_agent:
        wait_for_port(address, port, timeout_seconds)
    else:
        check_port_free(address, port)
    try:
        store = dist.TCPStore(
            address, port, is_master=rank == 0 and not by_agent,
            timeout=timedelta(seconds=timeout_seconds), wait_for_workers=False,
        )  # fmt: skip
    except STORE_ERRORS as error:
        raise LaunchError(
            f"rank {rank} could not reach the store at MASTER_ADDR={address}, MASTER_PORT={port}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    return dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Unreachable(Exception):
    """The store, and so the process that keeps it, does not answer."""


class PatientStore:
    """A store of which every call ends: torch's own wait for ever when its process is stopped but not dead."""

    def __init__(self, store: dist.Store, timeout_seconds: float):
        self._store, self._timeout = store, timeout_seconds

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> str | None:
        """None when it is not there."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def add(self, key: str, amount: int) -> int:
        """The sum so far, with this `amount`."""
        return self._ask(lambda: self._store.add(key, amount))

    def wait(self, key: str, seconds: float) -> bool:
        """Whether `key` was set in time."""

        def wait() -> bool:
            try:
                self._store.wait([key], timedelta(seconds=seconds))
            except STORE_ERRORS:
                return self._store.check([key])
            return True

        return self._ask(wait, seconds)

    def _ask(self, call: Callable[[], Result], seconds: float = 0.0) -> Result:
        outcome = within(seconds + self._timeout, "store", call)
        if outcome is None:
            raise Unreachable("its process is stopped, or cut off")
        if isinstance(outcome.error, STORE_ERRORS):
            raise Unreachable(str(outcome.error).partition("\n")[0])
        return outcome.value()


class Outcome(Generic[Result]):
    """What a call returned or raised."""

    def __init__(self, call: Callable[[], Result]):
        self.error: BaseException | None = None
        self._values: list[Result] = []
        try:
            self._values.append(call())
        except BaseException as error:
            self.error = error

    def value(self) -> Result:
        """Raises what the call raised."""
        if self.error is not None:
            raise self.error
        return self._values[0]


def within(seconds: float, name: str, call: Callable[[], Result]) -> Outcome[Result] | None:
    """The outcome of `call`, None if it takes longer.

    What hangs in torch cannot be called back: it is left to a thread, which dies with the process.
    """
    outcomes: list[Outcome[Result]] = []
    thread = threading.Thread(target=lambda: outcomes.append(Outcome(call)), name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else None


class Assembly:
    """The ranks of a job around a store. Every method but `tell` and `hear` is called by all ranks, in the same order.

    Only rank 0 reads what each of the others wrote, so that thousands of ranks do not ask for thousands of things each.
    Every method raises Unreachable when the store does not answer. Phases have names of their own each.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout_seconds
        self._store = PatientStore(store, timeout_seconds)
        self._names: list[str] = [f"rank {rank}" for rank in range(world_size)]

    def name(self, rank: int) -> str:
        """ "rank 3 (node7)"; without the host until `meet` has heard of it."""
        return self._names[rank]

    def meet(self) -> list[str]:
        """The host of every rank. Stuck, with the ranks that did not come in time."""
        self._store.set(f"host/{self.rank}", socket.gethostname())
        try:
            self._arrive("the roll call")
        except Stuck:
            self._name([self._store.get(f"host/{rank}") for rank in self._ranks()])
            raise
        if self.rank == 0:
            self._store.set("hosts", json.dumps([self._store.get(f"host/{rank}") for rank in self._ranks()]))
        if not self._store.wait("hosts", self.timeout):
            raise Stuck([0], "the roll call", "did not finish")
        hosts = json.loads(self._store.get("hosts") or "[]")
        self._name(hosts)
        return hosts

    def phase(self, name: str, work: Callable[[], Result]) -> Result:
        """`work()` on all ranks at once, each in time. Stuck, with the ranks that did not begin or end it.

        What `work` raises on a rank is raised there; the others get Stuck.
        """
        self._arrive(name)
        outcome = within(self.timeout, name, work)
        if outcome is not None and outcome.error is not None:
            self._store.set(f"error/{self.rank}", f"{name}: {type(outcome.error).__name__}: {outcome.error}")
            raise outcome.error
        if outcome is not None:
            self._store.set(f"{name}/done/{self.rank}", "")
            if self._store.add(f"{name}/number done", 1) == self.world_size:
                self._store.set(f"{name}/all done", "")
        if outcome is None or not self._store.wait(f"{name}/all done", self.timeout):
            raise Stuck(self._without(f"{name}/done"), name, "did not finish")
        return outcome.value()

    def collect(self, name: str, value: Any) -> list[Any]:
        """Every rank's `value`, which JSON can hold, on rank 0; [] on the others. Stuck, with the ranks that gave none."""
        name = f"results of {name}"  # no phase's
        self._store.set(f"{name}/value/{self.rank}", json.dumps(value))
        self._arrive(name)
        values = [self._store.get(f"{name}/value/{rank}") for rank in self._ranks()]
        assert None not in values
        return [json.loads(value or "") for value in values]

    def errors(self) -> dict[int, str]:
        """What was raised so far, by rank; nothing on other ranks than 0, or when the store no longer answers."""
        try:
            found = {rank: self._store.get(f"error/{rank}") for rank in self._ranks()}
        except Unreachable:
            return {}
        return {rank: error for rank, error in found.items() if error is not None}

    def tell(self, verdict: int) -> None:
        """For rank 0, when it has said all: gives the others its exit code, and them a moment to read it.

        A launcher stops all ranks when the first one fails, and the store may end with this process.
        """
        self._store.set("verdict", str(verdict))
        self._store.wait("all told", min(self.timeout, FAREWELL_SECONDS))

    def hear(self) -> int | None:
        """For the others: rank 0's exit code; None when it does not come in time."""
        try:
            if not self._store.wait("verdict", self.timeout):
                return None
            verdict = int(self._store.get("verdict") or 1)
            if self._store.add("told", 1) == self.world_size - 1:
                self._store.set("all told", "")
        except Unreachable:
            return None
        return verdict

    def _arrive(self, name: str) -> None:
        """Waits for all ranks to come here."""
        self._store.set(f"{name}/here/{self.rank}", "")
        if self._store.add(f"{name}/count", 1) == self.world_size:
            self._store.set(f"{name}/all here", "")
        if not self._store.wait(f"{name}/all here", self.timeout):
            raise Stuck(self._without(f"{name}/here"), name, "did not arrive")

    def _without(self, prefix: str) -> list[int]:
        return [rank for rank in self._ranks() if self._store.get(f"{prefix}/{rank}") is None]

    def _ranks(self) -> range:
        """Those that this rank asks about."""
        return range(self.world_size if self.rank == 0 else 0)

    def _name(self, hosts: Sequence[str | None]) -> None:
        for rank, host in enumerate(hosts):
            self._names[rank] = f"rank {rank}" + (f" ({host})" if host else "")
