"""Forward and backward of one Pattention against its Gram form, the plain formula, a GELU MLP and its bare products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_tf.benchmark.counting import saved_bytes
from megatron_tf.benchmark.references import Layer, bare_products, gelu_mlp, plain_formula
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import Call, interleaved
from megatron_tf.errors import ConfigError
from megatron_tf.model import pattention
from megatron_tf.model.pattention import Form, partial_pattention
from megatron_tf.parallel.groups import SINGLE

BATCH = 4


def gram_form(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same layer with the norm of its scores from KᵀK, made at every call."""
    scale = keys.shape[0] ** 0.5
    return partial_pattention(x, [keys], [values], [scale], "l2_norm_gelu", SINGLE, Form("gram"))[0]


LAYERS: dict[str, Layer] = {"pattention": pattention, "gram": gram_form, "plain": plain_formula, "mlp": gelu_mlp}


def rows(
    device: torch.device, dtypes: Sequence[torch.dtype], tokens: Sequence[int], positions: int, width: int, rounds: int
) -> Iterator[Row]:
    """One row for each type and number of tokens; x is [positions / 4, 4, width]. ConfigError if 4 does not divide
    them."""
    if positions % BATCH:
        raise ConfigError(f"--positions {positions}: they come in batches of {BATCH}. Give a multiple of it.")
    for dtype in dtypes:
        for n in tokens:
            yield _measure(device, dtype, n, positions, width, rounds)


def _measure(device: torch.device, dtype: torch.dtype, n: int, positions: int, width: int, rounds: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(positions // BATCH, BATCH, width, generator=generator).to(device, dtype) for _ in range(2))
    keys, values = (torch.randn(n, width, generator=generator).mul_(0.02).to(device, dtype) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (x, keys, values)]

    def step(layer: Layer) -> Call:
        return lambda: torch.autograd.grad(layer(*inputs), inputs, grad)

    calls = {name: step(layer) for name, layer in LAYERS.items()}
    plain_inputs = x.detach(), keys.detach(), values.detach()
    timings = interleaved({**calls, "products": lambda: bare_products(*plain_inputs, grad)}, device, rounds)
    ours = timings["pattention"]
    saved = {name: saved_bytes(partial(layer, *inputs), inputs) / positions for name, layer in LAYERS.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": n,
        "positions": positions,
        "width": width,
        **{f"{name} ms": 1e3 * timing.median for name, timing in timings.items()},
        "× gram": ours.speed_against(timings["gram"]),
        "× plain": ours.speed_against(timings["plain"]),
        "× mlp": ours.speed_against(timings["mlp"]),
        "of floor": ours.speed_against(timings["products"]),
        # what the elementwise passes cost, whatever the speed of the products
        "overhead ns/score": 1e9 * ours.median_excess(timings["products"]) / (positions * n),
        **{f"saved/row {name}": int(size) for name, size in saved.items()},
    }
