"""The account of a run that is started again: its history in the checkpoint, and the changes of its configuration.

The run follows its new configuration in all that can change, such as the learning rate; each such key is announced and
goes into the history in the checkpoint. The past cannot change: if the run was grown by one method, a new growth.method
has no effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tf.config.load import dump_config, load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth, GrowthMethods
from megatron_tf.diagnosis.run_facts import defaults, settings
from megatron_tf.durable import open_plain, read_plain, write_atomically
from megatron_tf.errors import ConfigError, file_errors
from megatron_tf.growth.methods import BANK, SPLIT
from megatron_tf.growth.source import PRUNED
from megatron_tf.training.start import Start
from megatron_tf.training.warm_start import EVENT, KEY

CONFIG_NAME = "config.yml"
_LARGEST_CONFIG = 2**26


@dataclass(frozen=True)
class Account:
    """`config`: the one in effect.  `lines`: for the log.  `ineffective`: warnings of keys without effect.

    `origin`: where the weights come from, as the end of a sentence; empty for initial ones.
    `history`: events of the run so far, for the checkpoint, see `checkpoint.records`.
    """

    config: RunConfig
    lines: tuple[str, ...]
    origin: str
    history: tuple[Mapping[str, Any], ...]
    ineffective: tuple[str, ...] = ()


def account(config: RunConfig, start: Start, ranks: int, earlier: Mapping[str, str] | None) -> Account:
    """The account of a run of `config` on `ranks` ranks from `start` on.

    `earlier`: the settings of a run whose checkpoint, of an older version, does not have them.
    """
    history, origin = tuple(start.run_state.get("history", ())), _origin(start)
    if not start.resumed:
        return Account(config, (), origin, history)
    config, ineffective = _as_it_was(config, start)
    step, before = start.progress.step, start.run_state.get("settings", earlier)
    if before is None:
        unknown = [f"configuration: what it was until step {step:,} is not known"] if step else []
        return Account(config, tuple(unknown), origin, history, ineffective)
    now = run_settings(config, ranks)
    new = _new_keys(config, before)
    changes = {
        key: [before.get(key), now.get(key)]
        for key in {**before, **now}
        if key not in new and before.get(key) != now.get(key) and not _has_keys(key, before, now)
    }
    changes |= start.changes
    if not changes:
        return Account(config, (f"configuration: as it was until step {step:,}",), origin, history, ineffective)
    lines = [f"configuration: {len(changes)} of its values changed since step {step:,}"]
    lines += [f"  {key}: {_told(old)} before, {_told(new)} now" for key, (old, new) in changes.items()]
    event = {"event": "resumed", "step": step, "tokens": start.progress.tokens, "changes": changes}
    return Account(config, tuple(lines), origin, (*history, event), ineffective)


def run_settings(config: RunConfig, ranks: int) -> dict[str, str]:
    """Every key of the configuration, and the number of ranks, with its value as text."""
    return {**settings(config), "ranks": str(ranks)}


def _new_keys(config: RunConfig, before: Mapping[str, str]) -> set[str]:
    """Keys that an older version did not have in sections that it had, where they now have their defaults."""
    sections = {_section(key) for key in before}
    return {key for key in defaults(config) - before.keys() if _section(key) in sections}


def _has_keys(key: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether `key` is a section or list that is empty (null, []) in one of the two: its own keys show the change."""
    return any(other.startswith((f"{key}.", f"{key}[")) for other in {**before, **now})


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def earlier_settings(run_dir: Path) -> dict[str, str] | None:
    """The settings in the folder's config.yml; None when it cannot be read any more."""
    path = run_dir / CONFIG_NAME
    try:
        with file_errors(ConfigError, path, "It is passed over."), open_plain(path):
            return settings(load_config(path))
    except ConfigError:
        return None


def keep_config(run_dir: Path, config: RunConfig) -> None:
    """Write config.yml. An earlier, different one becomes config.1.yml, the next one config.2.yml, and so on."""
    path, content = run_dir / CONFIG_NAME, dump_config(config).encode()
    if os.path.exists(path) and (old := read_plain(path, _LARGEST_CONFIG)) != content:
        number = 1
        while os.path.lexists(kept := path.with_suffix(f".{number}.yml")):
            number += 1
        write_atomically(kept, old)
    write_atomically(path, content)


