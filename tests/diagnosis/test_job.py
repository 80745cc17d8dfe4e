"""A job of gloo ranks of which one is slow, wrong, stuck, or not there at all."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tf.diagnosis import job
from megatron_tf.diagnosis.job import Diagnosis, examine
from megatron_tf.diagnosis.measure import bus_bandwidth, ring_rounds
from megatron_tf.diagnosis.verdict import Link
from megatron_tf.errors import exit_now
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.runtime.rendezvous import Assembly

CULPRIT = 1
# Ranks on two shared cores disturb one another; what the tests slow down is slower than that by far.
FACTOR = 20.0


def sick_job(sickness, ranks, *, started=None, timeout=20.0, doubtful_passes=5) -> Diagnosis:
    """What rank 0 finds when `sickness` befell rank CULPRIT; `started`: ranks that come at all."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(rank_of_job, started or ranks, sickness, ranks, folder, timeout, doubtful_passes)
        found = json.loads(Path(folder, "0.json").read_text())
    links = [Link(**link) for link in found.pop("links")]
    return Diagnosis(links=links, **found)


def rank_of_job(rank, sickness, ranks, folder, timeout, doubtful_passes):
    torch.set_num_threads(1)
    job.LINK_PASSES = 1
    job.DOUBTFUL_PASSES = doubtful_passes
    if rank == CULPRIT and sickness is not None:
        sickness()
    store = dist.FileStore(f"{folder}/store", ranks)
    found = examine(Assembly(store, rank, ranks, timeout), store, 0, 100_000, FACTOR)
    Path(folder, f"{rank}.json").write_text(json.dumps(asdict(found)))
    exit_now()


def slow_sender():
    send = dist.send

    def late(*arguments):
        time.sleep(0.1)
        return send(*arguments)

    dist.send = late


def disturbed_sender():
    """Slow for as long as links are measured whatever they are."""
    send, measure, passes = dist.send, job.measure_link, Counter()

    def measured(rank, link, *arguments):
        passes[link] += 1
        dist.send = late if passes[link] <= job.LINK_PASSES else send
        return measure(rank, link, *arguments)

    def late(*arguments):
        time.sleep(0.1)
        return send(*arguments)

    job.measure_link = measured


def slow_device():
    original = job.device_flops

    def throttled(device):
        flops, right = original(device)
        return flops / 10_000, right

    job.device_flops = throttled


def wrong_sums():
    reduce = dist.all_reduce

    def wrong(tensor, *arguments, **named):
        reduce(tensor, *arguments, **named)
        tensor += 1

    dist.all_reduce = wrong


def lost_messages():
    original = dist.send

    def send(tensor, *arguments):
        return original(torch.zeros_like(tensor) - 1, *arguments)

    dist.send = send


def raising():
    def broken(device):
        raise RuntimeError("the GPU has fallen off the bus")

    job.device_flops = broken


def hanging():
    job.device_flops = lambda device: time.sleep(1000)


def other_software():
    facts = job._facts
    job._facts = lambda device: {**facts(device), "torch": "2.11.0"}


def test_a_job_that_is_well():
    found = sick_job(None, 4)
    assert (found.broken, found.slow) == ([], [])
    assert [(link.first, link.second) for link in found.links] == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert all(link.bandwidth > 1e6 and 0 < link.latency < 1 and link.right for link in found.links)
    assert [one["kind"] for one in found.collectives] == ["all_reduce", "all_gather", "reduce_scatter"]
    assert all(one["bytes"] == 100_000 and one["bus_bandwidth"] > 1e5 for one in found.collectives)
    assert len(found.flops) == len(found.hosts) == 4


def test_a_slow_rank_is_named():
    found = sick_job(slow_sender, 3, doubtful_passes=1)
    assert found.broken == []
    (sentence,) = found.slow
    assert sentence.startswith(f"rank 1 ({os.uname().nodename}): all its 2 links are slow")


@pytest.mark.slow
def test_a_slow_device_is_named():
    found = sick_job(slow_device, 3)
    assert found.broken == []
    (sentence,) = (slow for slow in found.slow if "link" not in slow)
    assert sentence.startswith("rank 1 (") and "its device computes" in sentence


@pytest.mark.slow
def test_a_link_that_was_disturbed_is_measured_again():
    found = sick_job(disturbed_sender, 3)
    assert (found.broken, found.slow) == ([], [])


@pytest.mark.slow
def test_wrong_sums_are_broken():
    found = sick_job(wrong_sums, 2)
    assert found.broken == [f"all_reduce gives wrong numbers on rank 1 ({os.uname().nodename})"]


@pytest.mark.slow
def test_messages_that_do_not_arrive_whole():
    assert "what one sends the other does not receive" in sick_job(lost_messages, 2).broken[0]


def test_what_a_rank_raises_is_its_own_fault():
    (sentence,) = sick_job(raising, 3, timeout=5.0).broken
    assert sentence.startswith("rank 1 (") and "the GPU has fallen off the bus" in sentence


@pytest.mark.slow
def test_a_rank_that_hangs():
    (sentence,) = sick_job(hanging, 3, timeout=5.0).broken
    assert sentence.startswith("rank 1 (") and "did not finish in time: warming up the device" in sentence


def test_a_rank_that_never_comes():
    found = sick_job(None, 3, started=2, timeout=5.0)
    assert found.broken == ["rank 2 did not arrive in time: the roll call"]


@pytest.mark.slow
def test_a_rank_with_other_software():
    found = sick_job(other_software, 3)
    assert len(found.broken) == 1, found.broken
    (sentence,) = found.broken
    assert sentence.startswith("rank 1 (") and "torch 2.11.0, the others have 2." in sentence


@pytest.mark.parametrize(("ranks", "stride"), [(2, 1), (3, 1), (4, 1), (5, 1), (16, 8), (24, 8), (12, 4), (1, 1)])
def test_rounds_hold_each_link_once_and_each_rank_at_most_once(ranks, stride):
    rounds = ring_rounds(ranks, stride)
    for links in rounds:
        busy = [rank for link in links for rank in link]
        assert len(busy) == len(set(busy))
    links = {frozenset(link) for links in rounds for link in links}
    assert len(links) == sum(map(len, rounds))
    assert links == {frozenset((r, (r + stride) % ranks)) for r in range(ranks) if ranks > 1}


def test_bus_bandwidth_as_nccl_tests_define_it():
    assert bus_bandwidth("all_reduce", 8_000, 2.0, 8) == 7_000
    assert bus_bandwidth("all_gather", 8_000, 2.0, 8) == 3_500
