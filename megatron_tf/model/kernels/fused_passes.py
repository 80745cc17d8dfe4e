"""The elementwise passes over the scores of `l2_norm_gelu` as operators, where there are kernels for them.

CPUs: native_passes.c, built on first use. GPUs: triton_passes.py. `activations.l2_norm.NormedScores` has the formulas,
and computes the same in PyTorch elsewhere. Scores A, their gradient and weights S are [rows, n], norms r, totals T and
products P [rows, 1] in fp32, each with any stride between rows. All arithmetic is fp32.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from megatron_tf.compiling import constant_when_compiled
from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.model.kernels.score_layout import empty_scores
from megatron_tf.native import can_run_triton, kernels_wanted


def usable(scores: Tensor) -> bool:
    """Whether the operators below can take such scores."""
    return _has_kernels(scores.device.type, scores.dtype)


@constant_when_compiled
def _has_kernels(device_type: str, dtype: torch.dtype) -> bool:
    kernels = _kernels(device_type) if kernels_wanted() else None
    return kernels is not None and dtype in kernels.SUPPORTED_DTYPES and kernels.is_available()


@cache
def _kernels(device_type: str) -> ModuleType | None:
    """The kernels of a device type, or None: a module with a function for each operator below, which writes its results
    into given tensors."""
    if device_type == "cpu":
        from megatron_tf.model.kernels import native_passes

        return native_passes
    if can_run_triton(device_type):
        from megatron_tf.model.kernels import triton_passes

        return triton_passes
    return None


@operator()
def norm(scores: Tensor) -> Tensor:
    """Row norms r."""
    out = _column(scores)
    _run("norm", scores, out)
    return out


@operator()
def weights(scores: Tensor, norms: Tensor, scale: float) -> Tensor:
    """Attention weights S."""
    out = _alike(scores)
    _run("weights", scores, norms, out, scale)
    return out


@operator()
def norm_and_weights(scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(r, S) of scores that hold all columns of their rows."""
    out = _column(scores), _alike(scores)
    _run("norm_and_weights", scores, *out, scale)
    return out


@operator(["gradient"])
def backward(scores: Tensor, norms: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(S, T); `gradient` is dS and becomes D."""
    out = _alike(scores), _column(scores)
    _run("backward", scores, norms, gradient, *out, scale)
    return out


@operator(["gradient"])
def backward_with_product(
    scores: Tensor, norms: Tensor, gradient: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(S, T, P), with P = ΣdS∘S; `gradient` is dS and becomes D."""
    out = _alike(scores), _column(scores), _column(scores)
    _run("backward_with_product", scores, norms, gradient, *out, scale)
    return out


@operator(["gradient"])
def couple(scores: Tensor, norms: Tensor, totals: Tensor, gradient: Tensor) -> None:
    """`gradient` is D and becomes dA."""
    _run("couple", scores, norms, totals, gradient)


@operator(["gradient"])
def backward_and_couple(scores: Tensor, norms: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """S, of scores that hold all columns of their rows; `gradient` is dS and becomes dA."""
    out = _alike(scores)
    _run("backward_and_couple", scores, norms, gradient, out, scale)
    return out


def _run(name: str, scores: Tensor, *arguments: Tensor | float) -> None:
    getattr(_kernels(scores.device.type), name)(scores, *arguments)


def _column(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[0], 1, dtype=torch.float32)


def _alike(scores: Tensor) -> Tensor:
    return empty_scores(scores, *scores.shape)


# Shapes and types of the results, for torch.compile.
register_fake("norm", _column)
register_fake("weights", lambda scores, norms, scale: _alike(scores))
register_fake("norm_and_weights", lambda scores, scale: (_column(scores), _alike(scores)))
register_fake("backward", lambda scores, norms, gradient, scale: (_alike(scores), _column(scores)))
register_fake(
    "backward_with_product",
    lambda scores, norms, gradient, scale: (_alike(scores), _column(scores), _column(scores)),
)
register_fake("backward_and_couple", lambda scores, norms, gradient, scale: _alike(scores))
register_fake("couple", lambda scores, norms, totals, gradient: None)
