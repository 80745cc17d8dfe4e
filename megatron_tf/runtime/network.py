"""Network interfaces of this machine, and the variables by which gloo and NCCL choose one. No torch."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def interface_problems(environ: Mapping[str, str], hosts: Sequence[str], on_gpu: bool) -> Iterator[str]:
    """Yields a sentence with its remedy for each variable in `environ` with which ranks on `hosts` could not connect.

    gloo's is checked on GPUs as well, because ranks exchange what they keep on the CPU through it.
    """
    if sys.platform != "linux":
        return
    own = interfaces()
    usable = [name for name, addresses in own.items() if addresses]
    listed = ", ".join(usable) or "none with an address"
    several_hosts = len(set(hosts)) > 1
    chosen = _chosen_by_gloo(environ)
    for name in chosen:
        if name not in usable:
            what = "an interface without an address" if name in own else "no interface"
            yield (
                f"{GLOO_INTERFACE}={environ[GLOO_INTERFACE]}: {name} is {what} of this machine, which has {listed}. "
                "Set it to one of them, or unset it."
            )
            return
    addresses = [address for name in chosen for address in own[name]] or _address_of_host_name()
    if several_hosts and addresses and all(address.startswith("127.") or address == "::1" for address in addresses):
        named = (
            f"{GLOO_INTERFACE}={environ[GLOO_INTERFACE]}"
            if chosen
            else f"this machine's name, {socket.gethostname()}, is {addresses[0]}"
        )
        others = ", ".join(name for name in usable if name != LOOPBACK) or "none other"
        yield (
            f"{named}: an address that other machines cannot reach, and the ranks are on {len(set(hosts))} machines. "
            f"Set {GLOO_INTERFACE} to an interface that they share; here are {others}."
        )
    wanted = environ.get(NCCL_INTERFACE, "").strip()
    if on_gpu and wanted and not _matches_nccl(wanted, usable):
        yield (
            f"{NCCL_INTERFACE}={wanted}: no interface of this machine is meant by it; it has {listed}. Set it to one "
            "of them, or unset it."
        )


def stay_on_this_machine(environ: MutableMapping[str, str]) -> None:
    """Makes ranks of one machine use the loopback, if it is up: changes the interfaces that `environ` names."""
    environ.pop(NCCL_INTERFACE, None)
    environ.pop(GLOO_INTERFACE, None)
    if interfaces().get(LOOPBACK):
        environ[GLOO_INTERFACE] = LOOPBACK


def interfaces() -> dict[str, list[str]]:
    """The IPv4 and IPv6 addresses of each interface of this machine, by its name; [] for one without any."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name, addresses in found.items():
            addresses += _ipv4_address(probe, name)
    # Lines of address, number, prefix length, scope, flags and name.
    with suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        for line in file:
            digits, *_, name = line.split()
            if name in found:
                found[name].append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def _ipv4_address(probe: socket.socket, name: str) -> list[str]:
    import fcntl

    try:
        answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return []
    return [socket.inet_ntoa(answer[20:24])]


def _chosen_by_gloo(environ: Mapping[str, str]) -> list[str]:
    """The names of the interfaces that gloo uses; [] when it chooses. It ignores a value of a single character."""
    text = environ.get(GLOO_INTERFACE, "")
    return text.split(",") if len(text) > 1 else []


def _address_of_host_name() -> list[str]:
    """The address where gloo listens when no interface is chosen, in a list."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        # gloo takes the loopback then.
        return ["127.0.0.1"]
    return [str(found[0][4][0])]


def _matches_nccl(wanted: str, names: Sequence[str]) -> bool:
    """Whether `wanted` selects one of `names` by NCCL's rules: prefixes; "=": exact names; "^": all except these."""
    negated = wanted.startswith("^")
    exact = wanted.lstrip("^").startswith("=")
    parts = [part for part in wanted.lstrip("^=").split(",") if part]

    def meant(name: str) -> bool:
        hit = any(name == part if exact else name.startswith(part) for part in parts)
        return hit != negated

    return any(meant(name) for name in names)
