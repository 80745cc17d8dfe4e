"""Ranks agree on errors, and say in one line why they cannot meet."""

from __future__ import annotations

import os

import pytest
from distributed import spawn
from launching import free_port

from megatron_tf.engine.deepspeed.joining import join
from megatron_tf.errors import ConfigError, DataError, LaunchError, UserError
from megatron_tf.runtime.agreement import from_rank_zero, together
from megatron_tf.runtime.environment import LaunchEnvironment


def _fail_on(ranks, rank, message="broken"):
    if rank in ranks:
        raise DataError(message)
    return rank


def _agreement(group):
    rank = group.rank
    assert together(lambda: rank * 10) == rank * 10
    assert from_rank_zero(lambda: f"from {rank}") == "from 0"
    with pytest.raises(DataError, match="^broken$"):
        together(lambda: _fail_on([0, 1], rank))
    with pytest.raises(UserError, match=r"^broken \(on rank 1\)$"):
        together(lambda: _fail_on([1], rank))
    with pytest.raises(UserError, match="broken on 0 .*\nbroken on 1 "):
        together(lambda: _fail_on([0, 1], rank, f"broken on {rank}"))

    def only_zero():
        raise ConfigError("rank 0 said no")

    with pytest.raises(UserError, match="rank 0 said no"):
        from_rank_zero(only_zero)


def test_an_error_of_one_rank_is_an_error_of_all():
    spawn(_agreement, 2)


def test_a_rank_that_does_not_find_rank_0():
    with pytest.raises(LaunchError) as error:
        join(LaunchEnvironment("deepspeed", 1, 2, 1, 2, "127.0.0.1", free_port()), 1)
    assert "WORLD_SIZE" not in os.environ
    assert "\n" not in str(error.value) and "within 1 seconds" in str(error.value)


def test_rank_0_alone():
    port = free_port()
    with pytest.raises(LaunchError) as error:
        join(LaunchEnvironment("deepspeed", 0, 2, 0, 2, "127.0.0.1", port), 1)
    message = str(error.value)
    assert message.startswith(
        f"rank 0 of 2 could not meet the others at MASTER_ADDR=127.0.0.1, MASTER_PORT={port} within "
    )
    assert "rank 1 did not arrive" in message and "parallel.timeout_seconds" in message and "\n" not in message
