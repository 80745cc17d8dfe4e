"""The embedding of tokens, which is also the head, and the loss of predicting the next tokens.

| tensor | local shape |
|---|---|
| ids, labels | [b, s] |
| embedding E | [V/T, d], rows [start, stop) of the vocabulary |
| logits | [s, b, V/T] |
| losses | [s, b] |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.data.documents import boundaries
from megatron_tf.data.samples import derived_seed
from megatron_tf.model.filling import fill_normal
from megatron_tf.model.later import Later
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.linear import linear
from megatron_tf.parallel.groups import Group
from megatron_tf.state.parameters import INITIAL_STD, shard_range
from megatron_tf.tasks.classes import IGNORED, cross_entropy
from megatron_tf.tasks.language_model.checks import checked_ids
from megatron_tf.tasks.language_model.section import vocab_size_of
from megatron_tf.tasks.layers import TaskLayers


def partial_embedding(ids: Tensor, weight: Tensor, start: int) -> Tensor:
    """The embeddings of ids that this rank holds, zeros for the others: [..., d], still to be summed over the group.

    ids int64 [...], weight [V/T, d]: the rows of the vocabulary from `start` on.
    """
    local = ids - start
    foreign = (local < 0) | (local >= weight.shape[0])
    rows = F.embedding(local.masked_fill(foreign, 0), weight)
    return rows.masked_fill(foreign.unsqueeze(-1), 0)


def first_row(model: Model, group: Group) -> int:
    """The first row of the vocabulary that this rank of the tensor group holds."""
    return shard_range(vocab_size_of(model), group.size, group.rank)[0]


class Embedding(nn.Module):
    """Token embedding and, tied, the output head. Vocabulary rows are split over the tensor group."""

    def __init__(self, model: Model, tensor: TensorParallel):
        super().__init__()
        self.tensor = tensor
        rows = vocab_size_of(model)
        self.start, stop = shard_range(rows, tensor.group.size, tensor.group.rank)
        self.weight = nn.Parameter(torch.empty(stop - self.start, model.hidden_size))
        # where a backward pass defers the gradient of the head to; None: it computes it
        self.later: Later | None = None
        fill_normal(self.weight, INITIAL_STD)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> hidden between layers."""
        return self.tensor.leave(partial_embedding(ids.mT, self.weight, self.start))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden between layers -> logits [s, b, V/T] over this rank's rows of the vocabulary."""
        whole = self.tensor.enter(hidden)
        return linear(whole, self.weight, self.later)


class LanguageModelLayers(TaskLayers):
    def input_layer(self, model: Model, tensor: TensorParallel) -> nn.Module:
        return Embedding(model, tensor)

    def logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        assert isinstance(head, Embedding)
        return head.logits(hidden)

    def hidden_shape(self, model: Model, inputs: Tensor) -> tuple[int, int]:
        """(s, b) of ids [b, s], because texts may be shorter than the model's seq_length."""
        rows, length = inputs.shape
        return length, rows

    def checked(self, name: str, inputs: Tensor, model: Model, device: torch.device) -> Tensor:
        return checked_ids(name, inputs, model, device)

    def losses(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        return cross_entropy(logits, targets.mT, first_row(model, group), group)

    def counts(self, targets: Tensor) -> Tensor:
        return (targets != IGNORED).sum(1)

    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def examples(self, config: RunConfig, samples: range) -> tuple[Tensor, Tensor]:
        """Random token ids, lower ones more often. Without data.eod_id, documents end with the most frequent, 0."""
        rows = torch.stack([random_tokens(config, sample) for sample in samples])
        # Copies: with a single row, ids and labels would share memory, and masking labels would change the ids.
        ids, labels = rows[:, :-1].clone(), rows[:, 1:].clone()
        mask = boundaries(config.data, config.data.eod_id or 0).loss_mask
        if mask is not None:
            mask.apply(ids.numpy(), labels.numpy())
        return ids, labels


def random_tokens(config: RunConfig, sample: int) -> Tensor:
    """Synthetic token ids [s + 1], a pure function of the run's seed and the sample's number."""
    # torch's generator takes a seed of 63 bits
    generator = torch.Generator().manual_seed(derived_seed(config.run.seed, sample) >> 1)
    uniform = torch.rand(config.model.seq_length + 1, generator=generator)
    return (uniform.square() * vocab_size_of(config.model)).long()


LANGUAGE_MODEL_LAYERS = LanguageModelLayers()
