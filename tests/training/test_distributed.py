"""Ranks agree on errors; joining compiles nothing."""

from __future__ import annotations

import pytest
from distributed import spawn

from megatron_tf.errors import ConfigError, DataError, UserError
from megatron_tf.training.agreement import from_rank_zero, together


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
