"""The study file: arms with their parents, budgets, seeds and sweeps, in YAML.

name: growth
dir: runs/studies/growth
seeds: [1, 2, 3]
reference: going_on
common: {sections of a configuration, for all arms}
arms:
  - {name: small, config: tiny.yml, flops: 1e13, decay: 0.2, comparable: false,
     sweep: {key: optimizer.lr, values: [1e-3, 2e-3, 4e-3]}}
  - {name: going_on, parent: small, by: branch, flops: 2e13, decay: 0.2}
  - {name: grown, parent: small, flops: 2e13, decay: 0.2, overrides: {model: {...}, growth: {method: gram}}}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from megatron_tf.checks import did_you_mean
from megatron_tf.config.extends import KEY as EXTENDS
from megatron_tf.config.fields import Count, Path, Positive, Section
from megatron_tf.config.load import MOST_BYTES, apply_override, check_keys
from megatron_tf.config.lookup import all_keys
from megatron_tf.config.mistakes import follows_from_another, value_sentence
from megatron_tf.config.nearest import either
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Moment
from megatron_tf.config.yaml_core import parse_yaml
from megatron_tf.errors import ConfigError, shown
from megatron_tf.shipped import studies
from megatron_tf.text_files import read_text_file


def _name(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is None:
        raise ValueError("must be letters, digits, '-', '_' and '.', and begin with a letter or digit")
    return text


Name = Annotated[str, AfterValidator(_name)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]


class Sweep(Section):
    """Values of one key. The arm takes the one with the lowest last validation loss at its first seed."""

    key: str
    """A key of the configuration, such as optimizer.lr."""
    values: Annotated[tuple[Positive, ...], Field(min_length=2)]
    """The values to try."""
    flops: Positive | None = None
    """FLOPs of a trial, parents included. null: a trial is as long as the arm, and the best one is its first run."""
    extend: Annotated[int, Field(ge=0, le=5)] = 0
    """The most values to try beyond an end of the list, while the best one is at that end."""


class Arm(Section):
    name: Name
    """Shown in reports; also the folder of its runs."""
    config: Path | None = None
    """A configuration file. null: the configuration of the parent; without a parent, the common sections alone."""
    overrides: dict[str, Any] = {}
    """Keys of a configuration, by section, that replace those of `config`."""
    parent: str | None = None
    """The arm whose checkpoint it starts from. null: initial weights."""
    by: Literal["growth", "branch"] = "growth"
    """How it starts: grown from the parent, or the same model going on."""
    at: Moment | None = None
    """Which of the parent's checkpoints. null: before_decay where the parent's schedule is wsd, else end."""
    flops: Positive | None = None
    """FLOPs at its end, parents included. Sets training.train_steps."""
    tokens: Positive | None = None
    """Tokens at its end, parents included. Sets training.train_steps."""
    decay: Share | None = None
    """Share of `flops` or `tokens` in which the rate falls: a wsd schedule. null: optimizer.schedule is not changed."""
    seeds: Seeds | None = None
    """null: those of the study."""
    sweep: Sweep | None = None
    """Tries values of one key first. null: no sweep."""
    value_of: str | None = None
    """An arm with a sweep: this arm sets the same key to the value chosen there. null: none."""
    comparable: bool = True
    """Whether it is compared. Arms that are compared must have the same data, budget and end of the schedule."""
    family: Name | None = None
    """Joins arms of one model at several budgets: their losses form a curve that other arms are measured by."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that it cannot begin without."""
        return tuple(name for name in (self.parent, self.value_of) if name is not None)


