"""Random operations: each keeps size and mode, does nothing at strength 0 where it has one, and is drawn as by timm."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pictures

from megatron_tf.config.sections.data import RandAugment
from megatron_tf.data.images import rand_augment
from megatron_tf.data.images.rand_augment import OPERATIONS, mirrored, rand_augmented

NOISE = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.uint8)
IMAGES = {"RGB": Pictures.fromarray(NOISE), "L": Pictures.fromarray(NOISE[..., 0])}
FIXED = {"_auto_contrast", "_equalize", "_invert", "_solarize", "_posterize"}
FILL = (10, 20, 30)


def same(one: Pictures.Image, other: Pictures.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("mode", IMAGES)
def test_operations(operation, mode):
    image = IMAGES[mode]
    for strength in (0.0, 0.5, 1.0):
        for sign in (1, -1):
            found = operation(image, strength, sign, FILL[: len(image.getbands())])
            assert (found.size, found.mode) == (image.size, mode)
            if not strength and operation.__name__ not in FIXED:
                assert same(found, image)


def test_what_comes_in_has_the_colour_that_is_asked_for():
    moved = rand_augment._translate_x(IMAGES["RGB"], 1, 1, FILL)
    assert np.asarray(moved)[5, -1].tolist() == list(FILL)
    assert np.asarray(moved)[5, 0].tolist() == pytest.approx(NOISE[5, 7].tolist(), abs=60)


def test_numbers_of_timm():
    assert rand_augment._factor(1, -1) == pytest.approx(0.1) and rand_augment._factor(0.9, 1) == pytest.approx(1.81)
    level = Pictures.fromarray(np.array([[0, 100, 127, 128, 250]], np.uint8))
    assert np.asarray(rand_augment._solarize_add(level, 0.9, 1, (0,))).tolist() == [[99, 199, 226, 128, 250]]
    assert np.asarray(rand_augment._solarize(level, 0.9, 1, (0,))).tolist() == [[0, 155, 128, 127, 5]]
    assert np.asarray(rand_augment._posterize(level, 0.5, 1, (0,))).tolist() == [[0, 64, 64, 128, 192]]


def test_half_of_the_operations_are_done(monkeypatch):
    done: list[float] = []

    def operation(image, strength, sign, fill):
        done.append(sign * strength)
        return image

    monkeypatch.setattr(rand_augment, "OPERATIONS", (operation,) * 15)
    random = np.random.default_rng(0)
    for _ in range(1000):
        rand_augmented(random, IMAGES["L"], RandAugment(), (0,))
    assert 900 < len(done) < 1100
    assert np.mean(np.abs(done)) == pytest.approx(0.9, abs=0.01) and np.std(np.abs(done)) == pytest.approx(
        0.05, abs=0.01
    )
    assert 0.4 < np.mean(np.array(done) > 0) < 0.6


def test_mirrored():
    assert np.array_equal(np.asarray(mirrored(IMAGES["RGB"])), NOISE[:, ::-1])
