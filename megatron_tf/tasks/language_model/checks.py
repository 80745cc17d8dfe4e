"""Checks of token ids for the public functions of a language model, each with one message."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tf.checks import described
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ArgumentError
from megatron_tf.model.checks import check_device, is_whole, shape_of, type_of
from megatron_tf.tasks.language_model.section import vocab_size_of


def checked_ids(name: str, ids: Tensor, model: Model, device: torch.device) -> Tensor:
    """`ids` as int64; ArgumentError unless they are token ids [b, s] of `model` on `device`, s at most its seq_length.

    In a compiled graph, and on a device other than a CPU, an id out of range raises later, without its number.
    """
    check_id_tensor(name, ids)
    if ids.shape[1] > model.seq_length:
        raise ArgumentError(
            f"{name}: has samples of {ids.shape[1]} tokens, model.seq_length is {model.seq_length}. Give shorter ones, "
            f"or build the model with seq_length={ids.shape[1]}: no weight depends on it."
        )
    check_device(name, ids, "the model", device)
    ids = ids.long()
    check_vocabulary(name, ids, vocab_size_of(model))
    return ids


def check_id_tensor(name: str, ids: Tensor) -> None:
    """ArgumentError unless `ids` are integers [b, s] with s at least 1."""
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"{name}: {described(ids)}, but a tensor is expected. Give torch.tensor({name}).")
    if not is_whole(ids):
        raise ArgumentError(f"{name}: the type is {type_of(ids)}, but token ids are whole numbers. Give int64.")
    if ids.dim() != 2 or ids.shape[1] == 0:
        remedy = f" Give {name}[None] for one sample." if ids.dim() == 1 and len(ids) else ""
        raise ArgumentError(
            f"{name}: the shape is {shape_of(ids)}, but [samples, tokens] is expected, at least one token.{remedy}"
        )


def check_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    """ArgumentError unless 0 <= ids < `vocab_size`."""
    if ids.numel() == 0 or ids.device.type == "meta":
        return
    expected = f"model.vocab_size is {vocab_size}. Token ids are 0 to {vocab_size - 1}: is it another tokenizer?"
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        # does not synchronise with the device, as a comparison on the host would
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), f"{name}: an id is out of range, {expected}")
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest < 0 or highest >= vocab_size:
        raise ArgumentError(f"{name}: {lowest if lowest < 0 else highest} is out of range, {expected}")
