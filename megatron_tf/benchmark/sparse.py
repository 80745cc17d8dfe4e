"""Forward and backward of a sparse Pattention against the dense one of as many used tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import interleaved
from megatron_tf.config.nearest import either, multiples_near
from megatron_tf.errors import ConfigError
from megatron_tf.model.projection import Pattention
from megatron_tf.model.routing import choose, straight_through
from megatron_tf.model.sparse_pattention import SparsePattention

CHECKED_ROWS = 256  # compared with the formula, which multiplies with the tokens of all candidates
# The largest relative error: four times the type's rounding; for fp32 the rounding of sums of thousands of terms.
BOUNDS = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}


def rows(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    tokens: Sequence[int],
    candidates: Sequence[int],
    group_size: int,
    positions: int,
    width: int,
    rounds: int,
) -> Iterator[Row]:
    """One row for each type, number of used tokens and number of candidates. The remainder of `tokens` by the size of a
    slot is dense.

    ConfigError when a number of tokens is less than a slot, or for a bank that a model cannot have.
    """
    if group_size % 16:
        raise ConfigError(
            f"--group-size {group_size}: is no multiple of 16. Give {either(multiples_near(group_size, 16))}."
        )
    if min(candidates) < 2:
        raise ConfigError(f"--candidates {min(candidates)}: that is the dense layer. Give 2 or more.")
    if min(tokens) < group_size:
        raise ConfigError(
            f"--tokens {min(tokens)}: a slot has --group-size {group_size}. Give at least as many tokens."
        )
    for dtype in dtypes:
        for used in tokens:
            for count in candidates:
                yield _measure(device, dtype, used, count, group_size, positions, width, rounds)


def _measure(
    device: torch.device,
    dtype: torch.dtype,
    used: int,
    candidates: int,
    group_size: int,
    positions: int,
    width: int,
    rounds: int,
) -> Row:
    torch.manual_seed(0)
    sparse = SparsePattention(
        used, width, width, group_size=group_size, candidates=candidates, dense=used % group_size
    ).to(device, dtype)
    dense = Pattention(used, width, width).to(device, dtype)
    x, grad = (torch.randn(positions, width, device=device).to(dtype) for _ in range(2))
    errors = _errors(sparse, x[:CHECKED_ROWS], grad[:CHECKED_ROWS])
    x.requires_grad_()

    def step(layer: Pattention | SparsePattention) -> tuple[Tensor, ...]:
        learning = [parameter for name, parameter in layer.named_parameters() if name != "bank.balance"]
        return torch.autograd.grad(layer.partial(x), [x, *learning], grad)

    timings = interleaved({"dense": lambda: step(dense), "sparse": lambda: step(sparse)}, device, rounds)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "used tokens": used,
        "candidates": candidates,
        "slots": sparse.num_slots,
        "dense tokens": used % group_size,
        "positions": positions,
        **{f"{name} ms": 1e3 * timing.median for name, timing in timings.items()},
        "time / dense": 1 / timings["sparse"].speed_against(timings["dense"]),
        **{f"error {name}": error for name, error in errors.items()},
        "bound": BOUNDS[dtype],
        # written so that NaN counts as an error
        "right": all(error <= BOUNDS[dtype] for error in errors.values()),
    }


def _errors(layer: SparsePattention, x: Tensor, grad: Tensor) -> dict[str, float]:
    """Of output and gradients, against the formula in fp32 with the tokens of all candidates: norm over norm."""
    found, expected = (
        _results(layer, x, grad, layer.partial),
        _results(layer, x, grad, lambda rows: _formula(layer, rows)),
    )
    return {
        name: ((own - exact).norm() / exact.norm()).item()
        for (name, own), exact in zip(found.items(), expected.values())
    }


def _results(layer: SparsePattention, x: Tensor, grad: Tensor, function) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    bank = layer.bank
    out = function(x)
    wanted = {"x": x, "keys": bank.key_tokens, "values": bank.value_tokens, "router": bank.router}
    gradients = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype))
    return {"output": out.detach().float(), **dict(zip(wanted, (gradient.float() for gradient in gradients)))}


def _formula(layer: SparsePattention, x: Tensor) -> Tensor:
    """Scores with all tokens, those of candidates that were not chosen put to 0; fp32."""
    bank = layer.bank
    logits = bank.logits(x)
    chosen = choose(logits, bank.slot_balance())
    factors = F.one_hot(chosen, logits.shape[-1]) * straight_through(logits, chosen).unsqueeze(-1)
    mask = (factors > 0).flatten(1).repeat_interleave(bank.shape[2], 1)
    gate = factors.flatten(1).repeat_interleave(bank.shape[2], 1)
    keys: list[Tensor] = [bank.key_tokens]
    values: list[Tensor] = [bank.value_tokens]
    if layer.key_tokens is not None and layer.value_tokens is not None:
        keys, values = [*keys, layer.key_tokens], [*values, layer.value_tokens]
        always = mask.new_ones(len(x), len(layer.key_tokens))
        mask, gate = torch.cat([mask, always], 1), torch.cat([gate, always.to(gate)], 1)
    scores = (x.float() @ torch.cat(keys).float().mT) * mask
    weights = F.gelu(layer.scale * scores / scores.norm(dim=-1, keepdim=True)) * gate
    return weights @ torch.cat(values).float()
