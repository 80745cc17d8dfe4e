"""Brings ranks together step by step, so that a rank that is missing or stuck can be named.

Torch's own rendezvous and collectives only report that some rank did not come. Here every rank leaves a mark in the
key-value store before and after each phase, so that rank 0 can read which ranks left none.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_tf.errors import DisagreementError, LaunchError, first_line
from megatron_tf.runtime.environment import (
    NOTICE_SECONDS,
    LaunchEnvironment,
    Notice,
    check_port_free,
    notice_of,
    wait_for_port,
)
from megatron_tf.runtime.patient_store import STORE_ERRORS, PatientStore, Result, Unreachable, within
from megatron_tf.telemetry.text import some_of

FAREWELL_SECONDS = 5.0
ALL_HERE = "all here"
# A living store answers in less, whatever else the ranks wait for.
ANSWER_SECONDS = 60.0
MOST_RANKS = 4  # that a message names
# Keys of their own for each meeting: a process may meet the others again, in a store of torchrun's that lives on.
_MEETINGS = itertools.count()


class Stuck(Exception):
    """Ranks did not begin or finish a phase. `ranks`: which, if known; `phase`: its name; `what`: "did not ..."."""

    def __init__(self, ranks: list[int], phase: str, what: str):
        super().__init__(f"{what} in {phase}")
        self.ranks = ranks
        self.phase = phase
        self.what = what


def open_store(environment: LaunchEnvironment, timeout_seconds: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 opens (under torchrun its agent).

    LaunchError when it cannot be opened, or not be reached in `timeout_seconds`.
    """
    address, port, rank = environment.master_addr, environment.master_port, environment.rank
    by_agent = environment.launcher == "torchrun"
    if rank > 0 or by_agent:
        wait_for_port(address, port, timeout_seconds, environment.address_from, notice_of(environment))
    else:
        check_port_free(address, port, environment.address_from)
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not by_agent,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except STORE_ERRORS as error:
        raise LaunchError(
            f"rank {rank} could not reach the store at MASTER_ADDR={address}, MASTER_PORT={port}: {first_line(error)}"
        ) from error
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"meeting {start}.{next(_MEETINGS)}", store)


