"""native_grouped.c: products of candidates with the rows that chose them, and of stacks of small matrices.

Built on first use, as native_passes.c.

x, scores and outputs are fp32 matrices with contiguous rows. Rows of the scores are sorted by candidate.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.model.kernels import onednn
from megatron_tf.model.kernels.native_library import BuildError, load_library
from megatron_tf.model.kernels.native_passes import FLAGS, X86_FLAGS
from megatron_tf.native import kernels_wanted

SOURCE = Path(__file__).with_suffix(".c")
# With fewer rows, packing the tokens takes longer than the product. Packing those of a small group takes less time than
# a call of PyTorch's products.
LEAST_ROWS = 32
SMALL_GROUP = 2**14
# The packed tokens of a larger group do not stay in a cache of 2 MiB, and MKL's product of gathered rows is faster.
LARGEST_GROUP = 256 * 768


def usable(tokens: Tensor) -> bool:
    """Whether the products below can take such tokens [..., g, width] and are faster than PyTorch's."""
    if not kernels_wanted() or tokens.device.type != "cpu" or tokens.dtype != torch.float32:
        return False
    fits = tokens.shape[-2] * tokens.shape[-1] <= LARGEST_GROUP or onednn.mkl_is_slow()
    return fits and _library() is not None


def least_rows(n: int, width: int) -> int:
    """With fewer rows PyTorch's products with n tokens of a width are faster."""
    return LEAST_ROWS if n * width > SMALL_GROUP else 1


class Rows(NamedTuple):
    """The rows of some candidates, of which each begins where the one before ends.

    `rows`: int32 [rows of the scores], the row of x or of the outputs that belongs to each. Within a candidate none
        occurs twice.
    `ends`: int32 [candidates], where the rows of each end, if the first ones are row `begin`.
    """

    rows: Tensor
    ends: Tensor
    begin: int


def scores(x: Tensor, rows: Rows, tokens: Tensor, out: Tensor) -> None:
    """out [rows, n] = x[rows] · tokensᵀ of their candidate; tokens [candidates, n, width]."""
    _call("scores", tokens.shape, *_matrix(x), *_rows(rows), *_tokens(tokens), *_matrix(out))


def add_outputs(scores: Tensor, rows: Rows, tokens: Tensor, total: Tensor) -> None:
    """total[rows] += scores [rows, n] · tokens of their candidate; tokens [candidates, n, width]."""
    _call("add_outputs", tokens.shape, *_matrix(scores), *_rows(rows), *_tokens(tokens), *_matrix(total))


def gradients(scores: Tensor, rows: Rows, x: Tensor, out: Tensor) -> None:
    """out [candidates, n, width] = scores [rows, n]ᵀ · x[rows], for candidates that have rows."""
    _call("gradients", out.shape, *_matrix(scores), *_rows(rows), *_matrix(x), *_tokens(out))


def add_products(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    out: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    symmetric: bool = False,
) -> None:
    """out [m, n, d] = alpha · left [m, n, k] · right [m, k, d] + beta · total.

    As `products.add_products`. `right` may be a transposed tensor. Of a symmetric result half is computed.
    """
    library = _library()
    assert library is not None
    transposed = not right.is_contiguous()
    given = right.mT if transposed else right
    (stack, n, depth), width = left.shape, right.shape[-1]
    threads = max(1, min(stack, torch.get_num_threads()))
    assert (
        right.shape == (stack, depth, width)
        and total.shape == out.shape == (stack, n, width)
        and (n == width or not symmetric)
    )
    for tensor in (out, total, left, given):
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
    packed = _room(threads * library.room(1, depth))
    pointers = out.data_ptr(), total.data_ptr(), left.data_ptr(), given.data_ptr()
    library.add_products(*pointers, stack, n, depth, width, transposed, symmetric, alpha, beta, packed, threads)


# Memory for packed tokens, one buffer for each Python thread. It is reused by all calls, so that it stays in the cache.
_kept = threading.local()


def _matrix(tensor: Tensor) -> tuple[int, int]:
    """(address, stride between rows)."""
    assert tensor.dim() == 2 and tensor.stride(1) == 1, "a matrix with neighbours in a row side by side"
    return tensor.data_ptr(), tensor.stride(0)


def _rows(rows: Rows) -> tuple[int, int, int, int]:
    for part in (rows.rows, rows.ends):
        assert part.dtype == torch.int32 and part.stride(0) == 1
    return rows.rows.data_ptr(), rows.ends.data_ptr(), rows.begin, len(rows.ends)


def _tokens(tokens: Tensor) -> tuple[int, int, int]:
    assert tokens.is_contiguous()
    return tokens.data_ptr(), *tokens.shape[1:]


def _call(name: str, sizes: torch.Size, *arguments: int) -> None:
    """Calls the library's function `name`, with memory to pack tokens of `sizes` and the number of threads."""
    library = _library()
    assert library is not None
    getattr(library, name)(*arguments, _room(library.room(*sizes[1:])), torch.get_num_threads())


def _room(wanted: int) -> int:
    """The address of memory for as many numbers."""
    if getattr(_kept, "packed", None) is None or len(_kept.packed) < wanted:
        _kept.packed = torch.empty(wanted, dtype=torch.float32)
    return _kept.packed.data_ptr()


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The library; None where the processor has no vectors that it supports, or where it cannot be built."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        library = load_library(SOURCE, FLAGS + X86_FLAGS)
    except BuildError as error:
        logging.getLogger(__name__).warning("Sparse layers run without their native CPU products, slower: %s", error)
        return None
    address, number, threads, factor = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
    matrix, tokens = (address, number), (address, number, number)
    rows = address, address, number, number
    for function in (library.scores, library.add_outputs):
        function.argtypes = (*matrix, *rows, *tokens, *matrix, address, threads)
    library.gradients.argtypes = (*matrix, *rows, *matrix, *tokens, address, threads)
    flags = ctypes.c_int, ctypes.c_int
    library.add_products.argtypes = (*[address] * 4, *[number] * 4, *flags, factor, factor, address, threads)
    library.room.argtypes = (number, number)
    library.room.restype = library.vector_lanes.restype = number
    return library if library.vector_lanes() else None
