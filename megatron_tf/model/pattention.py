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
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations import l2_norm
from megatron_tf.activations.forms import Norm
from megatron_tf.activations.function import ScoreFunction, accumulating, score_function
from megatron_tf.activations.overlap import row_chunks, row_parts
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model import fp8, gram, rounded_scores
from megatron_tf.model.checks import check_pattention
from megatron_tf.model.kernels import score_layout
from megatron_tf.model.later import Later
from megatron_tf.model.products import PLAIN, Factor, Product
from megatron_tf.parallel.collectives import begin_all_reduce
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
    scores, function = _rows(x) @ key_tokens.mT, score_function(activation)
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
        layer = _layer(tokens, scales, function, group, product, len(norms) > 0)
        scores: Tensor | None = None
        if layer.exchanges:
            scores, statistics, outputs = _sharded_forward(_rows(x), layer)
        elif keep_scores:
            scores, statistics, outputs = _forward((_rows(x), *norms), layer)
        else:
            chunks = [_forward(own, layer)[1:] for own in _chunks(_rows(x), *norms)]
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
        layer = _layer(tokens, *shared, wants_dx=ctx.needs_input_grad[7])
        rows = _rows(x), *map(_rows, grads), *statistics
        if ctx.later is not None:
            d_x, products, totals = _backward_to_inputs(rows, *kept, layer)
            ctx.later.add(ctx.leaves, _made(products, [len(own) for own in tokens]))
            token_grads = [None] * len(tokens)
        elif kept or layer.exchanges:
            scores = kept[0] if kept else _scores(rows[0], layer)
            d_x, of_keys, value_grads, totals = _backward_but_keys(rows, scores, layer)
            if ctx.meanwhile is None:
                token_grads = [*of_keys(), *value_grads]
            else:
                ctx.meanwhile.leave(of_keys)
                token_grads = [None] * count + value_grads
        else:
            d_x, token_grads, totals = _backward_by_chunks(rows, layer)
        gradients = [
            None if d_x is None else d_x.view(x.shape),
            *(None if grad is None else grad[: len(own)].to(own.dtype) for own, grad in zip(tokens, token_grads)),
        ]
        if layer.normed:
            norms = torch.cat(statistics, -1)
            gradients.append(torch.where(norms > 0, -torch.cat(totals, -1) / norms, 0))
        return None, None, None, None, None, None, None, *gradients