class Assembly:
    """The ranks of a job around a store.

    First of all they `meet`; then all ranks call `share`, `phase` and `collect` in the same order, each time with
    another name. Only rank 0 reads what each of the others wrote, so that thousands of ranks do not make thousands of
    requests each. Methods raise Unreachable when the store does not answer, except `errors` and `hear`.
    `notice` is told for which ranks this one waits, when that takes long.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float, notice: Notice | None = None
    ):
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout_seconds
        self._notice = notice
        self._store = PatientStore(store, min(timeout_seconds, ANSWER_SECONDS))
        self._names: list[str] = [f"rank {rank}" for rank in range(world_size)]
        # Ranks that did not come, as far as this one knows.
        self._absent: set[int] = set()

    def name(self, rank: int) -> str:
        """ "rank 3 (node7)"; without the host before `meet` has read it."""
        return self._names[rank]

    def meet(self, run: str = "") -> list[str]:
        """The roll call; returns the host of every rank. `run`: name of the run, the same on all its ranks.

        Raises Stuck, with the ranks that did not come in time (known on rank 0). LaunchError, on this rank alone, when
        the store belongs to another run. DisagreementError, on all ranks, when world sizes differ or two processes have
        the same rank.
        """
        host = socket.gethostname()
        if self.rank == 0:
            self._store.set("run", json.dumps({"run": run, "world_size": self.world_size, "host": host}))
        first = self._find_rank_zero(run)
        if first["world_size"] != self.world_size:
            self._refuse(
                f"the number of ranks is {first['world_size']} on {self.name(0)} and {self.world_size} on rank "
                f"{self.rank} ({host}). Start all ranks of a run with the same WORLD_SIZE, and give each run a "
                "MASTER_PORT of its own."
            )
        own = f"process {os.getpid()} on {host}"
        other = self._store.set_once(f"process/{self.rank}", own)
        if other != own:
            self._refuse(
                f"two processes are rank {self.rank}: {other}, and {own}. Give each process a RANK of its own, end "
                "what is left of an earlier start, and give each run a MASTER_PORT of its own."
            )
        self._store.set(f"host/{self.rank}", host)
        try:
            self._arrive("the roll call")
        except Stuck:
            self._name([self._store.get(f"host/{rank}") for rank in self._ranks()])
            raise
        hosts = self.share("hosts", [self._store.get(f"host/{rank}") for rank in self._ranks()])
        self._name(hosts)
        return hosts

    def call_off(self, run: str, reason: str) -> bool:
        """Called instead of `meet`: all other ranks raise `reason` as a DisagreementError.

        False when the roll call was over already, or rank 0 did not come. LaunchError when the store is another run's.
        """
        try:
            self._find_rank_zero(run)
        except Stuck:
            return False
        called_off = self._store.set_once("the roll call/all here", reason) != ALL_HERE
        self.farewell()
        return called_off

    def share(self, name: str, value: Any) -> Any:
        """Rank 0's `value`, a JSON value, on all ranks. Stuck when it does not come in time."""
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
        elif not self._store.wait(name, self.timeout):
            raise Stuck([0], name, "did not finish")
        return json.loads(self._store.get(name) or "null")

    def phase(self, name: str, work: Callable[[], Result]) -> Result:
        """Runs `work` on all ranks at once; returns its result when all have finished in time.

        Raises Stuck, with the ranks that did not begin or finish (known on rank 0). An exception of `work` is raised on
        its rank; the others then raise Stuck.
        """
        self._arrive(name)
        outcome = within(self.timeout, name, work)
        if outcome is not None and outcome.error is not None:
            self._store.set(f"error/{self.rank}", f"{name}: {type(outcome.error).__name__}: {outcome.error}")
            raise outcome.error
        if outcome is not None:
            if self._store.add(f"{name}/number done", 1) == self.world_size:
                self._store.set(f"{name}/all done", "")
            # The mark comes last: a rank that is lost before the others can go on has left none, and is named.
            self._store.set(f"{name}/done/{self.rank}", "")
        if outcome is None or not self._store.wait(f"{name}/all done", self.timeout):
            raise Stuck(self._without(f"{name}/done"), name, "did not finish")
        return outcome.value()

    def collect(self, name: str, value: Any) -> list[Any]:
        """Every rank's `value`, a JSON value, on rank 0; [] on the others. Stuck, with the ranks that gave none."""
        name = f"results of {name}"  # so that a phase can have the same name
        self._store.set(f"{name}/value/{self.rank}", json.dumps(value))
        self._arrive(name)
        values = [self._store.get(f"{name}/value/{rank}") for rank in self._ranks()]
        assert None not in values
        return [json.loads(value or "") for value in values]

    def errors(self) -> dict[int, str]:
        """The exceptions of phases so far, by rank, as text. {} on ranks other than 0, or when the store is silent."""
        try:
            found = {rank: self._store.get(f"error/{rank}") for rank in self._ranks()}
        except Unreachable:
            return {}
        return {rank: error for rank, error in found.items() if error is not None}

    def tell(self, verdict: int) -> None:
        """Rank 0 calls it at the end: gives the others its exit code, and a moment to read it.

        A launcher stops all ranks when the first one fails, and the store may end with this process.
        """
        self._store.set("verdict", str(verdict))
        self.farewell()

    def hear(self) -> int | None:
        """The other ranks call it at the end: rank 0's exit code; None when it does not come in time."""
        try:
            if not self._store.wait("verdict", self.timeout):
                return None
            verdict = int(self._store.get("verdict") or 1)
            self.farewell()
        except Unreachable:
            return None
        return verdict

    def farewell(self) -> None:
        """Called before all ranks end: the store may end with rank 0, and the others have to read the reason in it.

        Rank 0 waits a moment for them, but not for ranks that it knows did not come.
        """
        if self.rank > 0:
            self._store.set(f"told/{self.rank}", "")
            return
        end = time.monotonic() + min(self.timeout, FAREWELL_SECONDS)
        for rank in range(1, self.world_size):
            if rank not in self._absent and not self._store.wait(f"told/{rank}", end - time.monotonic()):
                return

    def _find_rank_zero(self, run: str) -> dict[str, Any]:
        """Rank 0's run, world size and host. Stuck when it does not come; LaunchError when it is another run's."""
        if not self._wait("run", "the roll call", lambda: [0]):
            raise Stuck([0], "the roll call", "did not come")
        first = json.loads(self._store.get("run") or "{}")
        self._name([first["host"]])
        if first["run"] != run:
            raise LaunchError(
                f"{self.name(0)} at this meeting point belongs to another run: {first['run'] or 'one without a name'}, "
                f"and rank {self.rank} on {socket.gethostname()} to {run or 'one without a name'}. Give each run a "
                "MASTER_PORT of its own."
            )
        return first

    def _refuse(self, reason: str) -> NoReturn:
        """Ends the roll call on all ranks, by a DisagreementError. If it was over already, this rank does not belong to
        the run: LaunchError."""
        if self._store.set_once("the roll call/all here", reason) == ALL_HERE:
            raise LaunchError(f"{self.name(0)} has met its ranks without this one: {reason}")
        self._arrive("the roll call")
        raise AssertionError(f"the roll call went on although {reason}")

    def _arrive(self, name: str) -> None:
        """Waits until all ranks have begun `name`. Stuck when some do not; DisagreementError when it is called off."""
        if self._store.add(f"{name}/count", 1) == self.world_size:
            self._store.set_once(f"{name}/all here", ALL_HERE)
        # last, as in `phase`
        self._store.set(f"{name}/here/{self.rank}", "")
        if not self._wait(f"{name}/all here", name, lambda: self._without(f"{name}/here")):
            absent = self._without(f"{name}/here")
            self._absent.update(absent)
            raise Stuck(absent, name, "did not arrive")
        refusal = self._store.get(f"{name}/all here")
        if refusal != ALL_HERE:
            self.farewell()
            raise DisagreementError(refusal)

    def _wait(self, key: str, phase: str, absent: Callable[[], list[int]]) -> bool:
        """Waits for `key`; returns whether it was set in time. `absent`: gives the ranks to name when it takes long."""
        at_first = min(NOTICE_SECONDS, self.timeout)
        if self._store.wait(key, at_first):
            return True
        if self._notice and self.timeout > at_first and (missing := absent()):
            self._notice(
                f"has waited {at_first:g} seconds for {some_of([self.name(rank) for rank in missing], MOST_RANKS)} "
                f"({phase}). It waits up to {self.timeout:g}: parallel.timeout_seconds"
            )
        return self._store.wait(key, self.timeout - at_first)

    def _without(self, prefix: str) -> list[int]:
        return [rank for rank in self._ranks() if self._store.get(f"{prefix}/{rank}") is None]

    def _ranks(self) -> range:
        """The ranks whose marks this one reads: all on rank 0, none on the others."""
        return range(self.world_size if self.rank == 0 else 0)

    def _name(self, hosts: Sequence[str | None]) -> None:
        for rank, host in enumerate(hosts):
            self._names[rank] = f"rank {rank}" + (f" ({host})" if host else "")
