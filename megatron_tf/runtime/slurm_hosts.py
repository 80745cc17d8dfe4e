"""The host of rank 0 of a SLURM step, from SLURM's variables. No torch.

A node list is sorted, whatever the order of the ranks. Two kinds of steps put rank 0 on another node than the first:
one over several components of a heterogeneous job begins with the nodes of its first component, and
`--distribution=arbitrary` follows a host file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product

from megatron_tf.errors import LaunchError

_REMEDY = "Set MASTER_ADDR to the host of rank 0."


def host_of_rank_zero(environ: Mapping[str, str]) -> tuple[str, str]:
    """(host, the variable that names it). LaunchError when SLURM's variables do not say."""
    name = next((name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environ.get(name)), None)
    if name is None:
        raise LaunchError(
            f"Neither MASTER_ADDR nor SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST says where the ranks meet. {_REMEDY}"
        )
    hosts = expand_hostlist(environ[name])
    if len(hosts) == 1:
        return hosts[0], name
    arbitrary = environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary")
    if arbitrary or ("SLURM_HOSTFILE" in environ and "SLURM_DISTRIBUTION" not in environ):
        return _first_of_host_file(environ), "SLURM_HOSTFILE"
    for group in range(_components(environ)):
        of_group = f"SLURM_JOB_NODELIST_HET_GROUP_{group}"
        nodes = expand_hostlist(environ[of_group]) if environ.get(of_group) else []
        # A step may leave out components of the job, whose nodes are then not among its hosts.
        if nodes and set(nodes) <= set(hosts):
            return nodes[0], of_group
    return hosts[0], name


def _components(environ: Mapping[str, str]) -> int:
    size = environ.get("SLURM_HET_SIZE", "0")
    return int(size) if size.isdecimal() else 0


def _first_of_host_file(environ: Mapping[str, str]) -> str:
    path = environ.get("SLURM_HOSTFILE")
    if not path:
        raise LaunchError(
            "SLURM_DISTRIBUTION=arbitrary puts rank 0 on any of the nodes, and without SLURM_HOSTFILE nothing says on "
            f"which. {_REMEDY}"
        )
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except OSError as error:
        raise LaunchError(
            f"SLURM_HOSTFILE={path} says on which node rank 0 runs, but cannot be read on this one: {error.strerror}. "
            "Put it into a folder that all nodes see, or set MASTER_ADDR to its first host."
        ) from None
    first = next((line for line in lines if line), None)
    if first is None:
        raise LaunchError(f"SLURM_HOSTFILE={path} names no host. {_REMEDY}")
    # A host may be followed by its number of tasks: n1*4.
    return expand_hostlist(first)[0].partition("*")[0]


def expand_hostlist(hostlist: str) -> list[str]:
    """The hosts that Slurm's short form names, in order: "n[1-3,07],gpu02" -> n1, n2, n3, n07, gpu02.

    Numbers keep their leading zeros; a host may hold several brackets. LaunchError when it cannot be read.
    """
    hosts: list[str] = []
    for item in re.split(r",(?![^\[]*\])", hostlist.strip()):
        # odd parts are the insides of brackets
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if any("[" in part or "]" in part for part in parts[::2]) or not item.strip():
            raise LaunchError(f"The node list {hostlist!r} cannot be read. {_REMEDY}")
        choices = [_numbers(part, hostlist) if at % 2 else [part.strip()] for at, part in enumerate(parts)]
        hosts += ["".join(chosen) for chosen in product(*choices)]
    return hosts


def _numbers(ranges: str, hostlist: str) -> list[str]:
    """ "1-3,07" -> "1", "2", "3", "07"."""
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise LaunchError(f"[{ranges}] in the node list {hostlist!r} cannot be read. {_REMEDY}")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
