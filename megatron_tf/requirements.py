"""Versions of other packages that this one was tested with. setup.py declares them; they are read from the metadata of
the installed package."""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata

PROJECT = "megatron_tf"


def wanted_versions(package: str) -> str:
    """The wanted versions in pip's notation, ">=2.11,<2.14". "" if any will do, or if this project is not installed."""
    return _requirements().get(_plain(package), "")


def is_wanted(package: str, version: str) -> bool:
    return all(_holds(version, clause) for clause in wanted_versions(package).split(",") if clause)


@cache
def _requirements() -> dict[str, str]:
    """Package -> versions, of all extras too: a package has the same bounds wherever it is asked for."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;\s]*)", line)
        assert match is not None, line
        # Lower bounds first (">" sorts after "<"): the installing tool may have changed their order.
        found[_plain(match[1])] = ",".join(sorted(match[2].split(","), reverse=True))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _holds(version: str, clause: str) -> bool:
    """Whether "2.13.0+cpu" satisfies one of ">=2.11", "<2.14", "==0.19.8"."""
    match = re.fullmatch(r"(>=|<|==)([0-9.]+)", clause)
    assert match is not None, clause
    have, limit = _numbers(version), _numbers(match[2])
    return {">=": have >= limit, "<": have < limit, "==": have == limit}[match[1]]


def _numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13): trailing zeros do not change a version."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
