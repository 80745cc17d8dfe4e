"""Marks for torch.compile, for modules that do not import it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """As torch.compiler.assume_constant_result, without importing the compiler, which takes a second: a run that
    compiles nothing does not wait for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
