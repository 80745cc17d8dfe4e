"""One rank's part of a TokenFormer under any layout, for inference: ids in, logits out at the last pipeline stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from megatron_tf.config.schema import Model
from megatron_tf.config.topology import Topology, stage_layers
from megatron_tf.model.attention import document_starts
from megatron_tf.model.context import BlockContext, run_blocks
from megatron_tf.model.layers import Block, Embedding, FinalNorm, TensorParallel, build_block
from megatron_tf.parallel.collectives import receive, send


class Stage(nn.Module):
    """The layers of one pipeline stage. `named_parameters` gives logical names; each is this tensor rank's rows.

    Only the hidden states cross a stage boundary. Every rank of a pipeline calls it with the same ids; batches may
    differ in shape, and a stage that has passed one on begins with the next.
    """

    def __init__(
        self,
        embedding: Embedding | None,
        blocks: Mapping[int, Block],
        final_norm: FinalNorm | None,
        tensor: TensorParallel,
        hidden_size: int,
        previous: int | None = None,
        following: int | None = None,
        document_ends: Sequence[int] = (),
    ):
        """`embedding`: of the first and, as the head, of the last stage.  `blocks`: by layer number, in their order.

        `previous`, `following`: the ranks of the neighbouring stages.  `document_ends`: the tokens after which attention
        begins anew.
        """
        super().__init__()
        self.embedding, self.final_norm = embedding, final_norm
        self.blocks = nn.ModuleDict({str(layer): block for layer, block in blocks.items()})
        self.tensor, self.hidden_size = tensor, hidden_size
        self.previous, self.following, self.document_ends = previous, following, document_ends

    def forward(self, ids: Tensor) -> Tensor | None:
        """ids int64 [b, s] -> logits [s, b, V/T] at the last stage, None elsewhere.

        Under sequence parallelism s is a multiple of T.
        """
        if self.previous is None:
            assert self.embedding is not None
            hidden = self.embedding(ids)
        else:
            hidden = receive(self._hidden_shape(ids), next(self.parameters()), self.previous)
        starts = document_starts(ids, self.document_ends) if self.document_ends else None
        blocks = cast("Iterable[Block]", self.blocks.values())
        hidden = run_blocks(blocks, hidden, starts, BlockContext())
        if self.following is not None:
            send(hidden, self.following)
            return None
        assert self.embedding is not None and self.final_norm is not None
        return self.embedding.logits(self.final_norm(hidden))

    def _hidden_shape(self, ids: Tensor) -> tuple[int, int, int]:
        rows, length = ids.shape
        return length // self.tensor.group.size if self.tensor.sequence else length, rows, self.hidden_size


def neighbours(topology: Topology, rank: int) -> tuple[int | None, int | None]:
    """The ranks that `rank` receives hidden states from and sends them to."""
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
    """The stage of `rank` with weights that are still to be written."""
    previous, following = neighbours(topology, rank)
    layers = stage_layers(model.num_layers, topology.pipeline, topology.coordinate("pipeline", rank))
    at_an_end = previous is None or following is None
    return Stage(
        Embedding(model, tensor) if at_an_end else None,
        {layer: build_block(model, layer, scales, tensor) for layer in layers},
        FinalNorm(model, tensor) if following is None else None,
        tensor, model.hidden_size, previous, following, document_ends,
    )  # fmt: skip
