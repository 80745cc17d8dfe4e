"""The plan against what runs here: memory and traffic within 10 %, communication to the byte."""

from __future__ import annotations

from collections import Counter
from operator import add
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import spawn_each
from gathered import read_rows_in_place

from megatron_tf.activations import overlap
from megatron_tf.activations.built_in import L2_NORM_GELU
from megatron_tf.activations.forms import GPU
from megatron_tf.benchmark.counting import Counting, saved_bytes
from megatron_tf.config import load_config
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.costs.communication import (
    block_collectives,
    context_collectives,
    ends_collectives,
)
from megatron_tf.costs.estimate import block_activation_bytes, memory_per_rank
from megatron_tf.costs.work import HIDDEN_PASSES, LOGIT_BYTES
from megatron_tf.model import build_model, fp8, gram, rounded_scores, rounding, sparse_function
from megatron_tf.model.context import BlockContext, of_all_positions
from megatron_tf.model.kernels import fused_passes
from megatron_tf.model.layers import FinalNorm, TensorParallel, build_block
from megatron_tf.model.projection import choose_forms
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import initial_scales
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.layers import Embedding

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"
SPARSE = ("model.sparse={ffn: {group_size: 64, candidates: 4}}",)
EVERYWHERE = (
    "model.sparse={qkv: {group_size: 32, candidates: 2, dense: 64}, proj: {group_size: 64, candidates: 2}, "
    "ffn: {group_size: 64, candidates: 4}}",
)
TRANSFORMER = ("model.architecture=transformer", "model.parameter_tokens=null", "model.ffn_hidden_size=768")
TOLERANCE = 0.10
KERNEL_PASSES = L2_NORM_GELU.kernel_passes
SMALL = ("model.seq_length=128", "training.micro_batch_size=2", "training.global_batch_size=8")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    """PyTorch's own operators, which can be counted, and what GPUs do in fp8. (Memory is estimated for them.)"""
    monkeypatch.setattr(fp8, "emulated_product", fp8.scaled_product)
    round_as_gpus_do(monkeypatch)
    monkeypatch.setattr(fused_passes, "usable", lambda scores: False)
    monkeypatch.setattr(sparse_function, "has_grouped_products", lambda device, dtype: dtype == torch.bfloat16)
    read_rows_in_place(monkeypatch)
    monkeypatch.setitem(vars(L2_NORM_GELU), "kernel_passes", None)


def round_as_gpus_do(monkeypatch):
    """With one operator for what is one kernel there. PyTorch computes its results here."""

    def largest(x):
        torch.zeros((), dtype=torch.int32)  # the kernel wants it cleared
        return torch.ops.megatron_tf.largest_bits.default(x)

    def round_to_8_bits(x, largest, power, gradient, *out):
        wanted = [tensor is not None for tensor in out[:2]]
        for tensor, own in zip(out, rounding.portable_rounded(x, largest, power, gradient, *wanted)):
            if tensor is not None:
                tensor.copy_(own)

    kernels = SimpleNamespace(largest_bits=rounding.portable_largest, round_to_8_bits=round_to_8_bits)
    monkeypatch.setattr(rounding, "usable", lambda x: True)
    monkeypatch.setattr(rounded_scores, "usable", lambda function, scores: False)
    monkeypatch.setattr(rounding, "_kernels", lambda: kernels)
    monkeypatch.setattr(rounding, "largest_bits", largest)
    monkeypatch.setattr(rounding, "round_to_8_bits", torch.ops.megatron_tf.round_to_8_bits.default)


def load(*overrides):
    return load_config(CONFIG, [*SMALL, *overrides])


