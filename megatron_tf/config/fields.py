"""What sections of a configuration are made of: their base class, numbers within bounds, and paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from megatron_tf.paths import expand, literal
from megatron_tf.registry import Registry

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
NOT_REGISTERED = "not_registered"  # kind of a validation error: a name that no registered object has


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


def name_in(registry: Registry[Any]) -> BeforeValidator:
    """Of a text that must be the name of a registered object."""

    def check(name: Any) -> Any:
        if not isinstance(name, str) or name not in registry:
            raise PydanticCustomError(NOT_REGISTERED, "not registered", {"choices": registry.names()})
        return name

    return BeforeValidator(check)


class OpenSection(Section):
    """A section whose keys depend on one of them: what is registered under its value has a section with keys of its own.

    `chooser`: that key.  `registered`: objects with a `section`, by the values of that key. A direct subclass has the keys
    that are common to all of them; called, it makes the section that its arguments choose.
    """

    chooser: ClassVar[str]
    registered: ClassVar[Registry[Any]]

    @classmethod
    def chosen(cls, values: Mapping[str, Any]) -> type[OpenSection] | None:
        """The class of the section that `values` choose; None when nothing is registered under that name."""
        name = values.get(cls.chooser, cls.model_fields[cls.chooser].get_default())
        return cls.registered[name].section if isinstance(name, str) and name in cls.registered else None

    def __new__(cls, /, **fields: Any) -> Self:
        section = cls.chosen(fields) if OpenSection in cls.__bases__ else None
        return super().__new__(section or cls)  # type: ignore[return-value]

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_is_chosen(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Validates a mapping as the section that it chooses.

        A key that not all have may be null, which is the same as leaving it out. A key of another section may also stand
        there with its default.
        """
        if not isinstance(values, Mapping):
            return handler(values)
        section = cls.chosen(values)
        if section is None:
            return handler({key: value for key, value in values.items() if key in cls._common().model_fields})
        said = {key: value for key, value in values.items() if not _says_nothing(section, key, value)}
        if info.mode == "json":  # a validator is given Python's values; in JSON, a list may become a tuple
            said = {key: _with_tuples(value) for key, value in said.items()}
        return handler(said) if issubclass(cls, section) else section.model_validate(said)  # type: ignore[return-value]

    @classmethod
    def _common(cls) -> type[OpenSection]:
        """The class with the keys that are common to all."""
        return next(base for base in cls.__mro__ if OpenSection in base.__bases__)

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        return tuple(cls.registered[name].section for name in cls.registered.names())


def _with_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _says_nothing(section: type[OpenSection], key: str, value: Any) -> bool:
    """Whether a key that not all have is null, or of another section than `section` and its default."""
    fields = [variant.model_fields[key] for variant in section.variants() if key in variant.model_fields]
    if key in section._common().model_fields or not fields:
        return False
    return value is None or (key not in section.model_fields and all(value == field.get_default() for field in fields))
