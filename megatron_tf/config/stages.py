"""A chain of growth stages in one file: a list of runs, each of which grows from the one before.

    <sections of an ordinary configuration, common to all stages>
    stages:
      - name: 124M
        model: {parameter_tokens: {qkv: 576, proj: 576, ffn: 2304}}
      - name: 354M
        model: {parameter_tokens: {qkv: 2140, proj: 2140, ffn: 8560}}
        optimizer: {lr: 3.0e-4}

With `deliver` (see `deliver`), each stage grows from before the decay of the stage before it.

A stage repeats only what differs from the common sections. It becomes an ordinary run of its own in
`<run.dir>/<name>`, so that whatever works on a run works on a stage, and interrupting the chain anywhere is no
different from interrupting a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from megatron_tf.config import deliver
from megatron_tf.config.extends import merged
from megatron_tf.config.load import apply_override, build_config, read_file
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import ConfigError
from megatron_tf.paths import literal

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def load_stages(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The runs of a file, in order: one for an ordinary configuration, one per stage for a chain.

    `overrides` hold for every stage, except training.init_from, which is for the first;
    "stages.NAME.section.field=value" is for one stage. Raises one ConfigError with all problems.
    """
    values, problems = read_file(path)
    if "stages" not in values:
        deliver.refuse_alone(values, problems)
        return [build_config(values, problems, overrides)]
    stages = values.pop("stages")
    problems += _shape_problems(stages)
    problems += [
        f"override {text!r}: stages are changed one value at a time. Write it as stages.NAME.section.field=value."
        for text in overrides
        if re.match(r"stages(\.[^.=]+)?=", text)
    ]
    if problems:
        raise ConfigError(problems)
    names = [stage["name"] for stage in stages]
    common = [text for text in overrides if not text.startswith("stages.")]
    own: dict[str, list[str]] = {name: [] for name in names}
    for text in overrides:
        if text.startswith("stages."):
            # one name may be the beginning of another, such as "1" and "1.5B"
            name = max((n for n in names if text.startswith(f"stages.{n}.")), key=len, default=None)
            if name is None:
                problems.append(f"override {text!r}: there is no such stage. The stages are {', '.join(names)}.")
            else:
                own[name].append(text.removeprefix(f"stages.{name}."))
    configs: list[RunConfig] = []
    delivered = False
    for stage in stages:
        if configs:  # only the first stage begins with weights from elsewhere
            common = [text for text in common if not text.startswith("training.init_from=")]
            values = {
                key: _without(value, "init_from") if key == "training" else value for key, value in values.items()
            }
        try:
            shared, texts = values, common
            grows = "growth" in stage or any(map(_is_of_growth, own[stage["name"]]))
            if not configs and not grows:  # settings of all growths are for the stages that grow
                shared = {**values, "growth": None}
                texts = [text for text in common if not _is_of_growth(text)]
            overridden = [*texts, *own[stage["name"]]]
            config, delivered = _stage_config(shared, stage, overridden, configs[-1:], delivered)
            configs.append(config)
        except ConfigError as error:
            problems += [f"stage {stage['name']}: {problem}" for problem in error.problems]
            if not configs:
                break  # the stages that grow from it would only repeat its problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return configs


def _is_of_growth(override: str) -> bool:
    return override.startswith(("growth.", "growth="))


def stage_name(config: RunConfig) -> str:
    """The name of a chain's stage, as in "stages.NAME.section.field=value"."""
    return os.path.basename(config.run.dir)


def _stage_config(
    common: dict[str, Any],
    stage: dict[str, Any],
    overrides: Sequence[str],
    previous: Sequence[RunConfig],
    was_delivered: bool,
) -> tuple[RunConfig, bool]:
    """(the stage's run, whether it is delivered). The stage after a delivered one grows from before its decay.

    `previous`: the run of the stage before, or nothing for the first. `was_delivered`: whether that stage is delivered.
    """
    values = merged(common, {key: value for key, value in stage.items() if key != "name"})
    problems = [problem for text in overrides for problem in apply_override(values, text)]
    run = values.get("run")
    if isinstance(run, dict) and isinstance(run.get("dir"), str):
        run["dir"] = os.path.join(run["dir"], stage["name"])
        run["name"] = "-".join([*([run["name"]] if isinstance(run.get("name"), str) else []), stage["name"]])
    if previous:
        growth = values.get("growth") or {}
        if isinstance(growth, dict) and "from" in growth:
            problems.append(
                "growth.from: a stage grows from the one before it. Remove it, or make this the first stage."
            )
        if isinstance(growth, dict):
            values["growth"] = {"from": literal(previous[0].run.dir), **growth}
            if was_delivered:
                deliver.grow_from_before(values["growth"], problems)
    share = deliver.take_share(values, problems)
    if share is None:
        return build_config(values, problems), False
    deliver.keep_both(values, problems)
    return deliver.with_decay(build_config(values, problems), share), True


def _shape_problems(stages: Any) -> list[str]:
    if not isinstance(stages, list) or not stages:
        return ["stages: not a list of stages. Write each as `- name: 354M` with the sections that differ."]
    problems, seen = [], set()
    for number, stage in enumerate(stages):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            quoted = " Write it in quotes." if isinstance(name, (int, float)) else ""
            problems.append(
                f"stages[{number}].name: {name!r} is not a name.{quoted} Give letters, digits, '-', '_' and '.', such "
                "as '354M'; it becomes the folder of the stage."
            )
            continue
        if name in seen:
            problems.append(f"stages[{number}].name: {name} is there twice. Give each stage a name of its own.")
        seen.add(name)
    return problems


def _without(section: Any, key: str) -> Any:
    return {name: value for name, value in section.items() if name != key} if isinstance(section, dict) else section
