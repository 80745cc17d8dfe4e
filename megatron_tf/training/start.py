"""The start of a run: its own newest checkpoint, that of another run or of a smaller model, other weights, or initial
ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.architecture import check_same_architecture, stored_model
from megatron_tf.checkpoint.fingerprint import changed_sources
from megatron_tf.checkpoint.format import CheckpointIndex
from megatron_tf.checkpoint.kinds import CHECKPOINTS_FOLDER
from megatron_tf.checkpoint.manager import (
    ALONE,
    Ranks,
    find_checkpoint,
    find_latest,
    from_first,
    verify_checkpoint,
)
from megatron_tf.checkpoint.moments import resolve_at
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.run_plan import RunPlan, plan_batches, plan_run
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.errors import CheckpointError, ConfigError, DamagedError, shortened
from megatron_tf.growth.grow import grow
from megatron_tf.growth.layers import DEPTH_METHODS
from megatron_tf.growth.methods import SPLIT
from megatron_tf.growth.width import before_cloning
from megatron_tf.state.parameters import in_layer, layer_of, parameter_table
from megatron_tf.state.sources import StateSource, initial_source
from megatron_tf.telemetry.text import bullets
from megatron_tf.training.early_stop import EarlyStop
from megatron_tf.training.run_folder import copied_from
from megatron_tf.training.warm_start import find_weights, open_weights


@dataclass(frozen=True)
class Progress:
    """How far a run is. `samples` is the position in the data; `tokens` counts since the very first stage."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Start:
    """Everything a run starts from.

    `grown_from`: the open source checkpoint of a growth that is not proved yet.  `missing_source`: why that of such a
    growth cannot be opened, as a clause; else empty.  `resumed`: from a checkpoint of its own.
    `changes`: facts that have changed without a key of the configuration: [before, now] by name.
    """

    source: StateSource
    description: str
    progress: Progress = Progress()
    growth_history: tuple[Mapping[str, Any], ...] = ()
    grown_from: CheckpointReader | None = None
    missing_source: str = ""
    trackers: Mapping[str, str] = field(default_factory=dict)
    run_state: Mapping[str, Any] = field(default_factory=dict)
    resumed: bool = False
    changes: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def earlier_tokens(self) -> int:
        """Tokens that the models before this run's growth were trained on."""
        return _earlier_tokens(self.growth_history)

    @property
    def run_tokens(self) -> int:
        """Tokens that this run itself was trained on so far."""
        return self.progress.tokens - self.earlier_tokens

    def earlier_flops(self, model: Model) -> float:
        """Floating-point operations of the training before this run's growth; `model` is the run's."""
        flops, tokens = 0.0, 0
        for entry, before in zip(self.growth_history, _models_before(model, self.growth_history)):
            flops += (entry["tokens"] - tokens) * flops_per_token(before)
            tokens = entry["tokens"]
        return flops

    def plan(self, config: RunConfig, world_size: int) -> RunPlan:
        """From here to the end of a run of `config`."""
        return plan_run(config, world_size, self.progress.step, self.run_tokens, self.run_state.get("schedule_unit"))

    @property
    def old_tokens(self) -> dict[str, int]:
        """Parameter tokens of each kind of projection before the last growth; empty for a model that never grew."""
        return dict(self.growth_history[-1]["from"]) if self.growth_history else {}

    def first_new(self, model: Model) -> dict[str, int]:
        """Where, in the flattened tensors of `model`, the tokens of its last growth begin."""
        if not self.growth_history:
            return {}
        before = parameter_table(self.model_before(model))
        old = {self.name_now(name, model): spec.numel for name, spec in before.items()}
        # What was split lies between its copies, and none of them is older than the others. Tokens that stay in no slot
        # are fewer than before, and old.
        copied = self.growth_history[-1].get("method") == SPLIT
        return {
            name: 0 if copied and old.get(name, 0) < spec.numel else old.get(name, 0)
            for name, spec in parameter_table(model).items()
            if spec.growable
        }

    def model_before(self, model: Model) -> Model:
        """The model before the last growth; `model` is the run's, which has grown."""
        (before,) = _models_before(model, self.growth_history[-1:])
        return before

    def name_now(self, name: str, model: Model) -> str:
        """The parameter or projection of `model` that was `name` before the last growth."""
        layer = layer_of(name)
        return name if layer is None else in_layer(name, self._old_at(model)[layer])

    def new_layers(self, model: Model) -> frozenset[int]:
        """The layers of `model` that its last growth added."""
        return frozenset(range(model.num_layers)).difference(self._old_at(model))

    def taken_from(self, model: Model) -> Sequence[int | None]:
        """For each layer of `model` the one before the last growth that it began as a copy of; None: it is initial."""
        layers = self.growth_history[-1].get("layers") if self.growth_history else None
        if layers is None:
            return range(model.num_layers)
        return DEPTH_METHODS[layers["method"]](layers["from"], layers["to"]).taken

    def _old_at(self, model: Model) -> Sequence[int]:
        """Where each layer of the model before the last growth stands now."""
        layers = self.growth_history[-1].get("layers") if self.growth_history else None
        return range(model.num_layers) if layers is None else layers["old_at"]


