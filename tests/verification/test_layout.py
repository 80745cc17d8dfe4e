"""Every layout computes what one process computes. A covering subset; tools/verify_layout.py --all does the rest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_tf.config.topology import Topology
from megatron_tf.errors import LaunchError
from megatron_tf.tasks.language_model.layers import random_tokens
from megatron_tf.verification.layout import Deviation, Layout, Trace, compare, layouts, reference, run_layouts

TOLERANCE = 1e-5  # relative; two fp32 orders of summation were seen to differ by 2e-6 over 20 steps


def check(config, chosen, steps=20):
    expected = reference(config, steps)
    assert expected.losses[0] != expected.losses[-1]
    for layout, trace in zip(chosen, run_layouts(config, chosen, steps)):
        difference = compare(trace, expected)
        assert difference.agrees(TOLERANCE), f"{layout}: {difference}"


# Many layouts go a quarter of the way in `make test`.
STEPS = pytest.mark.parametrize("steps", [5, pytest.param(20, marks=pytest.mark.scale)])


@STEPS
def test_two_ranks(config, steps):
    check(config(), [Layout(Topology(2, 1, 1)), Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)),
                     Layout(Topology(1, 1, 2))], steps)  # fmt: skip


@pytest.mark.slow
@STEPS
def test_four_ranks(config, steps):
    # the second one was silently wrong while DeepSpeed partitioned gradients between pipeline stages
    check(config(), [Layout(Topology(2, 2, 1)), Layout(Topology(2, 2, 1), True), Layout(Topology(2, 1, 2), True),
                     Layout(Topology(1, 2, 2)), Layout(Topology(4, 1, 1), True)], steps)  # fmt: skip


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("sequence", [False, True])
def test_eight_ranks(config, sequence):
    check(config(), [Layout(Topology(2, 2, 2), sequence)])


def transformer(config, **changes):
    model = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}
    return config(model=model, **changes)


@pytest.mark.slow
@STEPS
def test_transformer_on_two_ranks(config, steps):
    check(transformer(config), [Layout(Topology(2, 1, 1)), Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)),
                                Layout(Topology(1, 1, 2))], steps)  # fmt: skip


@pytest.mark.slow
def test_grouped_query_attention(config):
    """Two query heads to each key and value; the second layout has one pair of them on a rank."""
    model = {"architecture": "transformer", "parameter_tokens": None, "num_key_value_heads": 2}
    check(config(model=model), [Layout(Topology(2, 1, 1), True), Layout(Topology(2, 2, 1))], steps=3)


@pytest.mark.slow
@STEPS
def test_transformer_on_four_ranks(config, steps):
    check(transformer(config, training={"activation_checkpointing": True}),
          [Layout(Topology(2, 2, 1), True), Layout(Topology(2, 1, 2)), Layout(Topology(4, 1, 1), True)],
          steps)  # fmt: skip


@pytest.mark.slow
def test_activation_checkpointing(config):
    # DeepSpeed's default, reentrant, gave 58 of 59 parameters zero gradient with one stage
    check(config(training={"activation_checkpointing": True}), [Layout(Topology(1, 1, 2)), Layout(Topology(2, 1, 1),
                                                                                                  True),
                                                                Layout(Topology(1, 2, 1))], steps=3)  # fmt: skip


@pytest.mark.slow
def test_gram_form_without_kept_scores(config):
    """The reference keeps its scores and takes the direct form."""
    check(config(training={"norm": "gram", "scores": "recompute"}),
          [Layout(Topology(2, 1, 1)), Layout(Topology(2, 2, 1), True)], steps=3)  # fmt: skip


def test_zero_stage_0_without_clipping(config):
    # DeepSpeed itself then computes no norm of the gradient
    check(config(zero={"stage": 0}, training={"gradient_clipping": 0.0}), [Layout(Topology(1, 1, 2))], steps=3)


def test_a_configuration_that_no_single_process_could_run(config):
    """The reference is one process, whatever the configured layout."""
    values = config(parallel={"tensor": 2, "sequence": True})
    assert reference(values, 1).losses == reference(config(), 1).losses


def test_more_ranks_than_gpus(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(LaunchError, match="2 ranks need as many GPUs, but this machine has 1"):
        run_layouts(config(), [Layout(Topology(2, 1, 1))], 1)


def test_samples_of_the_largest_seed(config):
    ids = random_tokens(config(run={"dir": "unused", "seed": 2**63 - 1}), 2**40)
    assert ids.shape == (17,) and ids.min() >= 0 and ids.max() < 99


def test_zero_stage_0(config):
    check(config(zero={"stage": 0}), [Layout(Topology(1, 1, 2)), Layout(Topology(2, 1, 1))], steps=5)


BOUNDARIES = {"train": ({"path": "unused"},), "reset_at_eod": True, "mask_eod_loss": True, "pad_id": 1}


def test_document_boundaries_on_two_ranks(config):
    """Micro batches and ranks have different numbers of labels that count."""
    check(config(data=BOUNDARIES), [Layout(Topology(2, 1, 1)), Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2,
                                                                                                                1)),
                                    Layout(Topology(1, 1, 2))], steps=3)  # fmt: skip


@pytest.mark.slow
def test_document_boundaries_on_four_ranks(config):
    check(config(data=BOUNDARIES), [Layout(Topology(2, 2, 1)), Layout(Topology(2, 2, 1), True), Layout(Topology(1, 2,
                                                                                                                2)),
                                    Layout(Topology(2, 1, 2), True)], steps=3)  # fmt: skip


def test_document_boundaries_with_an_inner_stage(config):
    """It reads no ids: what it knows of documents comes from the stage before. Blocks are computed twice."""
    check(config(data=BOUNDARIES, model={"num_layers": 3}, training={"activation_checkpointing": True}),
          [Layout(Topology(1, 3, 1))], steps=3)  # fmt: skip


def test_document_boundaries_change_what_is_computed(config):
    """Each of them alone, so that agreement above is not that of a thing left out."""
    plain = reference(config(), 1)
    for key, value in (("reset_at_eod", True), ("mask_eod_loss", True), ("pad_id", 1)):
        changed = reference(config(data={"train": ({"path": "unused"},), key: value}), 1)
        assert not compare(changed, plain).agrees(1e-3), key


def test_an_uneven_depth(config):
    check(config(model={"num_layers": 3}), [Layout(Topology(1, 2, 1))], steps=3)


def test_gelu_before_norm(config):
    # softmax starts so close to uniform that its query gradients are mostly cancellation in fp32, on one process too;
    # tests/model/test_parallel_layers.py compares all three in fp64
    check(config(model={"activation": "gelu_l2_norm"}), [Layout(Topology(2, 1, 1), True)], steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("resets", [False, pytest.param(True, marks=pytest.mark.scale)])
def test_compiled_blocks(config, resets):
    changes = {"data": BOUNDARIES} if resets else {}
    check(config(training={"compile": True}, **changes), [Layout(Topology(2, 1, 1))], steps=2)


def test_compare_finds_the_worst_gradient():
    one = Trace([1.0, 2.0], [1.0, 1.0], {"a": torch.ones(4), "b": torch.ones(4)})
    other = Trace([1.0, 2.2], [1.0, 1.01], {"a": torch.ones(4), "b": torch.tensor([1.0, 1, 1, 3])})
    assert compare(one, one) == Deviation(0, 0, 0, "a")
    lost = compare(replace(one, gradients={**one.gradients, "a": one.gradients["a"] * math.nan}), one)
    assert lost.parameter == "a" and not lost.agrees(1e6)  # although that of b is right
    difference = compare(other, one)
    assert difference.parameter == "b" and difference.gradient == pytest.approx(1.0)
    assert difference.loss == pytest.approx(0.1) and not difference.agrees(0.5)
    evaluated = compare(replace(one, validation=1.1), replace(one, validation=1.0))
    assert evaluated.validation == pytest.approx(0.1) and evaluated.agrees(0.2) and not evaluated.agrees(0.05)


def test_a_nan_never_agrees():
    one = Trace([1.0], [1.0], {"a": torch.ones(2)})
    nan = float("nan")
    assert not compare(Trace([nan], [1.0], {"a": torch.ones(2)}), one).agrees(1e9)
    assert not compare(Trace([1.0], [1.0], {"a": torch.full((2,), nan)}), one).agrees(1e9)


def test_all_layouts_are_valid_and_complete(config):
    found = {str(layout) for layout in layouts(config(), 4)}
    assert found == {
        "TP1×PP1×DP2", "TP1×PP2×DP1", "TP2×PP1×DP1", "TP2×PP1×DP1+SP",
        "TP1×PP1×DP4", "TP1×PP2×DP2", "TP2×PP1×DP2", "TP2×PP1×DP2+SP", "TP2×PP2×DP1", "TP2×PP2×DP1+SP",
        "TP4×PP1×DP1", "TP4×PP1×DP1+SP",
    }  # fmt: skip
