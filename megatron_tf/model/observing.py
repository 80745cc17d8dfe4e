"""Watching the inputs of projections during forward passes outside of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from megatron_tf.model.projection import Pattention
from megatron_tf.model.sparse_pattention import SparsePattention

Observer = Callable[[Tensor], None]


@contextmanager
def observed(observers: Iterable[tuple[Pattention | SparsePattention, Observer]]) -> Iterator[None]:
    """Inside, each projection gives its observer each input x [s, b, d], whole on every rank."""
    pairs = list(observers)
    try:
        for projection, observer in pairs:
            projection.observer = observer
        yield
    finally:
        for projection, _ in pairs:
            projection.observer = None
