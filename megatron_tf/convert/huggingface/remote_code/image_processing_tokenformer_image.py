"""Pictures into what the model has seen in its evaluation, to the last bit. Needs Pillow."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images


class TokenFormerImageProcessor(BaseImageProcessor):
    """The shorter side becomes size / crop by bicubic interpolation, the middle is cut out, and pixels are normalised.

    `image_mean`, `image_std`: a number a channel, 1 being white.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size=224, crop=0.875, channels=3, image_mean=(0.5,), image_std=(0.5,), **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.crop = crop
        self.channels = channels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        """`images`: one or a list, of Pillow's, uint8 arrays [height, width, channels], paths or addresses."""
        flat = make_flat_list_of_images(self.fetch_images(images))
        pixels = np.stack([self.normalised(self.square(as_picture(image))) for image in flat])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def square(self, picture: Image.Image) -> np.ndarray:
        """uint8 [channels, size, size]."""
        picture = in_channels(picture, self.channels)
        shorter = math.floor(self.size / self.crop)
        width, height = picture.size
        longer = int(shorter * max(width, height) / min(width, height))
        size = (shorter, longer) if width <= height else (longer, shorter)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in size)
        pixels = np.asarray(picture.crop((left, top, left + self.size, top + self.size)))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.image_mean, self.image_std))
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def as_picture(image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image is an array of {pixels.dtype}. Give a picture of Pillow, or uint8 pixels")
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def in_channels(picture: Image.Image, channels: int) -> Image.Image:
    """In modes L or RGB. Transparency is dropped, and 16 bits of grey are scaled to 8."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        levels = np.asarray(picture).astype(np.int64).clip(0, 65535) // 257
        picture = Image.fromarray(levels.astype(np.uint8))
    return picture.convert("RGB" if channels == 3 else "L")
