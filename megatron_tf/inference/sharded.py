"""Loads a trained model under any layout from a checkpoint of any other one. Each rank reads only its own rows of the
weights, and no optimizer states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.model.filling import allocate
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.stage import Stage, build_stage
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import parameter_table, shard_range


@torch.no_grad()
def load_stage(
    reader: CheckpointReader,
    model: Model,
    topology: Topology,
    rank: int,
    tensor: TensorParallel,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    document_ends: Sequence[int] = (),
) -> Stage:
    """The pipeline stage of `rank`, in evaluation mode and without gradients.

    `document_ends`: the tokens after which attention begins anew. Memory: the rank's own weights in `dtype`, and one
    tensor in fp32 while it is read. The checksums of the files are not compared here. Raises CheckpointError.
    """
    table, group = parameter_table(model), tensor.group
    with torch.device("meta"):
        stage = build_stage(model, reader.index.scales, topology, rank, tensor, document_ends).to(dtype)
    allocate(stage, device)
    for name, parameter in stage.named_parameters():
        spec = table[name]
        first, last = shard_range(spec.shape[0], group.size, group.rank) if spec.sharded else (0, spec.shape[0])
        rows = reader.read(name, WEIGHT, first * spec.width, last * spec.width)
        parameter.copy_(rows.view(parameter.shape))
    return stage.eval().requires_grad_(False)
