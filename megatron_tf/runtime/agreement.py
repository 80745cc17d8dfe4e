"""Makes ranks succeed together or fail together, all with the same message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_tf.errors import UserError

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; returns its result. If it fails on any, all ranks raise a UserError with all reasons.

    UserError and OSError are failures that the user can correct. Any other exception is raised on its rank alone.
    """
    results: list[T] = []
    error: UserError | None = None
    try:
        results.append(work())
    except UserError as problem:
        error = problem
    except OSError as problem:
        error = UserError(f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem))
    reasons = gather(None if error is None else str(error))
    if any(reasons):
        unique = dict.fromkeys(reason for reason in reasons if reason)
        if len(unique) == 1 and all(reasons):
            raise (error or UserError(next(iter(unique))))
        raise UserError(
            "\n".join(f"{reason} (on rank {', '.join(_ranks(reasons, reason))})" for reason in unique)
        ) from error
    return results[0]


def gather(value: T) -> list[T]:
    """Every rank's `value`, in the order of the ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0; every rank returns its result, or raises its UserError."""
    box = together(lambda: [work()] if dist.get_rank() == 0 else [])
    shared: list[Any] = box or [None]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _ranks(reasons: list[str | None], reason: str) -> list[str]:
    return [str(rank) for rank, own in enumerate(reasons) if own == reason]
