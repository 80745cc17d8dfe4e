"""The directions in which a model grows: each changes keys of the `model:` section, and defines the new state.

A growth goes along one axis after another, so any of them can be combined. Arithmetic on configurations; torch is
imported only for state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.registry import Registry

if TYPE_CHECKING:
    from megatron_tf.state.sources import StateSource

PRUNE = "megatron_tf prune"  # the command that makes a model smaller, for messages
GO_ON = "set branch instead of growth"  # how the same model goes on, for messages; a study has another word for it


class Axis(ABC):
    """One direction in which a model grows.

    `order`: axes are grown along in ascending order. New layers come last, so that they copy grown ones.
    `keys`: those of the model section that it changes; one that ends with a dot stands for all keys below it.
    `changes`: these keys as text, such as "token counts".
    `takes_noise`: whether `growth.noise` applies to its result.
    """

    order: ClassVar[int]
    keys: ClassVar[tuple[str, ...]]
    changes: ClassVar[str]
    takes_noise: ClassVar[bool] = False

    @classmethod
    def claims(cls, key: str) -> bool:
        """Whether a key of the model section is one that this axis changes."""
        return any(key.startswith(own) if own.endswith(".") else key == own for own in cls.keys)

    def serves(self, model: Model) -> bool:
        """Whether models of this kind grow along the axis at all."""
        return True

    @abstractmethod
    def between(self, old: Model, new: Model) -> Model:
        """`old` with this axis' keys from `new`: the model that has grown along this axis alone."""

    def problems(self, old: Model, new: Model, growth: Growth) -> list[str]:
        """Why `old` cannot grow into `new` along this axis, as sentences without their full stop. The rest of the two
        may differ."""
        return []

    def without_effect(self, old: Model, new: Model, growth: Growth) -> list[str]:
        """Settings in `growth` for this axis that have no effect, because nothing grows along it, as sentences without
        their full stop."""
        return []

    def scales(self, old: Model, new: Model, growth: Growth, scales: Mapping[str, float]) -> Mapping[str, float]:
        """τ of every projection afterwards, from those of `old`. ConfigError, with all problems, when a method cannot
        do it. Here and below, `old` and `new` differ along this axis alone."""
        return scales

    @abstractmethod
    def preserves(self, old: Model, new: Model, growth: Growth) -> bool:
        """Whether the growth promises to keep the function, to rounding."""

    @abstractmethod
    def record(self, old: Model, new: Model, growth: Growth) -> dict[str, Any]:
        """The entry for the checkpoint's history, ready for JSON."""

    @abstractmethod
    def source(
        self, old: StateSource, fresh: StateSource, *, old_model: Model, new_model: Model, growth: Growth, seed: int
    ) -> StateSource:
        """The state of `new_model`, as a pure function of that of `old_model`, by range.

        `fresh`: initial state of the model that the whole growth ends with.  `seed`: of this growth.
        """


AXES: Registry[Axis] = Registry(
    {
        "width": "megatron_tf.growth.width:WIDTH",
        "tokens": "megatron_tf.growth.tokens:TOKENS",
        "candidates": "megatron_tf.growth.candidates:CANDIDATES",
        "layers": "megatron_tf.growth.layers:LAYERS",
    }
)


class Step(NamedTuple):
    """A part of a growth, along one axis."""

    axis: Axis
    before: Model
    after: Model


def axes() -> list[Axis]:
    """All axes, in the order in which a growth goes along them."""
    return sorted((AXES[name] for name in AXES.names()), key=lambda axis: axis.order)


def steps(old: Model, new: Model) -> Iterator[Step]:
    """The growth of `old` into `new`, axis by axis; nothing along an axis in which they are equal."""
    for axis in axes():
        after = axis.between(old, new)
        if after != old:
            yield Step(axis, old, after)
            old = after
