"""The work of a block in numbers: matrix products, elementwise traffic, memory, collectives. No torch.

An architecture states them, `costs` turns them into bytes and seconds, and tests count them in the running model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.training import ComputeType

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send", "all_to_all"]


@dataclass(frozen=True)
class Passes:
    """A number for the forward and one for the backward pass, such as elements read and written by kernels."""

    forward: float
    backward: float

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Passes:
        return Passes(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] × [k, n], or one in which each row is multiplied by one of `candidates` such matrices."""

    m: int
    k: int
    n: int
    candidates: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def elements(self) -> int:
        """The number of elements that it reads and writes."""
        return self.m * self.k + self.candidates * self.k * self.n + self.m * self.n


@dataclass(frozen=True)
class Collective:
    """A number `count` of equal collectives.

    `bytes`: of the whole tensor on a rank.  `overlapped`: other work is computed during the exchange.
    """

    kind: Kind
    bytes: int
    count: int = 1
    overlapped: bool = False

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that each of `ranks` ranks sends, in all `count` collectives together."""
        if self.kind == "send":
            return self.count * self.bytes
        factor = 2 if self.kind == "all_reduce" else 1
        return self.count * factor * self.bytes * (ranks - 1) / ranks


Collectives = tuple[Collective, ...]


@dataclass(frozen=True)
class BlockWork:
    """The work of one block on one micro batch, on the fullest tensor rank.

    `products`: of the forward pass; the backward pass has two for each.  `products_again`: those that the backward pass
        repeats in addition, because their results were not kept.  `products_of_step`: those of the forward pass, and as
        many of the backward pass, that are made once a step; in a compiled block, once a micro batch.
    `weights`: the `products` whose gradient of weights, one of the two backward products, can be computed later.
    `inner_width`: columns between the products, for each position: a Pattention's scores, an MLP's activations.
    `inner_passes`, `head_passes`: how often an elementwise kernel reads or writes an element of [s, b, inner_width],
        and of the rank's own heads [s, b, d/T].
    `kernels`: the number of kernels started.
    `moved`: elements per position that are read and written in addition, such as rows put into another order.
    `kept`: elements of the compute type per position that are kept for the backward pass, without the inputs of the
        norms and the whole inputs of attention and feed-forward.
    `kept_of_step`: fp32 numbers that are kept, independent of the number of positions.
    `kept_statistics`: fp32 numbers per position, without those of the norms and of attention.
    `backward_peak`: elements per position that the backward pass needs at its peak in addition to what is kept, without
        the gradients of a projection's output and input.
    """

    products: tuple[Product, ...]
    inner_width: int
    inner_passes: Passes
    head_passes: Passes
    kernels: Passes
    kept: int
    kept_statistics: int
    backward_peak: int
    products_again: tuple[Product, ...] = ()
    products_of_step: tuple[Product, ...] = ()
    kept_of_step: int = 0
    moved: Passes = Passes(0, 0)
    weights: tuple[Product, ...] = ()


def positions_of(config: RunConfig) -> int:
    """Positions of a micro batch on one rank: s · b / C, because C context ranks share them."""
    return config.model.seq_length // config.parallel.context * config.training.micro_batch_size


def hidden_bytes(config: RunConfig) -> int:
    """Bytes of the hidden states [s/C, b, d] of a context rank in the compute type, not split over the tensor ranks."""
    return positions_of(config) * config.model.hidden_size * compute_bytes(config.training.compute_type)


def compute_bytes(precision: ComputeType) -> int:
    """Bytes of an element in the compute type."""
    return 4 if precision == "fp32" else 2
