"""RandAugment (Cubuk et al., 2019) as timm's rand-mM-mstdS-inc1: each chosen operation is done with probability 1/2.

Most operations grow stronger with the magnitude. Random numbers come from a generator of the sample's own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_tf.config.sections.data import RandAugment

if TYPE_CHECKING:
    from PIL.Image import Image

STRONGEST = 10.0
_PROBABILITY = 0.5
# at the strongest: degrees, slope, share of the side, change of the factor, grey levels
_DEGREES, _SHEAR, _TRANSLATION, _ENHANCEMENT, _ADDED = 30.0, 0.3, 0.45, 0.9, 110
_WEAKEST_FACTOR = 0.1  # of an enhancement: 0 would be black
_MIDDLE = 128

Fill = tuple[int, ...]
# (image, strength in [0, 1], sign, fill) -> image
Operation = Callable[["Image", float, int, Fill], "Image"]


def rand_augmented(random: np.random.Generator, image: Image, settings: RandAugment, fill: Fill) -> Image:
    """The image (mode L or RGB) with random operations. `fill`: colour of uncovered areas, one number per channel."""
    for operation in random.integers(len(OPERATIONS), size=settings.operations).tolist():
        does, sign = random.random() < _PROBABILITY, 1 if random.random() < 0.5 else -1
        magnitude = settings.magnitude + settings.deviation * random.standard_normal()
        if does:
            strength = min(max(magnitude, 0.0), STRONGEST) / STRONGEST
            image = OPERATIONS[operation](image, strength, sign, fill)
    return image


def mirrored(image: Image) -> Image:
    return image.transpose(_pillow("Image").Transpose.FLIP_LEFT_RIGHT)


def _pillow(module: str) -> Any:
    # optional package: imported only when images are used
    return import_module(f"PIL.{module}")


def _affine(image: Image, matrix: tuple[float, ...], fill: Fill) -> Image:
    pillow = _pillow("Image")
    return image.transform(
        image.size, pillow.Transform.AFFINE, matrix, pillow.Resampling.BICUBIC, fillcolor=_colour(image, fill)
    )


def _colour(image: Image, fill: Fill) -> int | Fill:
    return fill[0] if image.mode == "L" else fill


def _rotate(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    bicubic = _pillow("Image").Resampling.BICUBIC
    return image.rotate(sign * strength * _DEGREES, bicubic, fillcolor=_colour(image, fill))


def _shear_x(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _affine(image, (1, sign * strength * _SHEAR, 0, 0, 1, 0), fill)


def _shear_y(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _affine(image, (1, 0, 0, sign * strength * _SHEAR, 1, 0), fill)


def _translate_x(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _affine(image, (1, 0, sign * strength * _TRANSLATION * image.size[0], 0, 1, 0), fill)


def _translate_y(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * strength * _TRANSLATION * image.size[1]), fill)


def _auto_contrast(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageOps").autocontrast(image)


def _equalize(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageOps").equalize(image)


def _invert(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageOps").invert(image)


def _posterize(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageOps").posterize(image, 4 - int(4 * strength)) if strength < 1 else image.point(lambda level: 0)


def _solarize(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageOps").solarize(image, 256 - min(256, int(256 * strength)))


def _solarize_add(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    added = min(_MIDDLE, int(strength * _ADDED))
    table = [min(255, level + added) if level < _MIDDLE else level for level in range(256)]
    return image.point(table * len(image.getbands()))


def _factor(strength: float, sign: int) -> float:
    return max(_WEAKEST_FACTOR, 1 + sign * strength * _ENHANCEMENT)


def _color(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageEnhance").Color(image).enhance(_factor(strength, sign))


def _contrast(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageEnhance").Contrast(image).enhance(_factor(strength, sign))


def _brightness(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageEnhance").Brightness(image).enhance(_factor(strength, sign))


def _sharpness(image: Image, strength: float, sign: int, fill: Fill) -> Image:
    return _pillow("ImageEnhance").Sharpness(image).enhance(_factor(strength, sign))


OPERATIONS: tuple[Operation, ...] = (
    _auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _solarize_add, _color, _contrast, _brightness,
    _sharpness, _shear_x, _shear_y, _translate_x, _translate_y,
)  # fmt: skip
