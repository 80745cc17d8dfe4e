"""Decodes and encodes image files with Pillow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from megatron_tf.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 1 << 27  # of one image: 134 million
_ORIENTATION = 0x0112  # the EXIF tag


class BadImage(Exception):
    """Bytes that cannot be decoded as an image; the message is a phrase without the file's name."""


def opened(content: bytes) -> Image:
    """The image, whose format is recognised by content, and whose pixels are not read yet.

    Raises UserError without Pillow; BadImage for bytes of no known format, and for too many pixels or none.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise UserError("Pillow is missing, which reads images. pip install 'megatron_tf[images]' brings it.") from None
    if not content:
        raise BadImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(content))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(_reason(error)) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise BadImage(f"{width} × {height} pixels are more than {MOST_PIXELS:,}")
    if not width * height:
        raise BadImage(f"{width} × {height} pixels")
    return image


def is_grey(image: Image) -> bool:
    """Whether the image has no colours, in 1, 8, 16 or 32 bits, with or without transparency."""
    return image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")


def in_channels(image: Image, channels: int) -> Image:
    """The image in mode L (1 channel) or RGB (3); BadImage when it is truncated, or is coloured and `channels` is 1.

    Transparency is dropped, as timm and torchvision drop it. 16 bits of grey are scaled to 8.
    """
    try:
        if image.mode.startswith("I;16") or image.mode == "I":
            image = _in_8_bits(image)
        if channels == 3:
            return image.convert("RGB")
        if not is_grey(image):
            raise BadImage(f"mode {image.mode} has colours, but model.image.channels is 1")
        return image.convert("L")
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage(_reason(error)) from None


def upright(image: Image) -> Image | None:
    """The image turned as its EXIF orientation says; None when it is upright already. BadImage for damaged data."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage(_reason(error)) from None


def encoded(image: Image) -> bytes:
    """The image as a file: JPEG of quality 95 if its mode is RGB or CMYK, else PNG (lossless)."""
    content = io.BytesIO()
    if image.mode in ("RGB", "CMYK"):
        image.save(content, "JPEG", quality=95, subsampling=0)
    else:
        image.save(content, "PNG")
    return content.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Grey pixels uint8 [h, w] as a PNG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _in_8_bits(image: Image) -> Image:
    from PIL import Image as images

    pixels = np.asarray(image).astype(np.int64)
    return images.fromarray((pixels.clip(0, 65535) // 257).astype(np.uint8))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace(" <_io.BytesIO object", "").split(" at 0x")[0]
    return text.rstrip(".") or type(error).__name__
