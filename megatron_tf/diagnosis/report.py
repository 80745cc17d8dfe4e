"""The doctor's findings as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_tf.telemetry.text import count_of


def machine_report(machine: dict[str, Any]) -> str:
    """Software and devices, what is missing, warnings, and what is broken; without a last newline."""
    facts = {**machine["system"], **{name: version for name, version in machine["packages"].items() if version}}
    lines = [f"{name:<14} {value}" for name, value in facts.items()]
    lines.append(f"{'devices':<14} {'; '.join(machine['gpus']) or 'no GPU: the CPU, with gloo'}")
    for head, key in (("missing", "missing"), ("warning", "warnings"), ("BROKEN", "broken")):
        lines += [f"{head:<14} {sentence}" for sentence in machine[key]]
    return "\n".join(lines)


def job_report(job: dict[str, Any]) -> str:
    """Speeds of a job's devices, links and collectives, and who is slow or broken; without a last newline."""
    return "\n".join(_job_lines(job))


def _job_lines(job: dict[str, Any]) -> Iterator[str]:
    hosts = job["hosts"]
    yield ""
    if hosts:
        yield f"{count_of(len(hosts), 'rank')} on {count_of(len(set(hosts)), 'host')}"
    if job["flops"]:
        yield f"  matrix product   {min(job['flops']) / 1e12:.3g} to {max(job['flops']) / 1e12:.3g} TFLOP/s a rank"
    for kind, within in (("within a host", True), ("between hosts", False)):
        links = [one for one in job["links"] if (hosts[one["first"]] == hosts[one["second"]]) == within]
        if links:
            rates, delays = [one["bandwidth"] / 1e9 for one in links], [one["latency"] * 1e6 for one in links]
            yield (
                f"  {count_of(len(links), 'link')} {kind}: {min(rates):.3g} to {max(rates):.3g} GB/s, "
                f"{min(delays):,.0f} to {max(delays):,.0f} µs"
            )
    for one in job["collectives"]:
        yield (
            f"  {one['kind']:<15}  {one['latency'] * 1e6:>8,.0f} µs  {one['bytes'] / 1e6:,.3g} MB in "
            f"{one['seconds'] * 1e3:,.3g} ms  bus {one['bus_bandwidth'] / 1e9:.3g} GB/s"
        )
    for head in ("slow", "broken"):
        for sentence in job[head]:
            yield f"  {head.upper()}: {sentence}"
    if not job["slow"] and not job["broken"]:
        yield "  all ranks are well"
