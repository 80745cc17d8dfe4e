"""The TokenFormer as DeepSpeed's PipelineModule.

One hidden-state tensor crosses a stage boundary, and where attention begins anew with each document, with it an
integer a token: where its document begins. The first stage finds that in the ids, which no other stage has.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_tf.config.schema import Model
from megatron_tf.config.topology import Topology, stage_layers
from megatron_tf.model.attention import document_starts
from megatron_tf.model.context import BlockContext, run_blocks
from megatron_tf.model.layers import Block, Embedding, FinalNorm, TensorParallel, build_block
from megatron_tf.model.stage import Stage, neighbours
from megatron_tf.parallel.vocab import IGNORED, cross_entropy
from megatron_tf.state.parameters import EMBEDDING, ParameterSpec, parameter_table, shard_range


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter of this rank: the rows of the logical tensor from `first_row` on.

    `owned`: false where another rank holds the same elements and speaks for them.
    """

    spec: ParameterSpec
    parameter: nn.Parameter
    first_row: int
    owned: bool


class _Layer(LayerSpec):
    def build(self, log: bool = False) -> nn.Module:
        return _without_weights(super().build)


class _TiedLayer(TiedLayerSpec):
    def build(self, log: bool = False) -> nn.Module:
        return _without_weights(super().build)


class _BlockLayer(_Layer):
    """A block of whatever architecture the model has."""

    def __init__(self, model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel):
        super().__init__(Block)
        self._build = partial(build_block, model, layer, scales, tensor)

    def build(self, log: bool = False) -> nn.Module:
        return _without_weights(self._build)


def _without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """A layer whose initial weights were not drawn: they are always written through the optimizer later."""
    with torch.device("meta"):
        layer = build()
    return layer.to_empty(device="cpu")


class TokenFormerPipeline(PipelineModule):
    """This rank's stage. Layers: embedding, blocks, final norm, head (tied to the embedding).

    The engine sets, before each step, `loss_weight`, what the loss of each token counts in training, and
    `auxiliary_weight`, what an auxiliary loss counts in the gradient of a micro batch. `reports` has the sums of the step's
    auxiliary losses and metrics over this rank's blocks and micro batches.
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
        self.config, self.grid_topology, self.tensor = model, topology, tensor
        self.document_ends = document_ends
        self.loss_weight: Tensor | float = 1.0
        self.auxiliary_weight: Tensor | float = 1.0
        self.reports: dict[str, Tensor] = {}
        layers = [
            _TiedLayer("embedding", Embedding, model, tensor),
            *(_BlockLayer(model, i, scales, tensor) for i in range(model.num_layers)),
            _Layer(FinalNorm, model, tensor),
            _TiedLayer("embedding", Embedding, model, tensor, forward_fn=Embedding.logits),
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
            super().__init__(
                layers,
                topology=PipeModelDataParallelTopology(
                    num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data
                ),
                loss_fn=self.loss,
            )
        for shard in self.shards():
            # DeepSpeed counts a parameter on every tensor rank in the gradient norm only if it is so marked
            if shard.spec.sharded:
                shard.parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """What this stage receives -> what it sends: ids [b, s] first, logits last, hidden states (and `starts`) between."""
        starts: Tensor | None = None
        if isinstance(inputs, tuple):
            hidden, starts = inputs
        else:
            hidden = inputs
            if self.document_ends:
                starts = document_starts(inputs, self.document_ends)
        context = BlockContext(loss_weight=self.auxiliary_weight if self.training else None)
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

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [s, b, V/T], labels [b, s] -> the micro batch's weighted sum, fp32.

        In evaluation [2, b]: of each sample the sum, and how many labels count.
        """
        start, _ = shard_range(self.config.vocab_size, self.tensor.group.size, self.tensor.group.rank)
        losses = cross_entropy(logits, labels.mT, start, self.tensor.group)
        if self.training:
            return losses.sum() * self.loss_weight
        return torch.stack((losses.sum(0), (labels != IGNORED).sum(1)))

    def blocks(self) -> dict[int, Block]:
        """This stage's blocks by layer number."""
        found = zip(range(self._local_start, self._local_stop), self.forward_funcs)
        return {index - 1: layer for index, layer in found if isinstance(layer, Block)}

    def as_stage(self) -> Stage:
        """The same layers, for a forward pass without DeepSpeed."""
        previous, following = neighbours(self.grid_topology, self.global_rank)
        norms = [layer for layer in self.forward_funcs if isinstance(layer, FinalNorm)]
        embedding = self.tied_modules["embedding"] if "embedding" in self.tied_modules else None  # noqa: SIM401 - no get
        return Stage(
            embedding,
            self.blocks(),
            norms[0] if norms else None,
            self.tensor,
            self.config.hidden_size,
            previous,
            following,
            self.document_ends,
        )

    def shards(self) -> list[ShardedParameter]:
        """Every parameter of this rank once, in model order, under its logical name."""
        group, pipeline = self.tensor.group, self.grid_topology.pipeline
        named: dict[str, nn.Parameter] = {}
        if "embedding" in self.tied_modules:
            named[EMBEDDING] = self.tied_modules["embedding"].weight
        for layer, block in self.blocks().items():
            named.update((f"blocks.{layer}.{name}", p) for name, p in block.named_parameters())
        for layer in self.forward_funcs:
            if isinstance(layer, FinalNorm):
                named.update((f"final_norm.{name}", p) for name, p in layer.named_parameters())
        table = parameter_table(self.config)
        shards = []
        for name, parameter in named.items():
            spec = table[name]
            first_row = shard_range(spec.shape[0], group.size, group.rank)[0] if spec.sharded else 0
            tied_copy = spec.tied and pipeline > 1 and self.stage_id > 0
            shards.append(
                ShardedParameter(spec, parameter, first_row, (spec.sharded or group.rank == 0) and not tied_copy)
            )
        return shards

    def _partition_layers(self, method: str = "uniform") -> None:
        """By blocks, so that every stage has at least one and the estimates know the split."""
        stages = self.grid_topology.pipeline
        starts = [1 + stage_layers(self.config.num_layers, stages, stage).start for stage in range(stages)]
        self.parts = [0, *starts[1:], len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def _synchronize_tied_weights(self) -> None:
        with torch.no_grad():  # a broadcast into a leaf that requires grad will become an error in torch
            super()._synchronize_tied_weights()
