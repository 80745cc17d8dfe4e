"""Projections of parameter tokens that this rank holds a share of, and how they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_tf.activations.forms import norm_form
from megatron_tf.checks import check_scale, check_whole_number
from megatron_tf.config.activations import ACTIVATIONS, DEFAULT_ACTIVATION
from megatron_tf.config.sections.training import Training
from megatron_tf.model import gram
from megatron_tf.model.checks import check_pattention
from megatron_tf.model.filling import fill_normal
from megatron_tf.model.later import Later
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.pattention import DIRECT, Form, partial_pattention
from megatron_tf.parallel.collectives import copy_to, gather_from, gather_together, reduce_from
from megatron_tf.parallel.groups import SINGLE, Group
from megatron_tf.parallel.meanwhile import Meanwhile, postponed
from megatron_tf.state.parameters import INITIAL_STD, check_activation, default_scale, shard_range


class Pattention(nn.Module):
    """One projection: n parameter tokens, of which this rank holds a contiguous share.

    `scale`: τ. It is stored and never recomputed from the number of tokens, so that growth can keep it.
    Used alone, it is a layer x [..., d_in] -> [..., d_out], see `pattention`. ArgumentError for invalid arguments.
    """

    def __init__(
        self,
        num_tokens: int,
        d_in: int,
        d_out: int,
        *,
        scale: float | None = None,
        activation: str = DEFAULT_ACTIVATION,
        group: Group = SINGLE,
    ):
        super().__init__()
        check_activation(activation)
        # each rank holds at least one token
        for name, size, least in (("num_tokens", num_tokens, group.size), ("d_in", d_in, 1), ("d_out", d_out, 1)):
            check_whole_number(name, size, least)
        if scale is not None:
            check_scale("scale", scale)
        start, stop = shard_range(num_tokens, group.size, group.rank)
        self.key_tokens = nn.Parameter(torch.empty(stop - start, d_in))
        self.value_tokens = nn.Parameter(torch.empty(stop - start, d_out))
        self.num_tokens = num_tokens
        self.form = DIRECT
        self.own_rows = False  # whether a rank computes Gram norms of its own rows only, see `entered`
        self.step: gram.StepMatrices | None = None  # of this and the projections that share its input
        self.scale = default_scale(num_tokens, activation) if scale is None else scale
        self.activation = activation
        self.group = group
        self.observer: Callable[[Tensor], None] | None = None  # gets each input x [s, b, d], whole on every rank
        fill_normal(self.key_tokens, INITIAL_STD)
        fill_normal(self.value_tokens, 1 / d_out**0.5)

    def forward(self, x: Tensor) -> Tensor:
        check_pattention(x, self.key_tokens, self.value_tokens, self.scale, self.activation)
        return reduce_from(self.partial(copy_to(x, self.group)), self.group)

    def partial(self, x: Tensor) -> Tensor:
        """x [..., d_in], whole -> [..., d_out], still to be summed over the group."""
        return partial_outputs([self], Entered(x))[0]

    @staticmethod
    def compute(projections: Sequence[Pattention], entered: Entered) -> tuple[Tensor, ...]:
        """`partial_outputs`, of projections of this class."""
        first = projections[0]
        return partial_pattention(
            entered.x,
            [p.key_tokens for p in projections] if entered.keys is None else entered.keys,
            [p.value_tokens for p in projections],
            [p.scale for p in projections],
            first.activation,
            first.group,
            first.form,
            entered.norms,
            first.step,
            entered.meanwhile,
        )


class Entered(NamedTuple):
    """The input x [..., d_in] of projections that share it, whole on every rank.

    `norms`: [..., projections] of the Gram form under sequence parallelism, where each rank computes them for its own
    rows before x is gathered; otherwise None.
    `keys`: the projections' key tokens, as `meanwhile` wants them; None: they are the projections' own.
    `meanwhile`: belongs to the exchange of x's gradient, which can hide the product that makes the keys' gradients.
    """

    x: Tensor
    norms: Tensor | None = None
    keys: Sequence[Tensor] | None = None
    meanwhile: Meanwhile | None = None


def entered(projections: Sequence[Pattention], hidden: Tensor, tensor: TensorParallel) -> Entered:
    """Hidden between layers [s, b, d], or its part on a rank, as the input of projections."""
    first = projections[0]
    keys, meanwhile = _postponed_keys(projections)
    if first.form.norm == "direct" or not first.own_rows:
        return Entered(tensor.enter(hidden, meanwhile), None, keys, meanwhile)
    matrices = gram.matrices(keys, first.group, first.step)
    norms = gram.norms(hidden.flatten(0, -2), matrices).view(*hidden.shape[:-1], -1)
    return Entered(*gather_together(hidden, norms, first.group, meanwhile), keys, meanwhile)


def gathered(projection: Pattention, x: Tensor) -> Entered:
    """Slices of x along its last dimension, one of each rank, as the input of a projection."""
    keys, meanwhile = _postponed_keys([projection])
    return Entered(gather_from(x, projection.group, -1, meanwhile), None, keys, meanwhile)


def _postponed_keys(projections: Sequence[Pattention]) -> tuple[Sequence[Tensor], Meanwhile | None]:
    keys, first = [p.key_tokens for p in projections], projections[0]
    # `Later` has the backward pass leave all gradients of tokens to it, and wants the tokens themselves
    return (keys, None) if first.form.later is not None else postponed(keys, first.group)


def partial_outputs(projections: Sequence[Pattention], entered: Entered) -> tuple[Tensor, ...]:
    """Outputs [..., d_out] of projections of the same form, each still to be summed over the tensor group."""
    for projection in projections:
        if projection.observer is not None:
            projection.observer(entered.x)
    return projections[0].compute(projections, entered)


def choose_forms(block: nn.Module, training: Training, device: str) -> list[gram.StepMatrices]:
    """Sets the `Form` of each Pattention of a block from `training`, for a `device` type.

    Returns the objects that keep KᵀK over the micro batches of a step. Their `begin` must be called at each step.
    """
    of_steps = []
    for module in block.modules():
        if isinstance(module, Pattention):
            norm = norm_form(
                training.wanted_norm, ACTIVATIONS[module.activation], module.num_tokens, module.key_tokens.shape[1],
                module.group.size, device, own_rows=module.own_rows, compiled=training.compile,
            )  # fmt: skip
            module.form = Form(norm, training.scores == "keep", fp8=training.precision == "fp8")
            module.step = gram.StepMatrices() if norm == "gram" else None
            if module.step is not None:
                of_steps.append(module.step)
    return of_steps


@contextmanager
def without_fp8(module: nn.Module) -> Iterator[None]:
    """A context in which the Pattentions of `module` compute products in the type of their tokens, not in fp8."""
    projections = [part for part in module.modules() if isinstance(part, Pattention)]
    forms = [projection.form for projection in projections]
    for projection in projections:
        projection.form = projection.form._replace(fp8=False)
    try:
        yield
    finally:
        for projection, form in zip(projections, forms):
            projection.form = form


def leave_weights(module: nn.Module, later: Later) -> None:
    """From now on, backward passes defer gradients of weights in `module` to `later`, for the layers that support it.
    Gradients of banks of candidates, norms, input embeddings and image classifiers are still computed at once."""
    for part in module.modules():
        if isinstance(part, Pattention):
            part.form = part.form._replace(later=later)
        elif hasattr(part, "later"):
            part.later = later  # type: ignore[assignment]