class _Layer(NamedTuple):
    """What all rows of a call share.

    `normed`: their norms are known before their scores.  `wants_dx`: whether the gradient of x is made.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    scales: Sequence[float]
    function: ScoreFunction
    group: Group
    product: Product
    normed: bool
    wants_dx: bool

    @property
    def exchanges(self) -> bool:
        """Whether a row waits for an exchange of its statistic."""
        return self.group.size > 1 and not self.normed


def _layer(
    tokens: Sequence[Tensor],
    scales: Sequence[float],
    function: ScoreFunction,
    group: Group,
    product: Product,
    normed: bool,
    wants_dx: bool = False,
) -> _Layer:
    """With keys and values of sizes that products are fast with."""
    if function.facts.ignores_zero:
        tokens = [score_layout.filled(own) for own in tokens]
    return _Layer(tokens[: len(scales)], tokens[len(scales) :], scales, function, group, product, normed, wants_dx)


# Scores [rows, keys of all projections], and each projection's r [rows, 1] and output [rows, d_out].
_Results = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]
# dx [rows, d_in] if it is wanted; gradients of keys and values, in the order of the tokens; each projection's T [rows,
# 1].
_Gradients = tuple["Tensor | None", Sequence[Tensor], Sequence[Tensor]]


def _forward(rows: Sequence[Tensor], layer: _Layer) -> _Results:
    """`rows`: x, and where it is known r [rows, projections]. Otherwise all tokens are here."""
    x, *norms = rows
    scores = _scores(x, layer)
    known = norms[0].split(1, -1) if norms else [None] * len(layer.keys)
    statistics, outputs = [], []
    for a, v, scale, r in zip(score_layout.split(scores, layer.keys), layer.values, layer.scales, known):
        if r is None:
            r, s = layer.function.statistic_and_weights(a, scale)
        else:
            s = layer.product.weights(layer.function, a, r, scale)
        statistics.append(r)
        outputs.append(layer.product(s, v))
    return scores, statistics, outputs


def _sharded_forward(x: Tensor, layer: _Layer) -> _Results:
    """In parts of the rows, where there are many: the first's statistic travels while the second's scores are made, and
    the second's while the first's outputs are."""
    keys, function = layer.keys, layer.function
    sizes = row_parts(x.shape[0], function.facts.reductions, torch.compiler.is_compiling())
    joined = score_layout.concatenated(keys)
    scores = score_layout.empty_scores(x, x.shape[0], joined.shape[0])
    outputs = [x.new_empty(x.shape[0], v.shape[1]) for v in layer.values]
    exchanges = []
    for a, x_part in zip(scores.split(sizes), x.split(sizes)):
        layer.product(x_part, joined.mT, out=a)
        exchanges.append(_begin_row_statistic(a, layer))
    statistics = []
    for finish, a, *out_parts in zip(exchanges, scores.split(sizes), *(out.split(sizes) for out in outputs)):
        statistics.append(finish())
        own = score_layout.split(a, keys), statistics[-1].split(1, -1)
        for own_scores, r, v, scale, out in zip(*own, layer.values, layer.scales, out_parts):
            layer.product(function.weights(own_scores, r, scale), v, out=out)
    return scores, torch.cat(statistics).split(1, -1), outputs


def _backward(rows: Sequence[Tensor], scores: Tensor, layer: _Layer) -> _Gradients:
    """`rows`: x, the outputs' gradients and r of each projection."""
    d_x, of_keys, value_grads, totals = _backward_but_keys(rows, scores, layer)
    return d_x, [*of_keys(), *value_grads], totals


def _backward_but_keys(
    rows: Sequence[Tensor], scores: Tensor, layer: _Layer
) -> tuple[Tensor | None, Callable[[], Sequence[Tensor]], Sequence[Tensor], Sequence[Tensor]]:
    """`_backward`: (dx, a function that makes the gradients of keys, those of values, T of each projection)."""
    value_grads: list[Tensor] = []
    product = layer.product
    gradient, totals = _to_scores(rows, scores, layer, lambda s, grad: value_grads.append(product(s, grad, "right")))

    def of_keys() -> Sequence[Tensor]:
        return score_layout.split(product(gradient.mT, rows[0], "left"), layer.keys, 0)

    return _inputs_gradient(gradient, layer), of_keys, value_grads, totals


