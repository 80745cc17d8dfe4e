"""Forward and backward of one Pattention with products in fp8 against those in bf16, and against emulated ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import Call, interleaved
from megatron_tf.model import fp8
from megatron_tf.model.pattention import Form, partial_pattention
from megatron_tf.model.products import Gradient
from megatron_tf.parallel.groups import SINGLE

FORMS = {"bf16": Form("gram"), "fp8": Form("gram", fp8=True)}
# Relative error of a product against the emulated one: four times the rounding of bf16, in which both are given.
BOUND = 2**-6


def rows(device: torch.device, tokens: Sequence[int], positions: int, width: int, rounds: int) -> Iterator[Row]:
    """One row for each number of tokens; x is [positions, width]."""
    for n in tokens:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(size, width, generator=generator) for size in (positions, positions, n, n)]
        x, grad, keys, values = (tensor.to(device, torch.bfloat16) for tensor in drawn)
        errors = list(_errors(x, grad, keys))
        inputs = [tensor.requires_grad_() for tensor in (x, keys, values)]

        def step(form: Form, inputs: Sequence[Tensor] = inputs, grad: Tensor = grad) -> Call:
            own, k, v = inputs
            scale = k.shape[0] ** 0.5
            return lambda: torch.autograd.grad(
                partial_pattention(own, [k], [v], [scale], "l2_norm_gelu", SINGLE, form), inputs, grad
            )

        timings = interleaved({name: step(form) for name, form in FORMS.items()}, device, rounds)
        yield {
            "tokens": n,
            "positions": positions,
            "width": width,
            **{f"{name} ms": 1e3 * timing.median for name, timing in timings.items()},
            "× bf16": timings["fp8"].speed_against(timings["bf16"]),
            "error": max(errors),
            "bound": BOUND,
            # written so that NaN counts as an error
            "right": all(error <= BOUND for error in errors),
        }


def _errors(x: Tensor, grad: Tensor, keys: Tensor) -> Iterator[float]:
    """Relative errors of the product of values alone, and of those with a gradient on either side."""
    factors: list[tuple[Tensor, Tensor, Gradient]] = [
        (x, keys.mT, None), (grad, keys.mT, "left"), (x.mT, grad, "right")
    ]  # fmt: skip
    for left, right, gradient in factors:
        found, expected = (make(left, right, gradient) for make in (fp8.scaled_product, fp8.emulated_product))
        yield ((found.float() - expected.float()).norm() / expected.float().norm()).item()
