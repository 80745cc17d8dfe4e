"""The software that decides what a rank computes: this package's code, libraries, and variables. No torch."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from megatron_tf.shipped import PACKAGE

# Libraries whose version decides numbers, file contents, or the communication between ranks.
LIBRARIES = ("torch", "deepspeed", "numpy", "triton", "safetensors", "tokenizers", "xxhash")
VARIABLE_PREFIX = "MEGATRON_TF_"
# They change arithmetic, or what is sent between ranks. OMP_NUM_THREADS and the like are left out: nodes may differ in
# their number of cores, and results agree up to rounding. So are names of interfaces: each node has its own.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "DS_ACCELERATOR",
    "GLOO_DEVICE_TRANSPORT",
    "NCCL_ALGO",
    "NCCL_IB_DISABLE",
    "NCCL_NET",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCHDYNAMO_DISABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
    "TORCH_DISTRIBUTED_DEBUG",
    "TRITON_INTERPRET",
)


def software_facts(environ: Mapping[str, str]) -> dict[str, str]:
    """Facts that must be the same on all ranks: name -> version, digest or value. Unset variables are left out."""
    facts = {"the code of megatron_tf": f"SHA-256 {code_digest()[:12]}", "Python": platform.python_version()}
    facts |= {library: _version(library) for library in LIBRARIES}
    names = sorted(name for name in environ if name in VARIABLES or name.startswith(VARIABLE_PREFIX))
    return facts | {name: environ[name] for name in names}


def code_digest(folder: Path | None = None) -> str:
    """SHA-256 of all source files (.py, .c) of this package or of `folder`, names included."""
    root = folder or PACKAGE
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("py", "c") for path in root.rglob(f"*.{ending}")):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _version(library: str) -> str:
    """The version that this process has imported, else the installed one, else "not installed"."""
    loaded = getattr(sys.modules.get(library), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"
