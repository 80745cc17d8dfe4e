"""The time that one micro batch takes on a GPU: matrix products, attention, elementwise traffic, kernel starts.

A pass is one reading or writing of a whole tensor by an elementwise kernel. The numbers of passes and of kernels were
counted in the model's own code, and a test counts them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_tf.architectures.work import Passes, Product, compute_bytes, positions_of
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.costs.hardware import Assumptions, Gpu

# Passes of a block over its hidden states [s, b, d]: norms and residual sums.
HIDDEN_PASSES = Passes(10, 20)
LOGIT_BYTES = {"fp32": Passes(24, 28), "bf16": Passes(20, 22), "fp16": Passes(20, 22)}  # bytes moved for one logit
ATTENTION_BACKWARD = 2.5  # work of attention's backward pass over that of its forward pass: scores are recomputed
# Bytes moved for one parameter to add a micro batch's gradient to the sum: in its own type, and for bf16 also to an
# fp32 buffer.
PARAMETER_BYTES = {"fp32": 12, "bf16": 26, "fp16": 6}


@dataclass(frozen=True)
class Seconds:
    """Seconds of the forward and of the backward pass, for one micro batch on one rank."""

    forward: float
    backward: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> Seconds:
        return Seconds(count * self.forward, count * self.backward)


def block_seconds(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> Seconds:
    """Time of one block and micro batch by the roofline, without communication."""
    model, training = config.model, config.training
    tensor = config.parallel.tensor
    split = tensor if config.parallel.sequence else 1
    positions = positions_of(config)
    hidden = model.hidden_size
    work = architecture_of(model).work(config)
    of_products = _products_seconds(work.products, config, gpu, assumed)
    again = _products_seconds(work.products_again, config, gpu, assumed)
    # A causal model computes half of the s × s scores.
    attention = (2 if task_of(model).causal else 4) * model.seq_length * hidden * positions / tensor
    attention /= assumed.attention * gpu.peak_flops(training.compute_type)
    bandwidth = assumed.memory * gpu.memory_bandwidth / compute_bytes(training.compute_type)

    def elementwise(direction: str) -> float:
        passes = (getattr(kind, direction) for kind in (work.inner_passes, HIDDEN_PASSES, work.head_passes))
        sizes = (positions * work.inner_width, positions * hidden / split, positions * hidden / tensor)
        moved = positions * getattr(work.moved, direction)
        return (moved + sum(count * size for count, size in zip(passes, sizes))) / bandwidth

    launches = 0.25 if training.compile else 1.0  # the share of kernels that is left after fusion
    forward = of_products + attention + elementwise("forward")
    backward = 2 * of_products + again + ATTENTION_BACKWARD * attention + elementwise("backward")
    return Seconds(
        max(forward, launches * work.kernels.forward * assumed.launch),
        max(backward, launches * work.kernels.backward * assumed.launch),
    )


def later_seconds(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds of one block's backward pass that a zero-bubble schedule postpones: the weight gradients. Else 0."""
    if config.parallel.schedule != "zero_bubble":
        return 0.0
    return _products_seconds(architecture_of(config.model).work(config).weights, config, gpu, assumed)


def step_seconds(config: RunConfig, micro_batches: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds that one block takes in a step in addition to `block_seconds`: products that are made once a step, or,
    under torch.compile, once a micro batch."""
    work = architecture_of(config.model).work(config)
    passes = 2
    if config.training.compile:
        passes = micro_batches * (3 if config.training.activation_checkpointing else 2)
    return passes * _products_seconds(work.products_of_step, config, gpu, assumed)


def ends_seconds(config: RunConfig, gpu: Gpu, assumed: Assumptions) -> tuple[Seconds, Seconds]:
    """(time of the task's input layer, time of its head and loss), for one micro batch."""
    work = task_of(config.model).work(config)
    entry, head = (_products_seconds(p, config, gpu, assumed) for p in (work.input_products, work.head_products))
    bandwidth, per_logit = assumed.memory * gpu.memory_bandwidth, LOGIT_BYTES[config.training.compute_type]
    forward, backward = (work.logits * count / bandwidth for count in (per_logit.forward, per_logit.backward))
    return Seconds(entry, 2 * entry), Seconds(head + forward, 2 * head + backward)


def accumulation_seconds(parameters: int, config: RunConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds to add the gradient of one micro batch to the sum."""
    return PARAMETER_BYTES[config.training.compute_type] * parameters / (assumed.memory * gpu.memory_bandwidth)


def update_seconds(parameters: int, config: RunConfig, data_parallel: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds of gradient norm, clipping and the optimizer of a rank, once a step.

    Bytes moved for each parameter: norm 4, clipping 8, zeroing 6. For each parameter of the rank's share: the optimizer
    reads weight, gradient and states and writes all but the gradient (AdamW: 28 bytes), and 6 for the weight in the
    compute type.
    """
    share = parameters / (data_parallel if config.zero.stage else 1)
    updated = 3 * 4 + 2 * rule_of(config.optimizer).state_bytes
    return (18 * parameters + (6 + updated) * share) / (assumed.memory * gpu.memory_bandwidth)


def _products_seconds(products: Iterable[Product], config: RunConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Each product takes the time of its arithmetic or of its memory traffic, whichever is longer."""
    precision = config.training.compute_type
    flops, bandwidth = assumed.gemm * gpu.peak_flops(precision), assumed.memory * gpu.memory_bandwidth

    def seconds(product: Product) -> float:
        reached = flops * (assumed.grouped if product.candidates > 1 else 1)
        return max(product.flops / reached, compute_bytes(precision) * product.elements() / bandwidth)

    return sum(map(seconds, products))
