"""Ranks that find and verify a checkpoint together."""

from __future__ import annotations

import copy
import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from damaged_checkpoints import (
    refuse,
)
from live import PATIENCE_SECONDS

from megatron_tf.checkpoint.format import INDEX_NAME, shard_name
from megatron_tf.checkpoint.manager import Ranks, find_latest, verify_checkpoint
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.errors import CheckpointError, DisagreementError, UnreadableError


class Meeting:
    """Threads that stand for ranks, and gather."""

    def __init__(self, size):
        self.size, self.barrier, self.values = size, threading.Barrier(size), [None] * size

    def ranks(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait(PATIENCE_SECONDS)
            gathered = copy.deepcopy(self.values)
            self.barrier.wait(PATIENCE_SECONDS)
            return gathered

        return Ranks(rank, self.size, gather)

    def everywhere(self, work):
        def one(rank):
            try:
                return work(self.ranks(rank))
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


@pytest.fixture
def sharded(sandbox):
    """Two checkpoints of four shards each."""
    return [sandbox.save(sandbox.split(sandbox.state(step), 4, step), sandbox.index(step))[0] for step in (10, 20)]


def test_nodes_with_other_checkpoints_of_one_name(sandbox, sharded):
    """Each whole in itself: parts of both would make a model."""

    def gather(value):
        if not (isinstance(value, tuple) and len(value) == 3):
            return [value]
        own, _, content = value
        return [value, (own, "rank 1 (n2)", "0123456789ab" if content else content)]

    ranks = Ranks(gather=gather)
    for work in (
        lambda: find_latest(sandbox.root, verify=True, ranks=ranks),
        lambda: verify_checkpoint(sharded[1], ranks),
    ):
        with pytest.raises(DisagreementError) as error:
            work()
        said = str(error.value)
        assert (
            said.startswith(f"{sharded[1]}: the index of this checkpoint is ") and "0123456789ab on rank 1 (n2)" in said
        )


def test_ranks_share_the_reading(sandbox, sharded, monkeypatch):
    read, verify = [], CheckpointReader.verify

    def counted(self, files):
        read.extend(files)
        verify(self, files)

    monkeypatch.setattr(CheckpointReader, "verify", counted)
    assert (
        Meeting(3).everywhere(lambda ranks: find_latest(sandbox.root, verify=True, ranks=ranks))
        == [(sharded[1], [])] * 3
    )
    assert sorted(read) == [INDEX_NAME, *map(shard_name, range(4))]


@pytest.mark.parametrize("shard", range(4))
def test_what_one_rank_finds_damaged_all_pass_over(sandbox, sharded, flip, shard):
    flip(sharded[1] / shard_name(shard), -1)
    answers = Meeting(3).everywhere(lambda ranks: find_latest(sandbox.root, verify=True, ranks=ranks))
    for path, [(skipped, reason)] in answers:
        assert (path, skipped) == (sharded[0], sharded[1]) and f"{shard_name(shard)} is damaged" in reason
    errors = Meeting(3).everywhere(lambda ranks: verify_checkpoint(sharded[1], ranks))
    assert len(set(map(str, errors))) == 1 and f"{shard_name(shard)} is damaged" in str(errors[0])


def test_what_one_rank_cannot_read_stops_all(sandbox, sharded, monkeypatch):
    refuse(monkeypatch, sharded[1], shard_name(2), errno.EIO)
    errors = Meeting(2).everywhere(lambda ranks: find_latest(sandbox.root, verify=True, ranks=ranks))
    assert all(isinstance(error, UnreadableError) and shard_name(2) in str(error) for error in errors)
