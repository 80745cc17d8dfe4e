"""The configuration of a fine-tuning run: a frozen base model, an adapter, and examples to train it on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import ErrorDetails

from megatron_tf.checks import did_you_mean
from megatron_tf.config.extends import read_extended
from megatron_tf.config.fields import Count, NonNegative, Path, Positive, Seconds, Section
from megatron_tf.config.load import apply_override
from megatron_tf.config.lookup import key_name, without_null_sections
from megatron_tf.config.mistakes import follows_from_another, value_sentence
from megatron_tf.config.nearest import either
from megatron_tf.config.rules.schedule import rate_problems
from megatron_tf.config.sections.optimizer import OF_CANDIDATES, Optimizer
from megatron_tf.config.yaml_core import dump_yaml, parse_yaml
from megatron_tf.errors import ConfigError
from megatron_tf.shipped import finetunings
from megatron_tf.text_files import read_text_file

_MOST_BYTES = 1 << 24


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Files = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


class Run(Section):
    name: str = "finetune"
    """Shown at trackers."""
    dir: Path
    """Folder of everything that the run writes: config.yml, metrics.jsonl, train.log, checkpoints/, adapter/."""
    tags: tuple[str, ...] = ()
    """Words to find the run by at trackers."""
    notes: str = ""
    """A text on the run, shown at trackers."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Determines the new tokens and the order of the examples."""
    max_hours: Positive | None = None
    """[hours] The run saves and stops when this time has passed since its start."""
    hang_seconds: Annotated[float, Field(ge=1, le=1e7)] = 900.0
    """[seconds] A longer step, or a longer silence of a rank, ends the run."""
    timeout_seconds: Seconds = 1800.0
    """[seconds] A collective that waits longer ends the run."""


class Base(Section):
    path: Path
    """Folder of a causal language model of transformers, with its tokenizer."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the frozen weights. Tokens, their gradients and moments are fp32."""


class AdapterSection(Section):
    tokens: Count | None = None
    """[tokens] Parameter tokens of each branch. null: 64, or as many as adapter.from has."""
    modules: tuple[str, ...] = ()
    """Modules that get a branch: attention and mlp, either of them, or linear alone; in a TokenFormer pattention alone.
    Empty: those of adapter.from; without it attention and mlp, in a TokenFormer pattention."""
    source: Path | None = Field(None, alias="from")
    """Folder of an adapter to begin with, such as a grown one."""


class Data(Section):
    train: Files = Field(min_length=1)
    """Files of one JSON object a line: prompt and answer, messages, or text."""
    validation: Files = ()
    """Files of the same kind, to measure the loss on."""
    seq_length: Count
    """[tokens] Length of packed sequences, and the most that an example may have."""
    packing: bool = True
    """Put several examples into a sequence; attention and positions begin anew with each."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with an example of more than seq_length tokens. The field text is cut into pieces instead."""


class Training(Section):
    train_steps: Count
    """[steps] Optimizer steps."""
    global_batch_size: Count
    """[sequences] Of an optimizer step, over all ranks."""
    micro_batch_size: Count
    """[sequences] Computed at once by each rank."""
    gradient_clipping: NonNegative = 1.0
    """Largest global L2 norm of the gradient. 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each layer of the base in the backward pass."""


class Parallel(Section):
    shard: Literal["parameters"] | None = None
    """parameters: each rank keeps a part of the base, of the tokens and of their moments. null: each keeps all."""


class Checkpoint(Section):
    interval_steps: Count | None = None
    """[steps] Between checkpoints. The last step is always saved."""
    keep_last: Count = 2
    """[checkpoints] Older ones are deleted."""


class Interval(Section):
    interval_steps: Count
    """[steps] Between evaluations. The last step is always evaluated."""


