from __future__ import annotations

import pytest
import torch

from megatron_tf.benchmark import sparse as mode
from megatron_tf.errors import ConfigError

CPU = torch.device("cpu")


def test_a_row_agrees_with_the_formula_and_has_both_speeds():
    (row,) = mode.rows(CPU, [torch.float32], [69], [3], group_size=16, positions=40, width=24, rounds=1)
    assert (row["used tokens"], row["candidates"], row["slots"], row["dense tokens"]) == (69, 3, 4, 5)
    assert all(row[f"error {name}"] < 1e-5 for name in ("output", "x", "keys", "values", "router"))
    assert row["dense ms"] > 0 and row["sparse ms"] > 0
    with pytest.raises(ConfigError, match="a slot has --group-size 16"):
        next(mode.rows(CPU, [torch.float32], [8], [3], group_size=16, positions=40, width=24, rounds=1))
    with pytest.raises(ConfigError, match=r"--group-size 20: is no multiple of 16. Give 16 or 32\."):
        next(mode.rows(CPU, [torch.float32], [64], [3], group_size=20, positions=40, width=24, rounds=1))
    with pytest.raises(ConfigError, match="--candidates 1: that is the dense layer. Give 2 or more"):
        next(mode.rows(CPU, [torch.float32], [64], [3, 1], group_size=16, positions=40, width=24, rounds=1))


def test_a_layer_that_is_too_far_off_is_not_right(monkeypatch):
    arguments = CPU, [torch.float32], [48], [2], 16, 64, 32, 1
    (row,) = mode.rows(*arguments)
    assert row["right"] and row["bound"] == 1e-5
    monkeypatch.setitem(mode.BOUNDS, torch.float32, 1e-9)
    (row,) = mode.rows(*arguments)
    assert not row["right"]
