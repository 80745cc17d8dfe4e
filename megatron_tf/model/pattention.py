"""Pattention: attention from the input to n learnable parameter tokens. The maths, once, for every layout.

    A = X Kᵀ,   S = θ(A),   out = S V

The activation's `ScoreFunction` computes the steps between the products, forward and backward. score_layout.py defines
the memory layout of scores.

Sharded over a group T (token axis): each Σ runs over all tokens, so it is all-reduced over T. That is one
number a row and projection, forward and backward; everything else is local.

| tensor | local shape |
|---|---|
| X | [..., d_in], whole on every rank |
| K, V | [n/T, d_in], [n/T, d_out] |
| A, S | [..., n/T] |
| r, Σ | [..., 1 for each projection that shares X] |
| out | [..., d_out], partial: the caller sums it over T |

Projections that share X (query, key, value) go through one product against their concatenated keys and one
all-reduce. Saved for backward: X once, A in the compute type, and r; S is recomputed, and dA is made in the memory of
dS. So the backward holds A, dS and one projection's S. A `Form` can have A recomputed too: one more product, and X and
r are all that is saved. Unless rows wait for an exchange, forward and backward then go over them chunk by chunk, so
that nothing of all rows and tokens is ever there; gradients of tokens are added up in fp32.

In the Gram form r comes from gram.py, and with it a Pattention is a GELU MLP of (τ/r)X: no row is exchanged, and the
backward hands on dr = −T/r instead of coupling the tokens. Under sequence parallelism each rank finds r of its own s/T
rows, which travels with them. Its products, not those that r comes from, can be made in 8 bits: see fp8.py.
Where r is a norm, a row of scores that is all zero has r = 0: its output and gradients are 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations import l2_norm
from megatron_tf.activations.forms import Norm
from megatron_tf.activations.function import ScoreFunction, score_function
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model import fp8, gram, row_passes
from megatron_tf.model.checks import check_pattention
from megatron_tf.model.later import Later
from megatron_tf.model.products import PLAIN
from megatron_tf.parallel.groups import SINGLE, Group
from megatron_tf.parallel.meanwhile import Meanwhile


class Form(NamedTuple):
    """How a Pattention is computed. The result is the same to rounding.

    `norm`: "direct", or "gram" for an activation that has it. On one process, rows whose norm would lose digits are
    computed directly, with all others of the call.
    `keep_scores`: for the backward pass, which otherwise makes them again.
    `later`: where the backward pass leaves the gradients of tokens; None: it makes them. Scores must be kept, and
    tokens be leaves.
    `fp8`: make products of factors rounded to 8 bits, where the norm is "gram".
    """

    norm: Norm = "direct"
    keep_scores: bool = True
    later: Later | None = None
    fp8: bool = False


DIRECT = Form()


def pattention(
    x: Tensor,
    key_tokens: Tensor,
    value_tokens: Tensor,
    *,
    scale: float | None = None,
    activation: str = DEFAULT_ACTIVATION,
) -> Tensor:
    """Pattention on one process. Differentiable in all three tensors.

    x [..., d_in], key_tokens [n, d_in], value_tokens [n, d_out] -> [..., d_out], in the type of the tokens, to which x
    is converted; under autocast, in autocast's type.
    `scale` is τ; the default is the activation's for n tokens, right only for a model that was never grown.
    ArgumentError when these do not fit together.
    """
    check_pattention(x, key_tokens, value_tokens, 1.0 if scale is None else scale, activation)
    if scale is None:
        scale = score_function(activation).facts.default_scale(key_tokens.shape[0])
    return partial_pattention(x, [key_tokens], [value_tokens], [scale], activation, SINGLE)[0]


def partial_pattention(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    activation: str,
    group: Group,
    form: Form = DIRECT,
    norms: Tensor | None = None,
    step: gram.StepMatrices | None = None,
    meanwhile: Meanwhile | None = None,
) -> tuple[Tensor, ...]:
    """Outputs of several projections of one x, each still to be summed over `group`.

    x [..., d_in]; keys[i] [n_i/T, d_in]; values[i] [n_i/T, d_out] -> one [..., d_out] a projection, in the type of the
    tokens; under autocast all are converted to autocast's type, as the arguments of a matrix product are.
    `norms`: r of the Gram form [..., projections], where it is known.  `step`: keeps KᵀK over the micro batches of one.
    `meanwhile`: of these keys, whose gradients the backward pass may leave to the exchange of x's gradient.
    """
    function = score_function(activation)
    device, dtype = x.device.type, keys[0].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        keys, values = ([token.to(dtype) for token in tokens] for tokens in (keys, values))
        with torch.autocast(device, enabled=False):
            return _outputs(x.to(dtype), keys, values, scales, function, group, form, norms, step, meanwhile)
    return _outputs(x.to(dtype), keys, values, scales, function, group, form, norms, step, meanwhile)


def _outputs(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    function: ScoreFunction,
    group: Group,
    form: Form,
    norms: Tensor | None,
    step: gram.StepMatrices | None,
    meanwhile: Meanwhile | None,
) -> tuple[Tensor, ...]:
    if norms is None and form.norm == "gram":
        matrices = gram.matrices(keys, group, step)
        norms = gram.norms(_rows(x), matrices).view(*x.shape[:-1], len(keys))
        # the ranks of a group would have to agree on it, and a compiled graph cannot branch
        certain = group.size > 1 or torch.compiler.is_compiling()
        if not certain and gram.loses_digits(_rows(x), matrices, _rows(norms)):
            norms = None
    in_fp8 = form.fp8 and norms is not None
    if norms is not None and in_fp8:
        factors = fp8.row_factors(norms.detach(), scales)
        x, norms = x * factors.to(x.dtype), norms * factors
    tensors = [x, *keys, *values, *([] if norms is None else [_rows(norms)])]
    product = fp8.PRODUCT if in_fp8 else PLAIN
    return _Pattention.apply(function, tuple(scales), group, product, form.keep_scores, form.later, meanwhile, *tensors)


@torch.no_grad()
def token_weights(x: Tensor, key_tokens: Tensor, scale: float, activation: str, group: Group) -> tuple[Tensor, Tensor]:
    """(‖A‖₂ over all tokens [rows, 1], this rank's S [rows, n/T]) of one projection, to look at. Not differentiable."""
    return weights_of(_rows(x) @ key_tokens.mT, scale, activation, group)


def weights_of(scores: Tensor, scale: float, activation: str, group: Group) -> tuple[Tensor, Tensor]:
    """As `token_weights`, of this rank's scores [rows, n/T]."""
    function = score_function(activation)
    norm = l2_norm.begin_reduction(l2_norm.norm(scores), group)
    statistic = function.begin_reduction(function.statistic(scores), group)()
    return norm(), function.weights(scores, statistic, scale)


class _Pattention(Function):
    # Where no gradient is wanted, torch.compile drops ctx from a call with as many arguments as `forward` has
    # parameters, which are nine: there must be more tensors than two.
    @staticmethod
    def forward(ctx, function, scales, group, product, keep_scores, later, meanwhile, *tensors):
        x, *others = tensors
        tokens, norms = others[: 2 * len(scales)], others[2 * len(scales) :]
        layer = row_passes.layer_of(tokens, scales, function, group, product, len(norms) > 0)
        scores: Tensor | None = None
        if layer.exchanges:
            scores, statistics, outputs = row_passes.sharded_forward(_rows(x), layer)
        elif keep_scores:
            scores, statistics, outputs = row_passes.forward((_rows(x), *norms), layer)
        else:
            chunks = [row_passes.forward(own, layer)[1:] for own in row_passes.chunks_of(_rows(x), *norms)]
            statistics, outputs = ([torch.cat(own) for own in zip(*parts)] for parts in zip(*chunks))
        ctx.save_for_backward(x, *tokens, *statistics, *([scores] if keep_scores else []))
        ctx.function, ctx.scales, ctx.group, ctx.normed = function, scales, group, layer.normed
        ctx.product = product
        ctx.later, ctx.leaves = later, tokens if later is not None else None
        ctx.meanwhile = meanwhile
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *others = ctx.saved_tensors
        count = len(ctx.scales)
        tokens, statistics, kept = others[: 2 * count], others[2 * count : 3 * count], others[3 * count :]
        shared = ctx.scales, ctx.function, ctx.group, ctx.product, ctx.normed
        layer = row_passes.layer_of(tokens, *shared, wants_dx=ctx.needs_input_grad[7])
        rows = _rows(x), *map(_rows, grads), *statistics
        if ctx.later is not None:
            d_x, products, totals = row_passes.backward_to_inputs(rows, *kept, layer)
            ctx.later.add(ctx.leaves, _made(products, [len(own) for own in tokens]))
            token_grads = [None] * len(tokens)
        elif kept or layer.exchanges:
            scores = kept[0] if kept else row_passes.make_scores(rows[0], layer)
            d_x, of_keys, value_grads, totals = row_passes.backward_but_keys(rows, scores, layer)
            if ctx.meanwhile is None:
                token_grads = [*of_keys(), *value_grads]
            else:
                ctx.meanwhile.leave(of_keys)
                token_grads = [None] * count + value_grads
        else:
            d_x, token_grads, totals = row_passes.backward_by_chunks(rows, layer)
        gradients = [
            None if d_x is None else d_x.view(x.shape),
            *(None if grad is None else grad[: len(own)].to(own.dtype) for own, grad in zip(tokens, token_grads)),
        ]
        if layer.normed:
            norms = torch.cat(statistics, -1)
            gradients.append(torch.where(norms == 0, 0, -torch.cat(totals, -1) / norms))
        return None, None, None, None, None, None, None, *gradients


def _made(products: Sequence[Callable[[], Tensor]], sizes: Sequence[int]) -> Callable[[], Sequence[Tensor]]:
    """A function that makes the products, the first `sizes` rows of each."""
    return lambda: [product()[:size] for product, size in zip(products, sizes)]


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return x.reshape(-1, x.shape[-1])
