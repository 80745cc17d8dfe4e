"""A model on one process, and the initial weights of any part of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.config.validate import check_model
from megatron_tf.model.checks import check_building, check_config, check_scales, check_starts
from megatron_tf.model.context import BlockContext, run_blocks
from megatron_tf.model.filling import allocate
from megatron_tf.model.layers import FinalNorm, TensorParallel, build_block, task_layers
from megatron_tf.model.stage import build_ends
from megatron_tf.state.initialize import initial_rows
from megatron_tf.state.parameters import initial_scales, parameter_table, shard_range


class TokenFormer(nn.Module):
    """Token ids [b, s] -> logits [b, s, V]. For other tasks, inputs [b, ...] -> logits [b, ..., classes].

    Names of parameters are the logical names of `state.parameters.parameter_table`.

    `scales`: τ by projection, from a checkpoint; None: that of a fresh model.
    ConfigError, as in training, when no model can be built from `config`. ArgumentError when `scales` do not fit it.
    """

    def __init__(self, config: Model, scales: Mapping[str, float] | None = None):
        super().__init__()
        check_config(config)
        check_model(config)
        if scales is not None:
            check_scales(scales, config)
        self.config = config
        self.scales = dict(initial_scales(config) if scales is None else scales)
        tensor = TensorParallel()
        self.task_layers, task = task_layers(config), task_of(config)
        input_layer, head = build_ends(config, tensor)
        assert input_layer is not None and head is not None
        self.add_module(task.input_name, input_layer)
        self.blocks = nn.ModuleList(build_block(config, i, self.scales, tensor) for i in range(config.num_layers))
        self.final_norm = FinalNorm(config, tensor)
        self.add_module(task.head_name, head)

    def forward(self, input_ids: Tensor, starts: Tensor | None = None, context: BlockContext | None = None) -> Tensor:
        """Logits, see the class. `input_ids`: integers [b, s], s at most config.seq_length; or another task's inputs.

        `starts`: see `attention.document_starts`; None: each sample is one document.  `context`: receives the auxiliary
        losses and metrics of the blocks; None: they are dropped. ArgumentError for inputs that the model cannot take.
        """
        device = self.final_norm.weight.device
        inputs = self.task_layers.checked("input_ids", input_ids, self.config, device)
        if starts is not None:
            check_starts(starts, inputs)
        return self.logits(self.hidden_states(inputs, starts, context)).movedim(-2, 0)

    def hidden_states(
        self, input_ids: Tensor, starts: Tensor | None = None, context: BlockContext | None = None
    ) -> Tensor:
        """The output of the last block: inputs [b, ...] -> [s, b, d]. The inputs are not checked."""
        hidden = self.get_submodule(task_of(self.config).input_name)(input_ids)
        return run_blocks(self.blocks, hidden, starts, context or BlockContext())  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        """The output of the last block [s, b, d] -> logits [..., b, classes]."""
        return self.task_layers.logits(self.get_submodule(task_of(self.config).head_name), self.final_norm(hidden))


def build_model(
    config: Model,
    *,
    seed: int = 1234,
    scales: Mapping[str, float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TokenFormer:
    """A model with initial weights, which depend on seed and parameter name only. On the meta device it has none.

    `device`: None: the CPU. ConfigError and ArgumentError as `TokenFormer`; ArgumentError for the other arguments.
    """
    check_building(config, seed, device, dtype)
    with torch.device("meta"):
        model = TokenFormer(config, scales)
    if device is not None and torch.device(device).type == "meta":
        return model
    allocate(model, device or "cpu")
    initialize(model.named_parameters(), config, seed)
    return model.to(dtype)


@torch.no_grad()
def initialize(
    parameters: Iterable[tuple[str, Tensor]], config: Model, seed: int, shard: int = 0, num_shards: int = 1
) -> None:
    """Fills parameters, given by logical name, with their initial weights: those of tensor rank `shard`."""
    table = parameter_table(config)
    for name, parameter in parameters:
        spec = table[name]
        rows = shard_range(spec.shape[0], num_shards, shard) if spec.sharded else (0, spec.shape[0])
        parameter.copy_(initial_rows(spec, seed, *rows))
