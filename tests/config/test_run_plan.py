from __future__ import annotations

import pytest

from megatron_tf.config.run_plan import plan_batches, plan_run
from megatron_tf.config.topology import Topology
from megatron_tf.errors import ConfigError


def test_a_plan_is_the_grid_and_the_batches_from_a_step_on(config):
    of_tokens = config(training={"train_steps": None, "train_tokens": 12_800}, parallel={"tensor": 2})
    plan = plan_run(of_tokens, 4, step=10, tokens=1280)
    assert plan.topology == Topology(tensor=2, data=2)
    assert plan.batches == plan_batches(of_tokens, 4, 10, 1280) != plan_batches(of_tokens, 4)


def test_ranks_that_do_not_share_the_work_are_refused(config):
    with pytest.raises(ConfigError, match="training.global_batch_size"):
        plan_run(config(), 3)
