"""Changes to images: what each does, and that all are functions of seed and sample."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from images import MIXING, image_config
from PIL import Image as Pictures

from megatron_tf.config.sections.data import Augmentation
from megatron_tf.data.images.augment import augmented, finished, random_box, seen, shifted, targets_of
from megatron_tf.tasks.image_classification.section import Image, image_of

GREY = Image(size=6, patch=3, channels=1, classes=5, crop=1)


def picture(width: int = 6, height: int = 6) -> Pictures.Image:
    return Pictures.fromarray(np.arange(width * height, dtype=np.uint8).reshape(height, width))


def pixels_of(picture: Pictures.Image) -> np.ndarray:
    return np.asarray(picture)[None]


def test_an_image_of_the_right_size_is_seen_as_it_is():
    assert (seen(picture(), GREY) == pixels_of(picture())).all()


def test_the_square_in_the_middle_is_seen():
    wide = np.zeros((6, 12), np.uint8)
    wide[:, 3:9] = 200
    assert (seen(Pictures.fromarray(wide), GREY) == 200).all()
    half = seen(Pictures.fromarray(np.pad(np.full((6, 6), 90, np.uint8), 3)), GREY.model_copy(update={"crop": 0.5}))
    assert (half == 90).all()


def test_images_smaller_than_the_crop_are_made_larger():
    plain = Pictures.fromarray(np.full((2, 3), 90, np.uint8))
    settings = Augmentation(crop_scale=(0.5, 1.0), flip=0.5)
    for found in (seen(plain, GREY), augmented(plain, GREY, settings, 0, 3)):
        assert found.shape == (1, 6, 6) and (found == 90).all()


def test_grey_becomes_three_channels():
    colour = seen(picture(), Image(size=6, patch=3, classes=5, crop=1))
    assert colour.shape == (3, 6, 6) and (colour == pixels_of(picture())).all()


@pytest.mark.parametrize("down, right", [(0, 0), (2, -1), (-3, 3), (9, 0)])
def test_a_shift_brings_black_in(down, right):
    pixels = pixels_of(picture()) + np.uint8(1)
    moved = shifted(pixels, down, right)
    for row in range(6):
        for column in range(6):
            inside = 0 <= row - down < 6 and 0 <= column - right < 6
            assert moved[0, row, column] == (pixels[0, row - down, column - right] if inside else 0)


def test_a_flip_mirrors():
    found = augmented(picture(), GREY, Augmentation(flip=1), 7, 0)
    assert (found == pixels_of(picture())[:, :, ::-1]).all()


def test_erasing_leaves_the_rest():
    found = [
        augmented(picture(), GREY, Augmentation(erasing=1), 7, sample) != pixels_of(picture()) for sample in range(50)
    ]
    assert all(1 <= erased.sum() <= 18 for erased in found)


def test_crops_are_within_their_bounds():
    random = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_box(random, (60, 40), (0.2, 0.9), (0.75, 4 / 3))
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
        assert 0.18 < (right - left) * (bottom - top) / 2400 < 0.92 and 0.7 < (right - left) / (bottom - top) < 1.4
    assert random_box(random, (100, 1), (1, 1), (0.75, 4 / 3)) == (49, 0, 50, 1)


def test_targets_are_smoothed_and_padding_has_none():
    assert targets_of(np.array([2, -1]), 5, 0.1).tolist() == [pytest.approx([0.02, 0.02, 0.92, 0.02, 0.02]), [0] * 5]


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_pairs_are_mixed_by_what_their_targets_say(settings):
    config = image_config({"channels": 1}, data={"augmentation": settings})
    images = np.stack([np.full((1, 6, 6), value, np.uint8) for value in (0, 200) * 10])
    mixed, targets = finished(images, np.array([0, 1] * 10), range(20), config)
    for row in range(20):
        assert mixed[row].mean() == pytest.approx(200 * targets[row, 1], abs=0.6)
        assert targets[row, :2].sum() == pytest.approx(1)
    assert len({float(share) for share in targets[:, 0]}) > 5 and set(np.unique(images)) == {0, 200}


def digest(samples: range, seed: int = 7) -> list[str]:
    config = image_config(
        {"channels": 1},
        run={"seed": seed},
        data={"augmentation": MIXING | {"crop_scale": (0.3, 1.0), "rand_augment": {}}},
    )
    image, settings = image_of(config.model), config.data.augmentation
    images = np.stack([augmented(picture(9, 8), image, settings, config.run.seed, sample) for sample in samples])
    found = finished(images, np.array([sample % 5 for sample in samples]), samples, config)
    return [hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest() for a, b in zip(*found)]


def test_everything_is_a_function_of_seed_and_sample():
    whole = digest(range(4, 16))
    assert whole == [one for first in range(4, 16, 2) for one in digest(range(first, first + 2))]
    assert len(set(whole)) == 12 and not set(whole) & set(digest(range(4, 16), seed=8))
