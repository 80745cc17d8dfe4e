"""Official weights of a tiny model, and training checkpoints as DeepSpeed writes them for the official code."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from megatron_tf.config.sections.model import Model
from megatron_tf.state.parameters import parameter_table

Weights = dict[str, Tensor]
NUM_LAYERS = 2


@pytest.fixture
def model() -> Model:
    return Model.model_validate({"num_layers": NUM_LAYERS, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 4,
                                 "vocab_size": 16, "parameter_tokens": {"qkv": 5, "proj": 3, "ffn": 7}})  # fmt: skip


@pytest.fixture
def weights(model) -> Weights:
    """fp32, by official name."""
    generator = torch.Generator().manual_seed(0)
    return {
        spec.official_name: torch.randn(spec.shape, generator=generator) for spec in parameter_table(model).values()
    }


@pytest.fixture
def save_training(monkeypatch) -> Callable[..., Path]:
    """`save(folder, weights, data_ranks=1, stages=1)` -> global_step7, with two optimizer groups and fp16 weights."""
    names = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler")
    modules = {name: types.ModuleType(name) for name in names}
    scaler = type("LossScaler", (), {"__module__": names[-1]})
    modules[names[-1]].LossScaler = scaler

    def save(folder: Path, weights: Weights, data_ranks: int = 1, stages: int = 1) -> Path:
        tag = folder / "global_step7"
        tag.mkdir(parents=True)
        (folder / "latest").write_text(tag.name)
        with monkeypatch.context() as patch:
            for name, module in modules.items():  # a pickle names classes by their modules
                patch.setitem(sys.modules, name, module)
            for stage in range(stages):
                own = weights if stages == 1 else _of_stage(weights, stage, stages)
                _save_stage(tag, own, stage, data_ranks, stages, scaler())
        if stages > 1:
            for position in {int(name.split(".")[1]) for name in weights}:
                prefix = f"sequential.{position}."
                layer = {name.removeprefix(prefix): tensor.half() for name, tensor in weights.items()
                         if name.startswith(prefix)}  # fmt: skip
                torch.save(layer, tag / f"layer_{position:02d}-model_00-model_states.pt")
        return tag

    return save


def _of_stage(weights: Weights, stage: int, stages: int) -> Weights:
    """Blocks in turn; the first stage has the embedding, the last one the norm and the head's copy of the embedding."""
    embedding = "sequential.0.word_embeddings.weight"
    own = {}
    for name, tensor in weights.items():
        position = int(name.split(".")[1])
        last = position > NUM_LAYERS + 1
        if name == embedding:
            if stage in (0, stages - 1):
                own["tied_modules.embed.word_embeddings.weight"] = tensor
        elif (stages - 1 if last else (position - 2) % stages) == stage:
            own[name.removeprefix("sequential.")] = tensor
    return own


def _save_stage(tag: Path, own: Weights, stage: int, data_ranks: int, stages: int, scaler: object) -> None:
    groups = [{name: tensor for name, tensor in own.items() if ("norm" in name) == norm} for norm in (False, True)]
    groups = [group for group in groups if group]
    arguments = {"num_layers": NUM_LAYERS, "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 4,
                 "padded_vocab_size": 16, "tokenizer_type": "HFTokenizer"}  # fmt: skip
    state = {
        "module": {name: tensor.half() for name, tensor in own.items()} if stages == 1 else None,
        "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
        "dp_world_size": data_ranks, "args": arguments, "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
    }  # fmt: skip
    torch.save(state, tag / f"mp_rank_{stage:02d}_model_states.pt")
    flat = [torch.cat([tensor.flatten() for tensor in group.values()]) for group in groups]
    for rank in range(data_ranks):
        parts = []
        for group in flat:
            size = -(-len(group) // data_ranks)
            parts.append(
                torch.cat([group, torch.zeros(size * data_ranks - len(group))])[rank * size : (rank + 1) * size]
            )
        optimizer = {"loss_scaler": scaler, "single_partition_of_fp32_groups": [part.clone() for part in parts]}
        name = f"zero_pp_rank_{rank}_mp_rank_{stage:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.0"}, tag / name)
