"""Does fp8 pay? Rounding alone, products, and forward and backward of one Pattention, in fp8 against bf16.

What is timed is checked as well: the kernels that round against PyTorch's passes, bit for bit, products against
emulated ones, and outputs and gradients of the layer against those in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import Call, interleaved
from megatron_tf.model import fp8, rounding
from megatron_tf.model.pattention import Form, partial_pattention
from megatron_tf.model.products import Gradient
from megatron_tf.parallel.groups import SINGLE

FORMS = {"bf16": Form("gram"), "fp8": Form("gram", fp8=True)}
# Relative error of a product against the emulated one: four times the rounding of bf16, in which both are given.
BOUND = 2**-6
# Of the layer, whose gradients are off by 9 % when factors are rounded independently, and by rounding to bf16.
LAYER_BOUND = 2**-3


def rows(device: torch.device, tokens: Sequence[int], positions: int, width: int, rounds: int) -> Iterator[Row]:
    """One row for each number of tokens; x is [positions, width].

    Milliseconds of: rounding one tensor of the scores' size, row by row with a known bound, as S is, and in both
    layouts with the largest element looked for, as dA is, also by PyTorch's passes; the product of that tensor with
    value tokens, in bf16, of factors that are rounded already, and with their rounding; a layer, forward and backward.
    """
    for n in tokens:
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(size, width, generator=generator) for size in (positions, positions, n, n)]
        x, grad, keys, values = (tensor.to(device, torch.bfloat16) for tensor in drawn)
        errors = list(_errors(x, grad, keys))
        same = _same_bits(x @ keys.mT) and _same_bits(_awkward(device))
        layers = _layers(x, keys, values, grad)
        layer_errors = list(map(_error, layers["layer fp8"](), layers["layer bf16"]()))
        calls = {**_roundings(x @ keys.mT), **_products(x @ keys.mT, values), **layers}
        timings = interleaved(calls, device, rounds)
        yield {
            "tokens": n,
            "positions": positions,
            "width": width,
            **{f"{name} ms": 1e3 * timing.median for name, timing in timings.items()},
            "product × bf16": timings["product with rounding"].speed_against(timings["product bf16"]),
            "layer × bf16": timings["layer fp8"].speed_against(timings["layer bf16"]),
            "error": _largest(errors),
            "bound": BOUND,
            "layer error": _largest(layer_errors),
            "its bound": LAYER_BOUND,
            "same bits": same,
            # written so that NaN counts as an error
            "right": same
            and all(error <= BOUND for error in errors)
            and all(error <= LAYER_BOUND for error in layer_errors),
        }


def _largest(errors: Sequence[float]) -> float:
    """The largest; NaN before all others."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def _roundings(scores: Tensor) -> Mapping[str, Call]:
    def portable() -> None:
        largest = rounding.portable_largest(scores)
        rounding.portable_rounded(scores, largest, 0, gradient=True, by_row=True, by_column=True)

    bound = scores.abs().max().item()
    return {
        "round S": lambda: rounding.rounded(scores, bound=bound),
        "round dA": lambda: rounding.rounded(scores, gradient=True, by_column=True),
        "round dA in PyTorch": portable,
    }


def _products(scores: Tensor, values: Tensor) -> Mapping[str, Call]:
    left, right = rounding.rounded(scores), rounding.rounded(values, by_row=False, by_column=True)
    return {
        "product bf16": lambda: scores @ values,
        "product fp8": lambda: fp8.PRODUCT(left, right),
        "product with rounding": lambda: fp8.PRODUCT(scores, values),
    }


def _layers(x: Tensor, keys: Tensor, values: Tensor, grad: Tensor) -> Mapping[str, Callable[[], tuple[Tensor, ...]]]:
    """Functions that return output and gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, keys, values)]

    def step(form: Form) -> tuple[Tensor, ...]:
        own, k, v = inputs
        (out,) = partial_pattention(own, [k], [v], [k.shape[0] ** 0.5], "l2_norm_gelu", SINGLE, form)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return {f"layer {name}": partial(step, form) for name, form in FORMS.items()}


def _errors(x: Tensor, grad: Tensor, keys: Tensor) -> Iterator[float]:
    """Relative errors of the product of values alone, and of those with a gradient on either side."""
    factors: list[tuple[Tensor, Tensor, Gradient]] = [
        (x, keys.mT, None), (grad, keys.mT, "left"), (x.mT, grad, "right")
    ]  # fmt: skip
    for left, right, gradient in factors:
        yield _error(*(make(left, right, gradient) for make in (fp8.scaled_product, fp8.emulated_product)))


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def _same_bits(x: Tensor) -> bool:
    """Whether `rounded` gives what PyTorch's passes give, in both types and layouts, with and without a bound."""
    same = True
    for gradient in (False, True):
        for bound in (None, 2.0):
            made = rounding.rounded(x, gradient=gradient, bound=bound, by_column=True)
            largest = rounding.portable_largest(x) if bound is None else None
            power = 0 if bound is None else rounding.known_power(bound, gradient)
            codes, transposed, down = rounding.portable_rounded(x, largest, power, gradient, True, True)
            assert made.by_row is not None and made.by_column is not None
            same &= torch.equal(made.by_row.view(torch.uint8), codes)
            same &= torch.equal(made.by_column.view(torch.uint8), transposed)
            same &= torch.equal(made.down.nan_to_num(7.0), down.nan_to_num(7.0))
    return same


def _awkward(device: torch.device) -> Tensor:
    """Every number of bf16, with NaN and infinities, in a shape that is no multiple of 16."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    return torch.cat([codes, codes.new_zeros(256)]).view(257, 256).to(device)
