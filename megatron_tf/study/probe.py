"""Speeds of a study's models, measured on this machine by optimizer steps of the runs' own configurations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.parallel import Parallel
from megatron_tf.engine.choice import build_engine, join
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.state.sources import InitialSource
from megatron_tf.study.hours import Speeds, speed_key
from megatron_tf.study.plan import Node
from megatron_tf.tasks.layers import example_batches

# Of one model's turn. A turn has at least one step.
TURN_SECONDS = 5.0


def probe(nodes: Sequence[Node], ranks: int, threads: int, rounds: int = 3, steps: int = 4) -> Speeds:
    """Trains each run's model for up to `steps` steps on synthetic data in this process, `rounds` times; the median
    counts.

    The models take turns, and each round begins with another one, so that other load on the machine slows all of them.
    `ranks`: processes of a run; the speed of one is multiplied by them.  `threads`: of each process.
    """
    configs = {speed_key(node): _on_one_rank(node.config, ranks) for node in nodes}
    keys, seconds = list(configs), dict[str, list[float]]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    timeout = max(config.parallel.timeout_seconds for config in configs.values())
    join(configs.values(), LaunchEnvironment("python", 0, 1, 0, 1, "127.0.0.1", 0), timeout)
    try:
        for i in range(rounds):
            for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
                seconds.setdefault(key, []).append(_step_seconds(configs[key], steps))
    finally:
        leave()
        torch.set_num_threads(before)
    tokens = {key: config.training.global_batch_size * config.model.seq_length for key, config in configs.items()}
    return Speeds({key: ranks * tokens[key] / statistics.median(seconds[key]) for key in keys})


def _on_one_rank(config: RunConfig, ranks: int) -> RunConfig:
    """One of `ranks` ranks with as many micro batches a step, without the others."""
    training = config.training
    samples = training.micro_batch_size * plan_batches(config, ranks).num_micro_batches
    alone = {
        "training": training.model_copy(update={"global_batch_size": samples}),
        "parallel": Parallel(engine="torch", timeout_seconds=config.parallel.timeout_seconds),
    }
    return config.model_copy(update=alone)


def _step_seconds(config: RunConfig, steps: int) -> float:
    plan = plan_batches(config, 1)
    source = InitialSource(config.model, config.run.seed)
    engine = build_engine(config, config.model, plan, topology_for(config, 1), SINGLE, source)
    batches = list(example_batches(config, plan, 0, 0, 1))
    # The first step allocates the optimizer's states and compiles what the configuration wants compiled.
    engine.train_step(0, iter(batches)).loss.item()
    done, began = 0, time.perf_counter()
    while done < steps and (done == 0 or time.perf_counter() - began < TURN_SECONDS):
        done += 1
        engine.train_step(done, iter(batches)).loss.item()
    spent = (time.perf_counter() - began) / done
    engine.close()
    return spent
