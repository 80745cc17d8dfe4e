"""Context parallelism: ranks that share the positions of a sample compute what one process computes."""

from __future__ import annotations

import pytest
from layout_checks import BOUNDARIES, TOLERANCE, check_layouts
from tiny import run_config

from megatron_tf.config.run_plan import topology_for
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import memory_per_rank
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.layouts import ranked
from megatron_tf.errors import ConfigError
from megatron_tf.verification.layout import Layout
from megatron_tf.verification.resume import Setting, check_resumes

IMAGES = {
    "task": "image_classification",
    "vocab_size": None,
    "seq_length": None,
    "image": {"size": 6, "patch": 3, "channels": 3, "classes": 5, "pooling": "mean"},
}


def config(**changes):
    return run_config(parallel={"engine": "torch", **changes.pop("parallel", {})}, **changes)


def test_documents_and_recomputation_on_two_ranks():
    """A document may begin with one rank and end with the other; ranks have different numbers of labels that count."""
    check_layouts(config(data=BOUNDARIES, training={"activation_checkpointing": True}), Layout(Topology(context=2)))


@pytest.mark.slow
def test_four_ranks_with_every_other_axis():
    layouts = [
        Layout(Topology(context=4)),
        Layout(Topology(tensor=2, context=2)),
        Layout(Topology(tensor=2, context=2), True),
        Layout(Topology(pipeline=2, context=2)),
        Layout(Topology(data=2, context=2)),
    ]
    check_layouts(config(data=BOUNDARIES, parallel={"shard": "parameters"}), *layouts)


@pytest.mark.slow
def test_grouped_heads_and_chosen_tokens():
    """Two query heads share each key. The balance of candidates is that of whole samples, and so is its metric."""
    plain = {"architecture": "transformer", "parameter_tokens": None, "num_key_value_heads": 2}
    check_layouts(config(model=plain), Layout(Topology(context=2)))
    banks = {kind: {"group_size": 16, "candidates": count} for kind, count in (("proj", 4), ("ffn", 3))}
    sparse = {"parameter_tokens": {"qkv": 13, "proj": 16, "ffn": 64}, "sparse": {**banks, "z_loss": 0.01}}
    check_layouts(config(model=sparse), Layout(Topology(context=2)), Layout(Topology(pipeline=2, context=2)))


@pytest.mark.slow
def test_checkpoints_know_nothing_of_it():
    split, other = Setting(Layout(Topology(context=2)), engine="torch"), Setting(Layout(Topology(tensor=2), True))
    for result in check_resumes(run_config(), [(split, other), (other, split)], 2):
        assert result.agrees(TOLERANCE), result


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        (
            {"parallel": {"engine": "deepspeed", "context": 2}},
            2,
            "parallel.context: 2 needs parallel.engine: torch, and it is deepspeed. Set parallel.engine to torch, or "
            "parallel.context to 1.",
        ),
        (
            {"parallel": {"context": 2}, "model": {"seq_length": 15}},
            2,
            "model.seq_length: 15 is not a multiple of the 2 ranks that share its positions (parallel.context 2). Set "
            "it to 14 or 16, or parallel.context to 1.",
        ),
        (
            {"parallel": {"context": 2, "tensor": 2, "sequence": True}, "model": {"seq_length": 18}},
            4,
            "model.seq_length: 18 is not a multiple of the 4 ranks that share its positions (parallel.context 2 × "
            "parallel.tensor 2). Set it to 16 or 20, or parallel.context to 1.",
        ),
        (
            {"parallel": {"context": 4, "tensor": 2}},
            8,
            "parallel.context: 4 does not divide the 2 attention heads of a rank (of 4, with parallel.tensor 2). Set "
            "it to 2.",
        ),
        (
            {"parallel": {"context": 2, "tensor": 2}},
            6,
            "parallel: tensor 2 × pipeline 1 × context 2 needs a multiple of 4 ranks, but there are 6. Start 4 or 8 "
            "ranks, or choose parallel.tensor × parallel.pipeline × parallel.context to be 1, 2, 3 or 6.",
        ),
        (
            {"parallel": {"context": 2}, "model": IMAGES},
            2,
            "parallel.context: 2 ranks would share the positions of a sample, which the task image_classification "
            "does not split. Set it to 1.",
        ),
    ],
)
def test_what_cannot_be_split(changes, ranks, message):
    with pytest.raises(ConfigError) as error:
        validate(config(**changes), ranks)
    assert error.value.problems == [message]


def test_a_long_sample_is_planned_over_ranks():
    """A rank's activations are a quarter, and the planner offers it where one rank could not hold them."""
    long = config(model={"seq_length": 65536}, training={"global_batch_size": 2, "micro_batch_size": 1})
    split = Layout(Topology(context=4)).apply(long)
    assert topology_for(split, 8) == Topology(data=2, context=4)
    whole, part = memory_per_rank(long, 1).activations, memory_per_rank(split, 8).activations
    assert part == pytest.approx(whole / 4, rel=0.01)
    best = ranked(long, 8, find_gpu("H100"), Assumptions())
    assert any(choice.config.parallel.context == 4 for choice in best)
    assert "parallel.context=4" in next(c for c in best if c.config.parallel.context == 4).overrides()
