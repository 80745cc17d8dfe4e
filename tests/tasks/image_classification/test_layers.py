"""Patches, positions, pooling and head against the same model in plain PyTorch; every layout against one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from images import MIXING, image_config, made_up, write_images
from registered import check_layouts
from torch.nn import functional as F

from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.topology import Topology
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.roofline import step_time
from megatron_tf.errors import ArgumentError, UserError
from megatron_tf.inference.cache import CachedModel
from megatron_tf.model import build_model
from megatron_tf.tasks.image_classification.layers import IMAGE_LAYERS, normalised, patches
from megatron_tf.tasks.image_classification.section import image_of
from megatron_tf.verification.layout import Layout
from megatron_tf.verification.resume import Setting, check_resumes

MIXED = {"training": {"label_smoothing": 0.1, "drop_path": 0.4}, "data": {"augmentation": MIXING}}


@pytest.mark.parametrize("architecture", ["tokenformer", "transformer"])
@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_it_is_a_vision_transformer(architecture, pooling):
    """The patch embedding is a convolution, and what surrounds the blocks is the usual."""
    keys = {"architecture": architecture, **({"parameter_tokens": None} if architecture == "transformer" else {})}
    config = image_config({"pooling": pooling}, keys)
    model, image = build_model(config.model, dtype=torch.float64), image_of(config.model)
    assert num_parameters(config.model) == sum(p.numel() for p in model.parameters())
    images, _ = IMAGE_LAYERS.examples(config, range(3))
    weights = dict(model.named_parameters())
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (image.mean, image.std))
    pixels = ((images.float() / 255 - mean) / std).double()
    kernel = weights["patches.weight"].mT.view(-1, image.channels, image.patch, image.patch)
    hidden = F.conv2d(pixels, kernel, weights["patches.bias"], stride=image.patch).flatten(2).permute(2, 0, 1)
    if pooling == "class_token":
        hidden = torch.cat((weights["patches.class_token"].expand(1, 3, -1), hidden))
    hidden = hidden + weights["patches.positions"][:, None]
    for block in model.blocks:
        hidden = block(hidden)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], weights["final_norm.weight"], weights["final_norm.bias"], 1e-5)
    pooled = hidden[0] if pooling == "class_token" else hidden.mean(0)
    expected = F.linear(pooled, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)


def test_pixels_of_a_patch_are_in_the_order_of_a_convolution():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    found = patches(images, 2)
    assert found.shape == (4, 2, 12)
    assert found[1, 1].tolist() == images[1, :, 0:2, 2:4].flatten().tolist()
    assert found[2, 0].tolist() == images[0, :, 2:4, 0:2].flatten().tolist()


def test_floats_are_normalised_already():
    image = image_of(image_config().model)
    floats = torch.rand(1, 3, 6, 6)
    assert normalised(floats, image) is floats
    white = normalised(torch.full((1, 3, 6, 6), 255, dtype=torch.uint8), image)
    torch.testing.assert_close(white[0, :, 0, 0], (1 - torch.tensor(image.mean)) / torch.tensor(image.std))


def test_what_is_no_image_is_refused():
    model = build_model(image_config().model)
    with pytest.raises(ArgumentError, match=r"the shape is \[1, 3, 6, 7\], but images \[b, 3, 6, 6\] are expected"):
        model(torch.zeros(1, 3, 6, 7, dtype=torch.uint8))
    with pytest.raises(ArgumentError, match="the type is int64, but uint8 is expected"):
        model(torch.zeros(1, 3, 6, 6, dtype=torch.int64))
    with pytest.raises(UserError, match="model.task: image_classification, but generation needs a model of text"):
        CachedModel(model)


def test_metrics_count_the_samples_that_count():
    config = image_config({"classes": 7})
    targets = torch.eye(7)[[0, 1, 6, 3]]
    targets[3] = 0
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    from megatron_tf.parallel.groups import SINGLE

    found = IMAGE_LAYERS.metrics(config.model, logits, targets, SINGLE)
    assert found.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert IMAGE_LAYERS.counts(targets).tolist() == [1, 1, 1, 0]


def test_a_plan_knows_its_costs():
    config = image_config(parallel={"tensor": 2, "sequence": True})
    assert step_time(config, 2, find_gpu("H100"), Assumptions()).total > 0


def test_examples_are_functions_of_the_sample():
    config = image_config(**MIXED)
    whole, parts = (
        IMAGE_LAYERS.examples(config, range(4, 8)),
        [IMAGE_LAYERS.examples(config, range(n, n + 2)) for n in (4, 6)],
    )
    for own, pieces in zip(whole, zip(*parts)):
        assert torch.equal(own, torch.cat(pieces))
    np.testing.assert_allclose(whole[1].sum(1), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_every_layout_is_one_process(pooling):
    chosen = [Layout(Topology(2, 2, 1)), Layout(Topology(1, 2, 2))]
    if pooling == "mean":
        chosen += [Layout(Topology(2, 1, 1), True), Layout(Topology(2, 2, 1), True)]
    check_layouts(image_config({"pooling": pooling}, **MIXED), chosen)


@pytest.mark.slow
def test_the_vision_transformer_under_a_layout():
    assert "transformer" in ARCHITECTURES
    config = image_config(model={"architecture": "transformer", "parameter_tokens": None}, **MIXED)
    check_layouts(config, [Layout(Topology(2, 1, 2), True)])


@pytest.mark.slow
def test_it_resumes_at_another_layout(tmp_path: Path):
    images, labels = made_up(12)
    source = write_images(tmp_path / "train", images, labels, tuple("abcde"))
    config = image_config(**{**MIXED, "data": {**MIXED["data"], "train": ({"path": source},)}})
    first, second = Setting(Layout(Topology(2, 2, 1), True)), Setting(Layout(Topology(1, 1, 2)))
    (result,) = check_resumes(config, [(first, second)], 3)
    assert result.agrees(1e-5), result