def _earlier_tokens(growth_history: Sequence[Mapping[str, Any]]) -> int:
    return growth_history[-1]["tokens"] if growth_history else 0


def _token_counts(model: Model) -> dict[str, int]:
    return architecture_of(model).token_counts(model)


def _models_before(model: Model, growth_history: Sequence[Mapping[str, Any]]) -> list[Model]:
    """The model before each of these growths, oldest first; `model` is the one after all of them."""
    found: list[Model] = []
    for entry in reversed(growth_history):
        if (layers := entry.get("layers")) is not None:
            model = model.model_copy(update={"num_layers": layers["from"]})
        model = before_cloning(model, entry)
        if (changed := entry.get("sparse")) is not None or entry.get("method") == SPLIT:
            # a history of an earlier version has splits of dense models alone
            model = architecture_of(model).with_sparse(model, None if changed is None else changed["from"])
        model = architecture_of(model).with_token_counts(model, entry["from"])
        found.append(model)
    return found[::-1]


def checkpoints_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / CHECKPOINTS_FOLDER


def choose(config: RunConfig, ranks: Ranks = ALONE) -> tuple[Path | None, list[str]]:
    """(The checkpoint to start from, or None for initial weights; unusable checkpoints, with reasons).

    All its checksums are compared; `ranks` share the reading and get the same answer, or the same error.
    CheckpointError when the run has checkpoints but none can be used, or when its source has no complete one;
    ConfigError when the run must not resume and has checkpoints.
    """
    own = checkpoints_folder(config)
    latest, passed = find_latest(own, verify=config.checkpoint.resume == "auto", ranks=ranks)
    if config.checkpoint.resume == "never" and (latest is not None or passed):
        # a later resume would take the highest step, whichever of the two runs it is of
        name = latest.name if latest is not None else passed[0][0].name
        raise ConfigError(
            f"checkpoint.resume: is never, but {own} holds {name} of an earlier run. Choose another run.dir, "
            "or delete that folder."
        )
    if latest is None and passed:
        reasons = bullets([reason for _, reason in passed])
        raise CheckpointError(
            f"{own}: there are checkpoints of this run, but none that can be used:{reasons}\n"
            "Starting over would write over them. Restore one, or move them away, or choose another run.dir."
        )
    unused = [f"{path}: not used: {reason}" for path, reason in passed]
    if latest is None and config.training.init_from is not None:
        latest = find_weights(config.training.init_from, ranks)
    for key, section in (("growth", config.growth), ("branch", config.branch)):
        if latest is None and section is not None:
            try:
                latest = resolve_at(section.source, section.at, ranks)
                verify_checkpoint(latest, ranks)
                _, newer = from_first(partial(find_checkpoint, section.source), ranks)
            except CheckpointError as error:
                raise CheckpointError(f"{key}.from: {error}") from error
            unused += [f"{key}.from: not used: {reason}" for reason in newer]
    return latest, unused


def first_stage_to_run(stages: Sequence[RunConfig], world_size: int) -> int:
    """Number of the first stage of a chain that is not complete; of the last one when all before it are.

    ConfigError when that stage has steps to do although a later one was grown from it already.
    """
    for number, config in enumerate(stages[:-1]):
        if _is_complete(config, world_size):
            continue
        for later in stages[number + 1 :]:
            if find_latest(checkpoints_folder(later), verify=False)[0] is not None:
                raise ConfigError(
                    f"stage {config.run.name}: has steps to do, but {later.run.dir} was grown from it already. Move "
                    "that folder away to grow it anew, or restore the length and the folder of this stage."
                )
        return number
    return len(stages) - 1


def _is_complete(config: RunConfig, world_size: int) -> bool:
    """Whether the run has reached its last step or ended early, judged by its newest checkpoint without its weights."""
    latest, _ = find_latest(checkpoints_folder(config), verify=False)
    if latest is None:
        return False
    index = open_checkpoint(latest).index
    stored_model(index)  # refuses an index that contradicts itself
    run_tokens = index.tokens - _earlier_tokens(index.growth_history)
    if EarlyStop(config.training.stop_when, index.run.get("early_stop", {})).reason is not None:
        return True
    return index.step >= plan_batches(config, world_size, index.step, run_tokens).train_steps


