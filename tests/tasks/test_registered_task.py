"""A second task, registered from outside the package: all that the package does with a task works.

Patches: each sample is a row of vectors, of which the model names the class. The vectors go through a matrix that is
split over their entries; attention sees all of them; the head reads their mean and is split over the classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from registered import check_layouts
from tiny import run_config
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.architectures.spec import ParameterSpec, shard_range
from megatron_tf.architectures.work import Collective, Product, hidden_bytes, positions_of
from megatron_tf.checkpoint.architecture import check_format
from megatron_tf.config import load_config
from megatron_tf.config.fields import Count, Fraction
from megatron_tf.config.load import dump_config
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import TASKS
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import memory_per_rank, num_parameters
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.plan import describe
from megatron_tf.costs.roofline import step_time
from megatron_tf.data.samples import derived_seed
from megatron_tf.errors import ArgumentError, CheckpointError, ConfigError, UserError, exit_now
from megatron_tf.growth.source import GrownSource
from megatron_tf.inference.cache import CachedModel
from megatron_tf.model import build_model
from megatron_tf.model.layers import TensorParallel
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.environment import detect
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.base import EndsWork, Task
from megatron_tf.tasks.classes import IGNORED, argmax, cross_entropy
from megatron_tf.tasks.data import OpenData, TaskData
from megatron_tf.tasks.layers import TaskLayers, example_batches
from megatron_tf.training.dry_run import dry_run
from megatron_tf.verification.layout import Layout, joined
from megatron_tf.verification.resume import Setting, check_resumes


class PatchModel(Model):
    task: Literal["patches"] = "patches"
    patch_size: Count
    num_classes: Count
    rotary_fraction: Fraction = 0.0


class Patches(Task):
    section = PatchModel
    layers = f"{__name__}:LAYERS"
    data = f"{__name__}:DATA"
    causal = False
    input_name, head_name = "patches", "head"
    metrics = ("top1",)

    def input_parameters(self, model: PatchModel) -> Iterator[ParameterSpec]:
        size, d = model.patch_size, model.hidden_size
        yield ParameterSpec("patches.weight", (size, d), True, False, True, size**-0.5, 0.0, ends=("first",))
        yield ParameterSpec("patches.bias", (d,), False, False, False, 0.02, 0.0, ends=("first",))
        yield ParameterSpec(
            "patches.positions", (model.seq_length, d), False, False, False, 0.02, 0.0, ends=("first",)
        )  # fmt: skip

    def head_parameters(self, model: PatchModel) -> Iterator[ParameterSpec]:
        yield ParameterSpec(
            "head.weight", (model.num_classes, model.hidden_size), True, False, True, 0.2, 0.0, ends=("last",)
        )  # fmt: skip
        yield ParameterSpec("head.bias", (model.num_classes,), True, False, False, 0.02, 0.0, ends=("last",))

    def sharded_rows(self, model: PatchModel) -> dict[str, int]:
        return {"model.patch_size": model.patch_size, "model.num_classes": model.num_classes}

    def describe(self, model: PatchModel) -> str:
        return f"{model.num_classes} classes"

    def losses_per_sample(self, model: PatchModel) -> int:
        return 1

    def multiply_adds(self, model: PatchModel) -> int:
        return model.hidden_size * (model.seq_length * model.patch_size + model.num_classes)

    def work(self, config: RunConfig) -> EndsWork:
        model, samples, tensor = config.model, config.training.micro_batch_size, config.parallel.tensor
        own, classes = -(-model.patch_size // tensor), -(-model.num_classes // tensor)
        entry = Product(positions_of(config), own, model.hidden_size)
        return EndsWork((entry,), (Product(samples, model.hidden_size, classes),), samples * classes)

    def collectives(self, config: RunConfig):
        reduced = (Collective("all_reduce", hidden_bytes(config)),)
        return (reduced, ()), ((Collective("all_reduce", 12 * config.training.micro_batch_size),), reduced)


class PatchEmbedding(nn.Module):
    def __init__(self, model: PatchModel, tensor: TensorParallel):
        super().__init__()
        self.tensor = tensor
        self.start, self.stop = shard_range(model.patch_size, tensor.group.size, tensor.group.rank)
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.hidden_size))
        self.positions = nn.Parameter(torch.empty(model.seq_length, model.hidden_size))

    def forward(self, inputs: Tensor) -> Tensor:
        own = inputs[..., self.start : self.stop].transpose(0, 1).to(self.weight.dtype)
        hidden = self.tensor.leave(own @ self.weight)
        first = self.tensor.group.rank * len(hidden) if self.tensor.sequence else 0
        positions = self.tensor.replicated(self.positions)[first : first + len(hidden)]
        return hidden + positions[:, None] + self.tensor.replicated(self.bias)


class ClassHead(nn.Module):
    def __init__(self, model: PatchModel, tensor: TensorParallel):
        super().__init__()
        self.tensor = tensor
        start, stop = shard_range(model.num_classes, tensor.group.size, tensor.group.rank)
        self.weight = nn.Parameter(torch.empty(stop - start, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(stop - start))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(self.tensor.enter(hidden).mean(0), self.weight, self.bias)


class PatchLayers(TaskLayers):
    def input_layer(self, model, tensor):
        return PatchEmbedding(model, tensor)

    def head(self, model, tensor):
        return ClassHead(model, tensor)

    def checked(self, name, inputs, model, device):
        if inputs.shape[1:] != (model.seq_length, model.patch_size):
            raise ArgumentError(f"{name}: the shape is {list(inputs.shape)}. Give patches.")
        return inputs

    def losses(self, model, logits, targets, group):
        return cross_entropy(logits, targets, shard_range(model.num_classes, group.size, group.rank)[0], group)

    def counts(self, targets):
        return targets != IGNORED

    def metrics(self, model, logits, targets, group):
        start, _ = shard_range(model.num_classes, group.size, group.rank)
        return (argmax(logits, start, group) == targets)[None]

    def plain_loss(self, logits, targets):
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def examples(self, config, samples):
        """The class shifts the first entries of each vector."""
        model, inputs, targets = config.model, [], []
        for sample in samples:
            generator = torch.Generator().manual_seed(derived_seed(config.run.seed, sample) >> 1)
            target = torch.randint(model.num_classes, (), generator=generator)
            vectors = torch.randn(model.seq_length, model.patch_size, generator=generator)
            vectors[:, int(target) % model.patch_size] += 2
            inputs.append(vectors)
            targets.append(target)
        return torch.stack(inputs), torch.stack(targets)


class MadeUpPatches(OpenData):
    """Endless samples from one source; there is no file."""

    def __init__(self, config: RunConfig):
        self._config = config

    def loader(self, sources, *, micro_batch_size, num_micro_batches, data_rank=0, data_size=1, training=False):
        return PatchLoader(self._config, micro_batch_size, num_micro_batches, data_rank, data_size)

    def fingerprint(self):
        return {"seed": self._config.run.seed}

    def outlook(self, samples):
        return f"{samples} patches", []


class PatchLoader:
    def __init__(self, config, size, number, data_rank, data_size):
        self._config, self._size, self._number, self._rank, self._ranks = config, size, number, data_rank, data_size

    def step_batches(self, first_sample):
        for micro in range(self._number):
            first = first_sample + (micro * self._ranks + self._rank) * self._size
            yield LAYERS.examples(self._config, range(first, first + self._size))

    def sample_sources(self, first_sample):
        return [0] * (self._size * self._number)

    def source_of(self, sample):
        return 0


class PatchData(TaskData):
    def checks(self, config):
        return []

    def open(self, config):
        return MadeUpPatches(config)


LAYERS, DATA, PATCHES = PatchLayers(), PatchData(), Patches()


@pytest.fixture(autouse=True)
def registered():
    with TASKS.registered("patches", PATCHES):
        yield


def config(model: dict | None = None, **changes) -> RunConfig:
    """Sizes that divide by nothing."""
    keys = {
        "task": "patches",
        "vocab_size": None,
        "seq_length": 6,
        "patch_size": 7,
        "num_classes": 5,
    }
    return run_config(model={**keys, **(model or {})}, **changes)


def test_its_section_is_strict(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(config()))
    assert load_config(file) == config() and isinstance(load_config(file).model, PatchModel)
    with pytest.raises(
        ConfigError, match="one of language_model, image_classification, patches is expected. Did you mean patches"
    ):
        load_config(file, ["model.task=patch"])
    with pytest.raises(ConfigError, match="model.num_classes: 0 is out of range"):
        load_config(file, ["model.num_classes=0"])
    with pytest.raises(ConfigError, match="model.vocab_size: another task.*set model.task to language_model"):
        load_config(file, ["model.vocab_size=9"])
    with pytest.raises(ConfigError) as error:
        load_config(file, ["model.task=language_model"])
    assert "model.vocab_size: missing" in str(error.value) and "set model.task to patches" in str(error.value)


def test_what_it_has_no_use_for_is_refused():
    data, evaluation = {"train": ({"path": "unused"},), "eod_id": 3}, {"sample_prompts": ("a",)}
    with pytest.raises(ConfigError) as error:
        validate(config(model={"num_classes": 2}, data=data, evaluation=evaluation, parallel={"tensor": 4}), 4)
    assert "model.num_classes: 2 rows cannot be split over parallel.tensor 4" in str(error.value)
    assert "data.eod_id: 3 means nothing to the task patches" in str(error.value)
    assert "evaluation.sample_prompts: ('a',) means nothing to the task patches" in str(error.value)


def test_what_is_made_for_text_refuses_it():
    with pytest.raises(CheckpointError, match="patches cannot be exported.*model.task is language_model"):
        check_format(config().model, "huggingface", "exported")
    with pytest.raises(UserError, match="model.task: patches, but generation needs a model of text"):
        CachedModel(build_model(config().model))


def test_it_is_planned():
    assert num_parameters(config().model) == sum(p.numel() for p in build_model(config().model).parameters())
    assert memory_per_rank(config(), 2).total > 0
    assert "5 classes" in describe(config(), 2) and "vocabulary" not in describe(config(), 2)
    assert step_time(config(), 2, find_gpu("H100"), Assumptions()).total > 0


def test_a_dry_run_shows_its_first_batch(tmp_path: Path):
    found = list(dry_run([config(run={"dir": str(tmp_path / "run")})], 1))
    assert any("inputs [2, 6, 7], targets [2], 2 of 2 losses count" in line for line in found), found


def test_every_position_sees_all_others():
    model = build_model(config().model, dtype=torch.float64)
    inputs, _ = LAYERS.examples(config(), range(1))
    changed = inputs.clone()
    changed[0, -1] += 1
    before, after = (model.hidden_states(x.double()) for x in (inputs, changed))
    assert (before[0] - after[0]).abs().max() > 1e-6
    with pytest.raises(ArgumentError, match="Give patches"):
        model(inputs[..., 1:])


def test_it_grows_and_keeps_the_function():
    small = config().model
    large = config(model={"parameter_tokens": {"qkv": 20, "proj": 11, "ffn": 51}}).model
    source = GrownSource(
        InitialSource(small, 7), InitialSource(large, 7), old_model=small, new_model=large,
        growth=Growth.model_validate({"from": "small"}), seed=3,
    )  # fmt: skip
    before = build_model(small, seed=7, dtype=torch.float64)
    after = build_model(large, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    inputs = LAYERS.examples(config(), range(3))[0].double()
    torch.testing.assert_close(after(inputs), before(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_every_layout_is_one_process():
    chosen = [Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)), Layout(Topology(1, 1, 2)),
              Layout(Topology(2, 2, 1)), Layout(Topology(1, 2, 2))]  # fmt: skip
    check_layouts(config(), chosen)


def _evaluate(rank: int, folder: str, topology: Topology) -> None:
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine

    with joined([config()], rank, topology.world_size, folder):
        run = Layout(topology).apply(config())
        plan, group = plan_batches(run, topology.world_size), make_group(topology, "tensor", 60)
        engine = DeepSpeedEngine(run, run.model, plan, topology, group, InitialSource(run.model, 7))
        samples = [0] * (plan.micro_batch_size * plan.num_micro_batches)
        found = engine.evaluate_groups(example_batches(run, plan, 0, 0, topology.data), samples, 1)
        (Path(folder) / f"{rank}.json").write_text(json.dumps([found.loss, found.metrics]))
    exit_now()


@pytest.mark.slow
def test_an_evaluation_gives_loss_and_metrics_to_every_rank(tmp_path: Path):
    start_ranks(_evaluate, 4, str(tmp_path), Topology(2, 2, 1))
    inputs, targets = LAYERS.examples(config(), range(8))
    with torch.no_grad():
        logits = build_model(config().model, seed=7)(inputs)
    for rank in range(4):
        loss, metrics = json.loads((tmp_path / f"{rank}.json").read_text())
        assert loss == pytest.approx(float(LAYERS.plain_loss(logits, targets)) / 8, rel=1e-5)
        assert metrics == {"top1": float((logits.argmax(1) == targets).float().mean())}


@pytest.mark.slow
@pytest.mark.scale  # so does the other task whose layers are not those of text, in image_classification/test_layers.py
def test_it_resumes_at_another_layout():
    first, second = Setting(Layout(Topology(2, 2, 1), True)), Setting(Layout(Topology(1, 1, 2)))
    (result,) = check_resumes(config(), [(first, second)], 3)
    assert result.agrees(1e-5), result


def _train(rank: int, *configs: RunConfig) -> None:
    """Runs one after the other, in a process of their own."""
    from megatron_tf.runtime.stop_signals import StopSignals
    from megatron_tf.training.run import train

    torch.set_num_threads(1)
    for run in configs:
        train([run], detect({}), StopSignals())


@pytest.mark.slow
def test_it_learns_is_evaluated_and_grows(tmp_path: Path):
    common = {
        "training": {"train_steps": 30},
        "data": {"train": ({"path": "made up"},), "validation": ({"path": "made up"},)},
        "optimizer": {"lr": 1e-2},
        "logging": {"health_interval_steps": 15},
    }
    small = config(run={"dir": str(tmp_path / "small")}, **common)
    grown = config(
        model={"parameter_tokens": {"qkv": 20, "proj": 11, "ffn": 51}}, run={"dir": str(tmp_path / "grown")},
        growth={"source": small.run.dir}, **common,
    )  # fmt: skip
    start_ranks(_train, 1, small, grown)
    for run in (small, grown):
        records = [json.loads(line) for line in (Path(run.run.dir) / "metrics.jsonl").read_text().splitlines()]
        assert any("health/ffn/active_share" in record for record in records)
        assert not any("perplexity" in key for record in records for key in record)
        first, last = (next(r for r in order if "eval/top1" in r) for order in (records, records[::-1]))
        assert last["eval/loss"] < first["eval/loss"] and last["eval/top1"] >= first["eval/top1"]
    assert last["eval/top1"] > 0.5
    log = (tmp_path / "grown" / "train.log").read_text()
    assert "growth: held batch" in log and "validation loss" in log and "top1" in log
