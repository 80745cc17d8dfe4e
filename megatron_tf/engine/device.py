"""Checks, before a rank starts, that this machine has what the engine of a run needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import torch

from megatron_tf.config.schema import RunConfig
from megatron_tf.model import rounding
from megatron_tf.requirements import wanted_versions


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit matrices. A CPU emulates it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= rounding.CAPABILITY


def accelerator_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """A problem when DeepSpeed's variable, which it reads at import, names another device than PyTorch has."""
    name, device = environ.get("DS_ACCELERATOR"), "cuda" if torch.cuda.is_available() else "cpu"
    if name not in (None, device):
        remedy = "hide the GPUs with CUDA_VISIBLE_DEVICES=" if device == "cuda" else "use a machine with a GPU"
        yield f"DS_ACCELERATOR={name}, but PyTorch's device here is {device}. Unset it, or {remedy}."


def engine_problems(config: RunConfig, key: str = "parallel.engine") -> Iterator[str]:
    """A problem when the engine, which `key` chooses, is not installed."""
    if config.parallel.engine == "deepspeed" and find_spec("deepspeed") is None:
        version = wanted_versions("deepspeed")
        yield (
            f"{key}: deepspeed is not installed here. Set it to torch, or `pip install setuptools wheel ninja "
            f"&& pip install --no-build-isolation deepspeed{version}`."
        )


def precision_problems(config: RunConfig) -> Iterator[str]:
    """A problem for fp8 on a GPU without it, and for a compute type that DeepSpeed refuses on a CPU."""
    if config.training.precision == "fp8" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < rounding.CAPABILITY:
            least, own = (".".join(map(str, version)) for version in (rounding.CAPABILITY, capability))
            yield (
                f"training.precision: fp8 needs a GPU of compute capability {least} or more, such as an H100, and this "
                f"{torch.cuda.get_device_name()} has {own}. Set it to bf16."
            )
    if config.training.precision != "fp16" or config.parallel.engine != "deepspeed" or torch.cuda.is_available():
        return
    from megatron_tf.engine.deepspeed.patches import has_fp16

    if not has_fp16():
        yield "training.precision: fp16 needs a GPU, and this machine's CPU has no fp16. Set it to bf16 or fp32."