def _as_it_was(config: RunConfig, start: Start) -> tuple[RunConfig, tuple[str, ...]]:
    """(`config` with the keys of the past as they were, a line for each key that therefore has no effect)."""
    lines: list[str] = []
    given, began_with = config.training.init_from, _warm_start(start)
    if given is not None and (began_with is None or not _leads_to(given, began_with)):
        lines.append(f"{KEY}: {given} has no effect: the run began with {began_with or 'other weights'}")
        training = config.training.model_copy(update={"init_from": began_with})
        config = config.model_copy(update={"training": training})
    if config.growth is None:
        return config, tuple(lines)
    if not start.growth_history or start.growth_history[-1]["method"] == PRUNED:
        lines.append(f"growth: has no effect: the run goes on from a checkpoint of its own{_origin(start)}")
        return config.model_copy(update={"growth": None}), tuple(lines)
    true = dict(_true_growth(config.growth, start.growth_history[-1]))
    lines += [f"growth.{key}: {value} has no effect: the run was grown {how}" for key, (value, how, _) in true.items()]
    update = {name: value for _, _, fields in true.values() for name, value in fields.items()}
    return config.model_copy(update={"growth": config.growth.model_copy(update=update)}), tuple(lines)


def _true_growth(growth: Growth, entry: Mapping[str, Any]) -> Iterator[tuple[str, tuple[object, str, dict[str, Any]]]]:
    """For each key that is not as it was at the growth in `entry`: the value given, how the run was grown, and the
    fields of `growth` that say so."""
    grew = [kind for kind, count in entry["to"].items() if count > entry["from"][kind]]
    method = entry["method"]
    methods = {kind: method if isinstance(method, str) else method.get(kind, growth.method_of(kind)) for kind in grew}
    given = {kind: growth.method_of(kind) for kind in grew}
    if methods != given:
        one = dict.fromkeys(methods.values())
        fields = {"method": next(iter(one)), "methods": GrowthMethods()}
        if len(one) > 1:
            # a bank is chosen for the model, other methods for a kind of tokens as well
            of_kinds = {kind: name for kind, name in methods.items() if name != BANK}
            fields = {"methods": GrowthMethods.model_validate(of_kinds)}
            if BANK in one:
                fields["method"] = BANK
        yield "method", (_method(given), f"by {_method(methods)}", fields)
    elif (method == SPLIT) != (growth.method == SPLIT):
        yield "method", (growth.method, f"by {_method(method)}", {"method": method})
    layers = entry.get("layers")
    if layers is not None and layers["method"] != growth.depth_method:
        was = layers["method"]
        yield "depth_method", (growth.depth_method, f"by {was}", {"depth_method": was})
    width = entry.get("width")
    if width is not None and (was := width.get("clone_noise", 0.0)) != growth.clone_noise:
        yield "clone_noise", (growth.clone_noise, f"with {was}", {"clone_noise": was})
    for key in ("noise", "moments", "moments_factor"):
        was, now = entry.get(key, 1.0 if key == "moments_factor" else None), getattr(growth, key)
        if was is not None and was != now:
            yield key, (now, f"with {was}", {key: was})
    if not _leads_to(growth.source, entry["source"]):
        yield "from", (growth.source, f"from {entry['source']}", {"source": entry["source"]})


def _origin(start: Start) -> str:
    if start.growth_history:
        entry = start.growth_history[-1]
        if entry["method"] == PRUNED:
            return f", pruned from {entry['source']}"
        return f", grown from {entry['source']} by {_how(entry)}"
    began_with = _warm_start(start)
    return f", begun with the weights of {began_with}" if began_with else ""


def _warm_start(start: Start) -> str | None:
    """The checkpoint or export that the run took its first weights from."""
    return next((event.get("source") for event in start.run_state.get("history", ()) if event["event"] == EVENT), None)


def _how(entry: Mapping[str, Any]) -> str:
    """The methods of a growth in words."""
    tokens, layers = _method(entry["method"]), entry.get("layers")
    of_layers = [] if layers is None else [f"{layers['from']} -> {layers['to']} layers by {layers['method']}"]
    width = entry.get("width")
    of_width = [] if width is None else [f"width {_widths(width)} by cloning"]
    return ", ".join([*of_width, *([tokens] if tokens else []), *of_layers])


def _widths(width: Mapping[str, Any]) -> str:
    return f"{width['from']['hidden_size']} -> {width['to']['hidden_size']}"


def _method(method: str | Mapping[str, str]) -> str:
    if isinstance(method, str):
        return method
    distinct = set(method.values())
    return distinct.pop() if len(distinct) == 1 else ", ".join(f"{kind} {name}" for kind, name in method.items())


def _leads_to(given: str, source: str) -> bool:
    """Whether `source` is the checkpoint that `given`, the path of a run, checkpoints folder or checkpoint, named."""
    folder, place = os.path.realpath(given), os.path.realpath(source)
    return place == folder or place.startswith(folder + os.sep)


def _told(value: str | None) -> str:
    return "not given" if value is None else value
