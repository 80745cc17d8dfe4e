"""Operators of this package, `torch.ops.megatron_tf`: for kernels that torch.compile cannot look into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch.library import Library, infer_schema
from torch.library import register_fake as _register_fake

_LIBRARY = Library("megatron_tf", "DEF")


def operator(mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: an operator that torch.compile can put into its graph; uncompiled, the plain function.

    It does not use torch.library.custom_op, whose checks at every call take longer than a kernel.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        _LIBRARY.define(name + infer_schema(function, mutates_args=mutates_args))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        made = getattr(torch.ops.megatron_tf, name).default

        @wraps(function)
        def dispatch(*arguments: Any) -> Any:
            return made(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return dispatch

    return register


def register_fake(name: str, shapes: Callable[..., Any]) -> None:
    """`shapes` makes the results of the operator `name`, uninitialised, for torch.compile."""
    _register_fake(f"megatron_tf::{name}", shapes, lib=_LIBRARY)
