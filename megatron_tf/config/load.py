"""From a YAML file and overrides to a `RunConfig`, and back.

Everything that is wrong with the file is reported at once, in sentences that name the key, what was given,
what is expected and what to write instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_tf.checks import did_you_mean
from megatron_tf.config.deepspeed_config import OWNED_KEYS, REFUSED_KEYS
from megatron_tf.config.extends import KEY as EXTENDS
from megatron_tf.config.extends import read_extended
from megatron_tf.config.fields import OpenSection
from megatron_tf.config.lookup import (
    Location,
    all_keys,
    key_name,
    keys_of,
    meaning_at,
    required_keys,
    section_at,
    without_null_sections,
)
from megatron_tf.config.mistakes import describe, follows_from_another, value_sentence
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.validate import check_model
from megatron_tf.config.yaml_core import dump_yaml, parse_yaml
from megatron_tf.durable import read_plain
from megatron_tf.errors import ConfigError, broken_link, system_reason
from megatron_tf.shipped import configurations
from megatron_tf.telemetry.text import count_of
from megatron_tf.text_files import decode_text

MOST_BYTES = 1 << 24  # of a configuration
_FEW_KEYS = 3  # a section with no more keys lists them even when the unknown key exists elsewhere


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, apply `overrides` ("section.field=value", value in YAML, later ones win), check every key.

    An override may name a section that the file lacks ("growth.from=runs/small"); null removes an optional
    one ("growth=null"), and gives any other that needs no key its defaults. Raises one ConfigError with all problems.
    Rules between fields, and between them and the world size, are checked by `validate.validate`.
    """
    values, problems = read_file(path)
    if "stages" in values:
        raise ConfigError(
            f"{path}: stages: a chain is for launch/train.py; here one run is needed. "
            "Give <run.dir>/<stage>/config.yml of a stage that has started."
        )
    return build_config(values, problems, overrides)


