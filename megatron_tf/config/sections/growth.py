"""The `growth` and `branch` sections: runs that continue from the checkpoint of another run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_tf.config.fields import Count, Fraction, NonNegative, Path, Section

TokenMethod = Literal["zero_key", "gram", "random", "matched"]
GrowthMethod = Literal["zero_key", "gram", "random", "matched", "split", "bank"]
DepthMethod = Literal["identity", "stack", "interleave"]
Moment = Literal["end", "before_decay"]


def _of_one_projection(method: Any) -> Any:
    if method in ("split", "bank"):
        raise ValueError("must be a method that adds tokens. Candidates of all projections are made by growth.method")
    return method


_MethodOfOne = Annotated[TokenMethod, BeforeValidator(_of_one_projection)]


class LearningRates(Section):
    old_tokens: NonNegative = 1.0
    """Tokens of the smaller model. 0 freezes them, to the last bit. Candidates of a split all count as new."""
    new_tokens: NonNegative = 1.0
    """Tokens that the growth added."""
    new_tokens_decay_steps: Count | None = None
    """[steps] Steps after the growth in which new_tokens goes to 1. null: it is constant. Since 0.2."""
    new_tokens_decay_shape: Literal["linear", "cosine"] = "linear"
    """Path of new_tokens to 1: a straight line, or half a cosine. Since 0.2."""
    new_layers: NonNegative = 1.0
    """Everything in layers that the growth added."""
    other: NonNegative = 1.0
    """Embedding, final norm, and a transformer's matrices in layers that are not new."""


class GrowthMethods(Section):
    qkv: _MethodOfOne | None = None
    """Method for query, key and value. null: growth.method."""
    proj: _MethodOfOne | None = None
    """Method for the attention output projection. null: growth.method."""
    ffn: _MethodOfOne | None = None
    """Method for the feed-forward Pattention. null: growth.method."""


class Growth(Section):
    source: Path = Field(alias="from")
    """Run folder, checkpoints folder or checkpoint to grow from."""
    at: Moment = "end"
    """Which checkpoint of the folder: end is the newest; before_decay needs checkpoint.keep_before_decay. Since 0.2."""
    method: GrowthMethod = "zero_key"
    """Initial values of new tokens. random and matched change the function; split and bank make candidates."""
    methods: GrowthMethods = GrowthMethods()
    """Methods of single projections, instead of growth.method."""
    depth_method: DepthMethod = "identity"
    """Initial weights of new layers, if model.num_layers rises. identity keeps the function, the others copy layers."""
    clone_noise: Fraction = 0.1
    """Relative difference of cloned weights, if model.hidden_size rises. The function is kept. Since 0.2."""
    noise: Fraction = 0.0
    """Standard deviation of noise on each weight of old tokens that grow, relative to it; in a split of the copies."""
    routers: Literal["clusters", "random"] = "clusters"
    """Routers of a split: fitted to clusters of positions of training data, or random. Since 0.2."""
    moments: Literal["keep", "reset"] = "keep"
    """Optimizer states of old parameters. New tokens and layers always start afresh."""
    moments_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor of kept moments; of second moments its square. Below 1, later gradients count more. Since 0.2."""
    lr_multipliers: LearningRates = LearningRates()
    """Factors of the schedule's learning rate."""

    def method_of(self, projection: str) -> GrowthMethod:
        """The method of `projection`, a field of model.parameter_tokens."""
        return getattr(self.methods, projection, None) or self.method


class Branch(Section):
    """A run that resumes from another run's checkpoint as from its own. The other run is not changed."""

    source: Path = Field(alias="from")
    """Run folder, checkpoints folder or checkpoint of the same model on the same data."""
    at: Moment = "end"
    """Which checkpoint of the folder: end is the newest; before_decay needs checkpoint.keep_before_decay."""
