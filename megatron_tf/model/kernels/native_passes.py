"""The CPU kernels in native_passes.c. Building them on first use takes about a second, once for each kind of processor.
Without a C compiler they are not available."""

from __future__ import annotations

import ctypes
import logging
import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.model.kernels.native_library import BuildError, load_library

SOURCE = Path(__file__).with_suffix(".c")
# Sums may be reordered and products fused. Not -ffast-math: NaN must stay NaN, because the trainer checks for it.
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
)  # fmt: skip
X86_FLAGS = ("-mprefer-vector-width=512",)
SUPPORTED_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def is_available() -> bool:
    """Whether the library can be used. Builds it if necessary; if that fails, logs a warning with the reason."""
    return _library() is not None


def norm(scores: Tensor, norms: Tensor) -> None:
    _call("norm", scores, norms)


def weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _call("weights", scores, norms, weights, scale=scale)


def norm_and_weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _call("norm_and_weights", scores, norms, weights, scale=scale)


def backward(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, totals: Tensor, scale: float) -> None:
    _call("backward", scores, norms, gradient, weights, totals, scale=scale)


def backward_with_product(
    scores: Tensor,
    norms: Tensor,
    gradient: Tensor,
    weights: Tensor,
    totals: Tensor,
    products: Tensor,
    scale: float,
) -> None:
    _call("backward_with_product", scores, norms, gradient, weights, totals, products, scale=scale)


def couple(scores: Tensor, norms: Tensor, totals: Tensor, gradient: Tensor) -> None:
    _call("couple", scores, norms, totals, gradient)


def backward_and_couple(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, scale: float) -> None:
    _call("backward_and_couple", scores, norms, gradient, weights, scale=scale)


def _call(name: str, scores: Tensor, *others: Tensor, scale: float | None = None) -> None:
    """Calls the library's function `name` with address and row stride of each tensor, sizes, threads and scale."""
    library = _library()
    assert library is not None
    arguments: list[ctypes.c_void_p | ctypes.c_long | ctypes.c_int | ctypes.c_float] = []
    for tensor in (scores, *others):
        assert tensor.dim() == 2 and tensor.stride(1) == 1, "a matrix with neighbours in a row side by side"
        arguments += ctypes.c_void_p(tensor.data_ptr()), ctypes.c_long(tensor.stride(0))
    arguments += map(ctypes.c_long, scores.shape)
    arguments.append(ctypes.c_int(torch.get_num_threads()))
    if scale is not None:
        arguments.append(ctypes.c_float(scale))
    getattr(library, f"{name}_{SUPPORTED_DTYPES[scores.dtype]}")(*arguments)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return load_library(SOURCE, FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()))
    except BuildError as error:
        reason = "Pattention runs without its native CPU kernel, slower: %s"
        logging.getLogger(__name__).warning(reason, error)
        return None
