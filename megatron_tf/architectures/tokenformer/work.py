"""What a TokenFormer's block costs.

`Passes` over a rank's heads and numbers of kernels were counted in the model; tests count them again. Passes over the
scores are the activation's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from megatron_tf.activations.base import Activation
from megatron_tf.activations.forms import GPU
from megatron_tf.activations.overlap import row_chunks, row_parts
from megatron_tf.architectures.tokenformer.forms import kinds_with_own_rows, norm_forms
from megatron_tf.architectures.tokenformer.section import Bank, TokenFormerModel, bank_of, banks_of
from megatron_tf.architectures.work import (
    BlockWork,
    Collective,
    Collectives,
    Passes,
    Product,
    compute_bytes,
    hidden_bytes,
    positions_of,
)
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.schema import RunConfig

HEAD_PASSES = Passes(15.5, 15)
# Of each slot, in a GPU's grouped products: inputs are gathered (read and written), outputs are added to others (read
# twice and written).
SLOT_PASSES = Passes(5, 7)
SLOT_KERNELS = Passes(7, 12)
# Of x, for each projection in the Gram form: xG times x and its sum; x times a number a row.
GRAM_PASSES = Passes(11, 4)
GRAM_KERNELS = Passes(15, 14)  # of projections that share an input
# Of x, whole, where norms of a rank's own rows travel with them: both are put together, and taken apart again.
PACKED_PASSES = Passes(2, 2)
# What training.precision: fp8 adds: factors are measured, scaled, rounded and turned, and scores put in their place. Of
# a score, eager and where one kernel scales and rounds; of x, for projections that share it; of the gradient of a
# projection's output; of an element of its keys and values. Between them x is scaled by the row.
FP8_PASSES = Passes(6.5, 17.5)
FP8_COMPILED_PASSES = Passes(4.5, 9.5)
FP8_INPUT_PASSES = Passes(6.5, 7.5)
FP8_GRADIENT_PASSES = Passes(0, 10)
FP8_TOKEN_PASSES = Passes(5, 5)
FP8_KERNELS = Passes(255, 446)
FP8_STATISTICS = 8  # fp32 numbers that a position keeps besides: scaled norms, and what they were scaled by
SHARING = {"qkv": 3, "proj": 1, "ffn": 1}  # that share an input
CHOICE_STATISTICS = 5  # fp32 numbers that a position keeps of its choice in a slot
KERNELS = Passes(73, 133)
FUSED_KERNELS = Passes(40, 52)  # of an activation with kernels of its own


def block_work(model: TokenFormerModel, config: RunConfig) -> BlockWork:
    """A block keeps of each position, in the compute type

    | kept                                           | elements |
    |------------------------------------------------|----------|
    | scores of the five projections                 | Σn/T     |
    | query, key, value and the output of attention  | 4 · d/T  |
    | input of proj, gathered from it; none if T = 1 | d        |

    (of a projection with a bank: of the tokens that the position uses), and in fp32 the norm of each of the five
    projections' scores. The backward pass of a projection holds one tensor of the size of its scores (query, key and
    value together: one of the size of theirs), 2 more for the projection it is at; what was kept for projections that
    come later in the model is free by then. With training.scores: recompute no scores are kept; the backward pass holds
    those of the projection it is at besides, all for some positions at a time where these wait for no exchange. A
    slot's choice and its place in the order of the rows are int64, its gate is fp32; its products are made on copies of
    inputs and outputs in that order. In fp8 the larger factor of a product is there 1.5 times besides.
    """
    tensor, hidden, positions = config.parallel.tensor, model.hidden_size, positions_of(config)
    counts, activation = model.parameter_tokens, ACTIVATIONS[model.activation]
    qkv, proj, ffn = (-(-count // tensor) for count in (counts.qkv, counts.proj, counts.ffn))
    scores = 3 * qkv + proj + ffn
    widths = {"qkv": 3 * qkv, "proj": proj, "ffn": ffn}
    slots = {kind: bank.slots(getattr(counts, kind)) // tensor for kind, bank in banks_of(model).items()}
    chosen_slots = sum(SHARING[kind] * count for kind, count in slots.items())
    of_kind = {
        kind: tuple(
            _products(positions, hidden, widths[kind] // sharing, sharing, bank_of(model, kind), slots.get(kind, 0))
        )
        for kind, sharing in SHARING.items()
    }
    keep = config.training.scores == "keep"
    kernels = KERNELS if activation.kernel_passes is None else FUSED_KERNELS
    with_gram = [kind for kind, form in norm_forms(model, config, GPU).items() if form == "gram"]
    gram_share = sum(widths[kind] for kind in with_gram) / scores
    # rows of which a rank makes the norm
    own_rows = kinds_with_own_rows(config)
    own = {kind: positions // tensor if kind in own_rows else positions for kind in with_gram}
    gram = [Product(rows, hidden, SHARING[kind] * hidden) for kind, rows in own.items()]
    gram_rows = sum(SHARING[kind] * rows for kind, rows in own.items()) / positions
    packed = len(own.keys() & own_rows)
    fp8 = _fp8_work(config, widths, len(with_gram) - packed)
    kept = (scores if keep else 0) + 4 * hidden // tensor + (hidden if tensor > 1 else 0) + fp8.kept
    if not keep:
        peak = _recomputed_peak(config, widths, with_gram)
    elif config.training.precision == "fp8":
        peak = max(7 * ffn // 2, 7 * proj // 2 - ffn, 15 * qkv // 2 - proj - ffn)
    else:
        peak = max(3 * ffn, 3 * proj - ffn, 5 * qkv - proj - ffn)

    moved = SLOT_PASSES * chosen_slots + GRAM_PASSES * gram_rows + PACKED_PASSES * packed
    return BlockWork(
        products=(*chain.from_iterable(of_kind.values()), *gram),
        weights=tuple(chain.from_iterable(own for kind, own in of_kind.items() if bank_of(model, kind) is None)),
        products_of_step=tuple(Product(hidden, widths[kind], hidden) for kind in with_gram),
        kept_of_step=2 * hidden**2 * sum(SHARING[kind] for kind in with_gram),
        products_again=() if keep else tuple(Product(positions, hidden, width) for width in widths.values()),
        inner_width=scores,
        inner_passes=_score_passes(activation, config, gram_share),
        head_passes=HEAD_PASSES,
        kernels=kernels + SLOT_KERNELS * chosen_slots + GRAM_KERNELS * len(with_gram) + fp8.kernels,
        moved=moved * hidden + fp8.moved,
        kept=kept,
        kept_statistics=5 + CHOICE_STATISTICS * chosen_slots + fp8.kept_statistics,
        backward_peak=(2 * hidden if slots else 0) + peak + fp8.backward_peak,
    )


class _Fp8Work(NamedTuple):
    """What `training.precision: fp8` adds to a block; fields as `BlockWork` has them."""

    kernels: Passes = Passes(0, 0)
    moved: Passes = Passes(0, 0)
    kept: int = 0
    kept_statistics: int = 0
    backward_peak: int = 0


def _fp8_work(config: RunConfig, widths: Mapping[str, int], copies: int) -> _Fp8Work:
    """`widths`: scores by kind.  `copies`: inputs that are kept as they were as well, for their norms.

    Of tokens in 8 bits nothing is kept: they are made from those in bf16 for each product. At the peak the keys of one
    kind are there scaled, and rounded.
    """
    if config.training.precision != "fp8":
        return _Fp8Work()
    hidden, positions = config.model.hidden_size, positions_of(config)
    tokens = 2 * sum(widths.values()) * hidden / positions

    of_rows = FP8_INPUT_PASSES * len(SHARING) + FP8_GRADIENT_PASSES * sum(SHARING.values())
    return _Fp8Work(
        kernels=FP8_KERNELS,
        moved=of_rows * hidden + FP8_TOKEN_PASSES * tokens,
        kept=copies * hidden,
        kept_statistics=FP8_STATISTICS,
        backward_peak=3 * max(widths.values()) * hidden // (2 * positions),
    )


def _recomputed_peak(config: RunConfig, widths: Mapping[str, int], with_gram: Sequence[str]) -> int:
    """Elements a position, on average, of a projection's scores and what is made of them: of one chunk of the positions
    unless they wait for an exchange. Chunks have their tokens' gradients, and fp32 sums of these, besides."""
    positions = positions_of(config)
    chunks = row_chunks(positions)
    sums = 2 * config.model.hidden_size * (1 + 4 // compute_bytes(config.training.compute_type))
    peaks = []
    for kind, width in widths.items():
        by_chunk = len(chunks) > 1 and (config.parallel.tensor == 1 or kind in with_gram)
        # scores and their gradient, and 2 more for the projection it is at
        own = width // SHARING[kind]
        elements = 2 * (width + own)
        if config.training.precision == "fp8":
            # a factor is there scaled, and rounded
            elements = max(2 * width + 5 * own // 2, 7 * width // 2)
        of_scores = elements * (max(chunks) if by_chunk else positions)
        peaks.append(of_scores + (sums * width if by_chunk else 0))
    return -(-max(peaks) // positions)


def _score_passes(activation: Activation, config: RunConfig, gram_share: float) -> Passes:
    """Of a score, on average; `gram_share` of them are in the Gram form."""
    compiled, in_fp8 = config.training.compile, config.training.precision == "fp8"
    passes = activation.compiled_passes if compiled else activation.passes
    saved = activation.gram_saves or Passes(0, 0)
    if activation.kernel_passes is not None:
        passes = activation.kernel_passes
        if config.parallel.tensor == 1:  # norm and weights are one kernel, and so are D and dA
            gram_share = 1
    added = (FP8_COMPILED_PASSES if compiled else FP8_PASSES) if in_fp8 else Passes(0, 0)
    return passes + saved * -gram_share + added


def _products(
    positions: int, hidden: int, tokens: int, number: int, bank: Bank | None, slots: int
) -> Iterator[Product]:
    """Of `number` projections that share their input, with so many tokens each and `slots` slots on this rank."""
    in_slots = 0 if bank is None else slots * bank.group_size
    if bank is not None:
        yield from number * [
            Product(positions, hidden, slots * bank.candidates),
            Product(positions, hidden, in_slots, bank.candidates),
            Product(positions, in_slots, hidden, bank.candidates),
        ]
    if dense := tokens - in_slots:
        sharing = number if bank is None else 1  # projections whose keys are in one product
        yield from (number // sharing) * [Product(positions, hidden, sharing * dense)]
        yield from number * [Product(positions, dense, hidden)]


def block_collectives(model: TokenFormerModel, config: RunConfig) -> tuple[Collectives, Collectives]:
    """(forward, backward) of one block and micro batch over two or more tensor ranks.

    | | forward | backward |
    |---|---|---|
    | q, k, v | scores' norms, one reduce-scatter over heads | one all-gather, norms, all-reduce of dX |
    | proj | all-gather of heads, norms, all-reduce | norms, reduce-scatter of heads |
    | ffn | norms, all-reduce | norms, all-reduce of dX |

    Under sequence parallelism each all-reduce of hidden states becomes a reduce-scatter on one side and an all-gather
    on the other. Norms are [s, b, 1] in fp32, one for each projection; forward they go in the parts of `row_parts`,
    each by the activation's number of reductions, those of a projection with a bank whole. In the Gram form there are
    no such exchanges; under sequence parallelism norms in fp32 are gathered with the input of q, k, v and with the
    ffn's, and their gradients, in the compute type, are reduced with its own.
    """
    positions, whole = positions_of(config), hidden_bytes(config)
    # query, key and value together, and their gradients
    scattered, gathered = (Collective(kind, 3 * whole) for kind in ("reduce_scatter", "all_gather"))
    forms = norm_forms(model, config, GPU)
    direct = {kind: SHARING[kind] for kind, form in forms.items() if form == "direct"}
    norms = tuple(Collective("all_reduce", 4 * positions * projections) for projections in direct.values())
    reductions = ACTIVATIONS[model.activation].reductions
    parts = row_parts(positions, reductions, config.training.compile)
    forward_norms = tuple(
        Collective("all_reduce", 4 * rows * projections, reductions, overlapped=part > 0)
        for kind, projections in direct.items()
        for part, rows in enumerate(parts if bank_of(model, kind) is None else (positions,))
    )
    forward: Collectives
    backward: Collectives
    if config.parallel.sequence:
        with_norms = [
            SHARING[kind] * positions for kind in forms if forms[kind] == "gram" and kind in kinds_with_own_rows(config)
        ]
        alone, compute = 3 - len(with_norms), compute_bytes(config.training.compute_type)
        gathers = tuple(Collective("all_gather", whole + 4 * norms) for norms in with_norms)
        scatters = tuple(Collective("reduce_scatter", whole + compute * norms) for norms in with_norms)
        forward = Collective("all_gather", whole, alone), *gathers, scattered, Collective("reduce_scatter", whole, 2)
        backward = gathered, Collective("all_gather", whole, 2), *scatters, Collective("reduce_scatter", whole, alone)
    else:
        reduced = Collective("all_reduce", whole, 2)
        forward = (Collective("all_gather", whole), scattered, reduced)
        backward = (gathered, Collective("reduce_scatter", whole), reduced)
    return forward + forward_norms, backward + norms


def step_collectives(model: TokenFormerModel, config: RunConfig) -> tuple[Collectives, Collectives]:
    """(forward, backward) of one block besides: in the Gram form KᵀK and its gradient, [d, d] in fp32 for each
    projection."""
    matrices = tuple(
        Collective("all_reduce", 4 * model.hidden_size**2 * SHARING[kind])
        for kind, form in norm_forms(model, config, GPU).items()
        if form == "gram"
    )
    return matrices, matrices
