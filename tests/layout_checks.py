"""Layouts against one process, for tests of engines."""

from __future__ import annotations

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts

TOLERANCE = 1e-5
# Boundaries of documents wherever the configuration can have them.
BOUNDARIES = {"train": ({"path": "unused"},), "reset_at_eod": True, "mask_eod_loss": True, "pad_id": 1}


def recomputed_and_sharded(samples: int) -> dict[str, dict]:
    """What else a pipeline of the torch engine can meet, as changes of `tiny.run_config`.

    Micro batches are of one sample.
    """
    training = {"micro_batch_size": 1, "global_batch_size": samples, "activation_checkpointing": True}
    return {"data": BOUNDARIES, "training": training, "parallel": {"shard": "parameters"}}


def pipelines_of_four_ranks(with_data: Topology) -> list[Layout]:
    """Pipelines of several parts a rank alone and with each other axis; with data the given one."""
    return [
        Layout(Topology(pipeline=4, virtual_stages=2)),
        Layout(with_data),
        Layout(Topology(tensor=2, pipeline=2, virtual_stages=2), True),
        Layout(Topology(pipeline=2, context=2, virtual_stages=2)),
    ]


def check_layouts(config: RunConfig, *chosen: Layout, steps: int = 3) -> None:
    """Losses, norms and gradients of each layout are those of one process."""
    expected = reference(config, steps)
    for layout, trace in zip(chosen, run_layouts(config, chosen, steps)):
        difference = compare(trace, expected)
        assert difference.agrees(TOLERANCE), f"{layout}: {difference}"
