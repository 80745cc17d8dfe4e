"""Modes step and scaling: what they measure is training, and their rows say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megatron_tf.architectures.tokenformer.section import Bank, Sparse
from megatron_tf.benchmark import scaling, serving, step
from megatron_tf.benchmark.models import equal_transformer
from megatron_tf.config import load_config
from megatron_tf.config.sections.model import ParameterTokens
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.errors import ConfigError
from megatron_tf.model import build_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setitem(step.SQUARE, "cpu", 64)


def model(**changes):
    path = Path(__file__).parents[2] / "configs" / "tiny.yml"
    sizes = {"num_layers": 2, "hidden_size": 32, "seq_length": 16, "vocab_size": 99, "num_attention_heads": 2}
    return load_config(path).model.model_copy(update={**sizes, **changes})


def setting(**changes):
    values = {"device": CPU, "dtype": torch.float32, "samples": 2, "layers": None, "compile": False, "rounds": 1}
    return step.StepOptions(**{**values, **changes})


def test_a_step_is_what_torch_would_do():
    torch.manual_seed(3)
    ours = step.TrainingStep(build_model(model()), 2, CPU, torch.float32)
    theirs = build_model(model())
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        loss = F.cross_entropy(theirs(ours._ids).flatten(0, 1), ours._labels.flatten())
        torch.testing.assert_close(ours(), loss.detach())
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(dict(ours._model.named_parameters()), dict(theirs.named_parameters()))


def test_bf16_learns_through_fp32_masters():
    torch.manual_seed(3)
    ours = step.TrainingStep(build_model(model()), 2, CPU, torch.bfloat16)
    losses = [float(ours()) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.02
    weights, masters = list(ours._model.parameters()), ours._masters
    assert {w.dtype for w in weights} == {torch.bfloat16} and {m.dtype for m in masters} == {torch.float32}
    assert all(torch.equal(weight, master.bfloat16()) for weight, master in zip(weights, masters))


def test_a_model_with_candidates_is_compared_with_one_without():
    sparse = Sparse(ffn=Bank(group_size=64, candidates=4))
    (row,) = step.rows({"small": model(sparse=sparse)}, setting())
    assert row["× dense"] > 0 and row["× transformer"] > 0
    assert row["parameters"] == num_parameters(model(sparse=sparse)) > row["transformer's"]
    assert row["transformer's"] == num_parameters(equal_transformer(model()))
    assert "× plain" not in row and "of floor" not in row


def test_the_balance_of_candidates_is_trained():
    ours = step.TrainingStep(
        build_model(model(sparse=Sparse(ffn=Bank(group_size=64, candidates=4)))), 2, CPU, torch.float32
    )
    balances = [weight for name, weight in ours._model.named_parameters() if name.endswith("bank.balance")]
    ours()
    assert len(balances) == 2 and all(balance.count_nonzero() > 0 for balance in balances)


def test_rows_of_a_step():
    (row,) = step.rows({"small": model(num_layers=3)}, setting(layers=2))
    assert (row["config"], row["layers"], row["tokens/step"]) == ("small", "2 of 3", 32)
    for key in (
        "× gram",
        "× plain",
        "× mlp",
        "of floor",
        "× transformer",
        "tok/s gram",
        "mfu",
        "mfu transformer",
        "tok/s tokenformer",
        "GEMM TFLOP/s",
    ):
        assert row[key] > 0, key


def test_cut_models_keep_their_proportions():
    whole = model(num_layers=4, hidden_size=128, vocab_size=1000)
    cut, transformer = step._compared(whole, 2).values()
    assert (cut.num_layers, cut.vocab_size) == (transformer.num_layers, transformer.vocab_size) == (2, 500)
    assert num_parameters(cut) == pytest.approx(num_parameters(whole) / 2, rel=0.01)
    assert num_parameters(cut) == pytest.approx(num_parameters(transformer), rel=0.05)
    assert step._compared(whole, 9)["tokenformer"] == whole


def test_a_model_smaller_than_any_transformer_is_refused():
    small = model(num_attention_heads=1, hidden_size=128, parameter_tokens=ParameterTokens(qkv=1, proj=1, ffn=1))
    with pytest.raises(ConfigError, match="heads of 128 channels is as small as .* Give more parameter tokens"):
        equal_transformer(small)


def test_models_beyond_memory_are_refused_before_any_is_measured():
    with pytest.raises(ConfigError, match="large: weights, gradients and optimizer of the 2 models take"):
        next(step.rows({"small": model(), "large": model(vocab_size=2**31)}, setting()))


@pytest.mark.slow
def test_rows_of_serving():
    prompt, token = serving.rows(model(), CPU, torch.float32, layers=1, positions=8, rounds=1)
    assert (prompt["call"], token["call"], prompt["layers"]) == ("prompt", "one token", 1)
    assert all(row[key] > 0 for row in (prompt, token) for key in ("gram × direct", "gram × llama", "direct × llama"))
    assert prompt["parameters"] == pytest.approx(prompt["llama's"], rel=0.1)


def test_rows_of_scaling():
    rows = list(scaling.rows(CPU, torch.float32, model(), [32, 64], [32], positions=32, rounds=1))
    sizes = [(row["tokens"], row["seq_length"], row["samples"]) for row in rows]
    assert sizes == [(32, 16, 2), (64, 16, 2), (128, 32, 1)]
    assert [row["width"] for row in rows] == [32] * 3
    assert rows[0]["transformer's"] < rows[1]["transformer's"]
    assert all(row["attention, tokenformer ms"] > 0 and row["attention's share"] > 0 for row in rows)