class Study(Section):
    name: Name
    """Shown in reports."""
    dir: Path
    """Folder of its runs, results and pictures."""
    seeds: Seeds = (1, 2, 3)
    """Of each arm. Sweeps use the first one."""
    ranks: Count = 1
    """Processes of each run."""
    reference: str | None = None
    """The arm that the others are compared with. null: the first one that is comparable."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Largest relative difference of FLOPs between arms that are compared."""
    common: dict[str, Any] = {}
    """Sections of a configuration, for all arms."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    """Reports keep their order."""

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        return arm.seeds or self.seeds


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """The study of a file. `overrides`: "dir=..." and other keys of the top level, as text in YAML.

    ConfigError with all problems: keys, values, parents that are missing or form a circle.
    """
    values, problems = _read(path)
    for text in overrides:
        problems += apply_override(values, text)
    try:
        study = Study.model_validate_json(json.dumps(values), by_alias=True, by_name=False)
    except ValidationError as error:
        found = [problem for problem in error.errors(include_url=False) if not follows_from_another(problem)]
        raise ConfigError([*problems, *(_sentence(problem, values) for problem in found)]) from None
    problems += [*_common_problems(study), *_arm_problems(study), *_sweep_problems(study)]
    if len({arm.name for arm in study.arms}) == len(study.arms):  # else it is not known which one a parent is
        problems += _parent_problems(study)
    if problems:
        raise ConfigError(problems)
    return study


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a file, and what is wrong with its syntax."""
    if not os.path.lexists(path):
        near = did_you_mean(os.path.basename(path).removesuffix(".yml"), studies())
        raise ConfigError(
            f"{path}: there is no such file. Give the path of a study's YAML file, or one of "
            f"{', '.join(studies())}.{near}"
        )
    text = read_text_file(ConfigError, path, "Give the path of a study's YAML file.", MOST_BYTES)
    values, problems = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        needed = ", ".join(name for name, field in Study.model_fields.items() if field.is_required())
        raise ConfigError(f"{path}: has no keys. A study needs {needed}.")
    if EXTENDS in values:
        raise ConfigError(
            f"{path}: {EXTENDS}: {shown(values[EXTENDS])}, but a study extends no file. Write what arms have in common "
            "under common, and a configuration as the config of an arm."
        )
    return values, problems


def _sentence(problem: Any, values: Mapping[str, Any]) -> str:
    place, kind = problem["loc"], problem["type"]
    names = [arm.get("name") if isinstance(arm, dict) else None for arm in _list(values.get("arms"))]
    key = ""
    for number, part in enumerate(place):
        if number == 1 and place[0] == "arms" and isinstance(part, int) and part < len(names) and names[part]:
            key = f"arm {names[part]}: "
        else:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key and not key.endswith(": ") else str(part)
    if kind == "missing":
        return f"{key}: missing. Give it."
    if kind == "extra_forbidden":
        section: type[Section] = Study if len(place) == 1 else Sweep if "sweep" in place[:-1] else Arm
        return f"{key}: {_unknown_key(str(place[-1]), section)}"
    return value_sentence(key.removesuffix(": "), problem)


def _unknown_key(name: str, section: type[Section]) -> str:
    if section is not Sweep and name in RunConfig.model_fields:
        place = "common" if section is Study else "overrides"
        return f"is a section of a run's configuration, and this is read as a study. Write it under {place}."
    hint = did_you_mean(name, section.model_fields)
    if section is not Sweep and did_you_mean(name, [EXTENDS]):
        hint = " No part of a study extends a file: write one as the config of an arm."
    return f"unknown key. The keys here are {', '.join(section.model_fields)}.{hint}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _common_problems(study: Study) -> Iterator[str]:
    """Unknown keys of `common` are reported once, not for each arm, and `extends` wherever it is not allowed."""
    try:
        check_keys({key: value for key, value in study.common.items() if key != EXTENDS})
    except ConfigError as error:
        yield from (f"common: {problem}" for problem in error.problems)
    of_arms = ((f"arm {arm.name}: overrides", arm.overrides) for arm in study.arms)
    for place, sections in (("common", study.common), *of_arms):
        if EXTENDS in sections:
            yield (
                f"{place}.{EXTENDS}: {shown(sections[EXTENDS])}, but only a file extends another. Write it as the "
                "config of an arm."
            )


