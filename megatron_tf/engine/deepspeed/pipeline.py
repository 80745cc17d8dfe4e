"""A model as DeepSpeed's PipelineModule.

One hidden-state tensor crosses a stage boundary. If attention begins anew with each document, the position at which
each token's document starts is sent with it, because only the first stage has the token ids to find it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.config.topology import Topology, stage_layers
from megatron_tf.engine.shards import ShardedParameter, shards_of
from megatron_tf.model.attention import document_starts
from megatron_tf.model.context import BlockContext, run_blocks
from megatron_tf.model.filling import allocate
from megatron_tf.model.layers import Block, FinalNorm, TensorParallel, build_block, task_layers
from megatron_tf.model.stage import Stage, neighbours
from megatron_tf.tasks.layers import evaluation_sums


class _Layer(LayerSpec):
    def __init__(self, build: Callable[[], nn.Module]):
        super().__init__(nn.Module)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return _without_weights(self._build)


class _TiedLayer(TiedLayerSpec):
    """A module that the first and the last stage share. `forward` replaces its own forward, if given."""

    def __init__(
        self, key: str, build: Callable[[], nn.Module], forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    ):
        super().__init__(key, nn.Module, forward_fn=forward)
        self._build = build

    def build(self, log: bool = False) -> nn.Module:
        return _without_weights(self._build)


def _without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """A layer without random initial weights, because weights are always written through the optimizer later."""
    with torch.device("meta"):
        layer = build()
    allocate(layer, "cpu")
    return layer


class TokenFormerPipeline(PipelineModule):
    """This rank's stage. Layers: the task's input layer, blocks, final norm, the task's head.

    The engine sets before each step: `loss_weight`, the weight of each loss; `auxiliary_weight`, the weight of an
    auxiliary loss in the gradient of a micro batch; and `branches` of each micro batch, see `model.context`.
    `reports` has the sums of the step's auxiliary losses and metrics over this rank's blocks and micro batches.
    """

    def __init__(
        self,
        model: Model,
        scales: Mapping[str, float],
        topology: Topology,
        tensor: TensorParallel,
        document_ends: Sequence[int] = (),
    ):
        """`document_ends`: the tokens after which attention begins anew."""
        self.config = model
        self.grid_topology = topology
        self.tensor = tensor
        self.task = task_of(model)
        self.task_layers = task_layers(model)
        self.document_ends = document_ends
        self.loss_weight: Tensor | float = 1.0
        self.auxiliary_weight: Tensor | float = 1.0
        self.branches: Iterator[Tensor | None] = itertools.repeat(None)
        self.reports: dict[str, Tensor] = {}
        input_layer, head = self._ends()
        layers = [
            input_layer,
            *(_Layer(partial(build_block, model, i, scales, tensor)) for i in range(model.num_layers)),
            _Layer(partial(FinalNorm, model, tensor)),
            head,
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # PipelineModule prints its settings
            super().__init__(
                layers,
                topology=PipeModelDataParallelTopology(
                    num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data
                ),
                loss_fn=self.loss,
            )
        for shard in self.shards():
            # DeepSpeed counts the parts of all tensor ranks in the gradient norm only if a parameter is marked so.
            if shard.spec.sharded:
                shard.parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Inputs at the first stage, hidden states (and `starts`) at others -> hidden states (and `starts`), at the
        last stage logits."""
        starts: Tensor | None = None
        if isinstance(inputs, tuple):
            hidden, starts = inputs
        else:
            hidden = inputs
            if self.document_ends:
                starts = document_starts(inputs, self.document_ends)
        context = BlockContext()
        if self.training:
            context = BlockContext(loss_weight=self.auxiliary_weight, branches=next(self.branches))
        for is_block, layers in itertools.groupby(self.forward_funcs, lambda layer: isinstance(layer, Block)):
            if is_block:
                hidden = run_blocks(layers, hidden, starts, context)
            else:
                for layer in layers:
                    hidden = layer(hidden)
        if self.training:
            for name, value in (context.losses | context.metrics).items():
                self.reports[name] = self.reports.get(name, 0.0) + value
        is_last = self.stage_id == self.grid_topology.pipeline - 1
        return hidden if is_last or starts is None else (hidden, starts)

    def _ends(self) -> tuple[LayerSpec, LayerSpec]:
        """The task's input layer and head."""
        layers, task = self.task_layers, self.task
        input_layer = partial(layers.input_layer, self.config, self.tensor)
        if task.tied:
            name = task.input_name
            return _TiedLayer(name, input_layer), _TiedLayer(name, input_layer, layers.logits)
        return _Layer(input_layer), _Layer(partial(layers.head, self.config, self.tensor))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [..., b, C/T], targets [b, ...] -> the micro batch's weighted sum, at least fp32.

        In evaluation [2 + metrics, b]: for each sample the summed loss, the number of losses, and the task's metrics.
        """
        layers, group = self.task_layers, self.tensor.group
        if self.training:
            return layers.losses(self.config, logits, targets, group).sum() * self.loss_weight
        return evaluation_sums(layers, self.config, logits, targets, group)

    def blocks(self) -> dict[int, Block]:
        """This stage's blocks by layer number."""
        found = zip(range(self._local_start, self._local_stop), self.forward_funcs)
        return {index - 1: layer for index, layer in found if isinstance(layer, Block)}

    def as_stage(self) -> Stage:
        """This stage's layers as a `Stage`, for a forward pass without DeepSpeed. Both share the parameters."""
        previous, following = neighbours(self.grid_topology, self.global_rank)
        norms = [layer for layer in self.forward_funcs if isinstance(layer, FinalNorm)]
        ends = self._named_ends()
        return Stage(
            self.config,
            self.tensor,
            ends.get(self.task.input_name) if previous is None else None,
            self.blocks(),
            norms[0] if norms else None,
            ends.get(self.task.head_name) if following is None else None,
            previous,
            following,
            self.document_ends,
        )

    def _named_ends(self) -> dict[str, nn.Module]:
        """The task's input layer and head by name, as far as this stage has them."""
        if self.task.tied:
            return dict(self.tied_modules.items())
        found = {}
        if self.stage_id == 0:
            found[self.task.input_name] = self.forward_funcs[0]
        if self.stage_id == self.grid_topology.pipeline - 1:
            found[self.task.head_name] = self.forward_funcs[-1]
        return found

    def shards(self) -> list[ShardedParameter]:
        """Every parameter of this rank once, in model order, under its logical name."""
        return shards_of(self.as_stage(), self.grid_topology)

    def _partition_layers(self, method: str = "uniform") -> None:
        """Splits by blocks, so that every stage has at least one and the cost estimates know the split."""
        stages = self.grid_topology.pipeline
        starts = [1 + stage_layers(self.config.num_layers, stages, stage).start for stage in range(stages)]
        self.parts = [0, *starts[1:], len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _synchronize_tied_weights(self) -> None:
        with torch.no_grad():  # a broadcast into a leaf that requires grad will become an error in torch
            super()._synchronize_tied_weights()
