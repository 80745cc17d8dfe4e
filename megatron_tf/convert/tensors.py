"""Comparison of the tensors of a file with those of a model."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]


def differing_tensors(found: Mapping[str, Shape], expected: Mapping[str, Shape], says: str) -> list[str]:
    """Missing names, unknown names and different shapes, as phrases. `says`: the source of `expected` in them, such as
    "config.json says"."""
    return [
        *(f"missing tensor {name}" for name in expected if name not in found),
        *(f"unknown tensor {name}" for name in found if name not in expected),
        *(
            f"{name} has shape {list(found[name])}, {says} {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
