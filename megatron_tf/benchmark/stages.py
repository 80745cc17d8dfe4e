"""The cost of each stage between Pattention's products, in nanoseconds a score, compared with all six products.

The ratio of stages to products is the overhead of Pattention. MEGATRON_TF_NATIVE=0 shows the stages in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_tf.activations.function import score_function
from megatron_tf.benchmark.references import bare_products
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import interleaved
from megatron_tf.config.activations import DEFAULT_ACTIVATION

SCALE = 1.0
SPLIT = ("norm", "weights", "backward", "couple")  # with tokens divided among ranks, which exchange sums in between
WHOLE = ("norm and weights", "backward and couple")  # otherwise


def rows(
    device: torch.device, dtypes: Sequence[torch.dtype], tokens: int, positions: int, width: int, rounds: int
) -> Iterator[Row]:
    """One row for each type. Keys are [tokens, width]."""
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(0)
        x, keys, values = (
            torch.randn(count, width, generator=generator).to(device, dtype) for count in (positions, tokens, tokens)
        )
        yield _measure(x, keys, values, rounds)


def _measure(x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rounds: int) -> Row:
    scores = x @ keys.mT
    gradient = torch.zeros_like(scores)  # `backward` works in place: anything else would shrink until it is denormal
    function = score_function(DEFAULT_ACTIVATION)
    r = function.statistic(scores)
    total = torch.zeros_like(r)
    calls = {
        "norm": lambda: function.statistic(scores),
        "weights": lambda: function.weights(scores, r, SCALE),
        "norm and weights": lambda: function.statistic_and_weights(scores, SCALE),
        "backward": lambda: function.backward(scores, r, gradient, SCALE),
        "couple": lambda: function.couple(scores, r, total, gradient, SCALE),
        "backward and couple": lambda: function.backward_and_couple(scores, r, gradient, SCALE),
        "products": lambda: bare_products(x, keys, values, x),
    }
    times = interleaved(calls, x.device, rounds)
    nanoseconds = {name: 1e9 * timing.median / scores.numel() for name, timing in times.items()}
    split, whole = (sum(nanoseconds[name] for name in names) for names in (SPLIT, WHOLE))
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "tokens": keys.shape[0],
        "positions": x.shape[0],
        **{f"{name} ns": nanoseconds[name] for name in (*SPLIT, *WHOLE)},
        "products ns": nanoseconds["products"],
        "split / products": split / nanoseconds["products"],
        "whole / products": whole / nanoseconds["products"],
    }
