from __future__ import annotations

import pytest
import torch
from distributed import spawn

from megatron_tf.architectures.spec import ParameterSpec
from megatron_tf.engine import matrices
from megatron_tf.engine.matrices import Matrices
from megatron_tf.optimizers.muon import MUON
from megatron_tf.parallel.groups import SINGLE

WIDTH = 12


def spec(name: str, rows: int, matrix_rows: int = 0) -> ParameterSpec:
    return ParameterSpec(name, (rows, WIDTH), True, True, True, std=0.02, mean=0.0, matrix_rows=matrix_rows)


def direction(spec: ParameterSpec) -> torch.Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(spec.shape[0]))


def expected(spec: ParameterSpec) -> torch.Tensor:
    """By the larger Gram matrix of each matrix, one after another."""
    each = direction(spec).double().unflatten(0, (-1, spec.matrix_rows or spec.shape[0]))
    return torch.cat([matrix @ MUON.transform(matrix.mT @ matrix) for matrix in each])


SPECS = [spec("tokens", 30), spec("flat", 40, 8), spec("square", 24, 12), spec("tall", 96, 32)]


def test_each_matrix_of_a_stack_is_transformed_by_itself(monkeypatch):
    monkeypatch.setattr(matrices, "AT_ONCE", {"cpu": 2 * 8 * WIDTH})  # two matrices of "flat"
    own = Matrices(SPECS, {spec.name: range(spec.shape[0]) for spec in SPECS}, SINGLE)
    updates = own.transformed(MUON, [(spec, direction(spec)) for spec in SPECS])
    for spec_, update in zip(SPECS, updates, strict=True):
        torch.testing.assert_close(update.double(), expected(spec_), rtol=1e-5, atol=1e-6)


def of_ranks(group, cuts):
    """`cuts`: the first row of each rank, as shares of all rows."""
    own = {each.name: range(*(round(cut * each.shape[0]) for cut in (*cuts, 1)[group.rank :][:2])) for each in SPECS}
    given = [(each, direction(each)[list(own[each.name])]) for each in SPECS]
    updates = Matrices(SPECS, {name: rows for name, rows in own.items() if rows}, group).transformed(MUON, given)
    for each, update in zip(SPECS, updates, strict=True):
        torch.testing.assert_close(update.double(), expected(each)[list(own[each.name])], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cuts",
    [
        (0, 0.5),
        (0, 0.6, 0.62),  # within one matrix, and the rank in the middle has rows of nothing else
        (0, 0, 1),  # two ranks without rows
        (0, 0.2, 0.4, 0.8),
    ],
)
def test_matrices_that_are_cut_between_ranks(cuts):
    spawn(of_ranks, len(cuts), cuts)


def test_a_rank_without_gradients_has_no_update():
    own = Matrices([SPECS[1]], {"flat": range(40)}, SINGLE)
    (update,) = own.transformed(MUON, [(SPECS[1], torch.empty(0, WIDTH))])
    assert update.shape == (0, WIDTH)
