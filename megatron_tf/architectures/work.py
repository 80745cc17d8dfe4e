"""The work of a block in numbers: matrix products, elementwise traffic, memory, collectives. No torch.

An architecture states them; `costs` turns them into bytes and seconds; tests count them in the model.
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
    """A matrix product [m, k] × [k, n], or of rows with one of `candidates` such matrices each."""

    m: int
    k: int
    n: int
    candidates: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def elements(self) -> int:
        """Read and written."""
        return self.m * self.k + self.candidates * self.k * self.n + self.m * self.n


@dataclass(frozen=True)
class Collective:
    """`bytes`: of the whole tensor on a rank.  `overlapped`: on its way while something else is computed."""

    kind: Kind
    bytes: int
    count: int = 1
    overlapped: bool = False

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that each of `ranks` ranks sends, over all `count` of them."""
        if self.kind == "send":
            return self.count * self.bytes
        factor = 2 if self.kind == "all_reduce" else 1
        return self.count * factor * self.bytes * (ranks - 1) / ranks


Collectives = tuple[Collective, ...]


@dataclass(frozen=True)
class BlockWork:
    """What one block does with one micro batch, on the fullest tensor rank.

    `products`: of the forward pass; the backward pass has each twice.  `products_again`: what it makes once more
        besides, because it was not kept.  `products_of_step`: of forward and backward each, once a step whatever its
        micro batches; of a compiled block once a micro batch.
    `weights`: of the products, those whose second one in the backward pass, the gradient of weights, can be made later.
    `inner_width`: columns between the products, for each position: a Pattention's scores, an MLP's activations.
    `inner_passes`, `head_passes`: how often an elementwise kernel reads or writes an element of [s, b, inner_width],
        and of the rank's own heads [s, b, d/T].
    `kernels`: started in all.
    `moved`: elements a position, read and written, of rows that are put into another order.
    `kept`: elements of the compute type that a position keeps for the backward pass, besides the inputs of the norms
        and the whole inputs of attention and feed-forward.
    `kept_of_step`: fp32 numbers that are kept whatever the positions.
    `kept_statistics`: fp32 numbers of a position, besides those of the norms and of attention.
    `backward_peak`: elements a position that the backward pass needs on top of what is kept, at its peak, besides the
        gradients of a projection's output and input.
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
    """Positions of a micro batch on a rank: s · b, shared by the context ranks."""
    return config.model.seq_length // config.parallel.context * config.training.micro_batch_size


def hidden_bytes(config: RunConfig) -> int:
    """Bytes of hidden states [s, b, d] in the compute type, whole over the tensor ranks."""
    return positions_of(config) * config.model.hidden_size * compute_bytes(config.training.compute_type)


def compute_bytes(precision: ComputeType) -> int:
    """Bytes of an element in the compute type."""
    return 4 if precision == "fp32" else 2