def _arm_problems(study: Study) -> Iterator[str]:
    names = [arm.name for arm in study.arms]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"arm {name}: is there twice. Give each arm a name of its own."
    if study.reference is not None and study.reference not in names:
        near = did_you_mean(study.reference, names)
        yield f"reference: there is no arm {study.reference}. The arms are {', '.join(names)}.{near}"
    elif study.reference is not None and not study.arm(study.reference).comparable:
        yield f"reference: {study.reference} is not comparable. Name another arm, or set its comparable to true."
    for place, seeds in (("", study.seeds), *((f"arm {arm.name}: ", arm.seeds or ()) for arm in study.arms)):
        if len(set(seeds)) < len(seeds):
            yield f"{place}seeds: {list(seeds)} has one twice, and one run would count as two. Give it once."
    for arm in study.arms:
        if arm.flops is not None and arm.tokens is not None:
            yield f"arm {arm.name}: both flops ({arm.flops:g}) and tokens ({arm.tokens:g}) are given. Give one."
        if arm.decay is not None and arm.flops is None and arm.tokens is None:
            yield f"arm {arm.name}: decay {arm.decay:g} is a share of flops or tokens, and neither is given. Give one."
        if arm.by == "branch" and arm.parent is None:
            yield f"arm {arm.name}: by branch, but it has no parent. Name one."
        if arm.by == "branch" and arm.config is not None:
            yield f"arm {arm.name}: config: a branch has the configuration of its parent. Remove config."


def _sweep_problems(study: Study) -> Iterator[str]:
    known = list(all_keys(RunConfig))
    for arm, sweep in ((arm, arm.sweep) for arm in study.arms if arm.sweep is not None):
        if sweep.key not in known:
            elsewhere = [key for key in known if key.rpartition(".")[2] == sweep.key]
            near = f" Did you mean {either(elsewhere)}?" if elsewhere else did_you_mean(sweep.key, known)
            yield (
                f"arm {arm.name}: sweep.key: {sweep.key}: unknown key. Give one of a configuration, such as "
                f"optimizer.lr.{near}"
            )
        # the folders of trials have values to 6 digits
        if len({f"{value:g}" for value in sweep.values}) < len(sweep.values):
            yield f"arm {arm.name}: sweep.values: {list(sweep.values)} has one twice, to 6 digits. Give each once."
        if sweep.flops is not None and arm.flops is None and arm.tokens is None:
            yield f"arm {arm.name}: sweep.flops shortens flops or tokens, and neither is given. Give one."


def _parent_problems(study: Study) -> Iterator[str]:
    by_name = {arm.name: arm for arm in study.arms}
    circles: set[frozenset[str]] = set()
    for arm in study.arms:
        for key, name in (("parent", arm.parent), ("value_of", arm.value_of)):
            if name is not None and name not in by_name:
                near = did_you_mean(name, [other for other in by_name if other != arm.name])
                yield f"arm {arm.name}: {key}: there is no arm {name}. The arms are {', '.join(by_name)}.{near}"
        if (way := _circle(arm.name, by_name)) and frozenset(way) not in circles:
            circles.add(frozenset(way))
            yield f"arms {' -> '.join([*way, arm.name])}: each starts from the next, in a circle. Remove a parent."
        swept = by_name.get(arm.value_of or "")
        if swept is not None and (swept.sweep is None or arm.sweep is not None):
            who = arm.name if arm.sweep is not None else swept.name
            yield (
                f"arm {arm.name}: value_of: takes what a sweep of {swept.name} has chosen, and {who} has "
                f"{'a sweep of its own' if arm.sweep is not None else 'no sweep'}. Remove value_of, or name another "
                "arm."
            )
        if arm.parent not in by_name:
            continue
        missing = [seed for seed in study.seeds_of(arm) if seed not in study.seeds_of(by_name[arm.parent])]
        if missing:
            yield (
                f"arm {arm.name}: seeds {missing} start from the parent's runs of these seeds, and {arm.parent} has "
                f"{list(study.seeds_of(by_name[arm.parent]))}. Give both the same."
            )


def _circle(name: str, by_name: Mapping[str, Arm], way: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The arms on a path from `name` through `needs` back to it; empty when there is none."""
    if name in way:
        return way if way[0] == name else ()
    if name not in by_name:
        return ()
    return next((found for need in by_name[name].needs if (found := _circle(need, by_name, (*way, name)))), ())
