"""The parameters of one rank under their logical names, whichever engine trains them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megatron_tf.config.topology import Topology
from megatron_tf.model.stage import Stage
from megatron_tf.state.parameters import ParameterSpec, parameter_table, shard_range


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of this rank: the rows of the logical tensor from `first_row` on.

    `owned`: whether this rank saves the elements and counts them in the gradient norm. False when another rank with
    the same elements does.
    """

    spec: ParameterSpec
    parameter: nn.Parameter
    first_row: int
    owned: bool


def shards_of(stage: Stage, topology: Topology) -> list[ShardedParameter]:
    """Every parameter of `stage` once, in model order."""
    group = stage.tensor.group
    named = dict(stage.named_parameters())
    shards = []
    for name, spec in parameter_table(stage.model).items():
        if name not in named:
            continue
        first_row = shard_range(spec.shape[0], group.size, group.rank)[0] if spec.sharded else 0
        tied_copy = spec.tied and topology.pipeline > 1 and stage.previous is not None
        owned = (spec.sharded or group.rank == 0) and not tied_copy
        shards.append(ShardedParameter(spec, named[name], first_row, owned))
    return shards
