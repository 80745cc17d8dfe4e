"""The `growth` and `branch` sections: runs that go on from the checkpoint of another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_tf.config.fields import Count, Fraction, NonNegative, Path, Section

TokenMethod = Literal["zero_key", "gram", "random", "matched"]
GrowthMethod = Literal["zero_key", "gram", "random", "matched", "split", "bank"]
DepthMethod = Literal["identity", "stack", "interleave"]
Moment = Literal["end", "before_decay"]


class LearningRates(Section):
    old_tokens: NonNegative = 1.0
    """Tokens of the smaller model. 0 freezes them, to the last bit."""
    new_tokens: NonNegative = 1.0
    """Tokens that the growth added."""
    new_tokens_decay_steps: Count | None = None
    """[steps] From the growth on, in which new_tokens goes to 1. null: it stays as it is. Since 0.2."""
    new_tokens_decay_shape: Literal["linear", "cosine"] = "linear"
    """How it goes there: in a straight line, or as half a cosine. Since 0.2."""
    new_layers: NonNegative = 1.0
    """Everything in layers that the growth added."""
    other: NonNegative = 1.0
    """Embedding, final norm, and a transformer's matrices in layers that are not new."""


class GrowthMethods(Section):
    qkv: TokenMethod | None = None
    """null: the one of growth.method."""
    proj: TokenMethod | None = None
    """null: the one of growth.method."""
    ffn: TokenMethod | None = None
    """null: the one of growth.method."""


class Growth(Section):
    source: Path = Field(alias="from")
    """Run folder, checkpoints folder or checkpoint to grow from."""
    at: Moment = "end"
    """Which checkpoint of the folder: end is the newest; before_decay needs checkpoint.keep_before_decay. Since 0.2."""
    method: GrowthMethod = "zero_key"
    """What new tokens begin as. random and matched change the function; split and bank make candidates."""
    methods: GrowthMethods = GrowthMethods()
    """Methods of single projections, instead of growth.method."""
    depth_method: DepthMethod = "identity"
    """What new layers begin as, where model.num_layers rises. identity keeps the function, the others copy layers."""
    clone_noise: Fraction = 0.1
    """What sets clones apart where model.hidden_size rises, relative to a weight. The function stays. Since 0.2."""
    noise: Fraction = 0.0
    """Standard deviation of a change to each old token weight, relative to it. 0 keeps the function."""
    moments: Literal["keep", "reset"] = "keep"
    """Optimizer states of what there was. New tokens and layers start afresh."""
    moments_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Of moments that are kept, squares by its square. Below 1, gradients after the growth weigh more. Since 0.2."""
    lr_multipliers: LearningRates = LearningRates()
    """Factors of the schedule's learning rate."""

    def method_of(self, projection: str) -> GrowthMethod:
        """The method of `projection`, a field of model.parameter_tokens."""
        return getattr(self.methods, projection, None) or self.method


class Branch(Section):
    """A run that goes on from another one's checkpoint as from its own, and leaves that run as it is."""

    source: Path = Field(alias="from")
    """Run folder, checkpoints folder or checkpoint of the same model on the same data."""
    at: Moment = "end"
    """Which checkpoint of the folder: end is the newest; before_decay needs checkpoint.keep_before_decay."""
