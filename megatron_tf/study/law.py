"""A law of the loss by parameters and tokens, fitted to a study's runs of models that have not grown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tf.costs.estimate import chooses, num_parameters
from megatron_tf.costs.law import Law, Range
from megatron_tf.study.comparison import counted, has_grown
from megatron_tf.study.plan import Plan
from megatron_tf.study.result import Result
from megatron_tf.telemetry.text import are, count_of

Json = dict[str, Any]
LEAST_POINTS = 6
LEAST_SIZES = 3
HUBER = 1e-3  # a relative error; the pull of a point does not grow beyond it, so that outliers do not decide
EXPONENTS = ((0.02, 0.02), (3.0, 3.0))  # least and largest (α, β)
LEAST_GAIN = 1e-4  # the loss must fall by this share over the range of parameters, and over that of tokens
EDGE = 1.01  # an exponent within this factor of an end of its range is not determined
GRID = 25  # exponents on each side of the grid
ROUNDS = 24  # each halves the grid around the best pair
REWEIGHTINGS = 12  # of the points, for Huber's loss


class Point(NamedTuple):
    parameters: int
    tokens: int
    flops: float
    loss: float


def laws_of(plan: Plan, runs: Mapping[str, Result]) -> dict[str, Json]:
    """By architecture the fitted law, or under "missing" why there is none.

    It is fitted to arms that were annealed, have not grown, and use all parameters at each position: of those of equal
    parameters and tokens, which differ in their rates or schedules, to the one whose mean loss is lowest.
    """
    arms: dict[str, dict[tuple[int, int], dict[str, list[Point]]]] = {}
    for node, result in counted(plan, runs):
        model = node.config.model
        if has_grown(node) or chooses(model) or node.config.optimizer.schedule.type == "constant":
            continue
        point = Point(num_parameters(model), result.tokens, result.flops, result.loss)
        of_size_and_length = arms.setdefault(model.architecture, {}).setdefault(point[:2], {})
        of_size_and_length.setdefault(node.arm.name, []).append(point)
    return {
        name: law_in_json([point for by_arm in own.values() for point in min(by_arm.values(), key=_mean_loss)])
        for name, own in arms.items()
    }


def _mean_loss(points: Sequence[Point]) -> float:
    return sum(point.loss for point in points) / len(points)


def law_in_json(points: Sequence[Point]) -> Json:
    """The law of `points`, or {"missing": why they do not determine one}."""
    distinct = {(point.parameters, point.tokens) for point in points}
    sizes, tokens = ({pair[number] for pair in distinct} for number in (0, 1))
    if len(distinct) < LEAST_POINTS or len(sizes) < LEAST_SIZES or len(tokens) < LEAST_SIZES:
        return {
            "missing": f"a law has 5 numbers and takes runs at {LEAST_POINTS} pairs of size and length, of at least "
            f"{LEAST_SIZES} sizes and {LEAST_SIZES} lengths, and here {are(len(points))} "
            f"{count_of(len(points), 'run')} at {count_of(len(distinct), 'pair')}, of {count_of(len(sizes), 'size')} "
            f"and {count_of(len(tokens), 'length')}"
        }
    law = fit(points)
    gains = (
        law.A * (law.parameters[0] ** -law.alpha - law.parameters[1] ** -law.alpha),
        law.B * (law.tokens[0] ** -law.beta - law.tokens[1] ** -law.beta),
    )
    if min(gains) < LEAST_GAIN * min(point.loss for point in points):
        return {"missing": f"of {len(distinct)} runs, the loss does not fall with both parameters and tokens"}
    for name, exponent, low, high in zip(("α of parameters", "β of tokens"), (law.alpha, law.beta), *EXPONENTS):
        if not low * EDGE < exponent < high / EDGE:
            return {
                "missing": f"{len(distinct)} runs do not determine the exponent {name}: it would be {exponent:.3g}, at "
                f"an end of the range {low:g} to {high:g}"
            }
    return {
        **{key: getattr(law, key) for key in ("E", "A", "alpha", "B", "beta", "points", "residual")},
        **{key: list(getattr(law, key)) for key in ("parameters", "tokens", "flops")},
    }


def fit(points: Sequence[Point]) -> Law:
    """The law with the least Huber loss of the relative errors of `points`.

    The law is linear in E, A and B, so these are solved for at each pair of exponents on a grid, which then halves
    around the best pair. Parameters and tokens are divided by their geometric means, to keep the equations well scaled.
    """
    sizes, tokens, losses = (
        torch.tensor([getattr(point, key) for point in points], dtype=torch.float64)
        for key in ("parameters", "tokens", "loss")
    )
    size_unit, token_unit = (values.log().mean().exp() for values in (sizes, tokens))
    low, high = (torch.tensor(bounds, dtype=torch.float64).log() for bounds in EXPONENTS)
    center, width = (low + high) / 2, (high - low) / 2
    for _ in range(ROUNDS):
        steps = torch.linspace(-1, 1, GRID, dtype=torch.float64)
        pairs = (center + width * torch.cartesian_prod(steps, steps)).clamp(low, high).exp()
        distances, factors = _factors(pairs, sizes / size_unit, tokens / token_unit, losses)
        best = distances.argmin()
        (alpha, beta), (floor, of_size, of_tokens) = pairs[best].tolist(), factors[best].tolist()
        center, width = pairs[best].log(), width / 2
    law = Law(
        floor, of_size * size_unit.item() ** alpha, alpha, of_tokens * token_unit.item() ** beta, beta, len(points)
    )
    residual = max(abs(law.loss(point.parameters, point.tokens) - point.loss) for point in points)
    return replace(
        law,
        residual=residual,
        parameters=_range(point.parameters for point in points),
        tokens=_range(point.tokens for point in points),
        flops=_range(point.flops for point in points),
    )


def _range(values: Iterable[float]) -> Range:
    ascending = sorted(values)
    return float(ascending[0]), float(ascending[-1])


def _factors(pairs: Tensor, sizes: Tensor, tokens: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents [k, 2] -> for each pair the Huber loss [k] and (E, A, B) [k, 3] of its best law: E ≥ 0, A, B > 0."""
    columns = torch.stack(
        [torch.ones_like(sizes).expand(len(pairs), -1), sizes ** -pairs[:, :1], tokens ** -pairs[:, 1:]], -1
    )
    relative = columns / losses[:, None]
    best = torch.full((len(pairs),), torch.inf, dtype=torch.float64)
    factors = torch.zeros(len(pairs), 3, dtype=torch.float64)
    # with E; then without it, for pairs at which it would be negative
    for used in ([0, 1, 2], [1, 2]):
        own = relative[..., used]
        weights = torch.ones(relative.shape[:2], dtype=torch.float64)
        for _ in range(REWEIGHTINGS):
            left = own.mT @ (weights[..., None] * own)
            jitter = 1e-14 * torch.eye(len(used), dtype=torch.float64)
            found = torch.linalg.solve(left + jitter, (own.mT @ weights[..., None])[..., 0])
            errors = (own @ found[..., None])[..., 0] - 1
            weights = HUBER / errors.abs().clamp_min(HUBER)
        size = errors.abs()
        distance = torch.where(size < HUBER, size.square() / 2, HUBER * (size - HUBER / 2)).sum(-1)
        better = (found > 0).all(-1) & (distance < best)
        best = torch.where(better, distance, best)
        whole = torch.zeros_like(factors)
        whole[:, used] = found
        factors = torch.where(better[:, None], whole, factors)
    return best, factors
