"""Finds this process's place in a run, under every launcher. No torch, no process group.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; `srun` (so `deepspeed
--launcher slurm` too) sets SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID and leaves the meeting point to us; plain
`python` is a run of one process.
Nothing is guessed, because contradicting variables would end in a hang, or in many processes that each train alone and
write into the same folder.
"""

from __future__ import annotations

import errno
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_tf.errors import DisagreementError, LaunchError, LostContactError, NodeError, UserError
from megatron_tf.runtime.slurm_hosts import host_of_rank_zero
from megatron_tf.runtime.stop_signals import ended_by_signals

Launcher = Literal["deepspeed", "torchrun", "srun", "python"]

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
# Slurm's numbers of steps that the user did not start by `srun` begin here (batch script, interactive shell, ...).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_RETRY_SECONDS = 0.5
# After so long a rank prints for which ranks it waits.
NOTICE_SECONDS = 10.0
Notice = Callable[[str], None]
_LATER_SECONDS = 20.0
_SOON_SECONDS = 2.0
_SRUN_REMEDY = (
    "Start every process with `srun python launch/train.py CONFIG`, or just one with `srun --ntasks=1 python ...`."
)


_SET_ADDRESS = "Set MASTER_ADDR to the host of rank 0, by a name that all nodes can resolve."
_MPI_REMEDY = (
    "every MPI process would train alone. Start with `deepspeed launch/train.py CONFIG`, torchrun or srun, or give "
    "every process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of its own."
)


