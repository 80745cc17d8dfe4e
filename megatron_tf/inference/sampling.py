"""Text from a language model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    num_tokens: int,
    context: int,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields up to `num_tokens` new ids after `prompt`, stopping before `end`.

    model: ids [1, s] -> logits [1, s, vocab]; it sees the last `context` ids. `temperature` 0 is greedy;
    `top_k` 0 samples from the whole vocabulary. Every step computes the whole context again.
    """
    ids = list(prompt)
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids[-context:]]))[0, -1].float()
        token = _pick(logits, temperature, top_k, generator)
        if token == end:
            return
        ids.append(token)
        yield token


def _pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        kept = logits.topk(min(top_k, logits.numel()))
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
    return int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator))
