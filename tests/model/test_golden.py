"""Agreement with numbers produced by the official TokenFormer classes (tests/golden, see its manifest)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from megatron_tf.config.sections.model import Model
from megatron_tf.convert.official import load_official_state_dict
from megatron_tf.model import build_model, pattention
from megatron_tf.model.attention import rotary_tables
from megatron_tf.state.parameters import parameter_table

GOLDEN = Path(__file__).parents[1] / "golden"
ACTIVATIONS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]


def tiny_model(qkv: int = 48, proj: int = 48, ffn: int = 160, **changes) -> Model:
    sizes = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": 128}
    tokens = {"qkv": qkv, "proj": proj, "ffn": ffn}
    return Model.model_validate({**sizes, "parameter_tokens": tokens, **changes})


def load(config: Model, tensors, prefix: str, dtype: torch.dtype, scales=None):
    model = build_model(config, dtype=dtype, scales=scales)
    load_official_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}, model)
    return model


def assert_close(actual, golden, tolerance):
    error = (actual.double() - golden.double()).abs().max().item()
    assert error <= tolerance, f"off by {error:.3g}, tolerance {tolerance:.3g}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_pattention(activation, precision):
    dtype = torch.float32 if precision == "fp32" else torch.float64
    with safe_open(GOLDEN / f"pattention_{activation}.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}
    cases = sorted({key.split("/")[0] for key in golden})
    assert len(cases) == 6
    for case in cases:
        x, k, v = (golden[f"{case}/{name}"].to(dtype).requires_grad_() for name in ("x", "K", "V"))
        out = pattention(x, k, v, activation=activation)
        out.backward(golden[f"{case}/grad_out"].to(dtype))
        for name, actual in (("out", out.detach()), ("dx", x.grad), ("dK", k.grad), ("dV", v.grad)):
            expected = golden[f"{case}/{name}_{precision}"]
            # rounding noise between two fp32 orders of summation is at most 6e-7 of the maximum
            tolerance = 1e-12 if precision == "fp64" else 3e-6 * expected.abs().max().item()
            assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("precision, logit_tolerance, grad_tolerance", [("fp64", 1e-10, 1e-10), ("fp32", 5e-5, 5e-5)])
def test_tiny_language_model(precision, logit_tolerance, grad_tolerance):
    tensors = load_file(GOLDEN / "tiny_lm.safetensors")
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = load(tiny_model(), tensors, "weights/", dtype)
    logits = model(tensors["input_ids"])
    assert_close(logits.detach(), tensors[f"logits_{precision}"], logit_tolerance)
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten())
    assert_close(loss.detach(), tensors[f"loss_{precision}"], logit_tolerance)
    loss.backward()
    parameters = dict(model.named_parameters())
    table = parameter_table(model.config)
    assert len(table) == 10 * 3 + 3
    for spec in table.values():
        golden = tensors[f"grads_{precision}/{spec.official_name}"]
        assert_close(parameters[spec.name].grad, golden, grad_tolerance * max(1.0, golden.abs().max().item()))


@pytest.mark.parametrize("activation", ["gelu_l2_norm", "softmax"])
def test_tiny_language_model_with_other_activations(activation):
    tensors = load_file(GOLDEN / "tiny_lm.safetensors")
    model = load(tiny_model(activation=activation), tensors, "weights/", torch.float64)
    assert_close(model(tensors["input_ids"]).detach(), tensors[f"logits_fp64_{activation}"], 1e-10)


def test_rotary_tables():
    tensors = load_file(GOLDEN / "tiny_lm.safetensors")
    cos, sin = rotary_tables(32, 4, 10000.0, torch.device("cpu"))
    assert_close(cos.squeeze(), tensors["rope/cos_fp32"].squeeze(), 1e-7)
    assert_close(sin.squeeze(), tensors["rope/sin_fp32"].squeeze(), 1e-7)


def test_official_file_is_read_without_unpickling_code():
    weights = torch.load(GOLDEN / "tiny_pytorch_model.bin", weights_only=True)
    tensors = load_file(GOLDEN / "tiny_lm.safetensors")
    model = load(tiny_model(), weights, "", torch.float64)
    assert_close(model(tensors["input_ids"]).detach(), tensors["logits_fp64"], 1e-10)
