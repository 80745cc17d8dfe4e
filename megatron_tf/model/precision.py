"""The torch types of the compute types in a configuration."""

from __future__ import annotations

import torch

from megatron_tf.config.sections.training import ComputeType

DTYPES: dict[ComputeType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
