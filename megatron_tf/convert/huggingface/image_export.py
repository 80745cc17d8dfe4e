"""Exports a trained image classifier as a folder that transformers and timm load: weights, configurations, own code.

| file | content |
|---|---|
| model.safetensors | fp32 weights under their Hugging Face names; matrices as linear layers have them |
| config.json | architecture, τ of every projection, names of the classes, and the versions that it was verified with |
| preprocessor_config.json | size, crop, mean and deviation: how an evaluation sees an image |
| configuration_, modeling_, image_processing_, network_tokenformer_image.py, pattention_tokenformer.py | the code |
| tokenformer_timm.py | registers the model with timm; import it before timm makes the model |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_tf.caches import prepare_hugging_face
from megatron_tf.convert.agreement import Agreement
from megatron_tf.convert.huggingface.choices import Choices
from megatron_tf.convert.huggingface.export import CONFIG_NAME, new_folder, write_code, write_json, write_weights
from megatron_tf.convert.huggingface.image_configuration import IMAGE_CODE, image_config, processor_config
from megatron_tf.convert.huggingface.verify import (
    compare_logits,
    load_exported,
    load_processor,
    transformers_errors,
    verifying_versions,
)
from megatron_tf.data.images.augment import seen
from megatron_tf.data.images.decode import opened, png
from megatron_tf.errors import CheckpointError
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tasks.image_classification.layers import normalised
from megatron_tf.tasks.image_classification.section import Image, image_of

PROCESSOR_NAME = "preprocessor_config.json"


def write_image_export(path: Path, network: TokenFormer, classes: Sequence[str]) -> dict[str, Agreement]:
    """Write `network`, load the result as a user would, and compare; returns the agreement by kind of sample.

    `classes`: their names, in the order of the logits. Raises CheckpointError, also when transformers prepares an image
    or computes logits differently from an evaluation of `network`, and UserError without transformers or Pillow. After
    an error nothing is left behind.
    """
    versions = verifying_versions()
    with new_folder(path, network) as folder:
        config = image_config(network.config, network.scales, classes)
        write_json(folder / CONFIG_NAME, {**config, "verified_with": versions})
        write_json(folder / PROCESSOR_NAME, processor_config(network.config))
        write_code(folder, IMAGE_CODE, versions, "compare the logits of some images")
        write_weights(folder, network)
        return _verify(folder, network)


@torch.no_grad()
def _verify(folder: Path, network: TokenFormer) -> dict[str, Agreement]:
    prepare_hugging_face()
    image = image_of(network.config)
    pictures = [opened(png(pixels)) for pixels in _noise(image)]
    expected = normalised(torch.from_numpy(np.stack([seen(picture, image) for picture in pictures])), image)
    processor = load_processor(folder)
    with transformers_errors("pictures"):
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    if not torch.equal(pixels, expected):
        raise CheckpointError(
            "the exported image processor gives other pixels than an evaluation sees. Nothing was written. Please "
            "report this, with the versions of torch, transformers and Pillow"
        )
    exported = load_exported(folder, "AutoModelForImageClassification")
    return {"images": compare_logits("images", exported, Choices(exported), network, {"pixel_values": pixels})}


def _noise(image: Image) -> list[np.ndarray]:
    """Random pictures, uint8 [h, w] or [h, w, 3]: wide, high, smaller than the model's square input, of its size."""
    random = np.random.default_rng(0)
    size, colours = image.size, () if image.channels == 1 else (3,)
    shapes = ((size + 5, 2 * size + 9), (3 * size, size + 2), (size // 2 + 1, size // 2 + 2), (size, size))
    return [random.integers(0, 256, (*shape, *colours), np.uint8) for shape in shapes]
