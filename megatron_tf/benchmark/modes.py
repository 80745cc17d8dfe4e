"""The modes of the command `megatron_tf benchmark`: from its arguments to the rows of its table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_tf.architectures.tokenformer.section import TokenFormerModel
from megatron_tf.benchmark import (
    adapters,
    communication,
    context,
    engines,
    images,
    memory,
    pattention,
    scaling,
    serving,
    sparse,
    stages,
    step,
)
from megatron_tf.benchmark.device import check_dtypes, machine, quick_dtype
from megatron_tf.benchmark.references import FORMULAS
from megatron_tf.benchmark.report import Row, check_json, table, write_json
from megatron_tf.config import load_config
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.nearest import either
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError
from megatron_tf.model.precision import DTYPES
from megatron_tf.runtime.host_memory import keep_freed_memory, refuse_beyond_free
from megatron_tf.tasks.image_classification.section import ImageModel


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Measures what `arguments.mode` says, and prints and writes its table."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device is here. Give --device cpu.")
    if "dtypes" in arguments:
        arguments.dtypes = arguments.dtypes or [quick_dtype(device)]
        check_dtypes(device, arguments.dtypes)
    if arguments.json:
        check_json(arguments.json)
    if device.type == "cpu":
        keep_freed_memory()  # as in training
        refuse_beyond_free()
    measured = measure(arguments, device)
    if arguments.json:  # first: what is measured is not lost when it cannot be printed
        write_json(arguments.json, arguments.mode, device, measured)
    print(json.dumps(machine(device)))
    print(table(measured), flush=True)


def measure(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """All rows; as each is measured, a line on stderr."""
    measured: list[Row] = []
    try:
        for row in MODES[arguments.mode](device, arguments):
            measured.append(row)
            print(f"{len(measured)}. " + "  ".join(map(str, list(row.values())[:4])), file=sys.stderr, flush=True)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise ConfigError(
                f"row {len(measured) + 1} does not fit in the memory that is free: {str(error).splitlines()[0][:200]} "
                f"Give less of what {arguments.mode} --help lists: tokens, positions, samples, lengths or layers."
            ) from error
        raise
    return measured


def run_pattention(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return pattention.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


def run_sparse(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return sparse.rows(
        device,
        dtypes,
        arguments.tokens,
        arguments.candidates,
        arguments.group_size,
        arguments.positions,
        arguments.width,
        arguments.rounds,
    )


def run_stages(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return stages.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


def run_communication(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    """The ranks are processes on CPUs and compile nothing, whatever the configuration: what is sent is the same."""
    if max(arguments.tensor) == 1:
        raise ConfigError("--tensor: one rank sends nothing. Give more ranks.")
    configs = []
    for tensor in arguments.tensor:
        for sequence in ("false", "true") if tensor > 1 else ("false",):
            layout = f"parallel.tensor={tensor}", f"parallel.sequence={sequence}", "parallel.pipeline=1"
            config = load_config(arguments.config, [*arguments.overrides, *layout, "training.compile=false"])
            validate(config, tensor)
            configs += forms_of(config, "norm", "direct", "gram") if tensor > 1 else [config]
    return communication.rows(configs)


def run_engines(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    if not find_spec("deepspeed"):
        raise ConfigError('benchmark engines: DeepSpeed is not here. pip install "megatron_tf[deepspeed]".')
    configs: dict[str, dict[str, RunConfig]] = {}
    for layout, axis in engines.LAYOUTS.items():
        for engine in ("deepspeed", "torch"):
            sizes = [f"parallel.{other}={2 if other == axis else 1}" for other in ("tensor", "pipeline")]
            sizes.append(f"parallel.sequence={str(axis == 'tensor').lower()}")
            words = [*arguments.overrides, *sizes, "training.compile=false", f"parallel.engine={engine}"]
            config = load_config(arguments.config, words)
            validate(config, engines.RANKS)
            configs.setdefault(layout, {})[engine] = config
    return engines.rows(configs, arguments.rounds)


def run_context(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    one_sample = "training.global_batch_size=1", "training.micro_batch_size=1", "training.compile=false"
    configs = []
    for ranks in arguments.ranks:
        layout = f"{{engine: torch, context: {ranks}, tensor: 1, pipeline: 1, sequence: false}}"
        config = load_config(arguments.config, [*arguments.overrides, *one_sample, f"parallel={layout}"])
        validate(config, ranks)
        configs.append(config)
    return context.rows(configs)


def run_memory(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    config = load_config(arguments.config, arguments.overrides)
    validate(config, 1)
    for norm in forms_of(config, "norm", "direct", "gram"):
        for scores in forms_of(norm, "scores", "keep", "recompute"):
            yield from memory.rows(device, scores)


def forms_of(config: RunConfig, key: str, *values: str) -> list[RunConfig]:
    """The configuration with each of `values` of training.`key` that its model has; itself alone where it says one."""
    if getattr(config.training, key) not in ("auto", "keep"):
        return [config]
    found = []
    for value in values:
        training = config.training.model_copy(update={key: value})
        other = config.model_copy(update={"training": training})
        with suppress(ConfigError):
            validate(other, config.parallel.tensor)
            found.append(other)
    return found or [config]


def run_step(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    names = [file.stem for file in arguments.configs]
    models = {
        file.stem if names.count(file.stem) == 1 else str(file): with_plain_formula(file, arguments.seq_length)
        for file in arguments.configs
    }
    for name in arguments.dtypes:
        yield from step.rows(
            models,
            step.StepOptions(
                device, DTYPES[name], arguments.samples, arguments.layers, arguments.compile, arguments.rounds
            ),
        )


def run_scaling(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    if not arguments.tokens and not arguments.lengths:
        raise ConfigError(
            "--tokens and --lengths: both are empty, so there is nothing to measure. Give one of them a value."
        )
    model = tokenformer_of(arguments.config)
    if model.sparse is not None:
        raise ConfigError(
            f"{arguments.config}: model.sparse has candidates, and this mode varies the number of tokens that every "
            "position uses. Give a configuration without them; benchmark step and sparse measure candidates."
        )
    for name in arguments.dtypes:
        yield from scaling.rows(
            device, DTYPES[name], model, arguments.tokens, arguments.lengths, arguments.positions, arguments.rounds
        )


def tokenformer_of(file: Path) -> TokenFormerModel:
    if "=" in file.name and not file.exists():
        raise ConfigError(f"{file}: this mode takes files as they are. Write the value into a copy of the file.")
    model = load_config(file).model
    if not isinstance(model, TokenFormerModel):
        raise ConfigError(
            f"{file}: model.architecture {model.architecture} is what is compared with. Give a tokenformer."
        )
    if model.task != "language_model":
        raise ConfigError(f"{file}: model.task {model.task} is measured by benchmark images. Give a language_model.")
    return model


def with_plain_formula(file: Path, seq_length: int | None) -> TokenFormerModel:
    """The model of a configuration, with another sequence length if one is given."""
    model = tokenformer_of(file)
    if model.activation not in FORMULAS:
        raise ConfigError(
            f"{file}: model.activation {model.activation} has no plain formula to be compared with. Give "
            f"{either(FORMULAS)}."
        )
    return model if seq_length is None else model.model_copy(update={"seq_length": seq_length})


def run_adapters(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    sizes = arguments.layers, arguments.width, arguments.samples, arguments.positions, arguments.rank
    return adapters.rows(device, *sizes, arguments.rounds)


def run_serving(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    model = tokenformer_of(arguments.config)
    if problem := architecture_of(model).format_problem(model, "huggingface"):
        raise ConfigError(f"{arguments.config}: {problem}. Give another configuration.")
    if arguments.positions > model.seq_length - 1:
        raise ConfigError(
            f"--positions {arguments.positions}: with one more they are above model.seq_length {model.seq_length}. "
            "Give fewer."
        )
    for name in arguments.dtypes:
        yield from serving.rows(model, device, DTYPES[name], arguments.layers, arguments.positions, arguments.rounds)


def run_images(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    config = load_config(arguments.config)
    model = config.model
    if model.architecture != "tokenformer" or not isinstance(model, ImageModel):
        raise ConfigError(
            f"{arguments.config}: is a {model.architecture} of the task {model.task}, and this mode measures a "
            "tokenformer of image_classification. Give one."
        )
    return images.rows(config, device, arguments.layers, arguments.samples, arguments.workers, arguments.rounds)


MODES = {
    "pattention": run_pattention,
    "sparse": run_sparse,
    "stages": run_stages,
    "communication": run_communication,
    "context": run_context,
    "engines": run_engines,
    "memory": run_memory,
    "step": run_step,
    "scaling": run_scaling,
    "adapters": run_adapters,
    "images": run_images,
    "serving": run_serving,
}
