"""Whether the tensors of a file are those of a model."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]


def differing_tensors(found: Mapping[str, Shape], expected: Mapping[str, Shape], says: str) -> list[str]:
    """Names that are missing or unknown, and shapes that differ, as phrases. `says`: of what is expected, such as
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
