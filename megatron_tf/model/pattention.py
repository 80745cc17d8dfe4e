"""Pattention: attention from the input to n learnable parameter tokens. The maths, once, for every layout.

    A = X Kᵀ,   S = θ(A),   out = S V

What is done between the products, forward and backward, is the activation's `ScoreFunction`; how scores lie in memory
is in score_layout.py.

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
dS. So the backward holds A, dS and one projection's S. A `Form` can have A recomputed too: one more product, and X and r
are all that is saved.

In the Gram form r comes from gram.py, and with it a Pattention is a GELU MLP of (τ/r)X: no row is exchanged, and the
backward hands on dr = −T/r instead of coupling the tokens.
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
from megatron_tf.activations.overlap import row_parts
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model import gram
from megatron_tf.model.checks import check_pattention
from megatron_tf.model.kernels import score_layout
from megatron_tf.parallel.collectives import begin_all_reduce
from megatron_tf.parallel.groups import SINGLE, Group


class Form(NamedTuple):
    """How a Pattention is computed; what it computes is the same to rounding.

    `norm`: "direct", or "gram" for an activation that has it. On one process, rows whose norm would lose digits are
    computed directly, with all others of the call.
    `keep_scores`: for the backward pass, which otherwise makes them again.
    """

    norm: Norm = "direct"
    keep_scores: bool = True


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
) -> tuple[Tensor, ...]:
    """Outputs of several projections of one x, each still to be summed over `group`.

    x [..., d_in]; keys[i] [n_i/T, d_in]; values[i] [n_i/T, d_out] -> one [..., d_out] a projection, in the type of the
    tokens; under autocast all are converted to autocast's type, as the arguments of a matrix product are.
    """
    function = score_function(activation)
    device, dtype = x.device.type, keys[0].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        keys, values = ([token.to(dtype) for token in tokens] for tokens in (keys, values))
        with torch.autocast(device, enabled=False):
            return _outputs(x.to(dtype), keys, values, scales, function, group, form)
    return _outputs(x.to(dtype), keys, values, scales, function, group, form)


def _outputs(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    function: ScoreFunction,
    group: Group,
    form: Form,
) -> tuple[Tensor, ...]:
    tensors = [x, *keys, *values]
    if form.norm == "gram":
        matrices = gram.matrices(keys, group)
        norms = gram.norms(_rows(x), matrices)
        # over ranks all would have to agree, and a compiled graph has no choice
        certain = group.size > 1 or torch.compiler.is_compiling()
        if certain or not gram.loses_digits(_rows(x), matrices, norms):
            tensors.append(norms)
    return _Pattention.apply(function, tuple(scales), group, form.keep_scores, *tensors)


@torch.no_grad()
def token_weights(x: Tensor, key_tokens: Tensor, scale: float, activation: str, group: Group) -> tuple[Tensor, Tensor]:
    """(‖A‖₂ over all tokens [rows, 1], this rank's S [rows, n/T]) of one projection, to look at. Not differentiable."""
    scores, function = _rows(x) @ key_tokens.mT, score_function(activation)
    norm = l2_norm.begin_reduction(l2_norm.norm(scores), group)
    statistic = function.begin_reduction(function.statistic(scores), group)()
    return norm(), function.weights(scores, statistic, scale)


class _Pattention(Function):
    # Where no gradient is wanted, torch.compile drops ctx from a call with as many arguments as `forward` has
    # parameters, which are six: there must be more tensors than two.
    @staticmethod
    def forward(ctx, function, scales, group, keep_scores, *tensors):
        x, tokens, norms = _taken_apart(tensors, scales)
        keys, values = _for_products(tokens, function)
        if norms is not None or group.size == 1:
            scores, statistics, outputs = _forward(_rows(x), keys, values, scales, function, norms)
        else:
            scores, statistics, outputs = _sharded_forward(_rows(x), keys, values, scales, function, group)
        ctx.save_for_backward(x, *tokens, *statistics, *([scores] if keep_scores else []))
        ctx.function, ctx.scales, ctx.group, ctx.normed = function, scales, group, norms is not None
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        function, scales, group = ctx.function, ctx.scales, ctx.group
        x, *others = ctx.saved_tensors
        count = len(scales)
        tokens, statistics, kept = others[: 2 * count], others[2 * count : 3 * count], others[3 * count :]
        keys, values = _for_products(tokens, function)
        scores = kept[0] if kept else _scores(_rows(x), score_layout.joined(keys))
        gradient = score_layout.empty_scores(scores, *scores.shape)
        score_layout.clear_gaps(gradient, keys)
        own = score_layout.split(gradient, keys), score_layout.split(scores, keys)
        parts = list(zip(*own, statistics, scales))
        coupled_here = group.size == 1 and not ctx.normed
        exchanged = group.size > 1 and not ctx.normed
        value_grads, totals = [], []
        for (d, a, r, scale), v, grad in zip(parts, values, grads):
            d.addmm_(_rows(grad), v.mT, beta=0)  # beta 0: what is in d is not read. torch.compile takes no out= here
            if coupled_here:
                s = function.backward_and_couple(a, r, d, scale)
            else:
                s, total = function.backward(a, r, d, scale)
                totals.append(total)
                if exchanged and len(totals) == count:  # on its way while the last value tokens' gradients are made
                    finish = begin_all_reduce(torch.cat(totals, -1), group)
            value_grads.append(s.mT @ _rows(grad))
        if exchanged:
            for (d, a, r, scale), total in zip(parts, finish().split(1, -1)):
                function.couple(a, r, total, d, scale)
        d_x = (gradient @ score_layout.joined(keys)).view(x.shape) if ctx.needs_input_grad[4] else None
        key_grads = score_layout.split(gradient.mT @ _rows(x), keys, 0)
        token_grads = [grad[: len(own)] for own, grad in zip(tokens, (*key_grads, *value_grads))]
        if ctx.normed:
            norms = torch.cat(statistics, -1)
            token_grads.append(torch.where(norms > 0, -torch.cat(totals, -1) / norms, 0))
        return None, None, None, None, d_x, *token_grads


def _taken_apart(tensors: Sequence[Tensor], scales: Sequence[float]) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """(x, keys and values, r [rows, projections] where it is known already)."""
    x, *others = tensors
    tokens, norms = others[: 2 * len(scales)], others[2 * len(scales) :]
    return x, tokens, norms[0] if norms else None


def _for_products(tokens: Sequence[Tensor], function: ScoreFunction) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(Keys, values) of the projections, with sizes that products are fast with."""
    if function.facts.ignores_zero:
        tokens = [score_layout.filled(own) for own in tokens]
    return tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]


# Scores [rows, keys of all projections], and each projection's r [rows, 1] and output [rows, d_out].
_Results = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]


def _forward(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    function: ScoreFunction,
    norms: Tensor | None,
) -> _Results:
    """Of rows that are whole here, or whose `norms` are known."""
    scores = _scores(x, score_layout.joined(keys))
    statistics, outputs = [], []
    known = [None] * len(keys) if norms is None else norms.split(1, -1)
    for a, v, scale, r in zip(score_layout.split(scores, keys), values, scales, known):
        if r is None:
            r, s = function.statistic_and_weights(a, scale)
        else:
            s = function.weights(a, r, scale)
        statistics.append(r)
        outputs.append(s @ v)
    return scores, statistics, outputs


def _scores(x: Tensor, joined: Tensor) -> Tensor:
    """A of x [rows, d] and keys [columns, d]: [rows, columns]."""
    return score_layout.empty_scores(x, x.shape[0], joined.shape[0]).addmm_(x, joined.mT, beta=0)


def _sharded_forward(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    function: ScoreFunction,
    group: Group,
) -> _Results:
    """In parts of the rows, where there are many: the first's statistic travels while the second's scores are made, and
    the second's while the first's outputs are."""
    sizes = row_parts(x.shape[0], function.facts.reductions, torch.compiler.is_compiling())
    joined = score_layout.joined(keys)
    scores = score_layout.empty_scores(x, x.shape[0], joined.shape[0])
    outputs = [x.new_empty(x.shape[0], v.shape[1]) for v in values]
    exchanges = []
    for a, x_part in zip(scores.split(sizes), x.split(sizes)):
        a.addmm_(x_part, joined.mT, beta=0)
        exchanges.append(_begin_row_statistic(a, keys, function, group))
    statistics = []
    for finish, a, *out_parts in zip(exchanges, scores.split(sizes), *(out.split(sizes) for out in outputs)):
        statistics.append(finish())
        own = score_layout.split(a, keys), statistics[-1].split(1, -1)
        for own_scores, r, v, scale, out in zip(*own, values, scales, out_parts):
            out.addmm_(function.weights(own_scores, r, scale), v, beta=0)
    return scores, torch.cat(statistics).split(1, -1), outputs


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return x.reshape(-1, x.shape[-1])


def _begin_row_statistic(
    scores: Tensor, keys: Sequence[Tensor], function: ScoreFunction, group: Group
) -> Callable[[], Tensor]:
    """A function that waits for r of every row and projection, over all tokens of the group: [rows, projections]."""
    local = torch.cat([function.statistic(a) for a in score_layout.split(scores, keys)], -1)
    return function.begin_reduction(local, group)
