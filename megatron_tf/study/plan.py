"""The runs of a study: their configurations, parents and costs, computed from its arms. Arithmetic, no torch.

A run is a node: an arm, a seed, and a value of the arm's sweep. Nodes with the same parent share its run, so what they
have in common is trained once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tf.config.extends import merged
from megatron_tf.config.load import apply_override, build_config, read_file
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Moment
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.errors import ConfigError
from megatron_tf.growth.axes import GO_ON
from megatron_tf.growth.rules import chain_problems
from megatron_tf.paths import literal
from megatron_tf.shipped import find_configuration
from megatron_tf.study.file import Arm, Study
from megatron_tf.study.sweep import Choice, choose
from megatron_tf.telemetry.text import count_of

Values = dict[str, Any]
Outcome = Callable[["Node"], "float | None"]  # the last validation loss of a run; None when it has not ended


@dataclass(frozen=True)
class Position:
    """How far a run is. `tokens` and `flops` include its parents, `step` is the run's own count."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Node:
    """One run.

    `value`: of the swept key; None without a sweep.  `is_trial`: whether it only tries that value for the sweep.
    `waits`: the arm whose sweep must end before the configuration is known; until then `value` is a guess. None: none.
    `plain`: the configuration without what the plan adds (folders, budget), for the arms that inherit it.
    `begin`: where its parent is left; after a growth its step is 0.  `end`: of the run.
    """

    name: str
    arm: Arm
    seed: int
    value: float | None
    is_trial: bool
    waits: str | None
    folder: Path
    config: RunConfig
    plain: Values
    parent: Node | None
    begin: Position
    end: Position

    @property
    def own_flops(self) -> float:
        return self.end.flops - self.begin.flops

    @property
    def own_tokens(self) -> int:
        return self.end.tokens - self.begin.tokens

    @property
    def parameters(self) -> int:
        return num_parameters(self.config.model)

    def position(self, at: Moment) -> Position:
        """The position of its checkpoint `at`."""
        decay = self.config.optimizer.schedule.decay_steps
        if at == "end" or decay is None:
            return self.end
        return _advance(self.begin, self.end.step - decay, self.config)


@dataclass(frozen=True)
class Plan:
    """`nodes`: in an order in which they can run.  `choices`: by arm, of all sweeps, also those that have not ended.

    `runs`: of each arm and seed, without trials. One that waits may be a guess that is a trial among the nodes.
    """

    study: Study
    nodes: tuple[Node, ...]
    choices: Mapping[str, Choice]
    runs: Mapping[tuple[str, int], Node]

    def of(self, arm: Arm) -> list[Node]:
        """The runs of an arm without trials, one for each seed."""
        return [self.runs[arm.name, seed] for seed in self.study.seeds_of(arm)]

    @property
    def reference(self) -> Arm | None:
        """The arm that others are compared with; None when no arm is comparable."""
        if self.study.reference is not None:
            return self.study.arm(self.study.reference)
        return next((arm for arm in self.study.arms if arm.comparable), None)


def make_plan(study: Study, outcome: Outcome = lambda node: None) -> Plan:
    """The runs of `study`, given the losses of those that have ended. ConfigError with the problems of all arms."""
    nodes: dict[str, Node] = {}
    choices: dict[str, Choice] = {}
    runs: dict[tuple[str, int], Node] = {}
    problems: list[str] = []
    for arm in in_order(study):
        if any((name, study.seeds_of(study.arm(name))[0]) not in runs for name in arm.needs):
            continue  # the other arm has failed, and its problem is in the list already
        try:
            found = list(_runs_of(study, arm, runs, choices, outcome))
        except ConfigError as error:
            problems += [f"arm {arm.name}: {problem}" for problem in error.problems]
            continue
        for node in found:
            if not node.is_trial:
                runs[arm.name, node.seed] = node
            # A trial of the arm's own length becomes the arm's run when its value is chosen.
            if node.name not in nodes or (not node.is_trial and node.waits is None):
                nodes[node.name] = node
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Plan(study, tuple(nodes.values()), choices, runs)


def in_order(study: Study) -> list[Arm]:
    """The arms, each after those that it needs."""
    by_name = {arm.name: arm for arm in study.arms}
    ordered: dict[str, Arm] = {}

    def add(arm: Arm) -> None:
        for name in arm.needs:
            if name not in ordered:
                add(by_name[name])
        ordered.setdefault(arm.name, arm)

    for arm in study.arms:
        add(arm)
    return list(ordered.values())


