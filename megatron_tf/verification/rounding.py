"""Bounds how far rounding alone can take a layout from the exact result: anything beyond is a fault of the layout.

A layout sums the same terms as one process, in another order and in other parts. In fp32, with unit roundoff u = 2⁻²⁴,
a sum of m terms is off by about √m · u times the size of its terms. Relative to the sum, that error grows as the terms
cancel: a gradient of query tokens may be a thousandth of its terms, with softmax a millionth. The error of a step also
changes all later steps; in a small model, whose rows of scores may nearly vanish, it grows a hundredfold. Neither
effect follows from sizes, so both are measured: one process trains in fp64, which counts as exact, and twice in fp32,
the second time from weights that are one rounding away, so that everything is rounded differently. With e the larger of
the two errors (of a value that is compared at every step, the largest so far), a layout may be off by

    MARGIN · (e + √m · u · |exact value|)

where m is the number of positions in a step, over which an element of a weight's gradient is summed. The second term is
for values on which both runs happen to be exact. Errors and limits of a gradient are norms over all its elements.

MARGIN covers that two samples of rounding do not show the largest error possible. In 216 runs of small models of nine
kinds, over 20 steps under layouts of two ranks, the error that came nearest to its limit was a third of it. The errors
of a faulty layout, such as one that leaves a rank out of a sum, exceed their limits hundreds of times and more.
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
_LEAST = 1e-30  # smallest divisor, in the place of an exact value of 0


@dataclass(frozen=True)
class Limits:
    """Largest relative errors allowed in a trace: of each step's loss, gradient norm and reports, of each gradient, and
    of the validation loss."""

    losses: Sequence[float]
    grad_norms: Sequence[float]
    reports: Sequence[float]
    gradients: Mapping[str, float]
    validation: float


@dataclass(frozen=True)
class Error:
    """A relative error, and its limit."""

    value: float
    limit: float

    @property
    def share(self) -> float:
        """The error over its limit; inf when the error is NaN."""
        return self.value / max(self.limit, _LEAST) if self.value == self.value else math.inf


@dataclass(frozen=True)
class Verdict:
    """For each kind of value the error with the largest share of its limit.

    `loss` includes auxiliary losses and metrics. `parameter`: name of the parameter with the worst gradient.
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
    """(the run in this process in fp64, how far rounding may take a layout from it)."""
    exact = reference(config, steps, torch.float64)
    rounded = [reference(config, steps, nudged=nudged) for nudged in (False, True)]
    return exact, rounding_limits(exact, rounded, config.training.global_batch_size * config.model.seq_length)


def rounding_limits(exact: Trace, rounded: Sequence[Trace], positions: int) -> Limits:
    """The limits that follow from `rounded`, runs in fp32 (see the module). `positions`: in a step, over all ranks."""
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
    """The limit `tolerance` for every value of a trace like `exact`."""
    losses, grad_norms, reports = (
        [tolerance] * len(values) for values in (exact.losses, exact.grad_norms, exact.reports)
    )
    return Limits(losses, grad_norms, reports, dict.fromkeys(exact.gradients, tolerance), tolerance)


def judge(trace: Trace, exact: Trace, limits: Limits) -> Verdict:
    """The worst errors of a layout's `trace` against `exact`."""
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
    """Norm of the difference over the norm of `exact`."""
    return ((value.double() - exact).norm() / exact.norm().clamp_min(_LEAST)).item()