class Logging(Section):
    interval_steps: Count = 10
    """[steps] Between logged steps. The last step is always logged."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """In addition to metrics.jsonl, which is always written."""
    project: str = "megatron_tf"
    """Name of the project at the tracker."""


class FinetuneConfig(Section):
    run: Run
    base: Base
    adapter: AdapterSection = AdapterSection()
    parallel: Parallel = Parallel()
    data: Data
    training: Training
    optimizer: SerializeAsAny[Optimizer]
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Interval = Interval(interval_steps=100)
    logging: Logging = Logging()


def load_finetune(path: FilePath, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a YAML file and those that it extends, apply `overrides` ("section.field=value"), check every key.
    ConfigError with all problems."""
    values, problems = read_extended(str(path), _read, _read, finetunings)
    for override in overrides:
        problems += apply_override(values, override)
    try:
        said = without_null_sections(values, FinetuneConfig)
        config = FinetuneConfig.model_validate_json(json.dumps(said), by_alias=True, by_name=False)
    except ValidationError as error:
        found = [problem for problem in error.errors(include_url=False) if not follows_from_another(problem)]
        raise ConfigError([*problems, *map(_sentence, found)]) from None
    if problems := [*problems, *_contradictions(config)]:
        raise ConfigError(problems)
    return config


def _read(path: str) -> tuple[dict[str, Any], list[str]]:
    """(The plain values of one file, problems of its syntax)."""
    names = finetunings()
    near = did_you_mean(FilePath(path).stem, names)
    remedy = f"Give the path of a fine-tuning run's YAML file, or one of {', '.join(names)}.{near}"
    values, problems = parse_yaml(read_text_file(ConfigError, path, remedy, _MOST_BYTES), path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no sections. A configuration needs {', '.join(_required(FinetuneConfig))}.")
    return values, problems


def dump_finetune(config: FinetuneConfig) -> str:
    return dump_yaml(config.model_dump(by_alias=True))


def check_ranks(config: FinetuneConfig, world_size: int) -> None:
    """ConfigError unless the global batch divides evenly among `world_size` ranks."""
    training = config.training
    at_once = training.micro_batch_size * world_size
    if training.global_batch_size % at_once:
        raise ConfigError(
            f"training.global_batch_size: {training.global_batch_size} is not a multiple of {at_once}, which is "
            f"training.micro_batch_size {training.micro_batch_size} × {world_size} ranks. Set it to a multiple of "
            f"{at_once}."
        )


def _contradictions(config: FinetuneConfig) -> Iterator[str]:
    adapter = config.adapter
    if config.optimizer.type != "adamw":
        yield f"optimizer.type: {config.optimizer.type}, and adapters are trained by adamw. Set it to adamw."
    if config.optimizer.lr_rule is not None:
        yield "optimizer.lr_rule: is for models of parameter tokens, and this is an adapter. Set it to null."
    for key in OF_CANDIDATES:
        if getattr(config.optimizer, key) not in (None, 1):
            yield f"optimizer.{key}: is for candidates of a model, and this is an adapter. Set it to null."
    if config.optimizer.layer_decay != 1:
        yield "optimizer.layer_decay: is for layers of a model, and this is an adapter. Set it to 1."
    yield from rate_problems(config.optimizer, config.training.train_steps)
    if adapter.source is not None and (adapter.tokens is not None or adapter.modules):
        yield "adapter.from: has tokens and modules of its own. Remove adapter.tokens and adapter.modules."


def _required(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items() if field.is_required()]


def _sentence(problem: ErrorDetails) -> str:
    """A problem found by pydantic, as "section.field: what is wrong. Remedy."."""
    *parts, last = problem["loc"] or ("configuration",)
    key = key_name((*parts, last))
    if problem["type"] == "extra_forbidden":
        keys = _keys_at(parts)
        near = did_you_mean(str(last), keys, f"{key_name(tuple(parts))}." if parts else "")
        return f"{key}: unknown key.{near or f' Choose of {either(keys)}.'}"
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default. Give it a value."
    return value_sentence(key, problem)


def _keys_at(parts: Sequence[int | str]) -> list[str]:
    section: Any = FinetuneConfig
    for part in parts:
        section = section.model_fields[part].annotation
    return [field.alias or name for name, field in section.model_fields.items()]
