"""The image classifier's implementation of `Task`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from megatron_tf.architectures.spec import INITIAL_STD, ParameterSpec
from megatron_tf.architectures.work import Collective, Collectives, Product, hidden_bytes, positions_of
from megatron_tf.config.nearest import either, multiples_near
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.tasks.base import EndsWork, Task
from megatron_tf.tasks.image_classification.section import MOST_POSITIONS, Image, ImageModel, image_of
from megatron_tf.telemetry.text import count_of

# logical name -> Hugging Face name, where the two differ
_HUGGING_FACE = {
    "patches.weight": "model.patches.proj.weight",
    "patches.bias": "model.patches.proj.bias",
    "patches.positions": "model.patches.positions",
    "patches.class_token": "model.patches.class_token",
}


class ImageClassification(Task):
    """Patches with learned positions, a class token or mean pooling, and a head with bias.

    The patch matrix is split over its inputs, the pixels of a patch in the order (channel, row, column). The head, with
    its bias, is split over its outputs, the classes. Everything else is replicated over the tensor ranks.
    """

    section = ImageModel
    layers = "megatron_tf.tasks.image_classification.layers:IMAGE_LAYERS"
    data = "megatron_tf.tasks.image_classification.data:IMAGE_DATA"
    evaluation = "megatron_tf.evaluation.images:IMAGE_EVALUATION"
    prepared_by = "tools/prepare_images.py"
    causal = False
    input_name, head_name = "patches", "head"
    unit = "images"
    metrics = ("top1", "top5")
    own_keys = ("data.augmentation", "data.workers", "training.label_smoothing")
    formats = frozenset({"huggingface"})
    why_not_elsewhere = "a classifier of images has model.image instead"

    def input_parameters(self, model: Model) -> Iterator[ParameterSpec]:
        image, width = image_of(model), model.hidden_size
        matrix = (image.pixels, width)
        yield _parameter(
            "patches.weight", matrix, "first", std=image.pixels**-0.5, sharded=True, decayed=True, transposed=True
        )
        yield _parameter("patches.bias", (width,), "first", std=0.0)
        yield _parameter("patches.positions", (image.positions, width), "first", std=INITIAL_STD)
        if image.pooling == "class_token":
            yield _parameter("patches.class_token", (width,), "first", std=INITIAL_STD)

    def head_parameters(self, model: Model) -> Iterator[ParameterSpec]:
        classes = image_of(model).classes
        matrix = (classes, model.hidden_size)
        yield _parameter("head.weight", matrix, "last", std=INITIAL_STD, sharded=True, decayed=True)
        yield _parameter("head.bias", (classes,), "last", std=0.0, sharded=True)

    def sharded_rows(self, model: Model) -> dict[str, int]:
        return {"model.image.classes": image_of(model).classes, "pixels of model.image.patch": image_of(model).pixels}

    def describe(self, model: Model) -> str:
        image = image_of(model)
        return f"{image.classes:,} classes of images of {image.size} in patches of {image.patch}"

    def losses_per_sample(self, model: Model) -> int:
        return 1

    def multiply_adds(self, model: Model) -> int:
        image = image_of(model)
        return model.hidden_size * (image.patches * image.pixels + image.classes)

    def work(self, config: RunConfig) -> EndsWork:
        image, width, samples = image_of(config.model), config.model.hidden_size, config.training.micro_batch_size
        tensor = config.parallel.tensor
        pixels, classes = -(-image.pixels // tensor), -(-image.classes // tensor)
        entry = Product(samples * image.patches, pixels, width)
        return EndsWork((entry,), (Product(samples, width, classes),), samples * classes)

    def collectives(self, config: RunConfig) -> tuple[tuple[Collectives, Collectives], tuple[Collectives, Collectives]]:
        samples, whole = config.training.micro_batch_size, hidden_bytes(config)
        # largest logit; then the sum of exponentials and of target times logit together
        loss = (Collective("all_reduce", 4 * samples), Collective("all_reduce", 8 * samples))
        if not config.parallel.sequence:
            reduced = (Collective("all_reduce", whole),)
            return (reduced, ()), (loss, reduced)
        # a rank has the gradients of its own positions only
        row, with_token = whole // positions_of(config), image_of(config.model).pooling == "class_token"
        offsets = (
            Collective("all_reduce", config.model.seq_length * row),
            Collective("all_reduce", row, 1 + with_token),
        )
        gather, scatter = (Collective("all_gather", whole),), (Collective("reduce_scatter", whole),)
        return (scatter, gather + offsets), (gather + loss, scatter)

    def problems(self, model: Model) -> Iterator[str]:
        image = image_of(model)
        if image.size % image.patch:
            yield (
                f"model.image.size: {image.size} is not a multiple of model.image.patch {image.patch}. Set it to "
                f"{either(multiples_near(image.size, image.patch))}."
            )
        elif image.positions > MOST_POSITIONS:
            most = math.isqrt(MOST_POSITIONS - 1) * image.patch
            yield (
                f"model.image.size: {_length(image)}, and a model has at most {MOST_POSITIONS:,}. Lower it to at most "
                f"{most:,}, or raise model.image.patch."
            )
        elif model.seq_length != image.positions:
            yield f"model.seq_length: {model.seq_length}, but {_length(image)}. Remove it."
        for name in ("mean", "std"):
            count = len(getattr(image, name))
            if count != image.channels:
                yield (
                    f"model.image.{name}: has {count_of(count, 'number')}, but model.image.channels is "
                    f"{image.channels}. Give one a channel, or remove it."
                )
        if model.rotary_fraction:
            yield (
                f"model.rotary_fraction: {model.rotary_fraction:g}, but the positions of an image are learned. Remove "
                "it."
            )

    def length(self, model: Model) -> str:
        return f"model.image.size: {_length(image_of(model))}, which is"

    def length_remedy(self, model: Model, multiple: int) -> str:
        image = image_of(model)
        if image.pooling == "class_token" and image.patches % multiple == 0:
            return f"Set model.image.pooling to mean, which leaves {image.patches} positions"
        return "Choose another model.image.size"

    def run_problems(self, config: RunConfig) -> Iterator[str]:
        augmentation, micro = config.data.augmentation, config.training.micro_batch_size
        if (augmentation.mixup or augmentation.cutmix) and micro % 2:
            yield (
                f"training.micro_batch_size: {micro} is odd, but mixup and cutmix mix pairs of neighbours. Set it to "
                "an even number, or remove data.augmentation.mixup and cutmix."
            )
        size = image_of(config.model).size
        if augmentation.shift >= size:
            yield (
                f"data.augmentation.shift: {augmentation.shift} pixels move images of model.image.size {size} out of "
                f"sight. Set it to at most {size - 1}; an eighth would be {size // 8}."
            )
        for name in ("crop_scale", "crop_ratio"):
            span = getattr(augmentation, name)
            if span is not None and not 0 < span[0] <= span[1]:
                yield (
                    f"data.augmentation.{name}: {list(span)} is no range. Give the least, above 0, and then the "
                    "largest."
                )

    def in_words(self, loss: float, metrics: Mapping[str, float]) -> str:
        shares = "  ".join(f"{name.replace('top', 'top-')} {100 * value:.2f} %" for name, value in metrics.items())
        return f"loss {loss:.4f}  {shares}"


def _parameter(
    name: str,
    shape: tuple[int, ...],
    end: Literal["first", "last"],
    *,
    std: float,
    sharded: bool = False,
    decayed: bool = False,
    transposed: bool = False,
) -> ParameterSpec:
    """A parameter of the first or last stage. Growth of tokens does not change it."""
    return ParameterSpec(
        name,
        shape,
        sharded,
        growable=False,
        decayed=decayed,
        std=std,
        mean=0.0,
        ends=(end,),
        huggingface_name=_HUGGING_FACE.get(name, name),
        transposed=transposed,
    )


def _length(image: Image) -> str:
    token = " and a class token" if image.pooling == "class_token" else ""
    return f"images of {image.size} in patches of {image.patch}{token} are {image.positions:,} positions"


IMAGE_CLASSIFICATION = ImageClassification()
