"""Width of a Transformer, by cloning (HyperCloning, arXiv 2409.12903). Arithmetic, without torch; `growth.cloned` has
the state.

With m times the channels the hidden states h become [h, h, ..., h]. Then the results of a block are repeated as well:

* The layer norm of [h, ..., h] is that of h, repeated, because mean and variance are the same.
* A matrix whose inputs are repeated k times is repeated along its inputs and its outputs, and divided by k: each output
  is a sum of k equal sums, each a k-th of the old one. qkv: m times the heads, with the same number of channels each,
  as m repetitions of the old ones; each head attends as the old one that it repeats, at the same rotation and scale.
  ffn: f'/f times the columns, which GELU does not mix.
* The embedding is repeated. The final norm's weight and bias are repeated and divided by m, because the logits,
  products with the tied embedding, are sums of m equal sums.

So the function is kept. But equal clones have equal gradients and would stay equal in all of training. Therefore
weight w of the i-th clone of an input is (w/k)·(1 + `growth.clone_noise`·(nᵢ − mean n)), with its own nᵢ ~ N(0, 1).
Over the clones of one input the changes add up to 0, so the function is still kept.

An optimizer's states begin afresh everywhere, because the gradients of the wider model's weights are different ones.

A TokenFormer is not cloned: it grows by tokens at one width, which keeps its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_tf.config.nearest import multiples_near
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.growth.axes import Axis

if TYPE_CHECKING:
    from megatron_tf.state.sources import StateSource

HEADS = ("num_attention_heads", "num_key_value_heads")


class WidthAxis(Axis):
    order = 0
    keys = ("hidden_size", *HEADS, "ffn_hidden_size")
    changes = "width"

    def serves(self, model: Model) -> bool:
        return model.architecture == "transformer" and model.task == "language_model"

    def between(self, old: Model, new: Model) -> Model:
        if not self.serves(old):
            return old
        return old.model_copy(update=_sizes(new))

    def problems(self, old: Model, new: Model, growth: Growth) -> list[str]:
        if not self.serves(old):
            return []
        before, after = _sizes(old), _sizes(new)
        found = [
            f"model.{key}: {size} before, {after[key]} after. Cloning repeats what there is: set it to "
            f"{size}, or {_larger(after[key], size)}"
            for key, size in before.items()
            if after[key] % size
        ]
        times = after["hidden_size"] // before["hidden_size"]
        for key in HEADS if not found else ():
            if after[key] != times * before[key]:
                found.append(
                    f"model.{key}: {before[key]} before, {after[key]} after, but model.hidden_size is {times} times "
                    f"what it was, and heads keep their size. Set it to {times * before[key]}"
                )
        return found

    def without_effect(self, old: Model, new: Model, growth: Growth) -> list[str]:
        if self.serves(old) and _sizes(old) != _sizes(new):
            if growth.moments_factor == 1:
                return []
            return [
                f"growth.moments_factor: {growth.moments_factor:g} is of moments that are kept, and a growth of the "
                "width keeps none. Set it to 1"
            ]
        usual = type(growth).model_fields["clone_noise"].default
        if growth.clone_noise == usual:
            return []
        if self.serves(old):
            why = f"model.hidden_size is {old.hidden_size} before and after"
        else:
            why = f"a {old.architecture} grows by new tokens and layers, without clones"
        return [f"growth.clone_noise: {growth.clone_noise:g} sets clones apart, but {why}. Remove growth.clone_noise"]

    def preserves(self, old: Model, new: Model, growth: Growth) -> bool:
        return True

    def record(self, old: Model, new: Model, growth: Growth) -> dict[str, Any]:
        return {"width": {"from": _sizes(old), "to": _sizes(new), "clone_noise": growth.clone_noise}}

    def source(
        self, old: StateSource, fresh: StateSource, *, old_model: Model, new_model: Model, growth: Growth, seed: int
    ) -> StateSource:
        from megatron_tf.growth.cloned import ClonedSource

        return ClonedSource(old, old_model, new_model, growth.clone_noise, seed)


def alike(width: Mapping[str, Any]) -> str | None:
    """The warning for a growth without noise, or None. `width`: the entry "width" of the growth's history."""
    if width["clone_noise"] != 0:
        return None
    return "growth.clone_noise is 0: clones are alike, and training never sets them apart"


def _sizes(model: Model) -> dict[str, int]:
    """The values of the axis' keys in the model."""
    return {key: getattr(model, key) for key in WidthAxis.keys}


def _larger(wanted: int, size: int) -> str:
    return " or ".join(str(near) for near in multiples_near(max(wanted, size + 1), size) if near > size)


def before_cloning(model: Model, entry: Mapping[str, Any]) -> Model:
    """`model` with the width that it had before the growth with the history `entry`."""
    width = entry.get("width")
    return model if width is None else model.model_copy(update=width["from"])


WIDTH = WidthAxis()
