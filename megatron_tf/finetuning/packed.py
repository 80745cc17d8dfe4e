"""Checks of a base model before a run relies on it: its context is long enough, and it keeps packed examples apart."""

from __future__ import annotations

from typing import Any

import torch

from megatron_tf.convert.agreement import agreement
from megatron_tf.errors import ConfigError
from megatron_tf.finetuning.batches import collate
from megatron_tf.finetuning.examples import Example

_LENGTHS = (5, 7)


def check_length(model: Any, seq_length: int, key: str) -> None:
    """ConfigError that names `key` when `seq_length` is above the model's context. Some models have no such limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and seq_length > context:
        raise ConfigError(
            f"{key}: {seq_length}, and the base's context is {context} tokens. Set it to at most {context}."
        )


@torch.no_grad()
def check_packing(model: Any, device: torch.device, key: str, remedy: str) -> None:
    """ConfigError that names `key` and `remedy` unless two examples packed into one sequence have the logits of each
    alone."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]
    batch = collate([[Example(ids, [False] * len(ids), "") for ids in texts]], sum(_LENGTHS))
    found = model(
        input_ids=batch.input_ids.to(device), position_ids=batch.position_ids.to(device), use_cache=False
    ).logits[0]
    alone = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in texts]
    compared = agreement(found, torch.cat(alone))
    if not compared.holds:
        raise ConfigError(f"{key}: the base lets packed examples see each other ({compared}). {remedy}")
