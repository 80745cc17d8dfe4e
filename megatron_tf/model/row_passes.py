"""The passes of a Pattention, forward and backward, over the rows of one call, without autograd.

pattention.py has the maths, and saves what the backward pass needs. Rows are [rows, d]; A is in columns of all
projections that share x, see score_layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.activations.function import ScoreFunction, accumulating
from megatron_tf.activations.overlap import row_chunks, row_parts
from megatron_tf.model import rounded_scores
from megatron_tf.model.kernels import score_layout
from megatron_tf.model.products import Factor, Product
from megatron_tf.parallel.collectives import begin_all_reduce
from megatron_tf.parallel.groups import Group


class Layer(NamedTuple):
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


def layer_of(
    tokens: Sequence[Tensor],
    scales: Sequence[float],
    function: ScoreFunction,
    group: Group,
    product: Product,
    normed: bool,
    wants_dx: bool = False,
) -> Layer:
    """With keys and values of sizes that products are fast with."""
    if function.facts.ignores_zero:
        tokens = [score_layout.filled(own) for own in tokens]
    return Layer(tokens[: len(scales)], tokens[len(scales) :], scales, function, group, product, normed, wants_dx)


# Scores [rows, keys of all projections], and each projection's r [rows, 1] and output [rows, d_out].
Results = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]
# dx [rows, d_in] if it is wanted; gradients of keys and values, in the order of the tokens; each projection's T [rows,
# 1].
Gradients = tuple["Tensor | None", Sequence[Tensor], Sequence[Tensor]]


def forward(rows: Sequence[Tensor], layer: Layer) -> Results:
    """`rows`: x, and where it is known r [rows, projections]. Otherwise all tokens are here."""
    x, *norms = rows
    scores = make_scores(x, layer)
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


def sharded_forward(x: Tensor, layer: Layer) -> Results:
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


def _backward(rows: Sequence[Tensor], scores: Tensor, layer: Layer) -> Gradients:
    """`rows`: x, the outputs' gradients and r of each projection."""
    d_x, of_keys, value_grads, totals = backward_but_keys(rows, scores, layer)
    return d_x, [*of_keys(), *value_grads], totals


def backward_but_keys(
    rows: Sequence[Tensor], scores: Tensor, layer: Layer
) -> tuple[Tensor | None, Callable[[], Sequence[Tensor]], Sequence[Tensor], Sequence[Tensor]]:
    """`_backward`: (dx, a function that makes the gradients of keys, those of values, T of each projection)."""
    value_grads: list[Tensor] = []
    product = layer.product
    gradient, totals = _to_scores(rows, scores, layer, lambda s, grad: value_grads.append(product(s, grad, "right")))

    def of_keys() -> Sequence[Tensor]:
        return score_layout.split(product(gradient.mT, rows[0], "left"), layer.keys, 0)

    return _inputs_gradient(gradient, layer), of_keys, value_grads, totals


def backward_to_inputs(
    rows: Sequence[Tensor], scores: Tensor, layer: Layer
) -> tuple[Tensor | None, Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
    """`_backward`, but each gradient of tokens is a function that makes it."""
    of_values: list[Callable[[], Tensor]] = []
    product = layer.product
    gradient, totals = _to_scores(
        rows, scores, layer, lambda s, grad: of_values.append(partial(product, s, grad, "right"))
    )
    of_keys = [partial(product, own.mT, rows[0], "left") for own in score_layout.split(gradient, layer.keys)]
    return _inputs_gradient(gradient, layer), [*of_keys, *of_values], totals


def _inputs_gradient(gradient: Factor, layer: Layer) -> Tensor | None:
    """dx from dA, if it is wanted."""
    return layer.product(gradient, score_layout.concatenated(layer.keys), "left") if layer.wants_dx else None


def _to_scores(
    rows: Sequence[Tensor], scores: Tensor, layer: Layer, of_values: Callable[[Factor, Factor], None]
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


def _weights_gradient(grads: Sequence[Factor], scores: Tensor, layer: Layer) -> Tensor:
    """dS of all projections, with zeros in the gaps between them."""
    if len(grads) == 1:
        return layer.product.scores(grads[0], layer.values[0].mT, "left")
    gradient = score_layout.empty_scores(scores, *scores.shape)
    score_layout.clear_gaps(gradient, layer.keys)
    for own, v, grad in zip(score_layout.split(gradient, layer.keys), layer.values, grads):
        layer.product(grad, v.mT, "left", own)
    return gradient


def backward_by_chunks(rows: Sequence[Tensor], layer: Layer) -> Gradients:
    """Of scores that are made again, of some rows at a time."""
    chunks = chunks_of(*rows)
    d_x: list[Tensor] = []
    totals: list[Sequence[Tensor]] = []
    sums: list[Tensor] = []
    for own in chunks:
        own_d_x, token_grads, own_totals = _backward(own, make_scores(own[0], layer), layer)
        if own_d_x is not None:
            d_x.append(own_d_x)
        totals.append(own_totals)
        if not sums:
            sums = [grad.to(accumulating(grad)) if len(chunks) > 1 else grad for grad in token_grads]
        else:
            for whole, grad in zip(sums, token_grads):
                whole += grad
    return torch.cat(d_x) if d_x else None, sums, [torch.cat(own) for own in zip(*totals)]


def chunks_of(*rows: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of several tensors, some at a time."""
    return list(zip(*(tensor.split(row_chunks(len(tensor))) for tensor in rows)))


def make_scores(x: Tensor, layer: Layer) -> Tensor:
    """A of x [rows, d]: [rows, columns]."""
    joined = score_layout.concatenated(layer.keys)
    return layer.product.scores(x, joined.mT)


def _begin_row_statistic(scores: Tensor, layer: Layer) -> Callable[[], Tensor]:
    """A function that waits for r of every row and projection, over all tokens of the group: [rows, projections]."""
    local = torch.cat([layer.function.statistic(a) for a in score_layout.split(scores, layer.keys)], -1)
    return layer.function.begin_reduction(local, layer.group)