def begin(config: RunConfig, path: Path | None, data: Mapping[str, Any]) -> Start:
    """The start from `path` as `choose` found it.

    `data`: the fingerprint of the training data. CheckpointError when the checkpoint is of another architecture
    or was trained on other data; ConfigError when the model cannot be grown from it.
    """
    if path is None:
        return Start(initial_source(config), f"initial weights of seed {config.run.seed}")
    # of the run's own folder, although what lies there may be a link to elsewhere
    own = path.parent.resolve() == checkpoints_folder(config).resolve()
    if own or config.branch is not None:
        reader = open_checkpoint(path)
        index = reader.index
        if not own:
            _check_longer_than_branch(config, index)
        check_same_architecture(index, config.model, config.optimizer.type, path, "" if own else "branch.from")
        _check_data(config, index.data, data, path)
        trackers, note = _own_trackers(config, index) if own else ({}, "")
        how = "resumed from" if own else "branched off"
        other_data = changed_sources(index.data, data) if "sources" in index.data else None
        return Start(
            CheckpointSource(reader),
            f"{how} {path} at step {index.step:,}{note}",
            Progress(index.step, index.samples, index.tokens),
            index.growth_history,
            *_unproved(index),
            trackers=trackers,
            run_state=index.run,
            resumed=True,
            changes={"data.train (content)": [shortened(words, 500) for words in other_data]} if other_data else {},
        )
    if config.growth is None:
        return _warm_start(config, path)
    reader = open_checkpoint(path)
    grown = grow(reader, config.model, config.growth, seed=config.run.seed, data=data, optimizer=config.optimizer.type)
    return Start(
        grown.source,
        f"grown from {path}",
        Progress(0, grown.samples, grown.tokens),
        grown.growth_history,
        grown_from=reader,
    )


def _check_longer_than_branch(config: RunConfig, index: CheckpointIndex) -> None:
    tokens = index.tokens - _earlier_tokens(index.growth_history)
    training = config.training
    lengths = (("train_steps", training.train_steps, index.step), ("train_tokens", training.train_tokens, tokens))
    for key, length, begins in lengths:
        if length is not None and length <= begins:
            raise ConfigError(
                f"training.{key}: {length:,}, but the branch begins at {begins:,}. Set it to more than {begins}."
            )


def _own_trackers(config: RunConfig, index: CheckpointIndex) -> tuple[Mapping[str, str], str]:
    """(The tracker ids to go on with, a message about them). A copied run must not log into its original's."""
    origin = copied_from(index.run, Path(config.run.dir))
    if not index.trackers or origin is None:
        return index.trackers, ""
    ids = ", ".join(f"{name} {number}" for name, number in index.trackers.items())
    return {}, (
        f"; this is a copy of {origin}, which keeps its run at the tracker ({ids}). Here a new one begins; to "
        "go on in that of wandb, set WANDB_RUN_ID"
    )


def _warm_start(config: RunConfig, path: Path) -> Start:
    source, event = open_weights(path, config.model)
    trained = f" (step {event['step']:,}, {event['tokens']:,} tokens)" if event["step"] else ""
    return Start(
        source,
        f"begins with the weights of {path}{trained}; optimizer, schedule and data from their beginning",
        run_state={"history": [event]},
    )


def _unproved(index: CheckpointIndex) -> tuple[CheckpointReader | None, str]:
    """The source checkpoint of a growth that was done as a file operation and is not yet verified, or None; and why it
    cannot be opened."""
    if index.step > 0 or not index.growth_history:
        return None, ""
    entry = index.growth_history[-1]
    model = stored_model(index)
    if entry["loss_before"] is not None or entry["to"] != _token_counts(model):
        return None, ""
    source = Path(entry["source"])
    try:
        return open_checkpoint(source), ""
    except CheckpointError as error:
        if os.path.lexists(source):
            reason = error.problem if isinstance(error, DamagedError) else error
            return None, f"the smaller model's checkpoint cannot be read ({reason})"
        return None, f"the smaller model's checkpoint {source} is not there"


def _check_data(config: RunConfig, stored: Mapping[str, Any], data: Mapping[str, Any], path: Path) -> None:
    if not stored or config.checkpoint.allow_data_change:
        return
    problems, remedies = [], []
    if stored.get("seed") != data.get("seed"):
        problems.append(
            f"run.seed: the checkpoint's samples are in the order of seed {stored.get('seed')}, "
            f"now it is {data.get('seed')}"
        )
        remedies.append(f"set run.seed={stored.get('seed')}")
    if changed := changed_sources(stored, data):
        problems.append(f"data.train: the checkpoint was trained on {changed[0]}; now it is {changed[1]}")
        remedies.append("restore the data")
    if not problems:
        return
    raise CheckpointError(
        f"{path}: the sample order would not continue.{bullets(problems)}\n"
        f"To go on as before, {' and '.join(remedies)}; to go on all the same, set checkpoint.allow_data_change=true."
    )
