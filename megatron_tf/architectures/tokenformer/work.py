"""The cost of a TokenFormer's block.

`Passes` over a rank's heads and numbers of kernels were counted in the running model; tests count them again. Passes
over the scores come from the activation.
"""

from __future__ import annotations

import math
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
# Around the grouped products of a GPU, which read rows where they are. Over x, for each projection with a bank: sums
# are written, gradients are added. For each slot: outputs are read. Elements for each slot: numbers of its pairs, and
# the order. Elements for each candidate: the router's scores.
BANK_PASSES = Passes(1, 4)
SLOT_PASSES = Passes(1, 1)
SLOT_ELEMENTS = Passes(77, 106)
CANDIDATE_ELEMENTS = Passes(9, 9)
# Of each projection with a bank; in addition, if it has dense tokens as well.
BANK_KERNELS = Passes(31, 25)
BANK_DENSE_KERNELS = Passes(12, 23)
# Over scores in slots, where the activation has no kernels: the product of dS and S.
PRODUCT_PASSES = Passes(0, 8)
# Over x, for each projection in the Gram form: xG times x and the sum of that; backward, x times one number a row.
GRAM_PASSES = Passes(11, 4)
GRAM_KERNELS = Passes(15, 14)  # for all projections that share an input
# Over the whole x, where the norms of a rank's own rows are gathered with it: both are packed, and unpacked again.
PACKED_PASSES = Passes(2, 2)
# training.precision: fp8 adds passes in which factors are measured and rounded, by the kernels of model/rounding.py:
# over a score; over one of projections that share an input, whose gradients are copied to their place; over x, once for
# projections that share it; over the gradient of a projection's output; over an element of its keys and values. In
# between, x is scaled by rows.
FP8_PASSES = Passes(1.5, 4.5)
FP8_SHARED_PASSES = Passes(0, 2)
FP8_INPUT_PASSES = Passes(4.5, 4.5)
FP8_GRADIENT_PASSES = Passes(0, 3)
FP8_TOKEN_PASSES = Passes(2.5, 2.5)
FP8_KERNELS = Passes(79, 70)
# With an activation that has its own kernels, these read and write each score as model/rounded_scores.py says. In
# addition, the rows of a projection's gradient and of its values are measured.
FP8_FUSED_PASSES = Passes(1.5, 3.5)
FP8_MEASURING_PASSES = Passes(0, 1)
FP8_FUSED_KERNELS = Passes(77, 150)
FP8_STATISTICS = 8  # further fp32 numbers that a position keeps: scaled norms, and the factors of the scaling
SHARING = {"qkv": 3, "proj": 1, "ffn": 1}  # projections of each kind, which share an input
# fp32 numbers that a position keeps of its choice in a slot: the candidate (int64), the row of the pair, the pair's
# place (int32 each), the chosen score and r.
CHOICE_STATISTICS = 6
# In the compute type, at the peak of all pairs at once: T, ΣdS∘S (fp32 each) and τ/r of a pair.
PAIR_SCALARS = 5
KERNELS = Passes(73, 133)
FUSED_KERNELS = Passes(40, 52)  # with an activation that has its own kernels


