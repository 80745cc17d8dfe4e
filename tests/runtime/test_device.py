from __future__ import annotations

import pytest
import torch

from megatron_tf.runtime.device import choose_device, missing_gpu


def test_a_machine_without_gpus_computes_on_its_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert missing_gpu(7) is None and choose_device(7) == torch.device("cpu")


def test_a_rank_without_a_gpu_among_ranks_with_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert missing_gpu(1) is None
    with pytest.raises(IndexError, match="^local rank 2 has no GPU: this node shows 2$"):
        choose_device(2)
