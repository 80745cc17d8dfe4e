"""Small models whose scores are far from zero, so that every part of them shows in the logits, and their exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_tf.config.sections.model import Model
from megatron_tf.convert.huggingface.export import ExportedTokenizer, write_export
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.tokenizer import load_tokenizer
from megatron_tf.model.tokenformer import TokenFormer, build_model

SHAPE = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "seq_length": 48, "vocab_size": 320,
    "parameter_tokens": {"qkv": 24, "proj": 40, "ffn": 96},
}  # fmt: skip


def make_network(**changes) -> TokenFormer:
    """Weights far above an initialiser's, and scales that do not follow from the numbers of tokens."""
    model = Model.model_validate({**SHAPE, **changes})
    network = build_model(model, seed=3)
    scales = {name: scale * (0.8 + 0.1 * number) for number, (name, scale) in enumerate(network.scales.items())}
    weights = network.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 if "value" in name else 0.3))
    network = TokenFormer(model, scales)
    network.load_state_dict(weights)
    return network.eval()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(["the cat sat on the mat, and the class of strings is assertable " * 20], 300, path)
    return path


@pytest.fixture(scope="session")
def network_of() -> Callable[..., TokenFormer]:
    return make_network


@pytest.fixture(scope="session")
def network() -> TokenFormer:
    return make_network()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, network, tokenizer_file) -> Path:
    """The export of `network`."""
    path = tmp_path_factory.mktemp("exports") / "model"
    write_export(path, network, ExportedTokenizer(load_tokenizer(tokenizer_file), tokenizer_file))
    return path
