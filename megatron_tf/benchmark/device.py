"""The machine of a measurement, and the types that it computes in."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

import torch

from megatron_tf.config.sections.training import ComputeType
from megatron_tf.errors import ConfigError
from megatron_tf.model.kernels import fused_passes
from megatron_tf.native import processor


def check_dtypes(device: torch.device, names: Iterable[str]) -> None:
    """ConfigError for a type in which the device cannot compute in reasonable time."""
    if "fp16" in names and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ConfigError("fp16: this processor has no instructions for it. Give bf16 or fp32, or --device cuda.")


def quick_dtype(device: torch.device) -> ComputeType:
    """bf16 if the device has instructions for its products, else fp32."""
    if device.type == "cuda":
        return "bf16"
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    has_dots = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return "bf16" if has_tiles() or has_dots() else "fp32"


def machine(device: torch.device) -> dict[str, object]:
    """The facts about the machine and its software that measurements depend on."""
    # Python's own `platform.processor` is empty or only the architecture on Linux
    of_cpu = processor().get("model name", platform.machine())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else of_cpu
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native kernels": fused_passes.usable(torch.empty(0, device=device)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
