"""What is said about a run before it starts. The numbers of `describe` are compared in test_estimate.py."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.config import load_config
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.costs.hardware import find_gpu
from megatron_tf.costs.plan import describe, room_warning
from megatron_tf.costs.report import report
from megatron_tf.costs.summary import Circumstances, plan

TINY = Path(__file__).parents[2] / "configs" / "tiny.yml"


def test_checkpoints_that_do_not_fit_on_the_disk():
    every, two = (load_config(TINY, ["checkpoint.interval_steps=10", f"checkpoint.keep_last={n}"]) for n in ("null", 2))
    mebibyte = 2**20
    assert room_warning(every, 100, mebibyte, 10 * mebibyte) is None
    assert room_warning(every, 101, mebibyte, 10 * mebibyte) == (
        "checkpoint: 11 checkpoints of 1 MiB need 11 MiB, and 10 MiB are free in runs/tiny. Make room, or set "
        "checkpoint.keep_last."
    )
    assert room_warning(two, 10**6, mebibyte, 3 * mebibyte) is None
    assert "3 checkpoints of 1 MiB need 3 MiB, and 2 MiB" in room_warning(two, 10**6, mebibyte, 2 * mebibyte)
    assert room_warning(two, 5, mebibyte, mebibyte) is None and room_warning(two, 0, mebibyte, 0) is None


def test_checkpoints_at_the_end_alone_cost_what_a_failure_takes_from_them():
    """As the same interval in numbers does; it is not the best one."""
    circumstances = Circumstances(64, find_gpu("h100"), 60.0, 1e9, 60, num_best=1)

    def lost(*overrides):
        (stage,) = (made := plan([load_config(TINY.with_name("1.4B.yml"), overrides)], circumstances))["stages"]
        return stage["checkpoint"]["configured_lost_share"], stage["run"]["hours"], report(made)

    at_end, every = lost("checkpoint.interval_steps=null"), lost("checkpoint.interval_steps=100000000")
    best = lost("checkpoint.interval_steps=100")
    assert at_end[0] > 2 * best[0] and at_end[0] <= every[0] and at_end[1] != best[1]
    assert "as configured, at the last step alone," in at_end[2] and "every 100,000,000 steps" in every[2]


def test_all_parameters_are_reduced_for_the_work_of_those_that_are_used():
    """Named where data-parallel ranks exchange them: it is what candidates cost that dense tokens do not."""
    sparse = load_config(TINY.with_name("sparse_124M_to_762M.yml"))
    dense = load_config(TINY.with_name("124M.yml"))

    def made(config, gpus):
        return plan([config], Circumstances(gpus, find_gpu("h100"), 0.1, 1e9, 60, num_best=1))

    (stage,) = made(sparse, 8)["stages"]
    routers = stage["used_parameters"] - num_parameters(dense.model)
    assert stage["parameters"] == num_parameters(sparse.model) > 6 * stage["used_parameters"]
    assert 0 < routers < 0.02 * num_parameters(dense.model)
    share = stage["step"]["data"] / stage["step"]["total"]
    in_words = report(made(sparse, 8))
    assert f"of which a position uses {stage['used_parameters']:,}" in in_words
    assert f"those that are used: {share:.1%} of the step" in in_words
    assert "those that are used" not in report(made(sparse, 1)) and "uses" not in report(made(dense, 8))


def test_a_description_says_how_many_parameters_a_position_uses():
    sparse = load_config(TINY.with_name("sparse_124M_to_762M.yml"))
    assert "model   761,908,416 parameters, of which a position uses 124,898,496: 12 layers" in describe(sparse, 8)
    assert "of which" not in describe(load_config(TINY), 2)


def test_rates_after_a_growth():
    def rates(name, *overrides):
        config = load_config(TINY.with_name(f"{name}.yml"), [f"growth.lr_multipliers.{own}" for own in overrides])
        found = [line for line in describe(config, 2).splitlines() if line.startswith("rates")]
        return found[0].removeprefix("rates   × optimizer.lr: ") if found else None

    assert rates("tiny_grow") is None and rates("tiny_grow", "old_tokens=0") == "old tokens 0"
    assert rates("tiny_grow", "new_tokens=4", "new_tokens_decay_steps=50", "other=0.5") == (
        "new tokens 4 at first, 1 after 50 steps; other 0.5"
    )
    assert rates("tiny_split", "old_tokens=0", "new_tokens=2") == (
        "old tokens 0; new tokens 2; growth.lr_multipliers.old_tokens has no effect on ffn, whose candidates all count "
        "as new"
    )
