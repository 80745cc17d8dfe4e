"""How far rounding alone may take a layout from what is exact, so that everything further is a fault of the layout.

A layout sums the same terms as one process, in another order and in other parts. In fp32, of unit roundoff u = 2⁻²⁴, a
sum of m terms is off by about √m · u times the size of its terms. Relative to the sum itself that is more the more its
terms cancel: a gradient of query tokens may be a thousandth of what it is summed from, or the millionth with softmax.
And what a step is off by moves all steps that follow; in a small model, whose rows of scores may nearly vanish, a
hundredfold. Neither follows from sizes, so it is measured: one process trains in fp64, which counts as exact, and
twice in fp32, the second time from weights that are one rounding away, so that everything is rounded another way. With
e the larger of the two errors, and the largest so far of what is compared at every step, a layout may be off by

    MARGIN · (e + √m · u · |exact value|)

where m, the number of positions in a step, is what one number of a weight's gradient is a sum over. The second term is
for values that both runs met by luck. Errors and limits of a gradient are norms, over all of its elements.

MARGIN is what two draws of rounding leave open about others. In 216 runs of small models of nine kinds, over 20 steps
under layouts of two ranks, the error that came nearest to its limit was a third of it. What a faulty layout computes,
as one that leaves a rank out of a sum, is beyond its limits by factors of hundreds and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.config.schema import RunConfig
from megatron_tf.verification.layout import Trace, reference

UNIT_ROUNDOFF = 2.0**-24
MARGIN = 10.0
_LEAST = 1e-30  # what is not divided by: an exact value of 0


@dataclass(frozen=True)
class Limits:
    """Largest relative errors of a trace: of each step's loss, gradient norm and reports, of each gradient, and of the
    validation loss."""

    losses: Sequence[float]
    grad_norms: Sequence[float]
    reports: Sequence[float]
    gradients: Mapping[str, float]
    validation: float


@dataclass(frozen=True)
class Error:
    """A relative error, and the largest that it may be."""

    value: float
    limit: float

    @property
    def share(self) -> float:
        """Of its limit. What is no number is beyond any limit."""
        return self.value / max(self.limit, _LEAST) if self.value == self.value else math.inf


@dataclass(frozen=True)
class Verdict:
    """Of each kind of value the error that is nearest to its limit, or farthest beyond it.

    `loss`: auxiliary losses and metrics as well.  `parameter`: the one of the gradient.
    """

    loss: Error
    grad_norm: Error
    gradient: Error
    parameter: str
    validation: Error

    @property
    def agrees(self) -> bool:
        return all(error.share <= 1 for error in (self.loss, self.grad_norm, self.gradient, self.validation))


def exact_and_limits(config: RunConfig, steps: int) -> tuple[Trace, Limits]:
    """The run on this process in fp64, and how far rounding may take a layout from it."""
    exact = reference(config, steps, torch.float64)
    rounded = [reference(config, steps, nudged=nudged) for nudged in (False, True)]
    return exact, rounding_limits(exact, rounded, config.training.global_batch_size * config.model.seq_length)


def rounding_limits(exact: Trace, rounded: Sequence[Trace], positions: int) -> Limits:
    """`rounded`: runs in fp32.  `positions`: of a step."""
    floor = UNIT_ROUNDOFF * math.sqrt(positions)

    def of_series(values: Sequence[float], runs: Sequence[Sequence[float]], stride: int = 1) -> list[float]:
        """`stride`: how many values a step has."""
        noise = [max(abs(run[i] - value) for run in runs) for i, value in enumerate(values)]
        largest = [max(noise[i % stride : i + 1 : stride]) for i in range(len(values))]
        return [MARGIN * (error / max(abs(value), _LEAST) + floor) for error, value in zip(largest, values)]

    def of_gradient(name: str) -> float:
        gradient = exact.gradients[name]
        return MARGIN * (max(_distance(run.gradients[name], gradient) for run in rounded) + floor)

    stride = max(1, len(exact.reports) // len(exact.losses))
    return Limits(
        of_series(exact.losses, [run.losses for run in rounded]),
        of_series(exact.grad_norms, [run.grad_norms for run in rounded]),
        of_series(exact.reports, [run.reports for run in rounded], stride),
        {name: of_gradient(name) for name in exact.gradients},
        *of_series([exact.validation], [[run.validation] for run in rounded]),
    )


def equal_limits(exact: Trace, tolerance: float) -> Limits:
    """The same limit for everything."""
    losses, grad_norms, reports = (
        [tolerance] * len(values) for values in (exact.losses, exact.grad_norms, exact.reports)
    )
    return Limits(losses, grad_norms, reports, dict.fromkeys(exact.gradients, tolerance), tolerance)


def judge(trace: Trace, exact: Trace, limits: Limits) -> Verdict:
    """`trace`: of a layout."""
    gradients = {
        name: Error(_distance(trace.gradients[name], gradient), limits.gradients[name])
        for name, gradient in exact.gradients.items()
    }
    parameter = max(gradients, key=lambda name: gradients[name].share)
    losses = [*_errors(trace.losses, exact.losses, limits.losses)]
    losses += _errors(trace.reports, exact.reports, limits.reports)
    norms = _errors(trace.grad_norms, exact.grad_norms, limits.grad_norms)
    [validation] = _errors([trace.validation], [exact.validation], [limits.validation])
    return Verdict(_nearest(losses), _nearest(norms), gradients[parameter], parameter, validation)


def _errors(values: Sequence[float], exact: Sequence[float], limits: Sequence[float]) -> list[Error]:
    return [
        Error(abs(value - right) / max(abs(right), _LEAST), limit)
        for value, right, limit in zip(values, exact, limits, strict=True)
    ]


def _nearest(errors: Sequence[Error]) -> Error:
    return max(errors, key=lambda error: error.share)


def _distance(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference, relative to the exact one's."""
    return ((value.double() - exact).norm() / exact.norm().clamp_min(_LEAST)).item()
