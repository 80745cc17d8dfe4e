"""Products of the groups of a sparse layer with the rows that chose them, all groups at once. See model/grouped.py.

`gathered_...` take rows where they are. On GPUs triton_gathered_products.py makes no copy of the rows of all pairs.
Elsewhere they are copied, and torch's `grouped_mm` multiplies them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.model.kernels.score_layout import empty_scores
from megatron_tf.native import can_run_triton


@operator()
def gathered_scores(x: Tensor, rows: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """x[rows] · tokensᵀ: x [rows, k], rows int32 [pairs], tokens [groups, g, k], contiguous -> [pairs, g].

    ends: int32 [groups], the end of each group's pairs among all pairs.
    """
    if not can_run_triton(x.device.type):
        return scores_of_copies(x, rows, tokens, ends)
    out = _empty_scores(x, rows, tokens, ends)
    _launch("scores", x, rows, tokens, ends, out)
    return out


@operator()
def gathered_gradients(scores: Tensor, rows: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """scoresᵀ · x[rows] of each group: scores [pairs, g], x [rows, k] -> [groups, g, k]."""
    if not can_run_triton(x.device.type):
        return gradients_of_copies(scores, rows, x, ends)
    out = _empty_gradients(scores, rows, x, ends)
    _launch("gradients", scores, rows, x, ends, out)
    return out


@operator()
def grouped_product(of_pairs: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """of_pairs [pairs, g] · tokens of each group [groups, g, width] -> [pairs, width]. An operator, so that
    torch.compile chooses no kernels of its own for it."""
    return F.grouped_mm(of_pairs, tokens, offs=ends)


def scores_of_copies(x: Tensor, rows: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """`gathered_scores` without a kernel of our own."""
    return F.grouped_mm(x.index_select(0, rows), tokens.mT, offs=ends)


def gradients_of_copies(scores: Tensor, rows: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`gathered_gradients` without a kernel of our own."""
    return F.grouped_mm(scores.mT, x.index_select(0, rows), offs=ends)


def _launch(name: str, *arguments: Tensor) -> None:
    from megatron_tf.model.kernels import triton_gathered_products

    getattr(triton_gathered_products, name)(*arguments)


# Memory for the results. torch.compile calls these with all arguments of the operators.
def _empty_scores(x: Tensor, rows: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    # grouped_mm requires aligned rows, as tensor cores do
    return empty_scores(x, rows.shape[0], tokens.shape[1])


def _empty_gradients(scores: Tensor, rows: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], scores.shape[1], x.shape[1])


register_fake("gathered_scores", _empty_scores)
register_fake("gathered_gradients", _empty_gradients)
register_fake("grouped_product", lambda of_pairs, tokens, ends: of_pairs.new_empty(of_pairs.shape[0], tokens.shape[2]))
