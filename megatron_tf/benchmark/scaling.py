"""Time of a block against parameter tokens and sequence length, compared with the Transformer of the same size.

Forward and backward of one block. A TokenFormer grows in tokens, the Transformer with as many parameters and layers in
width. So the cost of token-token attention, timed separately, stays the same for the former and rises for the latter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_tf.architectures.tokenformer.section import TokenFormerModel
from megatron_tf.benchmark.models import equal_transformer
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import Call, interleaved
from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.model import build_model
from megatron_tf.model.attention import causal_attention


def rows(
    device: torch.device,
    dtype: torch.dtype,
    base: TokenFormerModel,
    tokens: Sequence[int],
    lengths: Sequence[int],
    positions: int,
    rounds: int,
) -> Iterator[Row]:
    """`tokens` of each of query, key, value and proj, 4 times as many of ffn, at the sequence length of `base`; then
    its own tokens at each of `lengths`. Samples of a batch make up `positions` positions, or one sample if it is
    longer."""
    grown = [base.model_copy(update={"parameter_tokens": ParameterTokens(qkv=n, proj=n, ffn=4 * n)}) for n in tokens]
    longer = [base.model_copy(update={"seq_length": length}) for length in lengths]
    for model in (*grown, *longer):
        yield _measure(device, dtype, model, positions, rounds)


def _measure(device: torch.device, dtype: torch.dtype, model: TokenFormerModel, positions: int, rounds: int) -> Row:
    pair = {"tokenformer": model, "transformer": equal_transformer(model)}
    samples = max(1, positions // model.seq_length)
    calls: dict[str, Call] = {}
    for name, one in pair.items():
        calls[name] = _block(one, samples, device, dtype)
        calls[f"attention, {name}"] = _attention(one, samples, device, dtype)
    timings = interleaved(calls, device, rounds)
    ours = timings["tokenformer"]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": model.parameter_tokens.qkv,
        "seq_length": model.seq_length,
        "samples": samples,
        "parameters": num_parameters(model),
        "width": model.hidden_size,
        "transformer's": pair["transformer"].hidden_size,
        **{f"{name} ms": 1e3 * timing.median for name, timing in timings.items()},
        "× transformer": ours.speed_against(timings["transformer"]),
        "attention's share": 1 / timings["attention, tokenformer"].speed_against(ours),
    }


def _block(model: Model, samples: int, device: torch.device, dtype: torch.dtype) -> Call:
    """Forward and backward of one block, all gradients made anew."""
    (block,) = build_model(model.model_copy(update={"num_layers": 1, "vocab_size": 1})).to(device, dtype).blocks
    hidden = torch.randn(model.seq_length, samples, model.hidden_size).to(device, dtype).requires_grad_()
    inputs = [hidden, *block.parameters()]
    grad = torch.randn_like(hidden)
    return lambda: torch.autograd.grad(block(hidden), inputs, grad)


def _attention(model: Model, samples: int, device: torch.device, dtype: torch.dtype) -> Call:
    """Token-token attention of one block, forward and backward, rotation included."""
    heads, head_dim = model.num_attention_heads, model.hidden_size // model.num_attention_heads
    shape = model.seq_length, samples, heads, head_dim
    query, key, value = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(model.seq_length, samples, model.hidden_size).to(device, dtype)
    channels = int(head_dim * model.rotary_fraction)

    def call() -> object:
        out = causal_attention(query, key, value, channels, model.rotary_base)
        return torch.autograd.grad(out, (query, key, value), grad)

    return call
