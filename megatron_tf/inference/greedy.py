"""Greedy generation from a model on all ranks, at any layout: always the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_tf.model.stage import Stage
from megatron_tf.parallel.collectives import all_gather
from megatron_tf.tasks.classes import argmax
from megatron_tf.tasks.language_model.layers import first_row


@torch.no_grad()
def continue_greedily(
    stage: Stage, prompt: Sequence[int], *, num_tokens: int, context: int, vocab_size: int, end: int, last_rank: int
) -> list[int]:
    """At most `num_tokens` ids after `prompt` (not empty), each the likeliest; ends before the first `end`.

    All ranks call it together, every data-parallel replica on its own copy of the model, and get the same ids.
    `context`: most tokens that the model reads at once.  `vocab_size`: ids from it on are padding of the vocabulary and
    are never chosen.  `last_rank`: a rank of the last pipeline stage, which broadcasts its choice. Nothing is cached:
    each token costs a forward pass over the tokens before it.
    """
    device, group = next(stage.parameters()).device, stage.tensor.group
    ids: list[int] = list(prompt)
    for _ in range(num_tokens):
        seen = ids[-context:]
        padding = -len(seen) % stage.tensor.length_multiple
        logits = stage.infer(torch.tensor([[*seen, *[0] * padding]], device=device))
        chosen = torch.zeros(1, dtype=torch.int64, device=device)
        if logits is not None:
            first = first_row(stage.model, group)
            holder, at = divmod(len(seen) - 1, len(logits))  # the context rank that has the last token's logits
            row = logits[at].float().clone()  # [1, V/T]
            row[:, max(0, vocab_size - first) :] = -torch.inf
            chosen = all_gather(argmax(row, first, group), stage.tensor.context, 0)[[holder]]
        dist.broadcast(chosen, last_rank)
        if int(chosen) == end:
            break
        ids.append(int(chosen))
    return ids[len(prompt) :]