def block_work(model: TokenFormerModel, config: RunConfig) -> BlockWork:
    """The work of one block. It keeps, per position and in the compute type:

    | kept                                           | elements |
    |------------------------------------------------|----------|
    | scores of the five projections                 | Σn/T     |
    | query, key, value and the output of attention  | 4 · d/T  |
    | input of proj, gathered from it; none if T = 1 | d        |

    In addition it keeps the norm of the scores of each of the five projections in fp32. With a bank, n counts the
    tokens that a position uses.

    The backward pass holds one tensor of the size of the scores that share an input (query, key and value together),
    and 2 more for the projection that it is at. By then, the scores of projections that come later in the model are
    freed. With training.scores: recompute no scores are kept. The backward pass then holds the scores of the projection
    that it is at as well, of one chunk of positions at a time where these do not wait for an exchange.

    For a projection with a bank see `_bank_peak`. With model.sparse.z_loss a position also keeps its routers' scores,
    and their log-sum-exp of each slot, in fp32. In fp8 the gradient of the scores that share an input takes its size in
    addition, in two layouts of 8 bits.
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
    # kinds in the Gram form -> the rows whose norms this rank computes
    own_rows = kinds_with_own_rows(config)
    own = {kind: positions // tensor if kind in own_rows else positions for kind in with_gram}
    gram = [Product(rows, hidden, SHARING[kind] * hidden) for kind, rows in own.items()]
    gram_rows = sum(SHARING[kind] * rows for kind, rows in own.items()) / positions
    packed = len(own.keys() & own_rows)
    fp8 = _fp8_work(config, widths, len(with_gram) - packed, activation.kernel_passes is not None)
    kept = (scores if keep else 0) + 4 * hidden // tensor + (hidden if tensor > 1 else 0) + fp8.kept
    if not keep:
        peak = _recomputed_peak(config, widths, with_gram)
    elif config.training.precision == "fp8":
        peak = max(3 * ffn, 3 * proj - ffn, 6 * qkv - proj - ffn)
    else:
        freed = {"ffn": 0, "proj": ffn, "qkv": proj + ffn}
        peak = max(_peak(model, config, kind, widths[kind], slots.get(kind, 0)) - freed[kind] for kind in SHARING)

    moved = GRAM_PASSES * gram_rows + PACKED_PASSES * packed
    bank_kernels, bank_moved = _bank_traffic(model, slots, plain=activation.kernel_passes is None)
    return BlockWork(
        products=(*chain.from_iterable(of_kind.values()), *gram),
        weights=tuple(chain.from_iterable(own for kind, own in of_kind.items() if bank_of(model, kind) is None)),
        products_of_step=tuple(Product(hidden, widths[kind], hidden) for kind in with_gram),
        kept_of_step=2 * hidden**2 * sum(SHARING[kind] for kind in with_gram),
        products_again=() if keep else tuple(Product(positions, hidden, width) for width in widths.values()),
        inner_width=scores,
        inner_passes=_score_passes(activation, config, gram_share, widths["qkv"] / scores),
        head_passes=HEAD_PASSES,
        kernels=kernels + bank_kernels + GRAM_KERNELS * len(with_gram) + fp8.kernels,
        moved=moved * hidden + bank_moved + fp8.moved,
        kept=kept,
        kept_statistics=5 + CHOICE_STATISTICS * chosen_slots + _z_loss_statistics(model, slots) + fp8.kept_statistics,
        backward_peak=peak + fp8.backward_peak,
    )


def _bank_traffic(model: TokenFormerModel, slots: Mapping[str, int], plain: bool) -> tuple[Passes, Passes]:
    """(kernels, elements that are read and written per position) that the banks add. plain: without own kernels."""
    kernels, elements = Passes(0, 0), Passes(0, 0)
    for kind, bank in banks_of(model).items():
        of_slot = SLOT_PASSES * model.hidden_size + SLOT_ELEMENTS + CANDIDATE_ELEMENTS * bank.candidates
        if plain:
            of_slot += PRODUCT_PASSES * bank.group_size
        elements += (BANK_PASSES * model.hidden_size + of_slot * slots[kind]) * SHARING[kind]
        kernels += (BANK_KERNELS + BANK_DENSE_KERNELS * bool(bank.dense)) * SHARING[kind]
    return kernels, elements


def _peak(model: TokenFormerModel, config: RunConfig, kind: str, width: int, slots: int) -> int:
    """Elements per position that the backward pass of a kind's projections holds at its peak, without what is kept.

    width: scores of these projections on this rank.  slots: of each of them on this rank.
    """
    sharing, bank = SHARING[kind], bank_of(model, kind)
    if bank is None:
        return width + 2 * width // sharing
    return _bank_peak(model, config, sharing, bank, slots, dense=width // sharing - slots * bank.group_size)


def _bank_peak(model: TokenFormerModel, config: RunConfig, sharing: int, bank: Bank, slots: int, dense: int) -> int:
    """As `_peak`, for `sharing` projections with s = slots · group_size scores in slots and n = `dense` others each.

    First D is computed for one projection after the other. Of those before, D and the dense tokens' S and D are held.
    At the last one there are s for D and temporary tensors, or D and 3 n. Then dA is computed; each has s + n.

    On a GPU in bf16 all pairs are computed at once. There are 3 s while D is computed, and then a result d wide for
    each slot, before they are summed. In other types one candidate is computed after the other. Room for all rows d
    wide is there once while D is computed, with 2 scores of a candidate's rows, and twice while dA is.

    Gradients of the tokens are held until all are there: of values from the end of D on, of keys from that of dA on.
    Candidates have many tokens, so these count here. At once, they are made when D is there, else before.
    """
    hidden, in_slots, positions = model.hidden_size, slots * bank.group_size, positions_of(config)
    of_values, of_dense = in_slots * bank.candidates * hidden / positions, dense * hidden / positions
    at_once = config.training.compute_type == "bf16"
    if at_once:
        to_weights, to_inputs = 3 * in_slots + PAIR_SCALARS * slots, slots * hidden
    else:
        to_weights, to_inputs = in_slots + 2 * bank.group_size // bank.candidates + hidden, 2 * hidden
    before = (sharing - 1) * (in_slots + 2 * dense + of_values) + (0 if at_once else of_values)
    peak_to_weights = before + max(to_weights, in_slots + 3 * dense + (of_values if at_once else 0))
    peak_to_inputs = sharing * (in_slots + dense + 2 * of_values + 2 * of_dense) + to_inputs
    return math.ceil(max(peak_to_weights, peak_to_inputs))


def _z_loss_statistics(model: TokenFormerModel, slots: Mapping[str, int]) -> int:
    """fp32 numbers that a position keeps for model.sparse.z_loss."""
    if model.sparse is None or model.sparse.z_loss == 0:
        return 0
    banks = banks_of(model)
    return sum(SHARING[kind] * count * (banks[kind].candidates + 1) for kind, count in slots.items())


class _Fp8Work(NamedTuple):
    """The work that `training.precision: fp8` adds to a block. The fields are those of `BlockWork`."""

    kernels: Passes = Passes(0, 0)
    moved: Passes = Passes(0, 0)
    kept: int = 0
    kept_statistics: int = 0
    backward_peak: int = 0


def _fp8_work(config: RunConfig, widths: Mapping[str, int], copies: int, fused: bool) -> _Fp8Work:
    """`widths`: scores per position, by kind.  `copies`: the number of inputs that are also kept unscaled, for norms.
    `fused`: whether kernels round scores as they make them.

    Tokens in 8 bits are not kept, but made from the bf16 ones for each product. At the peak, those of the keys of one
    kind are in memory.
    """
    if config.training.precision != "fp8":
        return _Fp8Work()
    hidden, positions = config.model.hidden_size, positions_of(config)
    tokens = 2 * sum(widths.values()) * hidden / positions

    of_rows = FP8_INPUT_PASSES * len(SHARING) + FP8_GRADIENT_PASSES * sum(SHARING.values())
    measured = FP8_MEASURING_PASSES * (sum(SHARING.values()) * hidden + tokens / 2 if fused else 0)
    return _Fp8Work(
        kernels=FP8_FUSED_KERNELS if fused else FP8_KERNELS,
        moved=of_rows * hidden + FP8_TOKEN_PASSES * tokens + measured,
        kept=copies * hidden,
        kept_statistics=FP8_STATISTICS,
        backward_peak=max(widths.values()) * hidden // (2 * positions),
    )


def _recomputed_peak(config: RunConfig, widths: Mapping[str, int], with_gram: Sequence[str]) -> int:
    """Elements per position, on average, of the largest projection's scores and the tensors made from them. They are in
    memory for one chunk of the positions, or for all where these wait for an exchange. Chunks need the gradients of
    tokens, and fp32 sums of them, in addition."""
    positions = positions_of(config)
    chunks = row_chunks(positions)
    sums = 2 * config.model.hidden_size * (1 + 4 // compute_bytes(config.training.compute_type))
    peaks = []
    for kind, width in widths.items():
        by_chunk = len(chunks) > 1 and (config.parallel.tensor == 1 or kind in with_gram)
        # scores and their gradient, and two tensors for one projection
        own = width // SHARING[kind]
        elements = 2 * (width + own)
        if config.training.precision == "fp8":
            # their gradient is in memory in two layouts of 8 bits as well
            elements = max(elements, 3 * width)
        of_scores = elements * (max(chunks) if by_chunk else positions)
        peaks.append(of_scores + (sums * width if by_chunk else 0))
    return -(-max(peaks) // positions)


def _score_passes(activation: Activation, config: RunConfig, gram_share: float, shared: float) -> Passes:
    """Passes over a score, on average over the projections.

    `gram_share`: the share of scores in the Gram form.  `shared`: that of projections that share an input.
    """
    in_fp8 = config.training.precision == "fp8"
    if in_fp8 and activation.kernel_passes is not None:
        return FP8_FUSED_PASSES
    passes = activation.compiled_passes if config.training.compile else activation.passes
    saved = activation.gram_saves or Passes(0, 0)
    if activation.kernel_passes is not None:
        passes = activation.kernel_passes
        if config.parallel.tensor == 1:  # norm and weights are one kernel, and so are D and dA
            gram_share = 1
    added = FP8_PASSES + FP8_SHARED_PASSES * shared if in_fp8 else Passes(0, 0)
    return passes + saved * -gram_share + added


def _products(
    positions: int, hidden: int, tokens: int, number: int, bank: Bank | None, slots: int
) -> Iterator[Product]:
    """The products of `number` projections that share their input, each with `tokens` used tokens and `slots` slots on
    this rank."""
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
    """(forward, backward): the collectives of one block and micro batch over two or more tensor ranks.

    | | forward | backward |
    |---|---|---|
    | q, k, v | scores' norms, one reduce-scatter over heads | one all-gather, norms, all-reduce of dX |
    | proj | all-gather of heads, norms, all-reduce | norms, reduce-scatter of heads |
    | ffn | norms, all-reduce | norms, all-reduce of dX |

    Under sequence parallelism each all-reduce of hidden states becomes a reduce-scatter on one side and an all-gather
    on the other. Norms are [s, b, 1] in fp32, one for each projection. In the forward pass they are exchanged in the
    parts of `row_parts`, in one part for a projection with a bank, and each part takes the activation's number of
    reductions. In the Gram form there are no such exchanges. Under sequence parallelism its norms, in fp32, are
    gathered with the inputs of q, k, v and of ffn, and their gradients, in the compute type, are reduced with those of
    the input.
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
    """(forward, backward): the all-reduces that one block makes once a step. In the Gram form these are KᵀK and its
    gradient, [d, d] in fp32 for each projection."""
    matrices = tuple(
        Collective("all_reduce", 4 * model.hidden_size**2 * SHARING[kind])
        for kind, form in norm_forms(model, config, GPU).items()
        if form == "gram"
    )
    return matrices, matrices
