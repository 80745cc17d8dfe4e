"""The proof of parallelism: one model is trained in one process by plain PyTorch, and under a layout by the engine.

Both see the same samples and start from the same weights. Compared are the loss and the gradient norm of every step,
every parameter's gradient of the first step as a logical tensor, and the validation loss after all steps.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.nearest import divisors
from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.run_plan import BatchPlan, plan_batches
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.data.documents import Boundaries, boundaries
from megatron_tf.engine.choice import build_engine, join
from megatron_tf.engine.optimizer import Segment
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.errors import ConfigError, LaunchError, exit_now
from megatron_tf.model import build_model
from megatron_tf.model.attention import document_starts
from megatron_tf.model.context import BlockContext
from megatron_tf.model.drop_path import DropPath
from megatron_tf.model.layers import task_layers
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.lr_rule import PLAIN, Factors, factors
from megatron_tf.state.parameters import matrix_rows, parameter_table
from megatron_tf.state.sources import initial_source
from megatron_tf.tasks.layers import example_batches

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over ranks."""

    topology: Topology
    sequence: bool = False

    def __str__(self) -> str:
        return str(self.topology) + ("+SP" if self.sequence else "")

    def apply(self, config: RunConfig) -> RunConfig:
        """The same run under this layout, with a micro batch that is at most a data-parallel rank's share."""
        topology = self.topology
        parallel = config.parallel.model_copy(
            update={
                "tensor": topology.tensor,
                "pipeline": topology.pipeline,
                "context": topology.context,
                "virtual_stages": topology.virtual_stages,
                "schedule": config.parallel.schedule if topology.pipeline > 1 else "1f1b",
                "sequence": self.sequence,
            }
        )
        per_rank = max(1, config.training.global_batch_size // self.topology.data)
        micro = min(config.training.micro_batch_size, per_rank)
        training = config.training.model_copy(update={"micro_batch_size": micro})
        return config.model_copy(update={"parallel": parallel, "training": training})


@dataclass(frozen=True)
class Trace:
    """The numbers of a run that are compared.

    `losses`, `grad_norms` (before clipping): one per step. `gradients`: of the first step, clipped, by logical name.
    `reports`: auxiliary losses and metrics of an architecture that has any, step after step. `validation`: mean loss on
    the samples of one more step, which are not trained on.
    """

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    reports: list[float] = field(default_factory=list)
    validation: float = 0.0


@dataclass(frozen=True)
class Deviation:
    """Worst relative errors of a layout against one process. `loss` includes auxiliary losses and metrics."""

    loss: float
    grad_norm: float
    gradient: float
    parameter: str  # the one with the worst gradient
    validation: float = 0.0

    def agrees(self, tolerance: float) -> bool:
        return all(error <= tolerance for error in (self.loss, self.grad_norm, self.gradient, self.validation))


def layouts(config: RunConfig, num_ranks: int) -> list[Layout]:
    """Every valid layout of 2 to `num_ranks` ranks, with and without sequence parallelism."""
    found: list[Layout] = []
    for world in range(2, num_ranks + 1):
        sizes = divisors(world)
        for tensor, pipeline, context, virtual in itertools.product(sizes, sizes, sizes, (1, 2)):
            ranks = tensor * pipeline * context
            if world % ranks:
                continue
            topology = Topology(tensor, pipeline, world // ranks, context, virtual)
            for sequence in (False, True)[: 2 if tensor > 1 else 1]:
                layout = Layout(topology, sequence)
                try:
                    validate(layout.apply(config), world)
                except ConfigError:
                    continue
                found.append(layout)
    return found


def configured_boundaries(config: RunConfig) -> Boundaries:
    """The document boundaries of a run on random tokens. Without data.eod_id token 0, the most frequent, ends
    documents, because there are no data that could name another."""
    return boundaries(config.data, config.data.eod_id or 0)


def reference(config: RunConfig, steps: int, dtype: torch.dtype = torch.float32, nudged: bool = False) -> Trace:
    """The run of `steps` steps in this process, written in plain PyTorch without any of the engine.

    `nudged`: start with each weight replaced by one of its two neighbours in `dtype`.
    """
    plan = plan_batches(Layout(Topology()).apply(config), 1)
    model = build_model(config.model, seed=config.run.seed, dtype=dtype)
    if nudged:
        _nudge(model)
    table = parameter_table(config.model)
    settings = config.optimizer
    rule = factors(config.model, settings)
    alike: dict[tuple[bool, int, Factors], list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = rule.get(name, PLAIN)
            parameter.mul_(own.initial)
            alike[table[name].decayed, matrix_rows(table[name]), own].append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay * own.weight_decay if decayed else 0.0,
            "matrix_rows": rows,
            "factor": own.lr,
        }
        for (decayed, rows, own), parameters in alike.items()
    ]
    optimizer = rule_of(settings).reference(settings, groups)
    ends = configured_boundaries(config).ends
    architecture, layers = architecture_of(config.model), task_layers(config.model)
    drop_path = DropPath(config.training.drop_path, config.model.num_layers, config.run.seed)
    losses, norms, gradients = [], [], {}
    reports: list[float] = []
    for step in range(steps):
        means = dict.fromkeys((*architecture.losses(config.model), *architecture.metrics(config.model)), 0.0)
        total, micro_batches = 0.0, list(example_batches(config, plan, step, 0, 1))
        count = sum(int(layers.counts(targets).sum()) for _, targets in micro_batches)
        for number, (inputs, targets) in enumerate(micro_batches):
            places = range(number * plan.micro_batch_size, (number + 1) * plan.micro_batch_size)
            context = BlockContext(branches=drop_path.scales(step, places))
            logits = model(inputs, document_starts(inputs, ends), context)
            loss = layers.plain_loss(logits, targets) / count
            auxiliary = [given / plan.num_micro_batches for given in context.losses.values()]
            torch.stack([loss, *auxiliary]).sum().backward()
            total += loss.item()
            for name, given in context.losses.items():
                means[name] += given.item() / plan.num_micro_batches
            for name, given in context.metrics.items():
                means[name] += given.item() / plan.num_micro_batches / config.model.num_layers
        losses.append(total)
        reports += means.values()
        norms.append(_clip([p.grad for p in model.parameters() if p.grad is not None], config))
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, settings, plan.train_steps)
        optimizer.step()
        optimizer.zero_grad()
    return Trace(losses, norms, gradients, reports, _validation_loss(model, config, plan, steps))


