from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from bases import decoder
from peft import get_peft_model

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.tuner import adapter_of
from megatron_tf.errors import CheckpointError
from megatron_tf.finetuning.saving import Progress, read_progress, save, whole_moments
from megatron_tf.finetuning.section import FinetuneConfig
from megatron_tf.telemetry.trackers import open_trackers


def test_progress_and_moments_come_back(tmp_path):
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=2, modules="mlp"))
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(list(names))
    for parameter in names:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    progress = Progress(3, "digest", 70, {"wandb": "1a2b"}, rows=12)
    path = save(tmp_path, progress, adapter_of(model), whole_moments(optimizer, names))
    found = read_progress(path)
    assert found.progress == progress
    for parameter, name in names.items():
        assert torch.equal(found.moments["exp_avg_sq"][name], optimizer.state[parameter]["exp_avg_sq"])
    # as an earlier version wrote it
    (path / "training.json").write_text(json.dumps({"step": 3, "data": "digest"}))
    assert read_progress(path).progress == Progress(3, "digest")
    (path / "training.json").write_text(json.dumps({"step": 3, "data": "digest", "other": 1}))
    with pytest.raises(CheckpointError, match="other is not a field"):
        read_progress(path)
    (path / "training.json").write_text(json.dumps({"step": 3, "data": "digest"}))
    (path / "optimizer.safetensors").write_text("text")
    with pytest.raises(CheckpointError, match="optimizer.safetensors.*damaged.*Remove this checkpoint to go on"):
        read_progress(path)


def test_a_run_goes_on_at_its_tracker(tmp_path, monkeypatch):
    given = []

    def init(**arguments):
        given.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "new", url="https://wandb.ai/x", define_metric=lambda *_, **__: None
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    values = (
        {"run": {"dir": "runs/x", "name": "answers", "tags": ["first"]}, "base": {"path": "base"},
         "data": {"train": "a.jsonl", "seq_length": 8}, "optimizer": {"lr": 0.1},
         "training": {"train_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
         "logging": {"trackers": ["wandb"], "project": "adapters"}}
    )  # fmt: skip
    config = FinetuneConfig.model_validate_json(json.dumps(values))
    for ids in ({}, {"wandb": "1a2b"}):
        trackers = open_trackers(config, tmp_path, 0, ids, True, pytest.fail)
        assert trackers.ids == {"wandb": "1a2b" if ids else "new"}
    assert [one["id"] for one in given] == [None, "1a2b"]
    assert (given[0]["name"], given[0]["tags"], given[0]["project"]) == ("answers", ["first"], "adapters")
    assert given[0]["config"]["training"]["train_steps"] == 1
