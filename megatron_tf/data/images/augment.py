"""From an image to the model's input, with random changes in training that are functions of (seed, sample).

Each image is changed in this order: crop, flip, random operations, shift, erasing. Then pairs are mixed, sample 2i with
sample 2i + 1 of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import Augmentation
from megatron_tf.data.images.decode import in_channels
from megatron_tf.data.images.rand_augment import mirrored, rand_augmented
from megatron_tf.data.samples import derived_seed
from megatron_tf.tasks.image_classification.section import Image, image_of

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# the purpose that a seed is derived for: changes to one image, and to a pair
_ALONE, _PAIR = 1, 2
_CROP_TRIES = 10
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def seen(picture: Picture, image: Image) -> np.ndarray:
    """The square in the middle, uint8 [c, size, size], without random changes: for evaluation."""
    return _channels_first(_centre(picture, image))


def augmented(picture: Picture, image: Image, settings: Augmentation, seed: int, sample: int) -> np.ndarray:
    """The picture with the random changes of training sample `sample`, uint8 [c, size, size]."""
    random = np.random.default_rng(derived_seed(seed, _ALONE, sample))
    if settings.crop_scale is None:
        square = _centre(picture, image)
    else:
        box = random_box(random, picture.size, settings.crop_scale, settings.crop_ratio)
        square = _resized(in_channels(picture, image.channels), (image.size, image.size), box)
    if random.random() < settings.flip:
        square = mirrored(square)
    if settings.rand_augment is not None:
        fill = tuple(round(255 * mean) for mean in image.mean)
        square = rand_augmented(random, square, settings.rand_augment, fill)
    pixels = _channels_first(square)
    if settings.shift:
        pixels = shifted(pixels, *random.integers(-settings.shift, settings.shift + 1, 2).tolist())
    if random.random() < settings.erasing:
        pixels = _erased(random, pixels, image)
    return pixels


def finished(
    images: np.ndarray, labels: np.ndarray, samples: Sequence[int], config: RunConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(images with mixed pairs, uint8 [b, c, h, w]; targets fp32 [b, C]) from images and labels [b] of `samples`.

    With mixing, `samples` must be whole pairs.
    """
    settings, classes = config.data.augmentation, image_of(config.model).classes
    targets = targets_of(labels, classes, config.training.label_smoothing)
    if settings.mixup or settings.cutmix:
        images = images.copy()
        for row in range(0, len(images), 2):
            pair = slice(row, row + 2)
            random = np.random.default_rng(derived_seed(config.run.seed, _PAIR, samples[row] // 2))
            images[pair], share = _mixed(random, images[pair], settings)
            targets[pair] = share * targets[pair] + (1 - share) * targets[pair][::-1]
    return images, targets


def targets_of(labels: np.ndarray, classes: int, smoothing: float = 0.0) -> np.ndarray:
    """Targets fp32 [b, C]: 1 − smoothing for the label, plus smoothing / C for every class. 0 for a label below 0."""
    targets = np.full((len(labels), classes), smoothing / classes, np.float32)
    targets[np.arange(len(labels)), labels] += np.float32(1 - smoothing)
    targets[labels < 0] = 0
    return targets


def random_box(
    random: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of a random crop of an image of `size` (width, height).

    Its share of the area is within `scale`, and its width over height within `ratio`. When ten tries do not fit: the
    largest crop in the middle with such a ratio.
    """
    width, height = size
    for _ in range(_CROP_TRIES):
        area = random.uniform(*scale) * width * height
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """The pixels [c, h, w] moved by `down` and `right`; uncovered pixels are 0."""
    height, width = pixels.shape[1:]
    down, right = max(-height, min(height, down)), max(-width, min(width, right))
    moved = np.zeros_like(pixels)
    moved[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = pixels[
        :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)
    ]
    return moved


def _centre(picture: Picture, image: Image) -> Picture:
    """The middle of the picture, its shorter side resized to size / crop: as timm and torchvision do it, to the bit."""
    picture = in_channels(picture, image.channels)
    shorter = math.floor(image.size / image.crop)
    width, height = picture.size
    longer = int(shorter * max(width, height) / min(width, height))
    resized = _resized(picture, (shorter, longer) if width <= height else (longer, shorter))
    left, top = (round((side - image.size) / 2) for side in resized.size)
    return resized.crop((left, top, left + image.size, top + image.size))


def _resized(picture: Picture, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Picture:
    """The part of the picture in `box` (None: all of it) resized to `size` (width, height)."""
    if picture.size == size and box in (None, (0, 0, *size)):
        return picture
    from PIL.Image import Resampling

    return picture.resize(size, Resampling.BICUBIC, box=box)


def _channels_first(square: Picture) -> np.ndarray:
    pixels = np.asarray(square)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _erased(random: np.random.Generator, pixels: np.ndarray, image: Image) -> np.ndarray:
    """A copy with a random rectangle of noise, which is standard normal once the pixels are normalised."""
    height, width = pixels.shape[1:]
    left, top, right, bottom = random_box(random, (width, height), _ERASED_AREA, _ERASED_RATIO)
    mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (image.mean, image.std))
    noise = random.standard_normal((len(pixels), bottom - top, right - left), np.float32)
    pixels = pixels.copy()
    pixels[:, top:bottom, left:right] = _levels(255 * (noise * std + mean))
    return pixels


def _mixed(random: np.random.Generator, pair: np.ndarray, settings: Augmentation) -> tuple[np.ndarray, np.float32]:
    """(pair uint8 [2, c, h, w], mixed or with a rectangle exchanged; the share that each keeps of its own image)."""
    cuts = bool(settings.cutmix) and (not settings.mixup or random.random() < 0.5)
    alpha = settings.cutmix if cuts else settings.mixup
    share = np.float32(random.beta(alpha, alpha))
    if not cuts:
        own = pair.astype(np.float32)
        return _levels(share * own + (1 - share) * own[::-1]), share
    height, width = pair.shape[2:]
    h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
    middle, across = int(random.integers(height)), int(random.integers(width))
    rows = slice(max(0, middle - h // 2), min(height, middle - h // 2 + h))
    columns = slice(max(0, across - w // 2), min(width, across - w // 2 + w))
    cut = pair.copy()
    cut[:, :, rows, columns] = pair[::-1, :, rows, columns]
    exchanged = (rows.stop - rows.start) * (columns.stop - columns.start)
    return cut, np.float32(1 - exchanged / (height * width))


def _levels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
