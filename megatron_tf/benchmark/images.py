"""Training of a classifier of images: a step against vision transformers of its size, and how fast images are read.

Steps are forward, backward and AdamW on one batch, fp32, in torch alone. They compare the TokenFormer, the Transformer
with as many parameters, and, if timm is installed, its VisionTransformer of the Transformer's sizes. The loader's rate
is that of its threads together, compared with that of one thread times their number. Images are JPEG files of coloured
squares in memory, 500 × 375. Threads need cores of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.benchmark.models import equal_transformer
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import interleaved
from megatron_tf.config.schema import RunConfig
from megatron_tf.data.images.augment import augmented
from megatron_tf.data.images.decode import encoded, opened, png
from megatron_tf.data.images.loader import ImageLoader
from megatron_tf.data.images.source import ImageFiles
from megatron_tf.model import build_model
from megatron_tf.tasks.image_classification.section import image_of

LOADED = 32  # images that the loader is timed with
_HEIGHT, _WIDTH, _SQUARE = 375, 500, 5
_OURS, _TRANSFORMER, _TIMM = "TokenFormer", "Transformer", "timm"


class TrainingStep:
    """One optimizer step of `model` on noise."""

    def __init__(self, model: nn.Module, images: Tensor, targets: Tensor):
        self._model, self._images, self._targets = model.to(images.device), images, targets
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.3)

    def __call__(self) -> None:
        F.cross_entropy(self._model(self._images), self._targets).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class InMemory(ImageFiles):
    """Images that are files already, each of a class of its own as far as there are classes."""

    def __init__(self, contents: Sequence[bytes], classes: int):
        self.prefix = "memory"
        self._contents, self._classes = contents, classes

    def __len__(self) -> int:
        return len(self._contents)

    def read(self, number: int) -> tuple[int, bytes]:
        return number % self._classes, self._contents[number]


def rows(
    config: RunConfig, device: torch.device, layers: int, samples: int, workers: int, rounds: int
) -> Iterator[Row]:
    """A row for each step, then one for reading by one thread and one for the loader. `config` is of a TokenFormer that
    classifies images; its model is cut to `layers` layers."""
    yield from _step_rows(config, device, layers, samples, rounds)
    yield from _loader_rows(config, workers, rounds)


def _step_rows(config: RunConfig, device: torch.device, layers: int, samples: int, rounds: int) -> Iterator[Row]:
    image = image_of(config.model)
    model = config.model.model_copy(update={"num_layers": min(layers, config.model.num_layers)})
    transformer = equal_transformer(model)
    models: dict[str, nn.Module] = {_OURS: build_model(model), _TRANSFORMER: build_model(transformer)}
    if find_spec("timm") is not None:
        models[_TIMM] = _timm_model(
            img_size=image.size,
            patch_size=image.patch,
            in_chans=image.channels,
            num_classes=image.classes,
            global_pool="avg" if image.pooling == "mean" else "token",
            class_token=image.pooling != "mean",
            embed_dim=transformer.hidden_size,
            depth=transformer.num_layers,
            num_heads=transformer.num_attention_heads,
            mlp_ratio=transformer.ffn_hidden_size / transformer.hidden_size,
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, image.channels, image.size, image.size, generator=generator).to(device)
    targets = torch.rand(samples, image.classes, generator=generator).softmax(1).to(device)
    steps = {name: TrainingStep(made, images, targets) for name, made in models.items()}
    timings = interleaved(steps, device, rounds)
    for name, made in models.items():
        yield {
            "measured": f"step of {name}, {model.num_layers} layers",
            "parameters": sum(parameter.numel() for parameter in made.parameters()),
            "images/s": samples / timings[name].median,
            **{f"× {other}": timings[name].speed_against(timings[other]) for other in models if other != _OURS},
            "× threads × one": "",
        }


def _timm_model(**sizes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**sizes)


def _loader_rows(config: RunConfig, workers: int, rounds: int) -> Iterator[Row]:
    image = image_of(config.model)
    contents = [_file(number, image.channels) for number in range(LOADED)]
    data = config.data.model_copy(update={"workers": workers})
    loader = ImageLoader(
        [InMemory(contents, image.classes)],
        [1.0],
        config.model_copy(update={"data": data}),
        training=True,
        micro_batch_size=LOADED,
        num_micro_batches=1,
    )

    def one_thread() -> None:
        for sample, content in enumerate(contents):
            augmented(opened(content), image, config.data.augmentation, config.run.seed, sample)

    calls = {"one": one_thread, "loader": lambda: list(loader.step_batches(0))}
    timings = interleaved(calls, torch.device("cpu"), rounds)
    empty = partial(dict.fromkeys, [f"× {name}" for name in (_TRANSFORMER, *([_TIMM] if find_spec("timm") else []))])
    yield {
        "measured": "images read by one thread",
        "parameters": "",
        "images/s": LOADED / timings["one"].median,
        **empty(""),
        "× threads × one": "",
    }
    yield {
        "measured": f"images from the loader, {workers} {'thread' if workers == 1 else 'threads'}",
        "parameters": "",
        "images/s": LOADED / timings["loader"].median,
        **empty(""),
        "× threads × one": timings["loader"].speed_against(timings["one"]) / workers,
    }


def _file(number: int, channels: int) -> bytes:
    """A JPEG, or of grey a PNG."""
    random = np.random.default_rng(number)
    colours = (3,) if channels == 3 else ()
    levels = random.integers(0, 256, (_HEIGHT // _SQUARE, _WIDTH // _SQUARE, *colours), np.uint8)
    return encoded(opened(png(levels.repeat(_SQUARE, 0).repeat(_SQUARE, 1))))
