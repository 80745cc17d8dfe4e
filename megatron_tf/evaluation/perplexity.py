"""Token-weighted loss of a model on prepared data, at any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_tf.data.documents import LossMask
from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.loader import check_vocabulary
from megatron_tf.evaluation.windows import Window, Windows
from megatron_tf.model.stage import Stage
from megatron_tf.tasks.classes import IGNORED


@dataclass(frozen=True)
class Score:
    """A summed loss. `nats`: over all scored tokens.  `tokens`: their number.  `text_bytes`: UTF-8 bytes of the text
    that they stand for; None: not known."""

    nats: float
    tokens: int
    text_bytes: int | None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def pooled(scores: list[Score]) -> Score:
    """The score of all texts together: every token has the same weight."""
    known = [score.text_bytes for score in scores if score.text_bytes is not None]
    return Score(
        sum(score.nats for score in scores),
        sum(score.tokens for score in scores),
        sum(known) if len(known) == len(scores) else None,
    )


@torch.no_grad()
def summed_loss(
    stage: Stage,
    dataset: IndexedDataset,
    windows: Windows,
    *,
    vocab_size: int,
    batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    loss_mask: LossMask | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, int]:
    """(summed loss in nats, number of scored tokens) of this data-parallel rank's windows at the last stage; (0, 0) at
    other stages.

    `loss_mask`: the tokens that are not scored.  Batches of `batch_size` windows are dealt to the data-parallel ranks
    in turn. All ranks of one replica must call it together.  `progress` is called with the number of finished batches.
    DataError, on all ranks of the replica, for an id outside the vocabulary.
    """
    device = next(stage.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for number, batch in enumerate(_batches(windows, batch_size, data_rank, data_size)):
        ids, labels = _tensors(dataset, batch, windows.length, vocab_size, loss_mask)
        logits = stage.infer(ids.to(device))
        if logits is not None:
            total += token_losses(stage, logits, labels.to(device)).sum(dtype=torch.float64)
            count += int((labels != IGNORED).sum())
        progress(number + 1)
    return float(total), count


def num_batches(windows: Windows, batch_size: int, data_rank: int = 0, data_size: int = 1) -> int:
    """Batches of windows that fall to one data-parallel rank."""
    return len(range(data_rank, -(-len(windows) // batch_size), data_size))


def token_losses(stage: Stage, logits: Tensor, labels: Tensor) -> Tensor:
    """logits [s, b, V/T] of `stage`, labels [b, s] -> loss of each token in nats [b, s], fp32 or fp64, the same on each
    tensor rank. 0 where the label is IGNORED."""
    return stage.task_layers.losses(stage.model, logits, labels, stage.tensor.group).mT


def _batches(windows: Windows, batch_size: int, data_rank: int, data_size: int) -> Iterator[list[Window]]:
    for first in range(data_rank * batch_size, len(windows), data_size * batch_size):
        yield [windows[number] for number in range(first, min(first + batch_size, len(windows)))]


def _tensors(
    dataset: IndexedDataset, batch: list[Window], length: int, vocab_size: int, loss_mask: LossMask | None
) -> tuple[Tensor, Tensor]:
    """(ids, labels), each int64 [b, length]. Labels that are not scored are IGNORED. Shorter windows are padded at the
    end, where no scored token can see the padding."""
    ids = np.zeros((len(batch), length), dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    for row, window in enumerate(batch):
        tokens = dataset.tokens(window.start, window.stop + 1)
        check_vocabulary(dataset, window.start, tokens, vocab_size)
        size = window.stop - window.start
        ids[row, :size] = tokens[:-1]
        labels[row, size - window.scored : size] = tokens[-window.scored :]
    if loss_mask is not None:
        loss_mask.apply(ids, labels)
    return torch.from_numpy(ids), torch.from_numpy(labels)
