from __future__ import annotations

import torch
from deepspeed.runtime.pipe.module import PipelineModule

from megatron_tf.engine.deepspeed.pipeline import TokenFormerPipeline


def test_tied_weights_are_broadcast_outside_autograd(monkeypatch):
    """A broadcast into a leaf that requires grad is a warning today and will be an error."""
    recording = []
    monkeypatch.setattr(
        PipelineModule, "_synchronize_tied_weights", lambda self: recording.append(torch.is_grad_enabled())
    )
    assert torch.is_grad_enabled()
    TokenFormerPipeline.__new__(TokenFormerPipeline)._synchronize_tied_weights()
    assert recording == [False]
