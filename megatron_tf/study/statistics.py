"""Means of few seeds with their intervals, the cost of a loss on the curve of other runs, and optima of sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. The last one serves for more: a little wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval. A single value has no interval: None."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """Of the mean as a difference of losses: below 0 is better."""
        if self.low is None or self.high is None:
            return "one seed"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "not significant"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, with its interval by Student's t."""
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return Interval(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = _T[min(count - 1, len(_T)) - 1] * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations that a curve takes to a loss. If the loss is not on the curve, `flops` is a bound, and
    `beyond` its direction: "more" than the last point, or "less" than the first."""

    flops: float
    beyond: str = ""


def frontier(curve: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (FLOPs, loss) whose loss none reaches at as few FLOPs, by FLOPs: losses fall along it.

    One model has several points at one budget when it was trained with several rates; the best counts.
    """
    found: list[tuple[float, float]] = []
    for flops, loss in sorted(curve):
        if not found or loss < found[-1][1]:
            found.append((flops, loss))
    return found


def cost_of(loss: float, curve: Sequence[tuple[float, float]]) -> Cost:
    """The cost of `loss` on the `frontier` of `curve`, which is (FLOPs, loss) of one point or more. Between points the
    loss is linear in log FLOPs."""
    points = frontier(curve)
    if loss < points[-1][1]:
        return Cost(max(flops for flops, _ in curve), "more")
    if loss > points[0][1]:
        return Cost(points[0][0], "less")
    for (few, high), (many, low) in zip(points, points[1:]):
        if low <= loss <= high:
            share = (high - loss) / (high - low)
            return Cost(math.exp(math.log(few) + share * (math.log(many) - math.log(few))))
    return Cost(points[0][0])


def cheapest(loss: float, curves: Sequence[Sequence[tuple[float, float]]]) -> Cost:
    """The least cost of `loss` over `curves`.

    It is a bound, "less", when one of them may take less still: one that begins below the loss, or one that ends above
    it earlier, ahead of all others. It is "more", with the end of the curve that ends first, when none reaches it.
    """
    costs = [cost_of(loss, curve) for curve in curves]
    reached = [cost for cost in costs if cost.beyond != "more"]
    if not reached:
        return Cost(min(cost.flops for cost in costs), "more")
    least = min(cost.flops for cost in reached)
    earlier = [curve for curve, cost in zip(curves, costs) if cost.flops < least and _leads(curve, curves)]
    return Cost(least, "less" if earlier or any(cost.beyond for cost in reached) else "")


def _leads(curve: Sequence[tuple[float, float]], curves: Sequence[Sequence[tuple[float, float]]]) -> bool:
    """Whether none of `curves` has a lower loss at the FLOPs where `curve` ends, or below."""
    end, lowest = max(flops for flops, _ in curve), min(loss for _, loss in curve)
    found = [loss_at(end, other) for other in curves] + [loss for own in curves for flops, loss in own if flops <= end]
    return all(loss is None or loss >= lowest for loss in found)


def loss_at(flops: float, curve: Sequence[tuple[float, float]], tolerance: float = 0.0) -> float | None:
    """The loss of the `frontier` of `curve` at `flops`, linear in log FLOPs between points; None outside of the curve.

    `tolerance`: the share by which `flops` may be beyond an end and still have the loss of that end.
    """
    points, last = frontier(curve), max(flops for flops, _ in curve)
    (first, start), (_, end) = points[0], points[-1]
    if not first * (1 - tolerance) <= flops <= last * (1 + tolerance):
        return None
    if flops <= first:
        return start
    for (few, high), (many, low) in zip(points, points[1:]):
        if few < flops <= many:
            return high + (low - high) * math.log(flops / few) / math.log(many / few)
    return end


@dataclass(frozen=True)
class Optimum:
    """The best of some values, and the range of values whose loss is the same within noise. A best value at an end of
    the values has no range: None."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Optimum) -> bool:
        """Whether the ranges overlap; True when one of the two has none."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def optimum(losses: Mapping[float, float], noise: float) -> Optimum:
    """The least of the parabola, over the logarithm of the values, through the best one and its neighbours. The range
    is where the parabola is less than `noise` above its least."""
    values = sorted(losses)
    number = min(range(len(values)), key=lambda number: losses[values[number]])
    if number in (0, len(values) - 1):
        return Optimum(values[number])
    three = values[number - 1 : number + 2]
    (x0, x1, x2), (y0, y1, y2) = map(math.log, three), (losses[value] for value in three)
    slope = (y1 - y0) / (x1 - x0)
    bend = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)
    if bend <= 0:
        return Optimum(values[number])
    least, half = (x0 + x1) / 2 - slope / (2 * bend), math.sqrt(noise / bend)
    return Optimum(math.exp(least), math.exp(least - half), math.exp(least + half))


def pooled_deviation(groups: Iterable[Sequence[float]]) -> float:
    """Standard deviation within groups, pooled over all of them; 0 when none has two values."""
    squares, degrees = 0.0, 0
    for values in groups:
        if len(values) > 1:
            mean = sum(values) / len(values)
            squares += sum((value - mean) ** 2 for value in values)
            degrees += len(values) - 1
    return math.sqrt(squares / degrees) if degrees else 0.0
