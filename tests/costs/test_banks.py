"""What candidates take on a rank, when they are what limits a run, and whether what is then named helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.config import load_config
from megatron_tf.config.stages import load_stages
from megatron_tf.config.validate import validate
from megatron_tf.costs.banks import BOTTLENECK, bank_costs
from megatron_tf.costs.estimate import candidates_per_rank
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.layouts import estimate
from megatron_tf.costs.report import report
from megatron_tf.costs.summary import Circumstances, plan

CONFIG = Path(__file__).parents[2] / "configs" / "sparse_124M_to_762M.yml"
ASSUMED = Assumptions()
KEYS_AND_VALUES = 12 * 9 * 2 * 256 * 768  # of one candidate in each slot of each layer
MANY = "model.sparse.ffn.candidates=256"


def load(*overrides, path=CONFIG):
    return load_config(path, overrides)


def costs(gpus, *overrides, gpu="h100"):
    config, own = load(*overrides), find_gpu(gpu)
    validate(config, gpus)
    return bank_costs(estimate(config, gpus, own, ASSUMED), own, ASSUMED)


def text(gpus, *overrides, gpu="h100", path=CONFIG):
    circumstances = Circumstances(gpus, find_gpu(gpu), 0.1, 1e9, 60, num_best=1)
    return report(plan([load(*overrides, path=path)], circumstances))


@pytest.mark.parametrize(
    ("overrides", "gpus", "share", "bytes_of_one"),
    [
        ((), 8, 1, 2 + 2 + 4 + 12 / 8),
        (("training.precision=fp32", "zero.stage=0"), 8, 1, 4 + 4 + 8),
        (("parallel.engine=torch", "parallel.shard=optimizer"), 8, 1, 2 + 4 + (4 + 12) / 8),
        # of sharded state, the parameters of two of 12 blocks are whole at one time (2/13 with the ends)
        (("parallel.engine=torch", "parallel.shard=gradients"), 8, 1, 2 + 4 * 2 / 13 + (4 + 12) / 8),
        (("parallel.engine=torch", "parallel.shard=parameters"), 8, 1, (2 + 4) * 2 / 13 + (4 + 12) / 8),
        (("parallel.tensor=3",), 6, 3, 2 + 2 + 4 + 12 / 2),
        (("parallel.pipeline=2",), 8, 2, 2 + 2 + 4 + 12 / 4),
    ],
)
def test_bytes_of_candidates_by_hand(overrides, gpus, share, bytes_of_one):
    sizes = "training.micro_batch_size=1", "training.global_batch_size=24"
    parameters, num_bytes = candidates_per_rank(load(*sizes, *overrides), gpus)
    assert parameters == 16 * KEYS_AND_VALUES / share
    assert num_bytes == pytest.approx(parameters * bytes_of_one, rel=1e-6)


def test_candidates_that_do_not_fit_are_named_with_what_helps():
    found = costs(8, MANY)
    assert found.does_not_fit and found.parameters == 256 * KEYS_AND_VALUES
    assert [own.overrides for own in found.memory_remedies] == [
        ("parallel.engine=torch", "parallel.shard=gradients"),
        ("parallel.pipeline=2",),
        ("model.sparse.ffn.candidates=128",),
    ]
    for own in found.memory_remedies:
        changed = estimate(load(MANY, *own.overrides), 8, find_gpu("h100"), ASSUMED)
        assert own.fits and changed.fits and own.memory_total == changed.memory.total
        assert own.step_seconds == changed.time.total
    words = text(8, MANY)
    assert (
        "candidates are what does not fit: with gradients and optimizer states they take 96.2 GiB on each rank, of "
        "111.3 GiB in all and 66.8 GiB usable; it fits with parallel.engine=torch parallel.shard=gradients (61.3 GiB, "
    ) in words, words
    # 9 slots on 9 ranks can be split over 3 of them
    on_nine = costs(9, MANY, "training.global_batch_size=576")
    assert ("parallel.tensor=3",) in [own.overrides for own in on_nine.memory_remedies]


def test_what_is_sharded_already_is_not_advised_again():
    own = "parallel.engine=torch", "parallel.shard=gradients", "training.precision=fp32", "training.micro_batch_size=8"
    assert costs(8, MANY, *own).memory_remedies[0].overrides == ("parallel.shard=parameters",)
    all_sharded = costs(8, "model.sparse.ffn.candidates=1024", *own[:1], "parallel.shard=parameters")
    assert all_sharded.does_not_fit
    assert not any(key.startswith("parallel.shard") for r in all_sharded.memory_remedies for key in r.overrides)


def test_remedies_that_do_not_suffice_are_not_said_to():
    # 257 has no divisor, so candidates cannot be fewer in whole numbers
    small = "training.micro_batch_size=2", "training.global_batch_size=8", "model.sparse.ffn.candidates=257"
    found = costs(2, *small, gpu="a100-40gb")
    assert found.does_not_fit and not any(own.fits for own in found.memory_remedies) and found.memory_remedies
    assert "GiB usable; none suffices alone: parallel.engine=torch" in text(2, *small, gpu="a100-40gb")
    # one rank in fp32 shards nothing
    alone = 1, *small, "training.precision=fp32", "parallel.engine=torch"
    assert costs(*alone, gpu="a100-40gb").does_not_fit and costs(*alone, gpu="a100-40gb").memory_remedies == ()
    assert "usable; more GPUs are needed, or fewer candidates\n" in text(*alone, gpu="a100-40gb")


def test_candidates_are_not_blamed_for_activations():
    found = costs(8, "training.micro_batch_size=64", gpu="a100-40gb")
    assert found.bytes < 7 * 2**30 and not found.does_not_fit and found.memory_remedies == ()
    words = text(8, "training.micro_batch_size=64", gpu="a100-40gb")
    assert "DOES NOT FIT" in words and "what does not fit" not in words


def test_the_exchange_of_gradients_is_named_as_the_bottleneck():
    batch = "training.micro_batch_size=4", "training.global_batch_size=64"
    found = costs(16, *batch, gpu="l40s")
    assert found.is_bottleneck and found.exchange_share > BOTTLENECK and not found.does_not_fit
    assert found.exchanged_share == pytest.approx(16 * KEYS_AND_VALUES / 761_908_416, rel=1e-6)
    now = estimate(load(*batch), 16, find_gpu("l40s"), ASSUMED)
    kinds = [own.overrides for own in found.exchange_remedies]
    assert kinds == [("parallel.pipeline=8",)]  # no other makes it less than a fifth of the step
    assert all(own.fits and own.step_seconds < now.time.total for own in found.exchange_remedies)
    assert all(own.data_share < BOTTLENECK for own in found.exchange_remedies)
    words = text(16, *batch, gpu="l40s")
    assert (
        f"{now.time.data / now.time.total:.1%} of the step, so this exchange is its bottleneck; 89.2% of them are "
        "those of candidates; it takes less with a larger training.global_batch_size, or with parallel.pipeline=8 "
        "("
    ) in words, words
    larger = costs(16, "training.micro_batch_size=32", "training.global_batch_size=16384", gpu="l40s")
    assert not larger.is_bottleneck and larger.exchange_remedies == ()


def test_remedies_of_a_stage_are_its_own_and_leave_the_chain_one():
    """Each can be given as it is written, for one stage, and the stages around it can still grow."""
    chain = CONFIG.with_name("chain_sparse.yml")
    circumstances = Circumstances(64, find_gpu("h100"), 0.1, 1e9, 60, num_best=1)
    batch = "training.micro_batch_size=8"
    made = plan(load_stages(chain, [batch]), circumstances)
    assert made["problems"] == []
    seen = 0
    for number, name in ((1, "candidates4"), (2, "candidates16")):
        remedies = made["stages"][number]["banks"]["exchange_remedies"]
        assert remedies
        for own in remedies:
            assert all(override.startswith(f"stages.{name}.") for override in own["overrides"])
            other = plan(load_stages(chain, [batch, *own["overrides"]]), circumstances)
            assert other["problems"] == [] and other["stages"][number]["step"]["total"] == own["step_seconds"]
            seen += "candidates=" in own["overrides"][0]
    # 4 before it: not 4 again
    assert seen and made["stages"][2]["banks"]["exchange_remedies"][-1]["overrides"] == [
        "stages.candidates16.model.sparse.ffn.candidates=8"
    ]
    assert "less, but still 20% or more, with stages.candidates16.parallel.engine=torch" in report(made)
    best = made["stages"][1]["best_layouts"][0]["overrides"]
    assert plan(load_stages(chain, [batch, *best]), circumstances)["problems"] == []


def test_nothing_is_said_without_need():
    found = costs(8)
    assert not found.does_not_fit and not found.is_bottleneck
    assert found.memory_remedies == found.exchange_remedies == ()
    words = text(8)
    assert "what does not fit" not in words and "bottleneck" not in words
    dense = load(path=CONFIG.with_name("124M.yml"))
    assert bank_costs(estimate(dense, 8, find_gpu("h100"), ASSUMED), find_gpu("h100"), ASSUMED) is None
    assert "candidates are" not in text(8, path=CONFIG.with_name("124M.yml"))
