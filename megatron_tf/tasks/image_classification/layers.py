"""The layers of an image classifier: from images to hidden states, from those to classes; and its loss.

| tensor | local shape |
|---|---|
| images | [b, c, h, w] with h = w, uint8, or floats that are already normalised |
| patches | [p², b, c·patch²], p = h / patch |
| patch matrix | [c·patch²/T, d], pixels [start, stop) of a patch in the order (channel, row, column) |
| targets | [b, C], see `tasks.soft_targets` |
| logits | [b, C/T] |
| losses | [b] |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.data.images.augment import finished
from megatron_tf.data.samples import derived_seed
from megatron_tf.errors import ArgumentError
from megatron_tf.model.checks import check_device, shape_of, type_of
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.linear import linear
from megatron_tf.parallel.groups import Group
from megatron_tf.state.parameters import shard_range
from megatron_tf.tasks.image_classification.section import Image, image_of
from megatron_tf.tasks.layers import TaskLayers
from megatron_tf.tasks.soft_targets import rank_of_class, soft_cross_entropy


class PatchEmbedding(nn.Module):
    """A linear layer on patches, with learned positions. Each rank multiplies its own pixels of every patch.

    It is sharded as the embedding of a vocabulary is: by input rows, summed over the group.
    """

    def __init__(self, model: Model, tensor: TensorParallel):
        super().__init__()
        self.image = image = image_of(model)
        self.tensor = tensor
        self.start, self.stop = shard_range(image.pixels, tensor.group.size, tensor.group.rank)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.hidden_size))
        self.positions = nn.Parameter(torch.empty(image.positions, model.hidden_size))
        if image.pooling == "class_token":
            self.class_token = nn.Parameter(torch.empty(model.hidden_size))

    def forward(self, images: Tensor) -> Tensor:
        """images [b, c, h, w] -> hidden between layers; a class token is position 0."""
        own = patches(normalised(images, self.image), self.image.patch)[..., self.start : self.stop]
        partial = linear(own.to(self.weight.dtype), self.weight, transposed=True)
        if self.image.pooling == "class_token":
            partial = torch.cat((torch.zeros_like(partial[:1]), partial))
        hidden = self.tensor.leave(partial)
        first = self.tensor.group.rank * len(hidden) if self.tensor.sequence else 0
        return hidden + self._offsets()[first : first + len(hidden), None]

    def _offsets(self) -> Tensor:
        """The learned vectors [s, d] that are added at each position: position, bias, class token."""
        bias = self.tensor.replicated(self.bias).expand(self.image.patches, -1)
        if self.image.pooling == "class_token":
            bias = torch.cat((self.tensor.replicated(self.class_token)[None], bias))
        return self.tensor.replicated(self.positions) + bias


def normalised(images: Tensor, image: Image) -> Tensor:
    """uint8 [b, c, h, w] -> fp32, (pixel / 255 − mean) / std of each channel; floats as they are."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (torch.tensor(numbers, device=images.device)[:, None, None] for numbers in (image.mean, image.std))
    return (images.float() / 255 - mean) / std


def patches(images: Tensor, size: int) -> Tensor:
    """[b, c, h, w] -> [h/size · w/size, b, c·size²]: patches row by row, with pixels in the order (channel, row,
    column)."""
    cut = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return cut.permute(2, 4, 0, 1, 3, 5).flatten(3).flatten(0, 1)


class ClassHead(nn.Module):
    """Pooling and a linear layer with bias. Classes are split over the tensor group."""

    def __init__(self, model: Model, tensor: TensorParallel):
        super().__init__()
        image = image_of(model)
        self.tensor = tensor
        self.pooling = image.pooling
        start, stop = shard_range(image.classes, tensor.group.size, tensor.group.rank)
        self.weight = nn.Parameter(torch.empty(stop - start, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(stop - start))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden between layers -> logits [b, C/T] over this rank's classes."""
        whole = self.tensor.enter(hidden)
        return F.linear(whole.mean(0) if self.pooling == "mean" else whole[0], self.weight, self.bias)


class ImageLayers(TaskLayers):
    def input_layer(self, model: Model, tensor: TensorParallel) -> nn.Module:
        return PatchEmbedding(model, tensor)

    def head(self, model: Model, tensor: TensorParallel) -> nn.Module:
        return ClassHead(model, tensor)

    def checked(self, name: str, inputs: Tensor, model: Model, device: torch.device) -> Tensor:
        image = image_of(model)
        shape = (image.channels, image.size, image.size)
        if inputs.dim() != 4 or inputs.shape[1:] != shape:
            raise ArgumentError(
                f"{name}: the shape is {shape_of(inputs)}, but images [b, {str(list(shape))[1:]} are expected."
            )
        if inputs.dtype != torch.uint8 and not inputs.dtype.is_floating_point:
            raise ArgumentError(
                f"{name}: the type is {type_of(inputs)}, but uint8 is expected, or floats that are normalised."
            )
        check_device(name, inputs, "the model", device)
        return inputs

    def losses(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        return soft_cross_entropy(logits, targets, first_class(model, group), group)

    def counts(self, targets: Tensor) -> Tensor:
        return (targets.sum(1) > 0).long()

    def metrics(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        rank = rank_of_class(logits, targets.argmax(1), first_class(model, group), group)
        return torch.stack((rank < 1, rank < 5)) & (targets.sum(1) > 0)

    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets.to(logits), reduction="sum")

    def examples(self, config: RunConfig, samples: range) -> tuple[Tensor, Tensor]:
        """Noise whose brightness depends on the class."""
        image = image_of(config.model)
        images = np.empty((len(samples), image.channels, image.size, image.size), np.uint8)
        labels = np.empty(len(samples), np.int64)
        for row, sample in enumerate(samples):
            random = np.random.default_rng(derived_seed(config.run.seed, sample))
            labels[row] = random.integers(image.classes)
            bright = 64 + 128 * labels[row] // image.classes
            images[row] = random.normal(bright, 40, images[row].shape).clip(0, 255)
        inputs, targets = finished(images, labels, samples, config)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def first_class(model: Model, group: Group) -> int:
    """The first class that this rank of the tensor group holds."""
    return shard_range(image_of(model).classes, group.size, group.rank)[0]


IMAGE_LAYERS = ImageLayers()
