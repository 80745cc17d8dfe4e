"""Bytes to pixels: every mode that files have, and what is no image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as Pictures

from megatron_tf.data.images import decode
from megatron_tf.data.images.decode import BadImage, encoded, in_channels, opened, png, upright


def content(image: Pictures.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_three_channels(mode):
    image = Pictures.new("L", (5, 4), 255).convert("RGB").convert(mode) if mode == "CMYK" else None
    image = image or (
        Pictures.new("I;16", (5, 4), 65535) if mode == "I;16" else Pictures.new("L", (5, 4), 255).convert(mode)
    )
    found = in_channels(opened(content(image, "JPEG" if mode == "CMYK" else "PNG")), 3)
    assert (found.mode, found.size) == ("RGB", (5, 4)) and np.asarray(found).min() >= 254


def test_sixteen_bits_are_scaled_and_not_cut():
    image = Pictures.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(in_channels(opened(content(image)), 1)).tolist() == [[0, 100, 255]]


def test_colours_do_not_fit_into_one_channel():
    with pytest.raises(BadImage, match="mode RGB has colours, but model.image.channels is 1"):
        in_channels(opened(content(Pictures.new("RGB", (3, 3)))), 1)


def test_a_name_says_nothing_about_the_content():
    assert opened(content(Pictures.new("RGB", (3, 3)), "PNG")).format == "PNG"


@pytest.mark.parametrize("cut", [0, 5, 60])
def test_what_breaks_off_is_bad(cut):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    whole = content(Pictures.fromarray(noise), "JPEG")
    with pytest.raises(BadImage) as problem:
        in_channels(opened(whole[: len(whole) * cut // 100]), 3)
    assert "0x" not in str(problem.value) and str(problem.value)


def test_very_many_pixels_are_bad(monkeypatch):
    monkeypatch.setattr(decode, "MOST_PIXELS", 8)
    with pytest.raises(BadImage, match="3 × 3 pixels are more than 8"):
        opened(content(Pictures.new("L", (3, 3))))


def test_exif_turns_an_image():
    exif = Pictures.Exif()
    exif[0x0112] = 6
    turned = upright(opened(content(Pictures.new("RGB", (5, 3)), "JPEG", exif=exif)))
    assert turned is not None and turned.size == (3, 5)
    again = opened(encoded(turned))
    assert again.size == (3, 5) and upright(again) is None
    assert upright(opened(content(Pictures.new("RGB", (5, 3))))) is None


def test_pixels_come_back_from_png():
    pixels = np.random.default_rng(0).integers(0, 255, (7, 5)).astype(np.uint8)
    assert (np.asarray(in_channels(opened(png(pixels)), 1)) == pixels).all()
