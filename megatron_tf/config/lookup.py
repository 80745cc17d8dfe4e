"""Places in the configuration, such as data.train[0].path, and what the schema says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from megatron_tf.config.fields import Section
from megatron_tf.config.schema import RunConfig

Location = tuple[int | str, ...]
# The documentation of a key.
MEANING = re.compile(r"(?:\[(?P<unit>[^\]]+)\] )?(?P<text>.*?)(?: Since (?P<since>\d+\.\d+)\.)?", re.DOTALL)


def key_name(loc: Location) -> str:
    """("data", "train", 0, "path") as "data.train[0].path"."""
    name = ""
    for part in loc:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def fields_of(section: type[Section]) -> Iterator[tuple[str, Any, bool]]:
    """(key as it is written, annotation, required) of each field, of all variants of the section."""
    fields = {name: field for variant in section.variants() for name, field in variant.model_fields.items()}
    for name, field in {**fields, **section.model_fields}.items():
        yield field.alias or name, field.annotation, field.is_required()


def keys_of(section: type[Section]) -> list[str]:
    return [key for key, _, _ in fields_of(section)]


def required_keys(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.usual().model_fields.items() if field.is_required()]


def without_null_sections(values: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """`values` of a section without the keys of sections below it that are null and take their defaults then: a file
    that extends another one cannot remove the other's line."""
    fields = {key: (annotation, required) for key, annotation, required in fields_of(section)}
    found = {}
    for key, value in values.items():
        annotation, required = fields.get(key, (None, True))
        inner = as_section(annotation)
        if value is None and inner is annotation and not required:
            continue
        found[key] = without_null_sections(value, inner) if inner and isinstance(value, dict) else value
    return found


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of the schema with its path, sections included, list items left out."""
    for key, annotation, _ in fields_of(section):
        yield prefix + key
        inner = as_section(annotation)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{key}.")


def annotation_at(loc: Location) -> Any:
    """The annotation of a place in the configuration; an item of a list has that of the list."""
    annotation: Any = RunConfig
    for part in loc:
        if isinstance(part, str):
            section = section_in(annotation)
            if section is None:
                return None
            annotation = next((found for key, found, _ in fields_of(section) if key == part), None)
    return annotation


def meaning_at(loc: Location) -> str:
    """What the documentation says of a key, without its unit and version; "" where it says nothing."""
    section, key = section_at(loc[:-1]) if len(loc) > 1 else RunConfig, loc[-1]
    variants = () if section is None else (*section.variants(), section)
    fields = [(found.alias or name, found) for of in variants for name, found in of.model_fields.items()]
    text = next((found.description for name, found in fields if name == key and found.description), "")
    about = MEANING.fullmatch(text or "")
    assert about is not None
    return about["text"]


def section_at(loc: Location) -> type[Section] | None:
    """The section class at a place: also for `Section | None`, and for lists of sections."""
    return section_in(annotation_at(loc))


def as_section(annotation: Any) -> type[Section] | None:
    """The section class of `Section` or `Section | None`."""
    for candidate in (annotation, *(arg for arg in get_args(annotation) if type(None) in get_args(annotation))):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def section_in(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *get_args(annotation))
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, Section)), None)
