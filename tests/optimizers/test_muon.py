"""Muon under every layout is Muon on whole matrices, and all that ranks exchange for it is d × d numbers a matrix."""

from __future__ import annotations

import pytest
import torch
from tiny import run_config

from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError
from megatron_tf.model.products import add_products
from megatron_tf.optimizers.muon import COEFFICIENTS, ITERATIONS, MUON
from megatron_tf.state.parameters import matrix_rows, parameter_table
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts
from megatron_tf.verification.resume import Setting, check_resumes


def config(engine="torch", **changes):
    optimizer = {"type": "muon", "lr": 1e-2, "schedule": {"type": "constant", "warmup_steps": 1}}
    return run_config(optimizer=optimizer, parallel={"engine": engine}, **changes)


def iterate(x):
    a, b, c = COEFFICIENTS
    x = x / x.norm()
    for _ in range(ITERATIONS):
        square = x.mT @ x
        x = a * x + x @ (b * square + c * square @ square)
    return x


@pytest.mark.parametrize("rows", [300, 40, 1])
def test_the_gram_form_is_the_iteration(rows):
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    x[:, 3] = x[:, 4]  # singular
    expected = iterate(x)
    assert torch.allclose(x @ MUON.transform(x.mT @ x), expected, atol=1e-12, rtol=0)
    values = torch.linalg.svdvals(expected)
    assert 0.6 < values[0] < 1.25 and values[min(rows, 23) - 1] > 0.3


def test_several_matrices_at_once_are_each_of_them():
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] = 0
    for own, found in zip(x, MUON.transform(x.mT @ x), strict=True):
        torch.testing.assert_close(found, MUON.transform(own.mT @ own), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (1, 24)])
def test_whole_matrices_go_through_the_iteration(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 3] = x[0, :, 4]  # singular
    given = x.clone()
    for own, found in zip(x, MUON.update_whole(x, add_products), strict=True):
        torch.testing.assert_close(found, iterate(own), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, given)


def test_whole_matrices_in_fp32_need_no_gram_matrix_in_fp64():
    """Singular values from 1 to 1e-6: the Gram matrix in fp32 would lose the small ones."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 48, generator=generator, dtype=torch.float64))[0] for n in (48, 72))
    x = (left * torch.logspace(0, -6, 48, dtype=torch.float64)) @ right.mT
    exact, found = iterate(x), MUON.update_whole(x[None].float(), add_products)[0]
    assert (found - exact).norm() / exact.norm() < 2e-5


def test_a_direction_of_any_size_has_the_same_update():
    """Momentum without gradients falls until its squares are 0 in fp32."""
    x = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    expected = MUON.update_whole(x, add_products)
    for factor in (1e-30, 1e30):
        torch.testing.assert_close(MUON.update_whole(x * factor, add_products), expected, rtol=1e-4, atol=1e-6)
    assert MUON.update_whole(torch.full((1, 24, 40), 1e-44), add_products).isfinite().all()


def test_no_gradient_is_no_update():
    zero = torch.zeros(8, 4)
    assert torch.equal(zero @ MUON.transform(zero.mT @ zero), zero)
    assert torch.equal(MUON.update_whole(zero[None], add_products)[0], zero)


def check(config, *chosen, steps=4):
    expected = reference(config, steps)
    adam = config.model_copy(update={"optimizer": run_config().optimizer.model_copy(update={"lr": 1e-2})})
    assert abs(reference(adam, steps).losses[-1] / expected.losses[-1] - 1) > 1e-4, "the optimizers differ"
    for layout, trace in zip(chosen, run_layouts(config, chosen, steps)):
        difference = compare(trace, expected)
        assert difference.agrees(1e-5), f"{layout}: {difference}"


def test_two_ranks():
    check(config(), Layout(Topology(1, 1, 2)), Layout(Topology(2, 1, 1)))


def test_with_deepspeed():
    check(config("deepspeed"), Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)))


def sparse(ffn=48, **changes):
    """Groups of 16, which data-parallel ranks cut: 3 of 9 or 5 of 10."""
    banks = {"ffn": {"group_size": 16, "candidates": 5 if ffn == 32 else 3}}
    return config(model={"parameter_tokens": {"qkv": 13, "proj": 11, "ffn": ffn}, "sparse": banks}, **changes)


def test_candidates_are_matrices_of_their_own():
    own = sparse()
    rows = {name: matrix_rows(spec) for name, spec in parameter_table(own.model).items() if ".1.ffn." in name}
    assert rows == {
        "blocks.1.ffn.bank.key_tokens": 16,
        "blocks.1.ffn.bank.value_tokens": 16,
        "blocks.1.ffn.bank.router": 9,
        "blocks.1.ffn.bank.balance": 0,
    }
    check(own, Layout(Topology(1, 1, 2)))


@pytest.mark.slow
def test_candidates_over_four_ranks():
    check(sparse(training={"micro_batch_size": 1}), Layout(Topology(1, 1, 4)))
    check(sparse(32, training={"micro_batch_size": 1}), Layout(Topology(2, 1, 2), True))


@pytest.mark.slow
def test_four_ranks():
    # five tokens over four ranks leave the last one none
    few = config(model={"parameter_tokens": {"qkv": 5, "proj": 11, "ffn": 37}}, training={"micro_batch_size": 1})
    check(few, Layout(Topology(1, 1, 4)), Layout(Topology(2, 1, 2), True), Layout(Topology(1, 2, 2)))
    plain = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}
    check(config(model=plain), Layout(Topology(2, 1, 2)))


@pytest.mark.slow
def test_a_resume_at_another_layout():
    one, two = Setting(Layout(Topology(1, 1, 2)), engine="torch"), Setting(Layout(Topology(2, 1, 1)))
    for result in check_resumes(config(), [(one, two), (two, one)], 3):
        assert result.agrees(1e-5), result


def test_a_partition_that_cuts_rows_is_refused():
    with pytest.raises(
        ConfigError, match="optimizer.type: muon updates whole rows, and zero.stage 1 .* 2 data-parallel"
    ):
        validate(config("deepspeed"), 2)
    validate(config("deepspeed"), 1)
    with pytest.raises(ConfigError, match="Set parallel.engine to torch, zero.stage to 0 or optimizer.type to adamw"):
        validate(config("deepspeed", training={"precision": "fp32"}), 2)
    # DeepSpeed's stage 0 is not for bf16
    with pytest.raises(ConfigError, match=r"Set parallel.engine to torch or optimizer.type to adamw\."):
        validate(config("deepspeed", training={"precision": "bf16"}), 2)
