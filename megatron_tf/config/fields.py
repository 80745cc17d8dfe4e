"""Building blocks of the configuration's sections: base classes, numbers within bounds, and paths."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
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
    create_model,
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


# `~` and environment variables are replaced when a value is read. What is written, such as a run's config.yml,
# therefore names the very files that the run used, whatever the variables are when it is read again.
Path = Annotated[
    str,
    AfterValidator(_path),
    AfterValidator(expand),
    PlainSerializer(literal),
    Field(json_schema_extra={"format": PATH}),
]
ExpandedPath = Annotated[str, AfterValidator(_path)]  # in a record of the past: not expanded once more


class Section(BaseModel):
    """Frozen; an unknown key is an error; no silent conversion between types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, use_attribute_docstrings=True
    )

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        """The classes whose keys a section of this type may have."""
        return (cls,)

    @classmethod
    def usual(cls) -> type[Section]:
        """The class whose required keys are named where the section is missing."""
        return cls


def name_in(registry: Registry[Any]) -> BeforeValidator:
    """A validator for a text that must be the name of an object in `registry`."""

    def check(name: Any) -> Any:
        if not isinstance(name, str) or name not in registry:
            raise PydanticCustomError(NOT_REGISTERED, "not registered", {"choices": registry.names()})
        return name

    return BeforeValidator(check)


class OpenSection(Section):
    """A section with choosing keys, such as model.task: the object registered under its value adds keys of its own.

    `registered`: for each choosing key, a registry of objects that have a `section`. A direct subclass declares the
    keys that all variants have; calling it creates the variant that its arguments choose. With two choosing keys the
    variant is a class derived from both chosen sections: each narrows the type of its own choosing key, and the second
    one may redeclare any other common key.
    """

    registered: ClassVar[Mapping[str, Registry[Any]]]

    @classmethod
    def chosen(cls, values: Mapping[str, Any]) -> type[OpenSection] | None:
        """The class of the section that `values` choose; None when nothing is registered under a name."""
        parts = []
        for key, registry in cls.registered.items():
            name = values.get(key, cls.model_fields[key].get_default())
            if not isinstance(name, str) or name not in registry:
                return None
            parts.append(registry[name].section)
        return _composed(tuple(cls.registered), tuple(parts))

    def __new__(cls, /, **fields: Any) -> Self:
        section = cls.chosen(fields)
        return super().__new__(section if section and issubclass(section, cls) else cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Takes a composed class apart into its sections, which can be imported, unlike the class itself."""
        made_of = type(self).__bases__
        if len(made_of) == 1:
            return super().__reduce_ex__(protocol)
        return _restored, (tuple(self.registered), made_of[::-1], self.__getstate__())

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_is_chosen(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Validates a mapping as the section that it chooses.

        A key that only some variants have may be null, which is the same as leaving it out. A key of another variant
        may also be given with its default value.
        """
        if not isinstance(values, Mapping):
            return handler(values)
        section = cls.chosen(values)
        if section is None:
            return handler({key: value for key, value in values.items() if key in cls._common().model_fields})
        said = {key: value for key, value in values.items() if not _says_nothing(section, key, value)}
        if info.mode == "json":  # the values here are Python's: strict validation takes no list for a tuple of them
            said = {key: _with_tuples(value) for key, value in said.items()}
        return handler(said) if issubclass(cls, section) else section.model_validate(said)  # type: ignore[return-value]

    @classmethod
    def _common(cls) -> type[OpenSection]:
        """The class with the keys that all variants have."""
        return next(base for base in cls.__mro__ if OpenSection in base.__bases__)

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        return tuple(registry[name].section for registry in cls.registered.values() for name in registry.names())


@lru_cache(maxsize=64)
def _composed(keys: tuple[str, ...], parts: tuple[type[OpenSection], ...]) -> type[OpenSection]:
    """One class with the keys of all `parts`; part i is the section that choosing key i selected."""
    if len(parts) == 1:
        return parts[0]
    narrowed: dict[str, Any] = {
        key: (part.model_fields[key].annotation, part.model_fields[key]) for key, part in zip(keys, parts)
    }
    names = "As".join(part.__name__ for part in parts)
    return create_model(names, __base__=parts[::-1], __module__=parts[0].__module__, **narrowed)


def _restored(keys: tuple[str, ...], parts: tuple[type[OpenSection], ...], state: dict[str, Any]) -> OpenSection:
    """The section that `OpenSection.__reduce_ex__` took apart."""
    section: OpenSection = object.__new__(_composed(keys, parts))
    section.__setstate__(state)
    return section


def _with_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _says_nothing(section: type[OpenSection], key: str, value: Any) -> bool:
    """Whether a key that only some variants have is null, or belongs to another variant and has its default value."""
    fields = [variant.model_fields[key] for variant in section.variants() if key in variant.model_fields]
    if key in section._common().model_fields or not fields:
        return False
    return value is None or (key not in section.model_fields and all(value == field.get_default() for field in fields))