def _backward_to_inputs(
    rows: Sequence[Tensor], scores: Tensor, layer: _Layer
) -> tuple[Tensor | None, Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
    """`_backward`, but each gradient of tokens is a function that makes it."""
    of_values: list[Callable[[], Tensor]] = []
    product = layer.product
    gradient, totals = _to_scores(
        rows, scores, layer, lambda s, grad: of_values.append(partial(product, s, grad, "right"))
    )
    of_keys = [partial(product, own.mT, rows[0], "left") for own in score_layout.split(gradient, layer.keys)]
    return _inputs_gradient(gradient, layer), [*of_keys, *of_values], totals


def _inputs_gradient(gradient: Factor, layer: _Layer) -> Tensor | None:
    """dx from dA, if it is wanted."""
    return layer.product(gradient, score_layout.concatenated(layer.keys), "left") if layer.wants_dx else None


def _to_scores(
    rows: Sequence[Tensor], scores: Tensor, layer: _Layer, of_values: Callable[[Factor, Factor], None]
) -> tuple[Factor, Sequence[Tensor]]:
    """(dA of all projections, T of each).  `of_values`: is given Sᵀ of each projection, and its output's gradient."""
    keys, function, group, product = layer.keys, layer.function, layer.group, layer.product
    if product.rounds_scores(function, scores):
        outputs, norms, own = rows[1 : 1 + len(keys)], rows[1 + len(keys) :], score_layout.split(scores, keys)
        return rounded_scores.to_scores(
            scores, own, outputs, layer.values, norms, layer.scales, product, layer.wants_dx, of_values
        )
    grads = [product.factor(grad, gradient=True, both=True) for grad in rows[1 : 1 + len(keys)]]
    gradient = _weights_gradient(grads, scores, layer)
    pairs = score_layout.split(gradient, keys), score_layout.split(scores, keys)
    parts = list(zip(*pairs, rows[1 + len(keys) :], layer.scales))
    totals: list[Tensor] = []
    for (d, a, r, scale), grad in zip(parts, grads):
        if layer.normed or layer.exchanges:
            s, total = function.backward(a, r, d, scale)
            totals.append(total)
            if layer.exchanges and len(totals) == len(parts):
                # on its way while the last value tokens' gradients are made
                finish = begin_all_reduce(torch.cat(totals, -1), group)
        else:
            s = function.backward_and_couple(a, r, d, scale)
        of_values(product.factor(s.mT, bound=scale), grad)
        del s  # not in memory while dA is prepared
    if layer.exchanges:
        for (d, a, r, scale), total in zip(parts, finish().split(1, -1)):
            function.couple(a, r, total, d, scale)
    # The transpose is what the keys' gradient wants; dx wants dA itself.
    return product.factor(gradient.mT, gradient=True, both=layer.wants_dx).mT, totals


def _weights_gradient(grads: Sequence[Factor], scores: Tensor, layer: _Layer) -> Tensor:
    """dS of all projections, with zeros in the gaps between them."""
    if len(grads) == 1:
        return layer.product.scores(grads[0], layer.values[0].mT, "left")
    gradient = score_layout.empty_scores(scores, *scores.shape)
    score_layout.clear_gaps(gradient, layer.keys)
    for own, v, grad in zip(score_layout.split(gradient, layer.keys), layer.values, grads):
        layer.product(grad, v.mT, "left", own)
    return gradient


def _made(products: Sequence[Callable[[], Tensor]], sizes: Sequence[int]) -> Callable[[], Sequence[Tensor]]:
    """A function that makes the products, the first `sizes` rows of each."""
    return lambda: [product()[:size] for product, size in zip(products, sizes)]


def _backward_by_chunks(rows: Sequence[Tensor], layer: _Layer) -> _Gradients:
    """Of scores that are made again, of some rows at a time."""
    chunks = _chunks(*rows)
    d_x: list[Tensor] = []
    totals: list[Sequence[Tensor]] = []
    sums: list[Tensor] = []
    for own in chunks:
        own_d_x, token_grads, own_totals = _backward(own, _scores(own[0], layer), layer)
        if own_d_x is not None:
            d_x.append(own_d_x)
        totals.append(own_totals)
        if not sums:
            sums = [grad.to(accumulating(grad)) if len(chunks) > 1 else grad for grad in token_grads]
        else:
            for whole, grad in zip(sums, token_grads):
                whole += grad
    return torch.cat(d_x) if d_x else None, sums, [torch.cat(own) for own in zip(*totals)]


def _chunks(*rows: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of several tensors, some at a time."""
    return list(zip(*(tensor.split(row_chunks(len(tensor))) for tensor in rows)))


def _scores(x: Tensor, layer: _Layer) -> Tensor:
    """A of x [rows, d]: [rows, columns]."""
    joined = score_layout.concatenated(layer.keys)
    return layer.product.scores(x, joined.mT)


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return x.reshape(-1, x.shape[-1])


def _begin_row_statistic(scores: Tensor, layer: _Layer) -> Callable[[], Tensor]:
    """A function that waits for r of every row and projection, over all tokens of the group: [rows, projections]."""
    local = torch.cat([layer.function.statistic(a) for a in score_layout.split(scores, layer.keys)], -1)
    return layer.function.begin_reduction(local, layer.group)
