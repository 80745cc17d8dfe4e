"""Compares facts that all ranks must share when they meet, and names every difference with rank, host and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_tf.errors import DisagreementError, shortened
from megatron_tf.runtime.rendezvous import MOST_RANKS, Assembly
from megatron_tf.telemetry.text import bullets, count_of, some_of

Facts = Mapping[str, str]
NOT_SET = "not set"
COMMAND = "the command"
MOST_DIFFERENCES = 12  # that a message names
VALUE_LIMIT = 120  # characters
REMEDY = (
    "Start every rank with the same command and environment, and give every node the same code, libraries and files. "
    "If ranks of two runs have met, give each run a MASTER_PORT of its own (`deepspeed --master_port PORT`)."
)


def agree(assembly: Assembly, facts: Facts, problems: Sequence[str] = (), gpu: str = "") -> None:
    """DisagreementError on all ranks when `facts` are not the same on all of them, or when one has `problems`.

    A fact's name and value read "NAME is VALUE". `problems`: sentences with their remedy. `gpu`: identifier of this
    rank's GPU, "" without one; no two ranks may use the same. Raises Stuck and Unreachable as `Assembly` does.
    """
    reference = assembly.share("facts of rank 0", dict(facts))
    report = {"differs": differing(facts, reference), "problems": list(problems), "gpu": gpu}
    reports = assembly.collect("differences", report)
    verdict = assembly.share("verdict on facts", _verdict(assembly, reference, reports))
    if verdict:
        assembly.farewell()
        raise DisagreementError(verdict)


def differing(facts: Facts, reference: Facts) -> dict[str, str]:
    """The `facts` that differ from `reference`, with NOT_SET for those that only `reference` has.

    When the commands differ, only the command is returned: the other facts then differ by nature.
    """
    if facts.get(COMMAND) != reference.get(COMMAND):
        facts, reference = ({COMMAND: some.get(COMMAND, NOT_SET)} for some in (facts, reference))
    names = [*reference, *(name for name in facts if name not in reference)]
    values = {name: facts.get(name, NOT_SET) for name in names}
    return {name: value for name, value in values.items() if value != reference.get(name, NOT_SET)}


def differences(reference: Facts, by_rank: Sequence[Facts], names: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for each fact that has another value on some rank than on rank 0.

    `reference`: rank 0's facts. `by_rank`: what each rank finds `differing`. `names`: of the ranks.
    """
    for fact in dict.fromkeys(fact for own in by_rank for fact in own):
        ranks: dict[str, list[str]] = {}
        for name, own in zip(names, by_rank):
            if fact in own:
                ranks.setdefault(own[fact], []).append(name)
        values = [f"{_shown(reference.get(fact, NOT_SET))} on {names[0]}"]
        values += [f"{_shown(value)} on {some_of(who, MOST_RANKS)}" for value, who in ranks.items()]
        yield f"{fact} is {' and '.join(values)}"


def _verdict(assembly: Assembly, reference: Facts, reports: Sequence[Mapping[str, Any]]) -> str:
    """The message on everything that is wrong; "" if nothing is, and on ranks other than 0."""
    names = [assembly.name(rank) for rank in range(len(reports))]
    found = list(differences(reference, [report["differs"] for report in reports], names))
    sentences = found[:MOST_DIFFERENCES]
    if len(found) > MOST_DIFFERENCES:
        sentences.append(f"and {count_of(len(found) - MOST_DIFFERENCES, 'more difference')}")
    who: dict[str, list[str]] = {}
    by_gpu: dict[str, list[str]] = {}
    for name, report in zip(names, reports):
        by_gpu.setdefault(report["gpu"], []).append(name)
        for problem in report["problems"]:
            who.setdefault(problem, []).append(name)
    parts = [f"on {some_of(ranks, MOST_RANKS)}: {problem}" for problem, ranks in who.items()]
    parts += [
        f"{some_of(ranks, MOST_RANKS)} use the same GPU, {gpu}. Start a rank for each GPU, with a LOCAL_RANK of its "
        "own on its node."
        for gpu, ranks in by_gpu.items()
        if gpu and len(ranks) > 1
    ]
    if sentences:
        parts.append(f"the ranks would not do the same work:{bullets(sentences)}\n{REMEDY}")
    return "\n".join(parts)


def _shown(value: str) -> str:
    return shortened(value, VALUE_LIMIT)