def build_config(values: dict[str, Any], problems: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of plain `values` with `overrides` applied, which changes `values`.

    Raises one ConfigError with the `problems` found so far and all new ones.
    """
    problems = [*problems, *(problem for override in overrides for problem in apply_override(values, override))]
    try:
        # JSON mode, because there a list may become a tuple; it is otherwise as strict. by_name would let
        # the Python names of aliased keys in as a second spelling.
        said = without_null_sections(values, RunConfig)
        config = RunConfig.model_validate_json(json.dumps(said), by_alias=True, by_name=False)
    except ValidationError as error:
        raise ConfigError([*problems, *_sentences(error, values)]) from None
    if problems:
        raise ConfigError(problems)
    return config


def read_model(values: Any) -> Model:
    """The model of the plain `values` of a model section, checked with the rules between its fields.
    ConfigError with all problems, in the sentences that a file would get: "model.field: what is wrong. Remedy."
    """
    try:
        model = Model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentences(error, {"model": values}, ("model",))) from None
    check_model(model)
    return model


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, defaults included; `load_config` reads it back to an equal one."""
    return dump_yaml(config.model_dump(by_alias=True))


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a YAML file, with those of the files that it extends, and what is wrong with their syntax.

    ConfigError when one of them is missing or holds no sections.
    """
    return read_extended(os.fspath(path), _read_alone, _read_base)


def _read_alone(path: str) -> tuple[dict[str, Any], list[str]]:
    try:
        content = read_plain(path, MOST_BYTES)
    except FileNotFoundError:
        reason = broken_link(path) or "there is no such file"
        hint = did_you_mean(os.path.basename(path).removesuffix(".yml"), configurations())
        if os.path.isfile(f"{path}.yml"):
            hint = f" Did you mean {path}.yml?"
        remedy = f"Give the path of a run's YAML file, or a name of `megatron_tf config list`.{hint}"
        raise ConfigError(f"{path}: {reason}. {remedy}") from None
    except OSError as error:
        reason = system_reason(error, path)
        of_run = os.path.join(path, "config.yml")
        remedy = f"Give {of_run}, the run's own file." if os.path.isfile(of_run) else "Give a readable YAML file."
        raise ConfigError(f"{path}: cannot be read ({reason}). {remedy}") from None
    values, problems = parse_yaml(decode_text(ConfigError, path, content), path)
    if values is None:
        needed = ", ".join(required_keys(RunConfig))
        raise ConfigError(f"{path}: the file is empty. A configuration needs the sections {needed}.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the top level is {describe(values)}. It must be sections, such as `model:`.")
    return values, problems


def _read_base(path: str) -> tuple[dict[str, Any], list[str]]:
    """As `_read_alone`, for a file that another one extends: unknown keys are removed, and reported with this file's
    name, because after the merge it would not be known which file they came from."""
    values, problems = _read_alone(path)
    for loc in _unknown_keys(values):
        problems.append(f"{path}: {_unknown_key(loc)}")
        _remove(values, loc)
    return values, problems


def check_keys(values: dict[str, Any]) -> None:
    """ConfigError with all unknown keys in `values`, the plain values of a configuration or of a part of one."""
    if problems := [_unknown_key(loc) for loc in _unknown_keys(values)]:
        raise ConfigError(problems)


def _unknown_keys(values: dict[str, Any]) -> list[Location]:
    own = {key: value for key, value in values.items() if key not in (EXTENDS, "stages", "deliver")}
    try:
        RunConfig.model_validate_json(json.dumps(own), by_alias=True, by_name=False)
    except ValidationError as error:
        return [
            problem["loc"]
            for problem in error.errors(include_url=False)
            if problem["type"] == "extra_forbidden" and _of_another_choice(problem["loc"], values) is None
        ]
    return []


def _remove(values: Any, loc: Location) -> None:
    for part in loc[:-1]:
        values = values[part]
    del values[loc[-1]]


def apply_override(values: dict[str, Any], override: str) -> list[str]:
    """Set one override ("section.field=value") in `values`; returns the problems."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals and key.endswith((".yml", ".yaml")):
        return [f"{key}: is a second configuration. Give one; section.field=value replaces single values of it."]
    if not equals or not all(parts):
        return [f"override {override!r}: not of the form section.field=value. Write it as training.train_steps=100."]
    if parts[0] == EXTENDS:
        return [f"override {override!r}: only a file extends another. Write it into a file of your own, and give that."]
    try:
        value, problems = parse_yaml(text, f"override {key.strip()}", key.strip())
    except ConfigError as error:
        return error.problems
    section = values
    for depth, part in enumerate(parts[:-1]):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            parent = ".".join(parts[: depth + 1])
            given = f"{parent} is {describe(section)} and has no keys"
            return [f"override {key.strip()}: {given}. Give it as a whole: {parent}=..."]
    section[parts[-1]] = value
    return problems


# ---- what pydantic found, in our own words ---------------------------------------------------------------------------


def _sentences(error: ValidationError, values: Mapping[str, Any], section: Location = ()) -> list[str]:
    """`values`: the whole configuration. `section`: location in it of the values that were validated."""
    problems = [problem for problem in error.errors(include_url=False) if not follows_from_another(problem)]
    if any(problem["type"] == "extra_forbidden" and _is_extends(problem["loc"]) for problem in problems):
        # missing keys are probably in the file that was to be extended
        problems = [problem for problem in problems if problem["type"] != "missing"]
    sentences = (_sentence((*section, *problem["loc"]), problem, values) for problem in problems)
    return list(dict.fromkeys(sentences))  # a pair that lacks both items is reported for each


def _is_extends(loc: Location) -> bool:
    """Whether a top-level key is `extends`, misspelt or where it is not allowed."""
    return len(loc) == 1 and did_you_mean(str(loc[0]), (EXTENDS,)) != ""


def _sentence(loc: Location, problem: ErrorDetails, values: Mapping[str, Any]) -> str:
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _of_another_choice(loc, values) or _unknown_key(loc)
    if kind == "missing":
        return _missing_key(loc, given)
    return value_sentence(key_name(loc) or "configuration", problem) + _remedy(kind, loc, given)


def _remedy(kind: str, loc: Location, given: Any) -> str:
    """How to write what was probably meant: a sentence with a leading space, or nothing."""
    section = section_at(loc)
    if kind == "tuple_type" and section:
        return (
            f" Write the prefix of one, or a list of prefixes or of items with the keys {', '.join(keys_of(section))}."
        )
    if kind in ("model_type", "model_attributes_type") and section:
        if given is None:
            return f" It needs {', '.join(required_keys(section))}."
        return f" Its keys are {', '.join(keys_of(section))}."
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        return f" Write it in quotes: '{json.dumps(given)}'."
    if kind == "bool_type" and str(given).lower() in ("yes", "on", "1", "no", "off", "0"):
        return f" Write {'true' if str(given).lower() in ('yes', 'on', '1') else 'false'}."
    if kind == "float_type" or kind.startswith("int"):
        number = _as_number(given)
        if number is not None and (kind == "float_type" or number == int(number)):
            return f" Write {number:g}." if kind == "float_type" else f" Write {int(number)}."
    return ""


def _as_number(given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, (str, int, float)):
        return None
    try:
        number = float(given)  # also reads the digit groups of Python and YAML 1.1, 1_000
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e300 else None


def _of_another_choice(loc: Location, values: Mapping[str, Any]) -> str | None:
    """The sentence on a key that only other architectures, tasks or optimizers have; None for any other key."""
    section = section_at(loc[:-1])
    if section is None or not issubclass(section, OpenSection):
        return None
    for chooser, registry in section.registered.items():
        owners = [name for name in registry.names() if loc[-1] in registry[name].section.model_fields]
        if owners:
            own = values[str(loc[0])].get(chooser, section.model_fields[chooser].get_default())
            remedy = f"Remove it, or set {key_name((*loc[:-1], chooser))} to {' or '.join(owners)}"
            return f"{key_name(loc)}: {registry[own].why_not_elsewhere}. {remedy}."
    return None


def _unknown_key(loc: Location) -> str:
    name, section = str(loc[-1]), section_at(loc[:-1])
    assert section is not None, loc
    keys = keys_of(section)
    if loc[0] == "deepspeed" and (reason := _refusal(key_name(loc[1:]))):
        return f"{key_name(loc)}: {reason}"
    sentence = f"{key_name(loc)}: unknown key."
    if name == EXTENDS:
        return f"{sentence} A whole file extends another: write it at the top level of one, or remove it."
    if near := did_you_mean(name, keys, f"{key_name(loc[:-1])}." if len(loc) > 1 else ""):
        return sentence + near
    elsewhere = [key for key in all_keys(RunConfig) if key.rpartition(".")[2] == name]
    question = f" Did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    if len(loc) == 1 and not elsewhere and (near := did_you_mean(name, (EXTENDS, "stages"))):
        return sentence + near
    if elsewhere and len(keys) > _FEW_KEYS:
        return sentence + question
    where = f"The keys of {key_name(loc[:-1])}" if len(loc) > 1 else "The sections"
    return f"{sentence} {where} are {', '.join(keys)}.{question}"


def _refusal(key: str) -> str | None:
    """Why a key of DeepSpeed's may not be set in the `deepspeed` section; None when there is no such reason."""
    if key in OWNED_KEYS:
        return f"this is decided by {OWNED_KEYS[key]}. Remove it here and set that instead."
    return f"refused, because {REFUSED_KEYS[key]}. Remove it." if key in REFUSED_KEYS else None


def _missing_key(loc: Location, given: Any) -> str:
    if isinstance(loc[-1], int):
        return f"{key_name(loc[:-1])}: the list has {count_of(len(given), 'item')}, too few. Give all of them."
    section = section_at(loc)
    if section is not None:
        return f"{key_name(loc)}: missing. Add this section; it needs {', '.join(required_keys(section))}."
    return f"{key_name(loc)}: missing, and it has no default. Give it a value. {meaning_at(loc)}".rstrip()
