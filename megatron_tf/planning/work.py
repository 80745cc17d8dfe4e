"""What one micro batch costs a GPU: matrix products, attention, elementwise traffic, kernel starts.

Passes are how often an elementwise kernel reads or writes a tensor of that size; they and the number of kernels were
counted in the model's own code, and a test counts them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_tf.config.schema import Activation, Architecture, Model, RunConfig
from megatron_tf.estimate import compute_bytes
from megatron_tf.planning.hardware import Assumptions, Gpu


@dataclass(frozen=True)
class Passes:
    """Elements read and written by elementwise kernels, for each element of the scores [s, b, n]."""

    forward: float
    backward: float


SCORE_PASSES: dict[Activation, Passes] = {
    "l2_norm_gelu": Passes(5, 17),
    "gelu_l2_norm": Passes(7, 20),
    "softmax": Passes(23, 45),
}
COMPILED_SCORE_PASSES = Passes(3, 8)  # fused by torch.compile into one kernel between two reductions or products
# For each element of [s, b, d] of a block: norms and residual sums, and what is done on a rank's own heads.
HIDDEN_PASSES = Passes(10, 20)
HEAD_PASSES: dict[Architecture, Passes] = {"tokenformer": Passes(15.5, 15), "transformer": Passes(12, 12)}
MLP_PASSES = Passes(2, 3)  # of a transformer: for each element of [s, b, f]
BLOCK_KERNELS: dict[Architecture, Passes] = {"tokenformer": Passes(73, 133), "transformer": Passes(28, 36)}
LOGIT_BYTES = {"fp32": Passes(24, 28), "bf16": Passes(20, 22), "fp16": Passes(20, 22)}  # of one logit, cross-entropy
ATTENTION_BACKWARD = 2.5  # products of its backward pass for each of the forward pass: scores are recomputed
# Of one parameter, to add a micro batch's gradient to the sum: in its own type, and for bf16 on into an fp32 buffer.
PARAMETER_BYTES = {"fp32": 12, "bf16": 26, "fp16": 6}


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] × [k, n]."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def elements(self) -> int:
        """Read and written."""
        return self.m * self.k + self.k * self.n + self.m * self.n


@dataclass(frozen=True)
class Seconds:
    """Of one micro batch on one rank."""

    forward: float
    backward: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> Seconds:
        return Seconds(count * self.forward, count * self.backward)


def block_seconds(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> Seconds:
    """Time of one block by the roofline, communication aside."""
    model, training = config.model, config.training
    tensor, split = config.parallel.tensor, config.parallel.tensor if config.parallel.sequence else 1
    positions, hidden = model.seq_length * training.micro_batch_size, model.hidden_size
    if model.architecture == "tokenformer":
        products, inner = _token_products(model, positions, tensor)
        per_inner = COMPILED_SCORE_PASSES if training.compile else SCORE_PASSES[model.activation]
    else:
        products, inner = _matrix_products(model, positions, tensor)
        per_inner = MLP_PASSES
    of_products = _products_seconds(products, config, gpu, assumed)
    # causal: half of the s × s scores
    attention = 2 * model.seq_length * hidden * positions / tensor
    attention /= assumed.attention * gpu.peak_flops(training.precision)
    bandwidth = assumed.memory * gpu.memory_bandwidth / compute_bytes(training.precision)

    def elementwise(direction: str) -> float:
        passes = (getattr(kind, direction) for kind in (per_inner, HIDDEN_PASSES, HEAD_PASSES[model.architecture]))
        sizes = (positions * inner, positions * hidden / split, positions * hidden / tensor)
        return sum(count * size for count, size in zip(passes, sizes)) / bandwidth

    launches = 0.25 if training.compile else 1.0  # what is left of the kernels
    kernels = BLOCK_KERNELS[model.architecture]
    forward = of_products + attention + elementwise("forward")
    backward = 2 * of_products + ATTENTION_BACKWARD * attention + elementwise("backward")
    return Seconds(
        max(forward, launches * kernels.forward * assumed.launch),
        max(backward, launches * kernels.backward * assumed.launch),
    )


def _token_products(model: Model, positions: int, tensor: int) -> tuple[list[Product], int]:
    """The products of a tokenformer's block, and its scores for each position, on the fullest tensor rank."""
    counts, hidden = model.token_counts, model.hidden_size
    qkv, proj, ffn = (-(-count // tensor) for count in (counts.qkv, counts.proj, counts.ffn))
    keys = [Product(positions, hidden, n) for n in (3 * qkv, proj, ffn)]
    values = [Product(positions, n, hidden) for n in (qkv, qkv, qkv, proj, ffn)]
    return [*keys, *values], 3 * qkv + proj + ffn


def _matrix_products(model: Model, positions: int, tensor: int) -> tuple[list[Product], int]:
    """The products of a transformer's block, and the width of its MLP, on the fullest tensor rank."""
    hidden, own, mlp = model.hidden_size, model.hidden_size // tensor, -(-model.mlp_width // tensor)
    shapes = ((hidden, 3 * own), (own, hidden), (hidden, mlp), (mlp, hidden))
    return [Product(positions, *shape) for shape in shapes], mlp


def head_seconds(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> Seconds:
    """Time of the output head and the cross-entropy."""
    model, precision = config.model, config.training.precision
    positions, rows = (
        model.seq_length * config.training.micro_batch_size,
        -(-model.vocab_size // config.parallel.tensor),
    )
    products = _products_seconds([Product(positions, model.hidden_size, rows)], config, gpu, assumed)
    bandwidth = assumed.memory * gpu.memory_bandwidth
    per_logit = LOGIT_BYTES[precision]
    forward, backward = (positions * rows * count / bandwidth for count in (per_logit.forward, per_logit.backward))
    return Seconds(products + forward, 2 * products + backward)


def accumulation_seconds(parameters: int, config: RunConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Adding the gradient of one micro batch to the sum."""
    return PARAMETER_BYTES[config.training.precision] * parameters / (assumed.memory * gpu.memory_bandwidth)


def update_seconds(parameters: int, config: RunConfig, data_parallel: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Norm, clipping and AdamW of a rank, once a step.

    Norm 4 bytes a parameter, clipping 8, zeroing 6. AdamW 28 (weight, gradient and two moments in, all but the
    gradient out) and the weight in the compute type 6, both for a rank's share.
    """
    share = parameters / (data_parallel if config.zero.stage else 1)
    return (18 * parameters + 34 * share) / (assumed.memory * gpu.memory_bandwidth)


def _products_seconds(products: Iterable[Product], config: RunConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Each product takes as long as its arithmetic or its memory traffic, whichever is more."""
    precision = config.training.precision
    flops, bandwidth = assumed.gemm * gpu.peak_flops(precision), assumed.memory * gpu.memory_bandwidth
    return sum(max(p.flops / flops, compute_bytes(precision) * p.elements() / bandwidth) for p in products)
