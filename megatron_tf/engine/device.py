"""What the engine of a run needs of this machine, known before a rank starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import torch

from megatron_tf.config.schema import RunConfig
from megatron_tf.requirements import wanted_versions

FP8_CAPABILITY = (8, 9)


def has_fp8(device: torch.device) -> bool:
    """Whether there are products of 8-bit factors. A CPU emulates them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def accelerator_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """A DeepSpeed that is told to use another device than PyTorch has here. It reads this when it is imported."""
    name, device = environ.get("DS_ACCELERATOR"), "cuda" if torch.cuda.is_available() else "cpu"
    if name not in (None, device):
        remedy = "hide the GPUs with CUDA_VISIBLE_DEVICES=" if device == "cuda" else "use a machine with a GPU"
        yield f"DS_ACCELERATOR={name}, but PyTorch's device here is {device}. Unset it, or {remedy}."


def engine_problems(config: RunConfig) -> Iterator[str]:
    """An engine that is not installed."""
    if config.parallel.engine == "deepspeed" and find_spec("deepspeed") is None:
        version = wanted_versions("deepspeed")
        yield (
            "parallel.engine: deepspeed is not installed here. Set it to torch, or `pip install setuptools wheel ninja "
            f"&& pip install --no-build-isolation deepspeed{version}`."
        )


def precision_problems(config: RunConfig) -> Iterator[str]:
    """GPUs without products in fp8, and compute types that DeepSpeed refuses on a CPU."""
    if config.training.precision == "fp8" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < FP8_CAPABILITY:
            least, own = (".".join(map(str, version)) for version in (FP8_CAPABILITY, capability))
            yield (
                f"training.precision: fp8 needs a GPU of compute capability {least} or more, such as an H100, and this "
                f"{torch.cuda.get_device_name()} has {own}. Set it to bf16."
            )
    if config.training.precision != "fp16" or config.parallel.engine != "deepspeed" or torch.cuda.is_available():
        return
    from megatron_tf.engine.deepspeed.patches import has_fp16

    if not has_fp16():
        yield "training.precision: fp16 needs a GPU, and this machine's CPU has no fp16. Set it to bf16 or fp32."
