"""The size of tokens, for methods whose new tokens are as large as the old: the same on every rank, to the bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_tf.errors import CheckpointError

_READ_ELEMENTS = 1 << 22  # part of the definition: another number changes the rounding


def root_mean_square(elements: Callable[[int, int], Tensor], count: int, tensor: str) -> float:
    """The root mean square of the first `count` elements of the flattened `tensor`, computed in fp64.

    `elements`: reads a range of them.  `tensor`: its name. CheckpointError when some elements are not finite.
    """
    total = 0.0
    for start in range(0, count, _READ_ELEMENTS):
        part = elements(start, min(start + _READ_ELEMENTS, count))
        check_finite(part, tensor)
        with one_thread():
            total += float(part.to(torch.float64).square().sum())
    return math.sqrt(total / count)


def check_finite(elements: Tensor, tensor: str) -> None:
    """CheckpointError when some of these elements of the tensor named `tensor` are infinite or NaN."""
    if not elements.isfinite().all():
        raise CheckpointError(
            f"{tensor}: holds values that are infinite or no numbers: the training diverged. Grow an earlier checkpoint"
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch use one thread, because the rounding of sums and products depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