def _runs_of(
    study: Study, arm: Arm, runs: Mapping[tuple[str, int], Node], choices: dict[str, Choice], outcome: Outcome
) -> Iterator[Node]:
    seeds, value, waits = study.seeds_of(arm), None, None
    if arm.sweep is not None:
        trials: dict[float, Node] = {}

        def loss_of(value: float) -> float | None:
            trial = trials[value] = _node(study, arm, seeds[0], value, runs, is_trial=True)
            return None if trial.waits else outcome(trial)

        def is_possible(value: float) -> bool:
            try:
                _node(study, arm, seeds[0], value, runs, is_trial=True)
            except ConfigError:
                return False
            return True

        choice = choices[arm.name] = choose(arm.sweep, loss_of, is_possible)
        yield from (trials[value] for value in choice.values)
        value = choice.value
        if value is None:
            value, waits = choice.values[len(choice.values) // 2], arm.name
    elif arm.value_of is not None:
        other = runs[arm.value_of, study.seeds_of(study.arm(arm.value_of))[0]]
        value, waits = other.value, other.waits
    for seed in seeds:
        yield _node(study, arm, seed, value, runs, waits=waits)


def _node(
    study: Study,
    arm: Arm,
    seed: int,
    value: float | None,
    runs: Mapping[tuple[str, int], Node],
    *,
    waits: str | None = None,
    is_trial: bool = False,
) -> Node:
    parent = None if arm.parent is None else runs[arm.parent, seed]
    flops, tokens, name = arm.flops, arm.tokens, arm.name
    key = _swept_key(study, arm)
    if key is not None:
        is_short = is_trial and arm.sweep is not None and arm.sweep.flops is not None
        if is_short and arm.sweep is not None:
            flops, tokens = arm.sweep.flops, None
        name += f"/{'trial_' if is_short else ''}{key.rpartition('.')[2]}={value:g}"
    name += f"/seed{seed}"
    folder = Path(study.dir, "runs", name)
    at = _moment(arm, parent)
    begin = Position() if parent is None else parent.position(at)
    if parent is not None and arm.by == "growth":
        begin = Position(0, begin.tokens, begin.flops)
    plain = _plain_values(study, arm, parent, value)
    values = copy.deepcopy(plain)
    run = {"name": f"{study.name}-{name}", "dir": literal(str(folder)), "seed": seed}
    values["run"] = {**(values.get("run") or {}), **run}
    if parent is not None:
        section = "branch" if arm.by == "branch" else "growth"
        values[section] = {**(values.get(section) or {}), "from": literal(str(parent.folder)), "at": at}
    if flops is not None or tokens is not None:
        _add_budget(values, arm, begin, flops, tokens)
    if any(_moment(child, None) != "end" for child in study.arms if child.parent == arm.name):
        _keep_before_decay(values)
    config = build_config(values, [])
    validate(config, study.ranks)
    if config.training.stop_when is not None:
        raise ConfigError(
            "training.stop_when: would end a run before its budget, which arms are compared at. Set it to null."
        )
    if parent is not None and arm.by == "growth" and (problems := chain_problems([*_lineage(parent), config])):
        # an arm has no section `branch`
        raise ConfigError([problem.replace(GO_ON, "set by: branch") for problem in problems])
    end = _advance(begin, plan_batches(config, study.ranks).train_steps, config)
    if end.step <= begin.step:
        raise ConfigError(
            f"its parent has done {begin.step:,} steps where it branches off, and the arm ends at step {end.step:,}. "
            "Give it more steps."
        )
    waits = waits or (None if parent is None else parent.waits)
    return Node(name, arm, seed, value, is_trial, waits, folder, config, plain, parent, begin, end)


def _swept_key(study: Study, arm: Arm) -> str | None:
    """The key of the arm's own sweep, or of the sweep whose value it takes; None without either."""
    sweep = arm.sweep if arm.value_of is None else study.arm(arm.value_of).sweep
    return None if sweep is None else sweep.key


def _moment(arm: Arm, parent: Node | None) -> Moment:
    """The checkpoint of its parent that an arm starts from. `parent` None, not known yet: before_decay unless `at` is
    given."""
    if arm.at is not None:
        return arm.at
    return "before_decay" if parent is None or parent.config.optimizer.schedule.type == "wsd" else "end"


def _plain_values(study: Study, arm: Arm, parent: Node | None, value: float | None) -> Values:
    problems: list[str] = []
    if arm.config is not None:
        file, problems = read_file(find_configuration(arm.config))
        if "stages" in file:
            raise ConfigError(f"config: {arm.config} is a chain. Give one run; each size is an arm with a parent.")
        values = merged(file, study.common)
    else:
        values = copy.deepcopy(study.common if parent is None else parent.plain)
    values = merged(values, arm.overrides)
    growth = values.get("growth")
    if isinstance(growth, dict) and "from" in (arm.overrides.get("growth") or {}):
        raise ConfigError(f"growth.from: {growth['from']}, but an arm starts from another arm. Name it as parent.")
    if growth is not None and parent is None:
        raise ConfigError("growth: is given, but the arm has no parent to grow from. Name one, or set growth to null.")
    if arm.by == "branch":
        values["growth"] = None
    values.pop("branch", None)
    if (key := _swept_key(study, arm)) is not None:
        problems += apply_override(values, f"{key}={_written(value)}")
    if problems:
        raise ConfigError(problems)
    return values


def _written(value: float | None) -> str:
    """A swept value as YAML. Some keys take whole numbers only, which have no point."""
    return str(int(value)) if value is not None and value.is_integer() else repr(value)


def _add_budget(values: Values, arm: Arm, begin: Position, flops: float | None, tokens: float | None) -> None:
    """Sets the number of steps, and the decay, so that the run ends at the budget."""
    training = values.get("training")
    given = training if isinstance(training, dict) else {}
    values["training"] = {**given, "train_tokens": None, "train_samples": None, "train_steps": 1}
    plain_schedule = {"optimizer": {"schedule": {"type": "constant", "decay_steps": None, "warmup_steps": 0}}}
    model = build_config(merged(merged(values, plain_schedule), {"checkpoint": {"keep_before_decay": False}}), [])
    a_step = model.training.global_batch_size * model.model.seq_length
    whole, spent, unit = float(tokens or 0), float(begin.tokens), "tokens"
    if flops is not None:
        a_step *= flops_per_token(model.model)
        whole, spent, unit = flops, begin.flops, "flops"
    steps = round((whole - spent) / a_step)
    if steps < 1:
        parents = f"its parents take {spent:.4g} of them and " if spent else ""
        raise ConfigError(
            f"{unit}: {whole:.4g}, but {parents}one step takes {a_step:.4g}, so no step is left to do. Set it to "
            f"{spent + a_step:.4g} or more."
        )
    values["training"]["train_steps"] = begin.step + steps
    if arm.decay is None:
        return
    decay = max(1, round(arm.decay * whole / a_step))
    optimizer = values["optimizer"]
    schedule = optimizer.get("schedule") or {}
    warmup = 0 if begin.step else schedule.get("warmup_steps", 0)
    if decay + warmup > steps:
        raise ConfigError(
            f"decay: {arm.decay:g} of {whole:.4g} {unit} makes {count_of(decay, 'step')}, but the arm's own "
            f"{count_of(steps, 'step')} leave {max(0, steps - warmup):,} after the warm-up. Lower it, or start the arm "
            "earlier."
        )
    values["optimizer"] = {**optimizer, "schedule": {**schedule, "type": "wsd", "decay_steps": decay}}


def _keep_before_decay(values: Values) -> None:
    schedule = (values.get("optimizer") or {}).get("schedule") or {}
    if schedule.get("type") == "wsd":
        values["checkpoint"] = {**(values.get("checkpoint") or {}), "keep_before_decay": True}


def _lineage(node: Node) -> list[RunConfig]:
    """The configurations that led to a node by growth, oldest first. A branch takes the place of the run it left."""
    if node.parent is None:
        return [node.config]
    before = _lineage(node.parent)
    if node.arm.by == "growth":
        return [*before, node.config]
    return [*before[:-1], node.config.model_copy(update={"growth": before[-1].growth})]


def _advance(begin: Position, step: int, config: RunConfig) -> Position:
    tokens = (step - begin.step) * config.training.global_batch_size * config.model.seq_length
    return Position(step, begin.tokens + tokens, begin.flops + float(tokens) * flops_per_token(config.model))
