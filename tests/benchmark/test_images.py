from __future__ import annotations

import pytest
import torch
from images import image_config

from megatron_tf.benchmark import images
from megatron_tf.benchmark.images import LOADED, InMemory, rows
from megatron_tf.costs.estimate import num_parameters


def config():
    augmentation = {"crop_scale": (0.3, 1.0), "flip": 0.5}
    return image_config({"size": 12}, data={"augmentation": augmentation})


def test_steps_and_the_loader_are_set_against_each_other(monkeypatch):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    found = list(rows(config(), torch.device("cpu"), 1, 2, 2, rounds=1))
    assert [row["measured"] for row in found] == [
        "step of TokenFormer, 1 layers", "step of Transformer, 1 layers", "images read by one thread",
        "images from the loader, 2 threads",
    ]  # fmt: skip
    assert all(row["images/s"] > 0 and row.keys() == found[0].keys() for row in found)
    ours, theirs = (row["parameters"] for row in found[:2])
    assert ours == num_parameters(config().model.model_copy(update={"num_layers": 1}))
    assert theirs == pytest.approx(ours, rel=0.1) and found[1]["× Transformer"] == 1
    assert found[3]["× threads × one"] > 0


def test_timm_is_measured_where_it_is(monkeypatch):
    asked = {}

    def made(**sizes):
        asked.update(sizes)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 5))

    monkeypatch.setattr(images, "find_spec", lambda name: name)
    monkeypatch.setattr(images, "_timm_model", made)
    found = list(images._step_rows(config(), torch.device("cpu"), 2, 2, rounds=1))
    assert found[2]["measured"] == "step of timm, 2 layers" and found[0]["× timm"] > 0
    assert (asked["img_size"], asked["patch_size"], asked["depth"], asked["global_pool"]) == (12, 3, 2, "avg")


def test_images_in_memory_are_files():
    files = InMemory([images._file(number, 3) for number in range(7)], 5)
    assert len(files) == 7 and files.read(6) == (1, files.read(6)[1]) and files.read(0)[1][:2] == b"\xff\xd8"
    assert LOADED > 7