@dataclass(frozen=True)
class LaunchEnvironment:
    """One process's place in a run.

    `launcher`: "python" is always one process; "deepspeed" stands for anything else that sets RANK and WORLD_SIZE.
    `rank` of `world_size` over all nodes; `local_rank` of `local_world_size` on this node (None: not known).
    `restarts`: how often SLURM has put the job back into the queue.
    `master_addr`:`master_port`: where the ranks meet; 127.0.0.1 and port 0 in a run of one process.
    `address_from`: the variable that `master_addr` was taken from.
    `run`: a name that tells this run's ranks from another run's at the same port; "" when the launcher gives none.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    restarts: int = 0
    address_from: str = field(default="MASTER_ADDR", compare=False)
    run: str = field(default="", compare=False)


def detect(environ: Mapping[str, str]) -> LaunchEnvironment:
    """This process's place as the launcher's variables in `environ` (`os.environ`) describe it.

    LaunchError when variables are missing, are not integers, or contradict each other.
    """
    by_launcher = "TORCHELASTIC_RUN_ID" in environ or ("CROSS_SIZE" in environ and "RANK" in environ)
    if _in_slurm_step(environ) and not by_launcher:
        return _from_slurm_step(environ)
    launched = all(name in environ for name in (*_RANK_VARIABLES, *_MEETING_POINT))
    if any(name in environ for name in _RANK_VARIABLES) and not (_says_alone(environ) and not launched):
        return _from_rank_variables(environ)
    if (tasks := _slurm_tasks(environ)) > 1:
        raise LaunchError(
            f"This is one process in a Slurm allocation for SLURM_NTASKS={tasks} processes. {_SRUN_REMEDY}"
        )
    _check_mpi(environ, 1)
    return LaunchEnvironment("python", 0, 1, 0, 1, "127.0.0.1", 0)


def _says_alone(environ: Mapping[str, str]) -> bool:
    """Whether the variables describe one process: WORLD_SIZE=1, perhaps left over in a shell, and rank 0."""
    given = (environ.get(name, usual).strip() for name, usual in zip(_RANK_VARIABLES, ("0", "", "0")))
    return tuple(given) == ("0", "1", "0")


@contextmanager
def one_message(environment: LaunchEnvironment, wait: Callable[[float], object] = time.sleep) -> Iterator[None]:
    """A user's mistake in the block on which all ranks fail is raised on rank 0 only; the others exit with code 2.
    A NodeError, on which all ranks of a node fail, is raised on the node's first rank; another LaunchError on its rank.
    A launcher stops all ranks when the first one ends, so rank 0 goes first and the others `wait` (seconds).
    """
    try:
        yield
    except UserError as error:
        # A LaunchError is about this rank or its machine; no other rank can report it.
        if environment.rank == 0 or (isinstance(error, LaunchError) and not isinstance(error, NodeError)):
            raise
        if isinstance(error, NodeError) and environment.local_rank == 0:
            raise
        # Rank 0 knows of a disagreement as soon as this rank does.
        wait(_SOON_SECONDS if isinstance(error, DisagreementError) else _LATER_SECONDS)
        sys.exit(2)


def _from_rank_variables(environ: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in (*_RANK_VARIABLES, *_MEETING_POINT) if name not in environ]
    if missing and not (missing == ["LOCAL_RANK"] and _one_rank_a_machine(environ)):
        present = ", ".join(f"{name}={environ[name]}" for name in _RANK_VARIABLES if name in environ)
        raise LaunchError(
            f"{present} set, but not {', '.join(missing)}. Start with deepspeed, torchrun or srun, which set all of "
            "them, set LOCAL_RANK=0 where each machine or pod runs one rank, or unset them all for a run of one "
            "process."
        )
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else 0
    if rank >= world_size:
        raise LaunchError(f"RANK={rank} must be below WORLD_SIZE={world_size}. Use the launcher's own variables.")
    _check_one_run(environ, world_size)
    _check_mpi(environ, world_size)
    local_name = next((name for name in _LOCAL_SIZES if name in environ), None)
    local_world_size = _integer(environ, local_name) if local_name else None
    if local_world_size is not None and local_rank >= local_world_size:
        raise LaunchError(f"LOCAL_RANK={local_rank} must be below {local_name}={local_world_size}.")
    if local_rank > rank:
        raise LaunchError(f"LOCAL_RANK={local_rank} cannot be above RANK={rank}. Use the launcher's own variables.")
    launcher: Launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed"
    if world_size == 1:
        return LaunchEnvironment(launcher, 0, 1, local_rank, local_world_size, "127.0.0.1", 0)
    return LaunchEnvironment(
        launcher,
        rank,
        world_size,
        local_rank,
        local_world_size,
        _address(environ),
        _port(environ),
        run=_torchrun_run(environ),
    )


def _one_rank_a_machine(environ: Mapping[str, str]) -> bool:
    """Whether a missing LOCAL_RANK can only be 0, as in Kubeflow's pods of one process each."""
    several = ("TORCHELASTIC_RUN_ID", *_LOCAL_SIZES, *_MPI_SIZES)
    return not any(environ.get(name, "1") != "1" for name in several)


def _torchrun_run(environ: Mapping[str, str]) -> str:
    name = environ.get("TORCHELASTIC_RUN_ID", "none")
    if name == "none":  # torchrun's own for "not given"
        return ""
    return f"torchrun's run {name}, start {environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _check_mpi(environ: Mapping[str, str], world_size: int) -> None:
    """LaunchError when the processes of mpirun would be many runs, without variables or with another launcher's."""
    for name in _MPI_SIZES:
        text = environ.get(name, "1")
        processes = int(text) if text.isdecimal() else 1
        if processes > world_size:
            has = (
                f"RANK={environ['RANK']} and WORLD_SIZE={world_size}" if "RANK" in environ else "no RANK and WORLD_SIZE"
            )
            raise LaunchError(f"{name}={text} but {has}: {_MPI_REMEDY}")
    for name in _MPI_RANKS:
        if world_size == 1 and environ.get(name, "0").strip() not in ("0", ""):
            raise LaunchError(f"{name}={environ[name]} but no RANK and WORLD_SIZE above 1: {_MPI_REMEDY}")


