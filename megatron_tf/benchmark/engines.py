"""Processor time of a training step with each engine, in two CPU ranks that run here.

Both engines train in the same ranks, in turn: TP2 with sequence parallelism, PP2 and DP2. The time of a step is the sum
over ranks of user and system time. It is correct even if ranks share cores, and leaves out the time of waiting for
each other.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tf.benchmark.report import Row
from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.engine.base import Engine
from megatron_tf.engine.choice import initial_engine, join
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.tasks.layers import example_batches

RANKS = 2
LAYOUTS = {"TP2": "tensor", "PP2": "pipeline", "DP2": "data"}
WARM_UP = 2  # steps
TIMEOUT_SECONDS = 600.0


def rows(configs: Mapping[str, Mapping[str, RunConfig]], rounds: int) -> Iterator[Row]:
    """A row for each layout. `configs`: by layout and engine, valid for two ranks."""
    for layout, of_engine in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            start_ranks(_rank, RANKS, folder, of_engine, rounds)
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
        steps = {name: [sum(own) for own in zip(*(rank[name] for rank in ranks))] for name in of_engine}
        yield {
            "layout": layout,
            **{f"{name} s": statistics.median(seconds) for name, seconds in steps.items()},
            "torch / deepspeed": statistics.median(t / d for t, d in zip(steps["torch"], steps["deepspeed"])),
        }


def _rank(rank: int, folder: str, configs: Mapping[str, RunConfig], rounds: int) -> None:
    torch.set_num_threads(1)
    environment = LaunchEnvironment("torchrun", rank, RANKS, rank, RANKS, "localhost", 0)
    join(configs.values(), environment, TIMEOUT_SECONDS, store_file=f"{folder}/store")
    try:
        engines = {name: initial_engine(config, RANKS, TIMEOUT_SECONDS) for name, config in configs.items()}
        spent = _in_turn(engines, configs, rank, rounds)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(spent), encoding="utf-8")
        dist.barrier()
    finally:
        leave()


def _in_turn(
    engines: Mapping[str, Engine], configs: Mapping[str, RunConfig], rank: int, rounds: int
) -> dict[str, list[float]]:
    """Processor seconds of this rank for each engine's steps after the first ones."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(WARM_UP + rounds):
        # in every second round the other engine is first
        for name in sorted(engines, reverse=bool(step % 2)):
            config, topology = configs[name], topology_for(configs[name], RANKS)
            plan, data = plan_batches(config, RANKS), topology.coordinate("data", rank)
            own = list(example_batches(config, plan, step, data, topology.data))
            dist.barrier()
            begin = time.process_time()
            engines[name].train_step(step, iter(own))
            if step >= WARM_UP:
                spent[name].append(time.process_time() - begin)
    return spent
