"""Text from a language model, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_tf.checks import check_number, check_whole_number
from megatron_tf.errors import ArgumentError, CheckpointError
from megatron_tf.telemetry.text import count_of


def generate(
    model: Callable[[Tensor, Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    context: int,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yields, at most `num_tokens` times, the next id of each prompt; None for a prompt that has reached `end`. Stops
    when all have reached it.

    model: (ids [b, s], padding [b]) -> logits [b, vocab] after the last id, see `CachedModel`; it sees the last
    `context` ids of each row. `temperature` 0 is greedy. Otherwise an id is drawn from the `top_k` likeliest tokens (0:
    all), and among these from the fewest that together have `top_p` of the probability. A row depends only on its
    prompt, `seed` and its number. CheckpointError when the logits are not finite: the training diverged. ArgumentError,
    already at the call, for arguments that are out of range.
    """
    _check_prompts(prompts)
    check_whole_number("num_tokens", num_tokens, 0)
    check_whole_number("context", context, 1)
    if end is not None:
        check_whole_number("end", end, 0)
    check_number("temperature", temperature, "0 (greedy) or a finite number above it", lambda t: 0 <= t < math.inf)
    check_whole_number("top_k", top_k, 0)
    check_number("top_p", top_p, "a number above 0, up to 1 (all tokens)", lambda share: 0 < share <= 1)
    check_whole_number("seed", seed, 0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    generators = [torch.Generator().manual_seed((seed + row) % 2**63) for row in range(len(prompts))]

    def pick(logits: Tensor) -> list[int]:
        return [_pick(row, temperature, top_k, top_p, random) for row, random in zip(logits, generators)]

    return _generated(model, ids, padding, pick, num_tokens, context, end)


@torch.no_grad()
def _generated(
    model: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    padding: Tensor,
    pick: Callable[[Tensor], list[int]],
    num_tokens: int,
    context: int,
    end: int | None,
) -> Iterator[list[int | None]]:
    ended = [False] * len(ids)
    for _ in range(num_tokens):
        fallen = max(ids.shape[1] - context, 0)
        logits = model(ids[:, fallen:], (padding - fallen).clamp(min=0)).double()
        if logits.dim() != 2 or logits.shape[0] != len(ids):
            raise ArgumentError(
                f"model: gives {list(logits.shape)} for {len(ids)} prompts, but logits [{len(ids)}, vocabulary] after "
                "the last token are expected. Wrap a TokenFormer: CachedModel(model)."
            )
        if not logits.isfinite().all():
            raise CheckpointError(
                f"the model's logits after {count_of(ids.shape[1], 'token')} are not finite: its training diverged. "
                "Use an earlier checkpoint."
            )
        picked = pick(logits)
        ended = [done or token == end for done, token in zip(ended, picked)]
        if all(ended):
            return
        ids = torch.cat((ids, torch.tensor(picked)[:, None]), 1)
        yield [None if done else token for done, token in zip(ended, picked)]


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if len(prompts) == 0:
        raise ArgumentError("prompts: there are none. Give at least one list of token ids.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ArgumentError(
                f"prompts[{number}]: is empty. Give at least one token; the end of a document begins a new one."
            )
        for position, token in enumerate(prompt):
            check_whole_number(f"prompts[{number}][{position}]", token, 0)


def _pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        kept = logits.topk(min(top_k, logits.numel()))
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
    # The largest is 0 after the subtraction, so dividing by a tiny temperature cannot make +inf.
    weights = torch.softmax((logits - logits.max()) / temperature, 0)
    if top_p < 1:
        likeliest, order = weights.sort(descending=True, stable=True)
        before = likeliest.cumsum(0) - likeliest
        weights = weights.index_fill(0, order[before >= top_p], 0.0)
    return int(torch.multinomial(weights, 1, generator=generator))
