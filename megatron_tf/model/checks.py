"""Checks of the arguments of the model's public functions, each with one message: types, shapes, devices, numbers.

No check synchronises with a device or breaks a compiled graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checks import check_scale, check_whole_number, described
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ArgumentError
from megatron_tf.state.parameters import check_activation, projections

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_pattention(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, scale: float, activation: str) -> None:
    """ArgumentError unless these are valid arguments of `pattention`. x may have any floating-point type."""
    check_activation(activation)
    check_scale("scale", scale)
    for name, tensor in (("x", x), ("key_tokens", key_tokens), ("value_tokens", value_tokens)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: {described(tensor)}, but a tensor is expected. Give torch.as_tensor({name}).")
    for name, tokens in (("key_tokens", key_tokens), ("value_tokens", value_tokens)):
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ArgumentError(
                f"{name}: the shape is {shape_of(tokens)}, but [tokens, channels] is expected, at least one of each."
            )
        if tokens.dtype not in FLOATING:
            raise ArgumentError(
                f"{name}: the type is {type_of(tokens)}, but one of {_listed(FLOATING)} is expected. Convert the "
                "tokens, for example by .float()."
            )
    if key_tokens.shape[0] != value_tokens.shape[0]:
        raise ArgumentError(
            f"value_tokens: has {value_tokens.shape[0]} tokens, key_tokens has {key_tokens.shape[0]}. Give one value "
            "token for each key token."
        )
    if key_tokens.dtype != value_tokens.dtype:
        raise ArgumentError(
            f"value_tokens: the type is {type_of(value_tokens)}, that of key_tokens {type_of(key_tokens)}. Give "
            "both in one type."
        )
    if x.dim() == 0 or x.shape[-1] != key_tokens.shape[1]:
        raise ArgumentError(
            f"x: the shape is {shape_of(x)}, but the key tokens {shape_of(key_tokens)} need an x of [..., "
            f"{key_tokens.shape[1]}]. Its last axis must have d_in channels."
        )
    if not x.dtype.is_floating_point:
        remedy = "Token ids go through an embedding first; numbers, through x.float()"
        if x.dtype.is_complex:
            remedy = "Give real and imaginary parts as channels: torch.view_as_real(x).flatten(-2)"
        raise ArgumentError(f"x: the type is {type_of(x)}, but a floating-point type is expected. {remedy}.")
    for name, tensor in (("x", x), ("value_tokens", value_tokens)):
        check_device(name, tensor, "key_tokens", key_tokens.device)


def check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """ArgumentError unless the tensor `name` is on the device of `other`."""
    if tensor.device != device:
        raise ArgumentError(f"{name}: is on {tensor.device}, {other} on {device}. Move it: {name}.to({str(device)!r}).")


def check_starts(starts: Tensor, ids: Tensor) -> None:
    """ArgumentError unless `starts` are integers in the shape of `ids` [b, s], on the same device."""
    remedy = "attention.document_starts makes them"
    _check_whole_numbers("starts", starts, ids.shape, f"one for each of input_ids: {remedy}")
    check_device("starts", starts, "input_ids", ids.device)


def check_padding(padding: Tensor, ids: Tensor) -> None:
    """ArgumentError unless `padding` has an integer for each row of `ids` [b, s]."""
    _check_whole_numbers("padding", padding, ids.shape[:1], "one for each row: how many ids at its beginning are none")


def _check_whole_numbers(name: str, tensor: Tensor, shape: torch.Size, meaning: str) -> None:
    if isinstance(tensor, Tensor) and is_whole(tensor) and tensor.shape == shape:
        return
    given = described(tensor)
    if isinstance(tensor, Tensor):
        given = f"the shape is {shape_of(tensor)} and the type {type_of(tensor)}"
    raise ArgumentError(f"{name}: {given}, but whole numbers {list(shape)} are expected, {meaning}.")


def check_scales(scales: Mapping[str, float], model: Model) -> None:
    """ArgumentError unless `scales` has a τ for each projection of `model`, and no other."""
    if not isinstance(scales, Mapping):
        raise ArgumentError(f"scales: {described(scales)}, but a mapping from projections to τ is expected.")
    expected = projections(model)
    for problem, names in (
        ("has no τ of", [name for name in expected if name not in scales]),
        ("names what the model does not have:", [name for name in scales if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ArgumentError(
                f"scales: {problem} {names[0]}{more}. Give those of the model's checkpoint, or None for a fresh model."
            )
    for name, scale in scales.items():
        check_scale(f"scales[{name!r}]", scale)


def check_building(config: Model, seed: int, device: Any, dtype: torch.dtype) -> None:
    """ArgumentError unless these are valid arguments of `build_model`, and the device exists."""
    check_config(config)
    check_whole_number("seed", seed, 0, 2**63 - 1)
    check_dtype(dtype)
    try:
        kind = None if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device: {described(device)}, but one such as 'cpu' or 'cuda:0' is expected.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: {device} is given, but no CUDA device is here. Give 'cpu'.")


def check_config(config: object) -> None:
    """ArgumentError unless `config` is the model section of a configuration."""
    if not isinstance(config, Model):
        remedy = "Give the section config.model" if hasattr(config, "model") else "Give Model(num_layers=..., ...)"
        raise ArgumentError(f"config: {described(config)}, but a Model is expected. {remedy}.")


def check_dtype(dtype: torch.dtype) -> None:
    """ArgumentError unless `dtype` is one of FLOATING, the types of models."""
    if dtype not in FLOATING:
        given = str(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise ArgumentError(f"dtype: {given}, but one of {_listed(FLOATING)} is expected.")


def is_whole(tensor: Tensor) -> bool:
    """Whether `tensor` has an integer type."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def type_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(types: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)
