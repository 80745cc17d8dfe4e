"""Memory of a training step on one long sample that context ranks share, in CPU ranks that run here.

Each row trains one step of the torch engine on one sample of `model.seq_length` positions. `grows` is the peak memory
of a process in that step less its memory before, on the rank where that is largest. `remainder` is `grows` less an even
share of the first row's: gradients, optimizer state and buffers, which do not shrink with more ranks.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tf.benchmark.report import Row
from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.estimate import memory_per_rank
from megatron_tf.engine.choice import initial_engine, join
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.tasks.layers import example_batches
from megatron_tf.telemetry.memory import peak_resident_bytes, resident_bytes

# ranks on few cores wait long for each other's attention
TIMEOUT_SECONDS = 4 * 3600.0
_MIB = 2**20


def rows(configs: Sequence[RunConfig]) -> Iterator[Row]:
    """A row for each of `configs`, which differ only in their context ranks. Each is valid for as many ranks."""
    first = None
    for config in configs:
        size = config.parallel.context
        with tempfile.TemporaryDirectory() as folder:
            start_ranks(_rank, size, folder, config)
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
        grows = max(rank["after"] - rank["before"] for rank in ranks)
        first = first or (size, grows)
        yield {
            "context ranks": size,
            "positions": config.model.seq_length,
            "grows MiB": grows / _MIB,
            "of the first": grows / first[1],
            "remainder MiB": (grows - first[1] * first[0] / size) / _MIB,
            "planned activations MiB": memory_per_rank(config, size).activations / _MIB,
            "loss": ranks[0]["loss"],
            "gradient norm": ranks[0]["norm"],
            "processor s": sum(rank["seconds"] for rank in ranks),
        }


def _rank(rank: int, folder: str, config: RunConfig) -> None:
    torch.set_num_threads(1)
    size = config.parallel.context
    environment = LaunchEnvironment("torchrun", rank, size, rank, size, "localhost", 0)
    join([config], environment, TIMEOUT_SECONDS, store_file=f"{folder}/store")
    try:
        engine = initial_engine(config, size, TIMEOUT_SECONDS)
        batches = list(example_batches(config, engine.plan, 0, 0, 1))
        dist.barrier()
        before, begin = resident_bytes(), time.process_time()
        result = engine.train_step(0, iter(batches))
        found = {
            "before": before,
            "after": peak_resident_bytes(),
            "seconds": time.process_time() - begin,
            "loss": float(result.loss),
            "norm": result.grad_norm,
        }
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()
    finally:
        leave()
