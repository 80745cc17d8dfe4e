"""Small runs on images, and prepared images to run them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny import run_config

from megatron_tf.config.schema import RunConfig
from megatron_tf.data.images.decode import png
from megatron_tf.data.images.source import LABEL
from megatron_tf.data.images.summary import ImageSummary, write_image_summary
from megatron_tf.data.indexed import HEADER, MAGIC, data_file, index_file
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.state.parameters import initial_scales

MIXING = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "flip": 0.5, "shift": 1}


def image_config(image: dict | None = None, model: dict | None = None, **changes) -> RunConfig:
    """Sizes that divide by nothing: 2 × 2 patches of 27 pixels, 5 classes."""
    image = {"size": 6, "patch": 3, "channels": 3, "classes": 5, "pooling": "mean", **(image or {})}
    keys = {"task": "image_classification", "vocab_size": None, "seq_length": None, "image": image, **(model or {})}
    return run_config(model=keys, **changes)


def write_images(prefix: Path, images: list[np.ndarray], labels: list[int], classes: tuple[str, ...]) -> str:
    """Prepared files of uint8 [h, w] images."""
    return write_contents(prefix, [png(image) for image in images], labels, classes)


def write_contents(prefix: Path, contents: list[bytes], labels: list[int], classes: tuple[str, ...]) -> str:
    """Prepared files of the bytes of image files."""
    documents = [LABEL.pack(label) + content for label, content in zip(labels, contents)]
    data_file(prefix).parent.mkdir(parents=True, exist_ok=True)
    data_file(prefix).write_bytes(b"".join(documents))
    sizes = np.array([len(document) for document in documents], "<i4")
    starts = np.append(0, np.cumsum(sizes[:-1])).astype("<i8")[: len(sizes)]
    header = HEADER.pack(MAGIC, 1, 1, len(sizes), len(sizes) + 1)
    entries = np.arange(len(sizes) + 1, dtype="<i8")
    index_file(prefix).write_bytes(header + sizes.tobytes() + starts.tobytes() + entries.tobytes())
    write_image_summary(prefix, ImageSummary(len(sizes), int(sizes.sum()), classes, ("made up",), 0))
    return str(prefix)


def made_up(count: int, size: int = 6, classes: int = 5) -> tuple[list[np.ndarray], list[int]]:
    """Noise whose brightness tells the class."""
    random = np.random.default_rng(0)
    labels = [number % classes for number in range(count)]
    images = [
        random.normal(64 + 128 * label / classes, 30, (size, size)).clip(0, 255).astype(np.uint8) for label in labels
    ]
    return images, labels


def odd_classifier(image: dict, model: dict) -> TokenFormer:
    """Weights far above an initialiser's, and scales that do not follow from the numbers of tokens."""
    config = image_config(image, model).model
    network = TokenFormer(config, {name: 0.9 * scale for name, scale in initial_scales(config).items()})
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(weights)
    return network.eval()
