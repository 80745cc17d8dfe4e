"""Growth in depth: the origin of each layer of a deeper model. Arithmetic, no torch; `growth.deeper` has the state.

| method | layer i of L' | layers that are new | keeps the function |
|---|---|---|---|
| `identity` | old layers in order, each followed by its share of new ones | initial, but 0 in what they add | exactly |
| `stack` | old layer i mod L | copies | no |
| `interleave` | old layer ⌊i·L/L'⌋ | copies, next to what they are copied from | no |

`identity`: a block adds to the hidden states x a product a·W with a last tensor W of its attention, and then one of its
feed-forward part (`ParameterSpec.output`); with W = 0 both are 0, whatever a is, and x + 0 = x to the last bit. In the
first step W has a gradient, aᵀ·dx, and what computes a has none; from the second step on everything learns.

An optimizer's states, and how often it has updated them, stay with the first of the layers that come from the same old
one. Copies stand elsewhere, where gradients are others: like all that is new they begin afresh, with ages of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_tf.config.nearest import multiples_near
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.growth.axes import Axis
from megatron_tf.state.parameters import in_layer, initial_scales, layer_of, parameter_table

if TYPE_CHECKING:
    from megatron_tf.state.sources import StateSource


@dataclass(frozen=True)
class Origins:
    """The origins of the layers of a deeper model.

    `taken`: for each layer the old one whose weights it begins with; None: it is new and adds 0 to the hidden states.
    """

    taken: tuple[int | None, ...]

    @property
    def old_at(self) -> tuple[int, ...]:
        """Where each old layer stands."""
        return tuple(self.taken.index(layer) for layer in sorted({layer for layer in self.taken if layer is not None}))


def _identity(old: int, new: int) -> Origins:
    copies = _interleave(old, new).taken
    return Origins(tuple(layer if copies.index(layer) == at else None for at, layer in enumerate(copies)))


def _stack(old: int, new: int) -> Origins:
    return Origins(tuple(at % old for at in range(new)))


def _interleave(old: int, new: int) -> Origins:
    return Origins(tuple(at * old // new for at in range(new)))


# of (old, new) numbers of layers
DEPTH_METHODS: dict[str, Callable[[int, int], Origins]] = {
    "identity": _identity,
    "stack": _stack,
    "interleave": _interleave,
}
PRESERVING_DEPTH = frozenset({"identity"})


def origins(old: Model, new: Model, growth: Growth) -> Origins:
    return DEPTH_METHODS[growth.depth_method](old.num_layers, new.num_layers)


class LayersAxis(Axis):
    order = 3
    keys = ("num_layers",)
    changes = "model.num_layers"

    def between(self, old: Model, new: Model) -> Model:
        return old.model_copy(update={"num_layers": new.num_layers})

    def problems(self, old: Model, new: Model, growth: Growth) -> list[str]:
        before, after, key = old.num_layers, new.num_layers, "growth.depth_method"
        if after < before:
            return [
                f"model.num_layers: {before} before, {after} after. Growth cannot take layers away: set it to {before}"
            ]
        if growth.depth_method == "stack" and after % before:
            near = " or ".join(str(count) for count in multiples_near(after, before) if count > before)
            return [
                f"{key}: stack repeats all {before} layers, and model.num_layers {after} is no multiple of {before}. "
                f"Set model.num_layers to {near}, or {key} to interleave or identity"
            ]
        blocks = [spec for spec in parameter_table(new).values() if layer_of(spec.name) is not None]
        if growth.depth_method == "identity" and after > before and not any(spec.output for spec in blocks):
            return [
                f"{key}: identity sets to 0 what a block adds to the hidden states, and 0 of the "
                f"{len(blocks) // after} tensors of a {new.architecture}'s block are known to be that. Set {key} to "
                "stack or interleave, which change the function"
            ]
        return []

    def without_effect(self, old: Model, new: Model, growth: Growth) -> list[str]:
        usual = type(growth).model_fields["depth_method"].default
        if new.num_layers > old.num_layers or growth.depth_method == usual:
            return []
        return [
            f"growth.depth_method: {growth.depth_method} makes new layers, and model.num_layers is {old.num_layers} "
            f"before and after. Raise model.num_layers, or remove growth.depth_method"
        ]

    def scales(self, old: Model, new: Model, growth: Growth, scales: Mapping[str, float]) -> Mapping[str, float]:
        taken = origins(old, new, growth).taken
        found = {}
        for name, initial in initial_scales(new).items():
            layer = layer_of(name)
            from_layer = None if layer is None else taken[layer]
            found[name] = initial if from_layer is None else scales[in_layer(name, from_layer)]
        return found

    def preserves(self, old: Model, new: Model, growth: Growth) -> bool:
        return growth.depth_method in PRESERVING_DEPTH

    def record(self, old: Model, new: Model, growth: Growth) -> dict[str, Any]:
        return {
            "layers": {
                "method": growth.depth_method,
                "from": old.num_layers,
                "to": new.num_layers,
                "old_at": list(origins(old, new, growth).old_at),
            }
        }

    def source(
        self, old: StateSource, fresh: StateSource, *, old_model: Model, new_model: Model, growth: Growth, seed: int
    ) -> StateSource:
        from megatron_tf.growth.deeper import DeeperSource

        scales = self.scales(old_model, new_model, growth, old.scales)
        return DeeperSource(old, fresh, parameter_table(new_model), origins(old_model, new_model, growth), scales)


LAYERS = LayersAxis()
