"""One rank's part of a model under any layout: inputs in, logits out at the last pipeline stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.config.topology import Topology
from megatron_tf.model.attention import document_starts
from megatron_tf.model.context import BlockContext, run_blocks
from megatron_tf.model.layers import Block, FinalNorm, TensorParallel, build_block, task_layers
from megatron_tf.parallel.collectives import receive, send


class Stage(nn.Module):
    """The layers of one pipeline rank. Parameters have their logical names; sharded ones hold this tensor rank's rows.

    The layers are one contiguous part of the depth, or several, which are dealt out to the ranks in turn. Only hidden
    states pass from one part to the next.
    """

    def __init__(
        self,
        model: Model,
        tensor: TensorParallel,
        input_layer: nn.Module | None,
        blocks: Mapping[int, Block],
        final_norm: FinalNorm | None,
        head: nn.Module | None,
        previous: int | None = None,
        following: int | None = None,
        document_ends: Sequence[int] = (),
        parts: Sequence[range] = (),
        around: tuple[int, int] | None = None,
    ):
        """`input_layer`: for the first stage.  `final_norm`, `head`: for the last one.

        `blocks`: by layer number, in their order.  `previous`: the rank that the first part receives from, None on the
        first stage.  `following`: the rank that the last part sends to, None on the last stage.
        `document_ends`: the tokens that end a document; attention does not cross them.
        `parts`: the layers of each part; empty: all blocks are one part.  `around`: the ranks that the other parts
        receive from and send to, needed for several parts.
        """
        super().__init__()
        task = task_of(model)
        # a tied head has the name of the input layer, and is the same module on a single stage
        for name, layer in ((task.input_name, input_layer), (task.head_name, head)):
            if layer is not None:
                self.add_module(name, layer)
        self.final_norm = final_norm
        self.blocks = nn.ModuleDict({str(layer): block for layer, block in blocks.items()})
        self.model = model
        self.tensor = tensor
        self.task_layers = task_layers(model)
        self.previous = previous
        self.following = following
        self.document_ends = document_ends
        self.parts = [[str(layer) for layer in layers] for layers in parts] or [[str(layer) for layer in blocks]]
        self.around = around
        # The type of hidden states between stages; None: that of the parameters. An engine sets it when its compute
        # type is another one.
        self.hidden_dtype: torch.dtype | None = None

    def source(self, part: int = 0) -> int | None:
        """The rank that `part` receives from; None: it reads the inputs."""
        return self.previous if part == 0 or self.around is None else self.around[0]

    def target(self, part: int = 0) -> int | None:
        """The rank that `part` sends to; None: it ends with the logits."""
        return self.following if part == len(self.parts) - 1 or self.around is None else self.around[1]

    def forward(
        self, received: Tensor, starts: Tensor | None = None, context: BlockContext | None = None, part: int = 0
    ) -> Tensor:
        """Runs one part: inputs [b, ...] or received hidden states -> hidden states, or logits at the last part.

        `starts`: see `attention.document_starts`; None: each sample is one document. Inputs and `starts` have all
        positions, results have those of this context rank. The number of positions must be a multiple of
        `tensor.length_multiple`.
        """
        task = task_of(self.model)
        hidden = received
        if self.source(part) is None:
            hidden = self.get_submodule(task.input_name)(self.tensor.own_positions(received))
        blocks = cast("Iterable[Block]", (self.blocks[layer] for layer in self.parts[part]))
        hidden = run_blocks(blocks, hidden, starts, context or BlockContext())
        if self.target(part) is not None:
            return hidden
        assert self.final_norm is not None
        return self.task_layers.logits(self.get_submodule(task.head_name), self.final_norm(hidden))

    def modules_of(self, part: int) -> Iterator[nn.Module]:
        """The modules that only `part` runs, for a stage of several parts: its blocks, and the head at the end."""
        yield from (self.blocks[layer] for layer in self.parts[part])
        if self.target(part) is None:
            yield self.get_submodule(task_of(self.model).head_name)

    def infer(self, inputs: Tensor) -> Tensor | None:
        """Inputs [b, ...] through all stages. Returns the logits at the last one, None elsewhere.

        Every rank of the pipeline calls it with the same inputs. Batches may differ in shape. A stage that has sent the
        hidden states of one batch can begin with the next. The logits are those of this context rank's positions.
        """
        starts = self.starts(inputs)
        for part in range(len(self.parts)):
            received, source, target = inputs, self.source(part), self.target(part)
            if source is not None:
                dtype = self.hidden_dtype or next(self.parameters()).dtype
                received = receive(self.hidden_shape(inputs), dtype, inputs.device, source)
            output = self(received, starts, part=part)
            if target is None:
                return output
            send(output, target)
        return None

    def starts(self, inputs: Tensor) -> Tensor | None:
        """`attention.document_starts` of ids `inputs` [b, s]; None: each sample is one document."""
        return document_starts(inputs, self.document_ends)

    def hidden_shape(self, inputs: Tensor) -> tuple[int, int, int]:
        """The shape of this rank's hidden states between stages for `inputs`: (s, b, d), s divided among the ranks."""
        length, rows = self.task_layers.hidden_shape(self.model, inputs)
        return length // self.tensor.length_multiple, rows, self.model.hidden_size


def neighbours(topology: Topology, rank: int) -> tuple[int | None, int | None]:
    """(the rank that `rank` receives hidden states from, the one that it sends them to); None at the ends."""
    peers, stage = topology.peers("pipeline", rank), topology.coordinate("pipeline", rank)
    last = stage == topology.pipeline - 1
    return (peers[stage - 1] if stage else None), (None if last else peers[stage + 1])


def build_stage(
    model: Model,
    scales: Mapping[str, float],
    topology: Topology,
    rank: int,
    tensor: TensorParallel,
    document_ends: Sequence[int] = (),
) -> Stage:
    """The stage of `rank`. Its weights are uninitialised."""
    previous, following = neighbours(topology, rank)
    peers, number = topology.peers("pipeline", rank), topology.coordinate("pipeline", rank)
    parts = topology.parts(model.num_layers, number)
    around = peers[number - 1], peers[(number + 1) % topology.pipeline]
    input_layer, head = build_ends(model, tensor, first=previous is None, last=following is None)
    return Stage(
        model,
        tensor,
        input_layer,
        {layer: build_block(model, layer, scales, tensor) for layers in parts for layer in layers},
        FinalNorm(model, tensor) if following is None else None,
        head,
        previous,
        following,
        document_ends,
        parts,
        around if len(parts) > 1 else None,
    )


def build_ends(
    model: Model, tensor: TensorParallel, first: bool = True, last: bool = True
) -> tuple[nn.Module | None, nn.Module | None]:
    """(input layer, head) of a stage that is the first, the last, both or neither; None where it has none."""
    layers = task_layers(model)
    input_layer = layers.input_layer(model, tensor) if first else None
    if task_of(model).tied and first and last:
        return input_layer, input_layer
    return input_layer, layers.head(model, tensor) if last else None
