"""Sums over the slots of a sparse layer: for each row, of the results of its pairs. See model/grouped.py.

GPUs: triton_pair_sums.py. Elsewhere `embedding_bag`, which is one kernel as well. Neither adds atomically. Each sum is
in fp32 and is rounded once; where `embedding_bag`'s is added to another sum, a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.compiling import constant_when_compiled
from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.native import can_run_triton


@operator()
def sum_of_pairs(of_pairs: Tensor, places: Tensor) -> Tensor:
    """[pairs, width] -> [rows, width].  places: int32 [rows, slots], the places of each row's pairs, contiguous."""
    if not _has_kernel(of_pairs.device.type, of_pairs.dtype):
        return F.embedding_bag(places, of_pairs, mode="sum")
    out = _empty_sum(of_pairs, places)
    _launch(of_pairs, places, out, add=False)
    return out


@operator(["total"])
def add_sum_of_pairs(of_pairs: Tensor, places: Tensor, total: Tensor) -> None:
    """As `sum_of_pairs`, added to `total` [rows, width]."""
    if _has_kernel(of_pairs.device.type, of_pairs.dtype):
        _launch(of_pairs, places, total, add=True)
    else:
        total += F.embedding_bag(places, of_pairs, mode="sum")


@constant_when_compiled
def _has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    if not can_run_triton(device_type):
        return False
    from megatron_tf.model.kernels import triton_pair_sums

    return dtype in triton_pair_sums.SUPPORTED_DTYPES


def _launch(of_pairs: Tensor, places: Tensor, total: Tensor, add: bool) -> None:
    from megatron_tf.model.kernels import triton_pair_sums

    triton_pair_sums.sum_of_pairs(of_pairs, places, total, add)


def _empty_sum(of_pairs: Tensor, places: Tensor) -> Tensor:
    return of_pairs.new_empty(places.shape[0], of_pairs.shape[1])


# Shapes and types of the results, for torch.compile.
register_fake("sum_of_pairs", _empty_sum)
register_fake("add_sum_of_pairs", lambda of_pairs, places, total: None)
