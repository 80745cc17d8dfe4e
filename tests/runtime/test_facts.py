"""What differs between ranks is named, with rank, host and values."""

from __future__ import annotations

import pytest
from gathering import gathering

from megatron_tf.errors import DisagreementError
from megatron_tf.runtime.facts import COMMAND, MOST_DIFFERENCES, agree, differences, differing


def names(count):
    return [f"rank {rank} (n{rank})" for rank in range(count)]


def sentences(*facts):
    return list(differences(facts[0], [differing(own, facts[0]) for own in facts], names(len(facts))))


def test_equal_facts():
    assert sentences({"lr": "1"}, {"lr": "1"}) == sentences({}, {}) == []


def test_the_ranks_are_named_by_value():
    assert sentences({"lr": "1", "a": "x"}, {"lr": "2", "a": "x"}) == ["lr is 1 on rank 0 (n0) and 2 on rank 1 (n1)"]
    assert sentences({"lr": "1"}, {"lr": "2"}, {"lr": "3"}, {"lr": "2"}) == [
        "lr is 1 on rank 0 (n0) and 2 on rank 1 (n1), rank 3 (n3) and 3 on rank 2 (n2)"
    ]
    (sentence,) = sentences({"lr": "1"}, *[{"lr": "2"}] * 6)
    assert sentence.endswith("2 on rank 1 (n1), rank 2 (n2), rank 3 (n3), rank 4 (n4) and 2 more")


def test_what_only_some_have():
    assert sentences({"a": "1"}, {"b": "2"}) == [
        "a is 1 on rank 0 (n0) and not set on rank 1 (n1)",
        "b is not set on rank 0 (n0) and 2 on rank 1 (n1)",
    ]


def test_ranks_of_two_commands():
    train = {COMMAND: "train", "optimizer.lr": "1"}
    assert sentences(train, {COMMAND: "doctor"}) == ["the command is train on rank 0 (n0) and doctor on rank 1 (n1)"]


def test_values_are_cut():
    (sentence,) = sentences({"path": "a" * 500}, {"path": "b" * 5000})
    assert len(sentence) < 400


def test_ranks_agree_or_all_fail_with_the_same_words():
    def rank(assembly):
        assembly.meet()
        agree(assembly, {"lr": "1"})

    assert gathering(rank, 3) == [None] * 3

    def other(assembly):
        assembly.meet()
        problems = ["GLOO_SOCKET_IFNAME=ib0: wrong."] if assembly.rank else []
        agree(assembly, {f"key {number}": str(assembly.rank == 2) for number in range(20)}, problems, gpu="7")

    results = gathering(other, 3)
    (text,) = {str(result) for result in results}
    assert all(isinstance(result, DisagreementError) for result in results)
    lines = text.splitlines()
    assert lines[0].endswith(": GLOO_SOCKET_IFNAME=ib0: wrong.") and lines[0].startswith("on rank 1 (")
    assert "use the same GPU, 7. Start a rank for each GPU" in lines[1]
    assert lines[2] == "the ranks would not do the same work:"
    assert lines[3].startswith("  - key 0 is False on rank 0 (") and " and True on rank 2 (" in lines[3]
    assert len([line for line in lines if line.startswith("  - key")]) == MOST_DIFFERENCES
    assert "  - and 8 more differences" in lines and "MASTER_PORT" in lines[-1]


@pytest.mark.parametrize("gpus", [["", "", ""], ["a", "b", "c"]])
def test_gpus_of_their_own(gpus):
    def rank(assembly):
        assembly.meet()
        agree(assembly, {}, gpu=gpus[assembly.rank])

    assert gathering(rank, 3) == [None] * 3