def _check_one_run(environ: Mapping[str, str], world_size: int) -> None:
    """LaunchError when torchrun or deepspeed, started in every task of a Slurm step, would be one run per task."""
    tasks = _slurm_tasks(environ) if _in_slurm_step(environ) else 1
    agents = next((name for name in ("GROUP_WORLD_SIZE", "CROSS_SIZE") if name in environ), None)
    apart = agents is not None and _integer(environ, agents) == 1
    if tasks > 1 and (apart or world_size < tasks):
        raise LaunchError(
            f"RANK={environ['RANK']} and WORLD_SIZE={world_size}{f' with {agents}=1' if apart else ''} in a Slurm step "
            f"of SLURM_NTASKS={tasks} tasks: every task would be a run of its own. Give torchrun --nnodes and a "
            "rendezvous endpoint and start one a node, or use `srun python launch/train.py CONFIG` without it."
        )


def _from_slurm_step(environ: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID") if name not in environ]
    if missing:
        raise LaunchError(
            f"SLURM_STEP_ID={environ['SLURM_STEP_ID']} says that srun started this process, but {', '.join(missing)} "
            f"is not set. {_SRUN_REMEDY}"
        )
    rank, world_size = _integer(environ, "SLURM_PROCID"), _slurm_tasks(environ)
    if rank >= world_size:
        raise LaunchError(f"SLURM_PROCID={rank} must be below SLURM_NTASKS={world_size}. {_SRUN_REMEDY}")
    for name, slurm_name, value in (("WORLD_SIZE", "SLURM_NTASKS", world_size), ("RANK", "SLURM_PROCID", rank)):
        if name in environ and _integer(environ, name) != value:
            raise LaunchError(
                f"{name}={environ[name]} contradicts {slurm_name}={value} of srun. Unset RANK, WORLD_SIZE and "
                "LOCAL_RANK in the shell or script that calls srun."
            )
    # LOCAL_RANK wins: a script that shows each task only one GPU sets it to 0 on purpose.
    local_rank = _integer(environ, "LOCAL_RANK" if "LOCAL_RANK" in environ else "SLURM_LOCALID")
    # This may be the allocation's number and not this step's; the local world size is then not known.
    per_node = _integer(environ, "SLURM_NTASKS_PER_NODE") if "SLURM_NTASKS_PER_NODE" in environ else 0
    local_world_size = per_node if local_rank < per_node <= world_size else None
    restarts = _integer(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    if world_size == 1:
        return LaunchEnvironment("srun", 0, 1, local_rank, local_world_size, "127.0.0.1", 0, restarts)
    address, origin = (_address(environ), "MASTER_ADDR") if "MASTER_ADDR" in environ else host_of_rank_zero(environ)
    job, step = environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]
    port = (
        _port(environ)
        if "MASTER_PORT" in environ
        else _port_of_step(_integer(environ, "SLURM_JOB_ID"), int(step), restarts)
    )
    run = f"step {step} of SLURM job {job}, start {restarts}"
    return LaunchEnvironment(
        "srun", rank, world_size, local_rank, local_world_size, address, port, restarts, origin, run
    )


def _port_of_step(job: int, step: int, restarts: int) -> int:
    """A port from 20000 to 29999 that differs between the steps of a job, because they may run at the same time.

    It also differs after a requeue, and is far from the next jobs' ports: a rank of the previous start may still run.
    """
    return 20000 + (job + 997 * restarts + 211 * step) % 10000


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process, and not a batch script or an interactive shell of an allocation."""
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_JOB_ID" in environ and step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    if "SLURM_JOB_ID" not in environ or "SLURM_NTASKS" not in environ:
        return 1
    return _integer(environ, "SLURM_NTASKS")


def _address(environ: Mapping[str, str]) -> str:
    address = environ["MASTER_ADDR"].strip()
    if not address:
        raise LaunchError("MASTER_ADDR is empty. Set it to the host of rank 0, or unset it under srun.")
    return address


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise LaunchError(f"MASTER_PORT={port} is outside 1 to 65535.")
    return port


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"\s*[0-9]+\s*", text):
        raise LaunchError(f"{name}={text!r} is not an integer of 0 or more. Set it as the launcher would.")
    return int(text)


def check_port_free(addr: str, port: int, address_from: str = "MASTER_ADDR") -> None:
    """LaunchError when rank 0 could not open `addr`:`port` on this machine. Rank 0 calls it before it opens the port.

    `address_from`: the variable that names `addr`. Not to be used under torchrun, whose agent listens on the port. Port
    0 is always free.
    """
    try:
        found = socket.getaddrinfo(addr, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unresolved(addr, address_from, error) from None
    if not any(_is_of_this_machine(family, address) for family, _, _, _, address in found):
        remedy = "Name the host of rank 0, or unset it under srun." if address_from == "MASTER_ADDR" else _SET_ADDRESS
        raise LaunchError(
            f"{_named(addr, address_from)} ({found[0][4][0]}) is not an address of this machine, "
            f"{socket.gethostname()}, where rank 0 runs. {remedy}"
        )
    if port == 0:
        return
    # The store will listen on every address of this machine, not on `addr` alone.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT counts as free
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
            raise LaunchError(
                f"MASTER_PORT={port} {reason} on {addr}, perhaps by another run. Choose another: "
                "`deepspeed --master_port PORT ...`, or MASTER_PORT=PORT in the environment under srun."
            ) from None


def notice_of(environment: LaunchEnvironment) -> Notice | None:
    """A function that prints what this rank waits for. None for a rank that would repeat what others print: only rank
    0, rank 1 and the first rank of each node print it."""
    if environment.rank > 1 and environment.local_rank > 0:
        return None
    who = f"rank {environment.rank} of {environment.world_size}"
    return lambda text: print(f"{who} {text}", file=sys.stderr, flush=True)


def wait_for_port(
    addr: str, port: int, timeout_seconds: float, address_from: str = "MASTER_ADDR", notice: Notice | None = None
) -> None:
    """Wait until rank 0 listens on `addr`:`port`. The other ranks call it before they connect.

    `address_from`: the variable that names `addr`. `notice` is told once when this takes long. LaunchError when `addr`
    cannot be resolved, or when nothing answers in `timeout_seconds`.
    """
    with ended_by_signals():
        _wait_for_port(addr, port, timeout_seconds, address_from, notice)


def _wait_for_port(addr: str, port: int, timeout_seconds: float, address_from: str, notice: Notice | None) -> None:
    began = time.monotonic()
    deadline = began + timeout_seconds
    while True:
        try:
            patience = min(deadline - time.monotonic(), NOTICE_SECONDS)
            socket.create_connection((addr, port), timeout=max(0.1, patience)).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise _unresolved(addr, address_from, error) from None
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise LostContactError(
                    f"rank 0 was not found at MASTER_ADDR={addr}, MASTER_PORT={port} within {timeout_seconds:g} "
                    f"seconds ({error.strerror or error}). Check that rank 0 has started, that these name its host and "
                    "port, and that no firewall is between; parallel.timeout_seconds is how long ranks wait."
                ) from None
            waited = time.monotonic() - began
            if notice and waited >= NOTICE_SECONDS:
                notice(
                    f"has waited {waited:.0f} seconds for rank 0 at MASTER_ADDR={addr}, MASTER_PORT={port} "
                    f"({error.strerror or error}). It waits up to {timeout_seconds:g}: parallel.timeout_seconds"
                )
                notice = None
        time.sleep(_RETRY_SECONDS)


def _unresolved(addr: str, address_from: str, error: OSError) -> NodeError:
    remedy = "Name the host of rank 0." if address_from == "MASTER_ADDR" else _SET_ADDRESS
    return NodeError(f"{_named(addr, address_from)} cannot be resolved: {error}. {remedy}")


def _named(addr: str, address_from: str) -> str:
    if address_from == "MASTER_ADDR":
        return f"MASTER_ADDR={addr}"
    return f"the host of rank 0, {addr} by {address_from},"


def _is_of_this_machine(family: int, address: tuple[Any, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
    return True