def hidden_for(config, split=1):
    model = config.model
    shape = (model.seq_length // split, config.training.micro_batch_size, model.hidden_size)
    return torch.randn(shape).to(TYPES[config.training.precision]).requires_grad_()


def block_for(config, group=SINGLE, context=SINGLE):
    tensor = TensorParallel(group, config.parallel.sequence, context)
    block = build_block(config.model, 0, initial_scales(config.model), tensor).to(TYPES[config.training.precision])
    choose_forms(block, config.training, GPU)
    return block


PEAKS = {
    "logits": ("model.vocab_size=32768", "training.precision=bf16"),
    "logits, recomputed": (
        "model.vocab_size=32768",
        "training.precision=bf16",
        "training.activation_checkpointing=true",
    ),
    "logits in fp32": ("model.vocab_size=32768",),
    "ffn": ("model.vocab_size=256",),
    "ffn, recomputed": ("model.vocab_size=256", "training.activation_checkpointing=true", "training.precision=bf16"),
    "ffn, scores recomputed": ("model.vocab_size=256", "training.scores=recompute"),
    "qkv, scores recomputed": (
        "model.vocab_size=256",
        "model.parameter_tokens.qkv=900",
        "training.precision=bf16",
        "training.scores=recompute",
        "training.micro_batch_size=8",
    ),
    "qkv": ("model.vocab_size=256", "model.parameter_tokens.qkv=900", "training.precision=bf16"),
    "ffn, fp8": ("model.vocab_size=256", "training.precision=fp8", "training.micro_batch_size=8"),
    "qkv, fp8, scores recomputed": (
        "model.vocab_size=256",
        "model.parameter_tokens.qkv=896",
        "training.precision=fp8",
        "training.scores=recompute",
        "training.micro_batch_size=8",
    ),
    "transformer": (*TRANSFORMER, "model.vocab_size=256", "training.precision=bf16"),
    "transformer, recomputed": (*TRANSFORMER, "model.vocab_size=256", "training.activation_checkpointing=true"),
    # rows of all pairs gathered at once in bf16, by candidate in fp32
    "sparse": (*SPARSE, "model.vocab_size=256", "training.precision=bf16"),
    "sparse, fp32": (*SPARSE, "model.vocab_size=256"),
    "sparse, recomputed": (
        *SPARSE,
        "model.vocab_size=256",
        "training.precision=bf16",
        "training.activation_checkpointing=true",
    ),
    "sparse, small groups": (
        "model.sparse={ffn: {group_size: 16, candidates: 2}}",
        "model.vocab_size=256",
        "training.precision=bf16",
    ),
    "sparse, dense tokens": (
        "model.sparse={ffn: {group_size: 64, candidates: 2, dense: 384}}",
        "model.vocab_size=256",
        "training.precision=bf16",
    ),
    "sparse everywhere": (*EVERYWHERE, "model.vocab_size=256", "training.precision=bf16"),
    "sparse everywhere, fp32": (*EVERYWHERE, "model.vocab_size=256"),
    "sparse qkv": (
        "model.sparse={qkv: {group_size: 64, candidates: 2, dense: 64}}",
        "model.parameter_tokens={qkv: 576, proj: 64, ffn: 128}",
        "model.vocab_size=256",
        "training.precision=bf16",
    ),
    "wide": ("model.vocab_size=256", "model.hidden_size=512", "model.num_attention_heads=8"),
}


def test_peak_of_activations_without_scores_by_chunks(monkeypatch):
    monkeypatch.setattr(overlap, "ROWS_AT_ONCE", 128)
    tokens = "model.parameter_tokens={qkv: 512, proj: 512, ffn: 4096}"
    test_peak_of_activations(
        ("model.vocab_size=256", tokens, "training.scores=recompute", "training.micro_batch_size=8")
    )


@pytest.mark.parametrize("overrides", PEAKS.values(), ids=PEAKS.keys())
def test_peak_of_activations(overrides):
    config = load(*overrides)
    model = build_model(config.model, dtype=TYPES[config.training.precision])
    for block in model.blocks:
        block.recompute = config.training.activation_checkpointing
        choose_forms(block, config.training, GPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.zeros(config.training.micro_batch_size, config.model.seq_length, dtype=torch.int64)
    with Counting() as counted:
        cross_entropy(model(ids).transpose(0, 1), ids.mT, 0, SINGLE).mean().backward()
    estimated = memory_per_rank(config, 1).activations
    assert estimated == pytest.approx(counted.peak, rel=TOLERANCE)


def saved_by_block(group, sequence, precision, architecture):
    config = load(
        f"parallel={{tensor: {group.size}, sequence: {str(sequence).lower()}}}",
        f"training.precision={precision}",
        *architecture,
    )
    block = block_for(config, group)
    hidden = hidden_for(config, group.size if sequence else 1)
    block(hidden)
    assert block_activation_bytes(config) == pytest.approx(saved_bytes(lambda: block(hidden)), rel=TOLERANCE)


BLOCKS = [
    *((sequence, precision, ()) for sequence in (False, True) for precision in ("bf16", "fp32")),
    (True, "bf16", ("training.scores=recompute",)),
    (True, "bf16", EVERYWHERE),
    (False, "fp32", ("model.sparse={z_loss: 1e-3, ffn: {group_size: 16, candidates: 16}}",)),
    (False, "bf16", TRANSFORMER),
    (True, "bf16", TRANSFORMER),
]


def test_what_a_block_keeps_on_two_tensor_ranks():
    """Also without its scores, with candidates, and of a transformer."""
    spawn_each(saved_by_block, 2, BLOCKS)


@pytest.mark.parametrize("activation", ACTIVATIONS.names())
def test_elementwise_traffic_and_kernels_of_a_block(activation):
    config = load(f"model.activation={activation}", "training.precision=bf16", "model.parameter_tokens.ffn=2048")
    count_block(config)


@pytest.mark.parametrize("sparse", [SPARSE, EVERYWHERE, ("model.sparse={ffn: {group_size: 16, candidates: 16}}",)])
def test_elementwise_traffic_and_kernels_of_a_block_with_candidates(sparse):
    """Of many positions, compared with which the sums over a candidate's rows are small."""
    count_block(load(*sparse, "training.precision=bf16", "training.micro_batch_size=16"))


def test_elementwise_traffic_and_kernels_of_a_transformers_block():
    config = load(*TRANSFORMER, "training.precision=bf16", "model.ffn_hidden_size=2048")
    count_block(config)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_elementwise_traffic_and_kernels_of_a_block_in_the_gram_form(precision, monkeypatch):
    """Of many positions, compared with which KᵀK is small. Over ranks nobody asks for lost digits."""
    monkeypatch.setattr(gram, "loses_digits", lambda *tensors: False)
    tokens = "model.parameter_tokens={qkv: 512, proj: 512, ffn: 2048}"
    count_block(load("training.norm=gram", f"training.precision={precision}", "training.micro_batch_size=16", tokens))


def test_elementwise_traffic_and_kernels_of_a_block_in_fp8_with_its_own_kernels(monkeypatch):
    """Of which only what they read and write is there, not what they compute."""
    monkeypatch.setattr(gram, "loses_digits", lambda *tensors: False)
    monkeypatch.setitem(vars(L2_NORM_GELU), "kernel_passes", KERNEL_PASSES)

    def weights(scores, norms, scale, power, by_row, down):
        by_row.zero_()
        down.fill_(1)

    def backward(
        scores, norms, gradient, scale, power, transposed, weights_down, bound, by_row, by_column, down, *rest
    ):
        for tensor in (transposed, by_row, by_column, rest[0]):
            tensor.zero_()
        for tensor in (weights_down, down):
            tensor.fill_(1)

    monkeypatch.setattr(rounded_scores, "usable", lambda function, scores: True)
    monkeypatch.setattr(rounded_scores, "_kernels", lambda: SimpleNamespace(weights=weights, backward=backward))
    for name in ("rounded_weights", "rounded_backward"):
        monkeypatch.setattr(rounded_scores, name, getattr(torch.ops.megatron_tf, name).default)
    tokens = "model.parameter_tokens={qkv: 512, proj: 512, ffn: 2048}"
    count_block(load("training.norm=gram", "training.precision=fp8", "training.micro_batch_size=16", tokens))


def count_block(config):
    block, hidden, work = block_for(config), hidden_for(config), architecture_of(config.model).work(config)
    positions = hidden[..., 0].numel()
    block(hidden)  # the tables of the rotation are made once
    for direction in ("forward", "backward"):
        with Counting() as counted:
            if direction == "forward":
                out = block(hidden)
            else:
                out.backward(torch.ones_like(out))
        of_hidden = getattr(HIDDEN_PASSES, direction) + getattr(work.head_passes, direction)
        elements = getattr(work.inner_passes, direction) * work.inner_width + of_hidden * config.model.hidden_size
        elements += getattr(work.moved, direction)
        assert 2 * positions * elements == pytest.approx(counted.traffic, rel=TOLERANCE), direction
        if getattr(config.model, "activation", "l2_norm_gelu") == "l2_norm_gelu":
            assert getattr(work.kernels, direction) == pytest.approx(counted.kernels, rel=TOLERANCE), direction


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_traffic_of_the_cross_entropy(precision):
    logits = torch.randn(64, 2, 1000).to(TYPES[precision]).requires_grad_()
    labels = torch.zeros(64, 2, dtype=torch.int64)
    per_logit = LOGIT_BYTES[precision]
    with Counting() as counted:
        loss = cross_entropy(logits, labels, 0, SINGLE).sum()
    assert per_logit.forward * logits.numel() == pytest.approx(counted.traffic, rel=TOLERANCE)
    with Counting() as counted:
        loss.backward()
    # one gradient of 1 a token, spread over the logits, is not written out here
    assert per_logit.backward * logits.numel() == pytest.approx(counted.traffic, rel=TOLERANCE)


def as_counter(collectives):
    counted = Counter()
    for collective in collectives:
        counted[collective.kind, collective.bytes] += collective.count
    return counted


def sent_by_layers(group, sequence, precision, *model):
    config = load(
        f"parallel={{tensor: {group.size}, sequence: {str(sequence).lower()}}}",
        f"training.precision={precision}",
        *model,
    )
    dtype, tensor = TYPES[precision], TensorParallel(group, sequence)
    block, embedding, norm = (
        block_for(config, group), Embedding(config.model, tensor).to(dtype), FinalNorm(config.model, tensor).to(dtype),
    )  # fmt: skip
    ids = torch.zeros(config.training.micro_batch_size, config.model.seq_length, dtype=torch.int64)

    def check(call, expected):
        with Counting() as counted:
            out = call()
        assert counted.sent == as_counter(expected), (counted.sent, expected)
        return out

    # of a step with one micro batch
    forward, backward = map(add, block_collectives(config), architecture_of(config.model).step_collectives(config))
    (first_forward, first_backward), (last_forward, last_backward) = ends_collectives(config)
    hidden = check(lambda: embedding(ids), first_forward)
    check(lambda: hidden.backward(torch.ones_like(hidden)), first_backward)
    hidden = hidden.detach().requires_grad_()
    out = check(lambda: block(hidden), forward)
    check(lambda: out.backward(torch.ones_like(out)), backward)
    loss = check(
        lambda: cross_entropy(embedding.logits(norm(hidden)), ids.mT, embedding.start, group).mean(), last_forward
    )
    check(lambda: loss.backward(), last_backward)


SENT = [
    (False, "bf16"),
    (True, "fp32"),
    (True, "bf16", "model.activation=softmax"),
    (True, "bf16", "training.norm=gram"),
    (False, "bf16", *TRANSFORMER),
    (True, "bf16", *TRANSFORMER),
    (True, "bf16", *EVERYWHERE),
]


def test_tensor_parallel_communication_to_the_byte():
    """Also of the gram form, of a transformer, and with candidates."""
    spawn_each(sent_by_layers, 2, SENT)


def test_candidates_are_chosen_without_communication():
    """What is sent is what a dense model of as many used tokens sends."""
    dense = load("parallel.tensor=2")
    for architecture in (SPARSE, EVERYWHERE):
        sparse = load(*architecture, "parallel.tensor=2")
        assert list(map(as_counter, block_collectives(sparse))) == list(map(as_counter, block_collectives(dense)))


def context_of_a_block(group, model):
    """What a block keeps and sends where two ranks share its positions, in a step of training."""
    config = load("parallel={engine: torch, context: 2}", "training.precision=bf16", *model)
    block, hidden, reports = block_for(config, context=group), hidden_for(config, 2), BlockContext(loss_weight=1.0)
    block(hidden)  # the tables of the rotation are made once
    assert block_activation_bytes(config) == pytest.approx(saved_bytes(lambda: block(hidden)), rel=TOLERANCE)
    for expected in context_collectives(config):
        with Counting() as counted:
            if hidden.grad_fn is None:
                hidden = block(hidden, reports)
            else:
                hidden.backward(torch.ones_like(hidden))
        assert counted.sent == as_counter(expected)
    for metric in reports.metrics.values():
        with Counting() as counted:
            of_all_positions(metric, group)
        assert counted.sent == {("all_reduce", 4 * metric.numel()): 1}


def test_context_parallel_memory_and_communication():
    """Candidates are balanced without an exchange. What a step exchanges once is the number that it reports of them."""
    spawn_each(context_of_a_block, 2, [((),), ((*TRANSFORMER, "model.num_key_value_heads=2"),), (EVERYWHERE,)])
