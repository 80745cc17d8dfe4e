"""The `data` section: tokenizer, sources, and augmentation of images."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_tf.config.fields import Fraction, NonNegative, Path, Positive, Section, TokenId

Span = tuple[Fraction, Fraction]


class DataSource(Section):
    path: Path
    """Prefix of a .bin/.idx pair."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources."""


def _with_paths(value: Any) -> Any:
    """The prefix of a source, alone or in a list, stands for a source without other fields."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


# Also written as the prefix of one source, or as a list with prefixes in it.
Sources = Annotated[
    tuple[DataSource, ...],
    BeforeValidator(_with_paths, json_schema_input_type=str | tuple[str | DataSource, ...]),
]


class RandAugment(Section):
    """timm's rand-m9-mstd0.5-inc1: each operation is one of fifteen and is done half of the time."""

    operations: Annotated[int, Field(ge=1, le=15)] = 2
    """Operations drawn for each image."""
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Strength of the operations; 10 is the strongest."""
    deviation: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Standard deviation of the magnitude."""


class Augmentation(Section):
    """Random changes to training images. Each is a function of the seed and the sample."""

    crop_scale: Span | None = None
    """[share] Least and largest area of a random crop of the image. null: the square in its middle."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    """Least and largest width of such a crop over its height."""
    shift: Annotated[int, Field(ge=0, le=10_000)] = 0
    """[pixels] Largest random shift to each side; the gap is black."""
    flip: Fraction = 0.0
    """[share] Images that are mirrored."""
    rand_augment: RandAugment | None = None
    """Random operations on colours and geometry. null: none."""
    erasing: Fraction = 0.0
    """[share] Images in which a rectangle becomes noise."""
    mixup: NonNegative = 0.0
    """Mix neighbours in the batch in pairs, by a share from Beta(mixup, mixup). 0: never."""
    cutmix: NonNegative = 0.0
    """Exchange a rectangle of such a pair, by a share from Beta(cutmix, cutmix). With mixup: either. 0: never."""


class Data(Section):
    tokenizer: Path | None = None
    """A .json, .model or .tiktoken file, tiktoken:NAME, or bytes. It is compared with that of the data."""
    train: Sources = Field(min_length=1)
    """Sources of training samples. A prefix may stand for a source, and one source for a list of them."""
    validation: Sources = ()
    """Sources of validation samples, written as data.train."""
    eod_id: TokenId | None = None
    """Id of the token that ends a document. null: read from the summary next to the data."""
    pad_id: TokenId | None = None
    """Id of the token that pads data of other programs. It is never predicted and never attended to. null: none."""
    reset_at_eod: bool = False
    """Begin attention and rotary positions anew with each document."""
    mask_eod_loss: bool = False
    """No loss for the first token of a document, which does not follow from the one before."""
    augmentation: Augmentation = Augmentation()
    """Changes to training images. Since 0.2."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """[threads] On each rank, to read and augment images. Since 0.2."""

    @property
    def masks_loss(self) -> bool:
        """Whether some labels have no loss."""
        return self.mask_eod_loss or self.pad_id is not None
