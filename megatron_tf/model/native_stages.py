"""native_stages.c as PyTorch operators, built on first use: about a second, once for each kind of processor.

Without a C compiler there are none, and row_stages.py does the same in PyTorch. MEGATRON_TF_NATIVE=0 wants it so.
"""

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
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def usable(scores: Tensor) -> bool:
    """Whether the operators below take tensors like these scores."""
    return scores.device.type == "cpu" and scores.dtype in NAMES and _is_built()


@torch.compiler.assume_constant_result  # torch.compile need not look inside
def _is_built() -> bool:
    return _library() is not None


@torch.library.custom_op("megatron_tf::norm", mutates_args=(), device_types="cpu")
def norm(scores: Tensor) -> Tensor:
    """√Σ scores² over the last dim, [rows, 1] in fp32."""
    norms = scores.new_empty(scores.shape[0], 1, dtype=torch.float32)
    _call("norm", scores, *_matrix(scores), norms.data_ptr())
    return norms


@torch.library.custom_op("megatron_tf::normalised_gelu", mutates_args=(), device_types="cpu")
def normalised_gelu(scores: Tensor, inverse: Tensor) -> Tensor:
    """GELU(scores · inverse), inverse [rows, 1] in fp32."""
    weights = torch.empty_like(scores, memory_format=torch.contiguous_format)
    inverse = inverse.contiguous()
    _call("weights", scores, *_matrix(scores), inverse.data_ptr(), weights.data_ptr())
    return weights


@torch.library.custom_op("megatron_tf::normalised_gelu_backward", mutates_args=("gradient",), device_types="cpu")
def normalised_gelu_backward(scores: Tensor, inverse: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(GELU(U), Σ D∘scores [rows, 1] in fp32) with U = scores · inverse; gradient becomes D = inverse · gradient ∘ GELU'(U)."""
    weights = torch.empty_like(scores, memory_format=torch.contiguous_format)
    inverse, total = inverse.contiguous(), torch.empty_like(inverse, memory_format=torch.contiguous_format)
    arguments = *_matrix(scores), inverse.data_ptr(), *_matrix(gradient), weights.data_ptr(), total.data_ptr()
    _call("backward", scores, *arguments)
    return weights, total


@torch.library.custom_op("megatron_tf::couple_rows", mutates_args=("gradient",), device_types="cpu")
def couple_rows(gradient: Tensor, scores: Tensor, coupling: Tensor) -> None:
    """gradient −= scores · coupling, coupling [rows, 1] in fp32."""
    coupling = coupling.contiguous()
    _call("couple", scores, *_matrix(gradient), *_matrix(scores), coupling.data_ptr())


@norm.register_fake
def _(scores):
    return scores.new_empty(scores.shape[0], 1, dtype=torch.float32)


@normalised_gelu.register_fake
def _(scores, inverse):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@normalised_gelu_backward.register_fake
def _(scores, inverse, gradient):
    like = torch.contiguous_format
    return torch.empty_like(scores, memory_format=like), torch.empty_like(inverse, memory_format=like)


def _matrix(tensor: Tensor) -> tuple[int, int]:
    """Address and distance between rows."""
    assert tensor.dim() == 2 and tensor.stride(1) == 1, "a matrix with neighbours in a row side by side"
    return tensor.data_ptr(), tensor.stride(0)


def _call(stage: str, scores: Tensor, *arguments: int) -> None:
    library = _library()
    assert library is not None
    function = getattr(library, f"{stage}_{NAMES[scores.dtype]}")
    sizes = ctypes.c_long(scores.shape[0]), ctypes.c_long(scores.shape[1]), ctypes.c_int(torch.get_num_threads())
    function(*(ctypes.c_void_p(a) for a in arguments), *sizes)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if os.environ.get("MEGATRON_TF_NATIVE") == "0":
        return None
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
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
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
