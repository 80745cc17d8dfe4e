"""A third architecture, registered from outside the package: all that the package does with an architecture works.

Gated Pattention: the feed-forward projection has a second set of keys, out = (GELU(τ · XKᵀ/‖XKᵀ‖₂) ∘ XGᵀ) V.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from registered import check_both_ways, check_layouts
from tiny import run_config
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.architectures.spec import ParameterSpec, ProjectionSpec, shard_range
from megatron_tf.architectures.tokenformer.architecture import TokenFormerArchitecture
from megatron_tf.architectures.tokenformer.block import PattentionAttention
from megatron_tf.architectures.tokenformer.section import TokenFormerModel
from megatron_tf.checkpoint.architecture import check_format
from megatron_tf.config import load_config
from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.load import dump_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.costs.estimate import memory_per_rank, num_parameters
from megatron_tf.costs.plan import describe
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import build_model
from megatron_tf.model.layers import Block, TensorParallel
from megatron_tf.parallel.collectives import copy_to, reduce_from
from megatron_tf.parallel.groups import Group
from megatron_tf.state.sources import InitialSource
from megatron_tf.verification.layout import Layout


class GatedModel(TokenFormerModel):
    architecture: Literal["gated"] = "gated"


class GatedArchitecture(TokenFormerArchitecture):
    section = GatedModel
    block = f"{__name__}:gated_block"
    formats = frozenset()

    def block_parameters(self, model: Model, layer: int) -> Iterator[ParameterSpec]:
        for spec in super().block_parameters(model, layer):
            if spec.name.endswith("ffn.value_tokens"):
                name = spec.name.replace("value_tokens", "gate_tokens")
                yield ParameterSpec(name, spec.shape, sharded=True, growable=True, decayed=True, std=0.5, mean=0.0)
            yield spec

    def projections(self, model: Model) -> tuple[ProjectionSpec, ...]:
        return tuple(
            ProjectionSpec(p.name, p.kind, p.tokens, p.activation, values=("gate_tokens", "value_tokens"))
            if p.kind == "ffn"
            else p
            for p in super().projections(model)
        )


class GatedPattention(nn.Module):
    def __init__(self, num_tokens: int, width: int, scale: float, group: Group):
        super().__init__()
        start, stop = shard_range(num_tokens, group.size, group.rank)
        self.key_tokens, self.gate_tokens, self.value_tokens = (
            nn.Parameter(torch.empty(stop - start, width)) for _ in range(3)
        )
        self.scale, self.group = scale, group

    def partial(self, x: Tensor) -> Tensor:
        scores = x @ self.key_tokens.mT
        # the sum over all tokens; its gradient has a part from each rank's own weights
        squares = copy_to(reduce_from(scores.square().sum(-1, keepdim=True), self.group), self.group)
        return (F.gelu(self.scale * scores / squares.sqrt()) * (x @ self.gate_tokens.mT)) @ self.value_tokens


def gated_block(model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
    prefix = f"blocks.{layer}"
    ffn = GatedPattention(
        model.parameter_tokens.ffn, model.hidden_size, scales[f"{prefix}.ffn"], tensor.group
    )  # fmt: skip
    return Block(PattentionAttention(model, f"{prefix}.attention", scales, tensor), ffn, tensor, model.norm_eps)


GATED = GatedArchitecture()


@pytest.fixture(autouse=True)
def registered():
    with ARCHITECTURES.registered("gated", GATED):
        yield


def config(**tokens: int) -> RunConfig:
    counts = {"qkv": 13, "proj": 11, "ffn": 37, **tokens}
    return run_config(model={"architecture": "gated", "parameter_tokens": counts})


def test_its_section_is_strict(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(config()))
    assert load_config(file) == config() and isinstance(load_config(file).model, GatedModel)
    with pytest.raises(ConfigError, match="model.activation: .* expected. Did you mean softmax"):
        load_config(file, ["model.activation=softmx"])
    with pytest.raises(ConfigError, match="one of tokenformer, transformer, gated is expected. Did you mean gated"):
        load_config(file, ["model.architecture=gate"])
    with pytest.raises(ConfigError, match="model.ffn_hidden_size: .*set model.architecture to transformer"):
        load_config(file, ["model.ffn_hidden_size=4"])


def test_it_is_planned():
    assert num_parameters(config().model) == sum(p.numel() for p in build_model(config().model).parameters())
    assert memory_per_rank(config(), 2).total > 0
    assert "tokens qkv 13 / proj 11 / ffn 37" in describe(config(), 2)


def test_it_grows_and_keeps_the_function():
    small, large = config().model, config(qkv=20, ffn=51).model
    source = GrownSource(
        InitialSource(small, 7), InitialSource(large, 7), old_model=small, new_model=large,
        growth=Growth.model_validate({"from": "small"}), seed=3,
    )  # fmt: skip
    before = build_model(small, seed=7, dtype=torch.float64)
    after = build_model(large, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    ids = torch.arange(16)[None]
    torch.testing.assert_close(after(ids), before(ids), rtol=1e-12, atol=1e-12)
    new = after.blocks[0].ffn
    assert not new.key_tokens[37:].any() and new.gate_tokens[37:].all() and new.value_tokens[37:].all()
    with pytest.raises(
        ConfigError, match="gram grows projections of one key and one value tensor, and those of ffn are"
    ):
        GrownSource(
            InitialSource(small, 7), InitialSource(large, 7), old_model=small, new_model=large,
            growth=Growth.model_validate({"from": "small", "method": "gram"}), seed=3,
        )  # fmt: skip


def test_formats_without_a_place_for_it_refuse():
    with pytest.raises(CheckpointError, match="a gated cannot be exported.*huggingface.*tokenformer"):
        check_format(config().model, "huggingface", "exported")


@pytest.mark.slow
def test_every_layout_is_one_process():
    check_layouts(config())


@pytest.mark.slow
def test_it_resumes_at_another_layout():
    check_both_ways(config(), Layout(Topology(2, 2, 1), True))
