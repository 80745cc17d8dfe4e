"""From measurements to names."""

from __future__ import annotations

import pytest

from megatron_tf.diagnosis.verdict import Link, best_of, judge_devices, judge_facts, judge_links, worst_of


def names(count):
    return [f"rank {rank} (node{rank // 8})" for rank in range(count)]


def ring(count, slow_rank=None, slow_link=None, factor=10.0, stride=1):
    """Links of a ring; those of one rank, or one of them, are slower."""
    links = []
    for first in range(count if count > 2 else 1):
        second = (first + stride) % count
        slow = slow_rank in (first, second) or slow_link == (first, second)
        links.append(Link(first, second, 1e-5, 1e9 / factor if slow else 1e9 * (1 + first / 50), True))
    return links


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("slow_rank", [0, 1, 2])
def test_a_slow_rank_is_named_and_its_neighbours_are_not(count, slow_rank):
    found = judge_links(ring(count, slow_rank), names(count), ["node0"] * count, 2.0)
    assert found.broken == []
    (sentence,) = found.slow
    assert sentence.startswith(f"rank {slow_rank} (node0): all its 2 links are slow: 100 MB/s and 10 µs")


def test_a_slow_link_is_of_two_ranks():
    (sentence,) = judge_links(ring(5, slow_link=(2, 3)), names(5), ["node0"] * 5, 2.0).slow
    assert sentence.startswith("the link between rank 2 (node0) and rank 3 (node0) is slow: 100 MB/s")


def test_equal_links_and_two_ranks_have_no_slow_one():
    assert judge_links(ring(6), names(6), ["node0"] * 6, 1.5).slow == []
    assert judge_links(ring(2, slow_rank=1), names(2), ["node0"] * 2, 1.5).slow == []


def test_late_small_messages_are_slow_too():
    links = [Link(i, (i + 1) % 4, 1e-3 if 2 in (i, (i + 1) % 4) else 1e-5, 1e9, True) for i in range(4)]
    (sentence,) = judge_links(links, names(4), ["node0"] * 4, 2.0).slow
    assert sentence.startswith("rank 2") and "1,000 µs" in sentence


def test_links_between_hosts_are_measured_by_their_own():
    hosts = [f"node{rank // 8}" for rank in range(32)]
    within = [Link(r, r + 1, 1e-5, 400e9, True) for r in range(31) if hosts[r] == hosts[r + 1]]
    between = [Link(r, (r + 8) % 32, 4e-5, 5e9 if 11 in (r, (r + 8) % 32) else 40e9, True) for r in range(32)]
    assert judge_links([*within, *between], names(32), hosts, 1.5).slow == [
        "rank 11 (node1): all its 2 links are slow: 5 GB/s and 40 µs, usual are 40 GB/s and 40 µs"
    ]


def test_a_link_measured_again():
    disturbed, usual = Link(2, 3, 4e-5, 1e6, True), Link(2, 3, 1e-5, 1e9, False)
    assert best_of(disturbed, usual) == Link(2, 3, 1e-5, 1e9, False)
    assert worst_of(disturbed, usual) == Link(2, 3, 4e-5, 1e6, False)


def test_what_does_not_arrive_is_broken():
    links = [Link(0, 1, 1e-5, 1e9, True), Link(1, 2, 1e-5, 1e9, False)]
    assert judge_links(links, names(3), ["a"] * 3, 2.0).broken == [
        "rank 1 (node0) and rank 2 (node0): what one sends the other does not receive"
    ]


def test_devices():
    found = judge_devices([100e12, 101e12, 60e12, 99e12], [True, False, True, True], names(4), 1.5)
    assert found.slow == ["rank 2 (node0): its device computes 60 TFLOP/s, the median 99.5 TFLOP/s"]
    assert found.broken == ["rank 1 (node0): a matrix product on its device is wrong"]
    assert judge_devices([100e12, 101e12, 70e12], [True] * 3, names(3), 1.5).slow == []


def test_ranks_that_run_something_else():
    facts = [{"torch": "2.13.0", "GPU": "H100"} for _ in range(20)]
    facts[3]["torch"] = facts[9]["torch"] = "2.11.0"
    assert judge_facts(facts, names(20)) == [
        "rank 3 (node0), rank 9 (node1): torch 2.11.0, the others have 2.13.0",
    ]
    assert judge_facts([{}, {"NCCL_ALGO": "Ring"}, {}], names(3)) == [
        "rank 1 (node0): NCCL_ALGO Ring, the others have none"
    ]
    many = [{"torch": "2.13.0" if rank < 11 else "2.12.0"} for rank in range(20)]
    assert judge_facts(many, names(20))[0].count("rank ") == 8 and "and 1 more" in judge_facts(many, names(20))[0]
