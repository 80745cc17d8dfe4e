"""The `model:` section of an image classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from megatron_tf.config.fields import Count, Fraction, Positive, Section
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import UserError

MOST_POSITIONS = 2**31 - 1  # the bound of seq_length
# Those of ImageNet, which are usual for photographs of any data set.
COLOUR_MEAN, COLOUR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _from_list(value: Any) -> Any:
    # checkpoints keep the model as JSON, which has no tuples
    return tuple(value) if isinstance(value, list) else value


ByChannel = BeforeValidator(_from_list, json_schema_input_type=tuple[float, ...])


class Image(Section):
    size: Count
    """[pixels] Height and width of what the model sees. A multiple of patch."""
    patch: Count
    """[pixels] Height and width of a patch, which becomes one position."""
    channels: Literal[1, 3] = 3
    """3: red, green, blue. 1: grey."""
    classes: Annotated[int, Field(ge=2, lt=2**31)]
    """Classes to tell apart, numbered from 0."""
    pooling: Literal["class_token", "mean"] = "class_token"
    """What the head reads: one more position of its own, or the mean over all patches."""
    mean: Annotated[tuple[Fraction, ...], ByChannel] = Field(
        default_factory=lambda earlier: COLOUR_MEAN if earlier.get("channels") == 3 else (0.5,)
    )
    """Taken from the pixels, a number a channel, 1 being white. By default ImageNet's means, or 0.5 for grey."""
    std: Annotated[tuple[Positive, ...], ByChannel] = Field(
        default_factory=lambda earlier: COLOUR_STD if earlier.get("channels") == 3 else (0.5,)
    )
    """The pixels are divided by it then, a number a channel. By default ImageNet's deviations, or 0.5 for grey."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """[share] What is seen of an image: a square in its middle, so much of its shorter side."""

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.size // self.patch) ** 2

    @property
    def positions(self) -> int:
        """The number of positions of an image: its patches, and the class token if there is one."""
        return self.patches + (self.pooling == "class_token")

    @property
    def pixels(self) -> int:
        """The number of values in a patch, over all channels."""
        return self.channels * self.patch**2


class ImageModel(Model):
    derived: ClassVar[frozenset[str]] = frozenset({"seq_length"})

    task: Literal["image_classification"] = "image_classification"
    image: Image
    """What the images are like, and what is told apart. Since 0.2."""
    rotary_fraction: Fraction = 0.0

    @model_validator(mode="before")
    @classmethod
    def _with_its_positions(cls, values: Any) -> Any:
        """Sets seq_length from the image. If the image is invalid, or has too many positions for any seq_length, only
        that is reported, so any length will do."""
        if not isinstance(values, Mapping) or values.get("seq_length") is not None:
            return values
        return {**values, "seq_length": _positions(values.get("image"))}


def _positions(image: Any) -> int:
    if not isinstance(image, Image):
        try:
            image = Image.model_validate(image)
        except ValidationError:
            return 1
    return min(max(1, image.positions), MOST_POSITIONS)


def image_of(model: Model) -> Image:
    """The image section of `model`, which is known to be an image classifier."""
    assert isinstance(model, ImageModel), model.task
    return model.image


def check_sees_images(model: Model, action: str) -> None:
    """UserError unless `model` classifies images. `action`: what needs such a model, such as "classification"."""
    if not isinstance(model, ImageModel):
        raise UserError(
            f"model.task: {model.task}, but {action} needs a model of images. Give one whose model.task is "
            "image_classification."
        )
