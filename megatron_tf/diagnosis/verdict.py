"""From measurements to names: which rank is slow, which is broken, which differs. Pure arithmetic, no torch.

The reference speed is the median over ranks of each rank's best link. A single slow rank slows two links, so a median
over links would be fooled by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from megatron_tf.telemetry.text import some_of

LATENCY_FACTOR = 5.0  # small messages vary more than large ones


@dataclass(frozen=True)
class Link:
    """A link between two ranks, measured one way.

    `latency`: seconds for the smallest message; `bandwidth`: bytes/s of a large one; `right`: both arrived unchanged.
    """

    first: int
    second: int
    latency: float
    bandwidth: float
    right: bool


def best_of(*measured: Link) -> Link:
    """The best latency and bandwidth of repeated measurements of a link; `right` only if it always was."""
    return _combined(measured, min, max)


def worst_of(*measured: Link) -> Link:
    """The worst latency and bandwidth of a link as measured at its two ends; `right` only if it was at both."""
    return _combined(measured, max, min)


def _combined(measured: Sequence[Link], latency: Callable[..., float], bandwidth: Callable[..., float]) -> Link:
    return replace(
        measured[0],
        latency=latency(link.latency for link in measured),
        bandwidth=bandwidth(link.bandwidth for link in measured),
        right=all(link.right for link in measured),
    )


@dataclass(frozen=True)
class Findings:
    """What is wrong and what is slow, one sentence each, which names the ranks."""

    broken: list[str]
    slow: list[str]


def judge_devices(flops: Sequence[float], right: Sequence[bool], names: Sequence[str], factor: float) -> Findings:
    """Finds ranks whose matrix product is wrong, or more than `factor` times slower than the median.

    `flops` (FLOP/s), `right` and `names`: by rank.
    """
    usual = median(flops)
    broken = [f"{name}: a matrix product on its device is wrong" for name, ok in zip(names, right) if not ok]
    slow = [
        f"{name}: its device computes {_rate(own, 'FLOP/s')}, the median {_rate(usual, 'FLOP/s')}"
        for name, own in zip(names, flops)
        if own * factor < usual
    ]
    return Findings(broken, slow)


def judge_links(links: Sequence[Link], names: Sequence[str], hosts: Sequence[str], factor: float) -> Findings:
    """Finds links that lose data, ranks whose links (two or more) are all slow, and single slow links.

    Links within a host and between hosts are judged separately. `names` and `hosts`: by rank. Slow: bandwidth `factor`
    times below the usual, or latency LATENCY_FACTOR · `factor` times above it.
    """
    broken = [
        f"{names[link.first]} and {names[link.second]}: what one sends the other does not receive"
        for link in links
        if not link.right
    ]
    slow: list[str] = []
    for within in (True, False):
        alike = [link for link in links if (hosts[link.first] == hosts[link.second]) == within]
        slow += _slow_links(alike, names, factor)
    return Findings(broken, slow)


def _slow_links(links: Sequence[Link], names: Sequence[str], factor: float) -> list[str]:
    if not links:
        return []
    of_rank: dict[int, list[Link]] = {}
    for link in links:
        for rank in (link.first, link.second):
            of_rank.setdefault(rank, []).append(link)
    bandwidth = median(max(link.bandwidth for link in own) for own in of_rank.values())
    latency = median(min(link.latency for link in own) for own in of_rank.values())

    def is_slow(link: Link) -> bool:
        return link.bandwidth * factor < bandwidth or link.latency > LATENCY_FACTOR * factor * latency

    def speed(found: Sequence[Link]) -> str:
        worst = min(found, key=lambda link: link.bandwidth)
        late = max(link.latency for link in found)
        return (
            f"{_rate(worst.bandwidth, 'B/s')} and {late * 1e6:,.0f} µs, usual are {_rate(bandwidth, 'B/s')} and "
            f"{latency * 1e6:,.0f} µs"
        )

    unexplained = [link for link in links if is_slow(link)]
    sentences = []
    for rank, own in sorted(of_rank.items()):
        if len(own) > 1 and all(is_slow(link) for link in own) and any(link in unexplained for link in own):
            sentences.append(f"{names[rank]}: all its {len(own)} links are slow: {speed(own)}")
            unexplained = [link for link in unexplained if link not in own]
    sentences += [
        f"the link between {names[link.first]} and {names[link.second]} is slow: {speed([link])}"
        for link in unexplained
    ]
    return sentences


def judge_facts(facts: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Sentences on ranks whose software or device differs from most ranks'; "none" stands for a missing fact."""
    sentences = []
    for key in dict.fromkeys(key for own in facts for key in own):
        values = [str(own.get(key, "none")) for own in facts]
        ((usual, _),) = Counter(values).most_common(1)
        others: dict[str, list[str]] = {}
        for name, value in zip(names, values):
            if value != usual:
                others.setdefault(value, []).append(name)
        sentences += [
            f"{some_of(who, 8)}: {key} {value}, the others have {usual}" for value, who in sorted(others.items())
        ]
    return sentences


def _rate(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.3g} {prefix}{unit}"
    return f"{value:,.3g} {unit}"