@torch.no_grad()
def _validation_loss(model: torch.nn.Module, config: RunConfig, plan: BatchPlan, step: int) -> float:
    """The mean loss over the samples that `step` would have trained on."""
    layers, ends = task_layers(config.model), configured_boundaries(config).ends
    total, count = 0.0, 0
    model.eval()
    for inputs, targets in example_batches(config, plan, step, 0, 1):
        logits = model(inputs, document_starts(inputs, ends))
        total += layers.plain_loss(logits, targets).item()
        count += int(layers.counts(targets).sum())
    return total / count


@torch.no_grad()
def _nudge(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        upwards = torch.rand(parameter.shape, generator=generator) < 0.5
        parameter.copy_(torch.nextafter(parameter, torch.where(upwards, torch.inf, -torch.inf).to(parameter.dtype)))


def _clip(gradients: list[Tensor], config: RunConfig) -> float:
    """Clips in place; returns the norm before. It is computed in fp64, because torch's fp32 sum over 10⁶ elements is
    off by 1e-5."""
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
    limit = config.training.gradient_clipping
    if limit and norm + 1e-6 > limit:
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))
    return norm


def run_layouts(config: RunConfig, chosen: Sequence[Layout], steps: int) -> list[Trace]:
    """The traces of the run under each layout, on ranks that are started here, for each world size once.

    LaunchError when this machine has fewer GPUs than ranks.
    """
    most = max(layout.topology.world_size for layout in chosen)
    if torch.cuda.is_available() and most > torch.cuda.device_count():
        raise LaunchError(
            f"{most} ranks need as many GPUs, but this machine has {torch.cuda.device_count()}. Use fewer ranks, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    traces: dict[Layout, Trace] = {}
    for world in sorted({layout.topology.world_size for layout in chosen}):
        same_world = [layout for layout in chosen if layout.topology.world_size == world]
        with tempfile.TemporaryDirectory() as folder:
            start_ranks(_rank, world, config, same_world, steps, world, folder)
            for number, layout in enumerate(same_world):
                traces[layout] = _collect(Path(folder), number, world, config)
    return [traces[layout] for layout in chosen]


def compare(trace: Trace, expected: Trace) -> Deviation:
    """Worst relative errors of `trace`; for a gradient, the norm of the error over that of the expected gradient."""
    worst, parameter = 0.0, ""
    for name, gradient in expected.gradients.items():
        error = ((trace.gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)).item()
        error = math.inf if math.isnan(error) else error
        if error > worst or not parameter:
            worst, parameter = error, name
    return Deviation(
        max(map(relative_error, [*trace.losses, *trace.reports], [*expected.losses, *expected.reports])),
        max(map(relative_error, trace.grad_norms, expected.grad_norms)),
        worst,
        parameter,
        relative_error(trace.validation, expected.validation),
    )


def relative_error(value: float, expected: float) -> float:
    """|value − expected| / |expected|; inf when it is NaN."""
    error = abs(value - expected) / max(abs(expected), 1e-30)
    return error if error == error else float("inf")


@contextmanager
def joined(configs: Sequence[RunConfig], rank: int, world: int, folder: str) -> Iterator[None]:
    """Context in which this process is one of `world` ranks of this machine, which meet in `folder`, for `configs`."""
    from megatron_tf.telemetry.console import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    environment = LaunchEnvironment("torchrun", rank, world, rank, world, "localhost", 0)
    join(configs, environment, TIMEOUT_SECONDS, store_file=f"{folder}/store")
    try:
        yield
    finally:
        leave()


def _rank(rank: int, config: RunConfig, chosen: list[Layout], steps: int, world: int, folder: str) -> None:
    with joined([config], rank, world, folder):
        for number, layout in enumerate(chosen):
            _run(layout.apply(config), layout.topology, rank, steps, Path(folder), number)
            dist.barrier()
    exit_now()


def _run(config: RunConfig, topology: Topology, rank: int, steps: int, folder: Path, number: int) -> None:
    plan = plan_batches(config, topology.world_size)
    group = make_group(topology, "tensor", TIMEOUT_SECONDS)
    source, ends = initial_source(config), configured_boundaries(config).ends
    engine = build_engine(config, config.model, plan, topology, group, source, document_ends=ends)
    gradients: dict[str, Tensor] = {}

    def keep(segment: Segment, gradient: Tensor) -> None:
        if segment.owned:
            gradients[f"{segment.name}:{segment.start}"] = gradient.detach().cpu().clone()

    losses, norms = [], []
    reports: list[float] = []
    for step in range(steps):
        engine.on_gradients = keep if step == 0 else None
        own = example_batches(config, plan, step, topology.coordinate("data", rank), topology.data)
        result = engine.train_step(step, own)
        losses.append(float(result.loss))
        reports += map(float, result.reports.values())
        norms.append(float(result.grad_norm if result.grad_norm is not None else float("nan")))
    own = example_batches(config, plan, steps, topology.coordinate("data", rank), topology.data)
    groups = [0] * (plan.num_micro_batches * plan.micro_batch_size)
    validation = engine.evaluate_groups(own, groups, 1).loss
    save_file(gradients, folder / f"{number}.{rank}.safetensors")
    if rank == 0:
        (folder / f"{number}.json").write_text(json.dumps([losses, norms, reports, validation]))
    engine.close()


def _collect(folder: Path, number: int, world: int, config: RunConfig) -> Trace:
    table = parameter_table(config.model)
    flat = {name: torch.full((spec.numel,), float("nan")) for name, spec in table.items()}
    for rank in range(world):
        for key, part in load_file(folder / f"{number}.{rank}.safetensors").items():
            name, start = key.split(":")
            flat[name][int(start) : int(start) + part.numel()] = part
    losses, norms, reports, validation = json.loads((folder / f"{number}.json").read_text())
    gradients = {name: tensor.view(table[name].shape) for name, tensor in flat.items()}
    return Trace(losses, norms, gradients, reports, validation)
