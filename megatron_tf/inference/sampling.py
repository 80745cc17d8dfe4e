"""Text from a language model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_tf.errors import CheckpointError


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
    CheckpointError when the logits are not finite: the model is of a training that diverged.
    """
    assert prompt and temperature >= 0 and top_k >= 0
    ids = list(prompt)
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids[-context:]]))[0, -1].double()
        if not logits.isfinite().all():
            raise CheckpointError(
                f"the model's logits after {len(ids)} tokens are not finite: its training diverged. Use an earlier checkpoint."
            )
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
    # The largest is 0 after the subtraction, so that no temperature, however small, makes an infinity of it.
    weights = torch.softmax((logits - logits.max()) / temperature, 0)
    return int(torch.multinomial(weights, 1, generator=generator))
