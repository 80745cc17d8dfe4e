"""Speeds of a study's models, measured on this machine by optimizer steps of the runs' own configurations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.parallel import Parallel
from megatron_tf.engine.choice import initial_engine
from megatron_tf.errors import UserError
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import join_ranks, leave
from megatron_tf.study.hours import Speeds, speed_key
from megatron_tf.study.plan import Node
from megatron_tf.tasks.layers import example_batches

# Of one model's turn, after the first steps. A turn has at least one more.
TURN_SECONDS = 5.0


def probe(nodes: Sequence[Node], ranks: int, threads: int, rounds: int = 3, steps: int = 4) -> Speeds:
    """Trains each run's model for up to `steps` steps on synthetic data in this process, `rounds` times.

    Its speed is that of its median round. The models take turns, and each round begins with another one, so that other
    load on the machine slows all of them.
    `ranks`: processes of a run, which share its work; the speed of one is multiplied by them.  `threads`: of each.
    UserError when the state of a model is too large for one device.
    """
    configs = {speed_key(node): node.config for node in nodes}
    keys, seconds = list(configs), dict[str, list[float]]()
    if not configs:
        return Speeds({})
    before = torch.get_num_threads()
    timeout = max(config.parallel.timeout_seconds for config in configs.values())
    join_ranks(LaunchEnvironment("python", 0, 1, 0, 1, "127.0.0.1", 0), timeout)
    try:
        torch.set_num_threads(threads)
        for i in range(rounds):
            for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
                seconds.setdefault(key, []).append(_step_seconds(configs[key], steps))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--probe: a model of the study does not fit on one device, where it is measured ({error}). Plan with "
            "--flops-per-second."
        ) from error
    finally:
        torch.set_num_threads(before)
        leave()
    tokens = {key: config.training.global_batch_size * config.model.seq_length for key, config in configs.items()}
    return Speeds({key: ranks * tokens[key] / statistics.median(seconds[key]) for key in keys})


def _step_seconds(config: RunConfig, steps: int) -> float:
    """Seconds that a rank would take alone for a step of the run: its passes over all micro batches, and one update.

    A measured step has one micro batch.
    """
    training = config.training
    alone = config.model_copy(
        update={
            "training": training.model_copy(update={"global_batch_size": training.micro_batch_size}),
            "parallel": Parallel(engine="torch", timeout_seconds=config.parallel.timeout_seconds),
        }
    )
    if training.compile:
        # Otherwise the compiler would treat the next model's sizes as dynamic, unlike in a training run.
        torch.compiler.reset()
    engine = initial_engine(alone, 1, alone.parallel.timeout_seconds)
    try:
        batches = list(example_batches(alone, engine.plan, 0, 0, 1))
        # The first step compiles what the configuration wants compiled. In fp16 more find the scale of the loss.
        while engine.train_step(0, iter(batches)).seeks_scale:
            pass
        passes, updates, began = list[float](), list[float](), time.perf_counter()
        while len(passes) < steps and (not passes or time.perf_counter() - began < TURN_SECONDS):
            start = time.perf_counter()
            with engine.clock.step(measured=True):
                engine.train_step(len(passes) + 1, iter(batches)).loss.item()
            spent, share = time.perf_counter() - start, engine.clock.shares()["optimizer"]
            passes.append(spent * (1 - share))
            updates.append(spent * share)
    finally:
        engine.close()
    micro_batches = training.global_batch_size // training.micro_batch_size
    return statistics.mean(passes) * micro_batches + statistics.mean(updates)
