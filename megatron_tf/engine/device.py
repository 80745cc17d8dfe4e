"""What DeepSpeed needs of this machine's device, known before a rank starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megatron_tf.config.schema import RunConfig


def accelerator_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """A DeepSpeed that is told to use another device than PyTorch has here. It reads this when it is imported."""
    name, device = environ.get("DS_ACCELERATOR"), "cuda" if torch.cuda.is_available() else "cpu"
    if name not in (None, device):
        remedy = "hide the GPUs with CUDA_VISIBLE_DEVICES=" if device == "cuda" else "use a machine with a GPU"
        yield f"DS_ACCELERATOR={name}, but PyTorch's device here is {device}. Unset it, or {remedy}."


def precision_problems(config: RunConfig) -> Iterator[str]:
    """Compute types that DeepSpeed refuses on a CPU."""
    if config.training.precision != "fp16" or torch.cuda.is_available():
        return
    from megatron_tf.engine.deepspeed.patches import has_fp16

    if not has_fp16():
        yield "training.precision: fp16 needs a GPU, and this machine's CPU has no fp16. Set it to bf16 or fp32."
