"""What sections of a configuration are made of: their base class, numbers within bounds, and paths."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from megatron_tf.paths import expand, literal

# Upper bounds are far beyond every real run; they keep the arithmetic that follows within 64 bits and within fp32.
Count = Annotated[int, Field(ge=1, lt=2**31)]
TotalCount = Annotated[int, Field(ge=1, lt=2**60)]  # of a whole run
EvenCount = Annotated[TotalCount, Field(multiple_of=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1, le=1e7)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PATH = "path"  # format of a text in the JSON schema


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("must be a path: not empty, without NUL characters")
    return text


# `~` and environment variables are replaced when a value is read. What is written, such as a run's config.yml, therefore
# names the very files that the run used, whatever the variables are when it is read again.
Path = Annotated[
    str,
    AfterValidator(_path),
    AfterValidator(expand),
    PlainSerializer(literal),
    Field(json_schema_extra={"format": PATH}),
]
ExpandedPath = Annotated[str, AfterValidator(_path)]  # what a path was, in a record of the past


class Section(BaseModel):
    """Frozen; an unknown key is an error; no silent conversion between types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, use_attribute_docstrings=True
    )

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        """The classes that a section of this type may be of."""
        return (cls,)
