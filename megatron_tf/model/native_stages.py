"""native_stages.c, built on first use: about a second, once for each kind of processor. Without a C compiler: nothing."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
# Sums may be reordered and products fused. Not -ffast-math: a NaN must stay one, the trainer looks for it.
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
)  # fmt: skip
X86_FLAGS = ("-mprefer-vector-width=512",)
BUILD_SECONDS = 60.0
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def is_available() -> bool:
    """Builds the library when nobody has. Where that fails, a warning says why."""
    return _library() is not None


def norm(scores: Tensor, norms: Tensor) -> None:
    _call("norm", scores, norms)


def weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _call("weights", scores, norms, weights, scale=scale)


def norm_and_weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _call("norm_and_weights", scores, norms, weights, scale=scale)


def backward(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, totals: Tensor, scale: float) -> None:
    _call("backward", scores, norms, gradient, weights, totals, scale=scale)


def couple(scores: Tensor, norms: Tensor, totals: Tensor, gradient: Tensor) -> None:
    _call("couple", scores, norms, totals, gradient)


def backward_and_couple(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, scale: float) -> None:
    _call("backward_and_couple", scores, norms, gradient, weights, scale=scale)


def _call(stage: str, scores: Tensor, *others: Tensor, scale: float | None = None) -> None:
    """The function of the library: address and distance between rows of each tensor, sizes, threads, scale."""
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
    getattr(library, f"{stage}_{DTYPES[scores.dtype]}")(*arguments)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        _warn("no C compiler is installed")
        return None
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    identity = repr((SOURCE.read_bytes(), compiler, flags, _processor())).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_tf"
    path = cache / f"native_stages_{hashlib.sha256(identity).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # built under a name of its own and then renamed: ranks that start together may all build it, none waits
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                built = Path(folder) / path.name
                command = [compiler, *flags, str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(
                    command, check=True, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS
                )
                built.replace(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        _warn(f"{compiler} could not build it: {error.stderr.strip()[-200:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(str(error))
    return None


def _warn(reason: str) -> None:
    logging.getLogger(__name__).warning("Pattention runs without its native CPU kernel, slower: %s", reason)


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by nodes of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
