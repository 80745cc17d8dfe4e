"""The `optimizer` section: the keys of every optimizer, and learning rates by step and by number of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_tf.config.fields import Count, NonNegative, OpenSection, Positive, Section, name_in
from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.config.sections.model import ParameterTokens

# Keys of `Optimizer` for models with candidates. `optimizers.base.UpdateRule` has a value where they are null.
OF_CANDIDATES = ("candidate_lr_factor", "router_lr_factor")
LrPower = Annotated[float, Field(ge=0, le=2)]


class Schedule(Section):
    type: Literal["cosine", "constant", "wsd"] = "cosine"
    """Shape of the learning rate over the steps. wsd: warm-up, stable, decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """[steps] The rate rises linearly from 0; the first update has rate 0."""
    decay_steps: Count | None = None
    """[steps] For wsd: the number of last steps in which the rate falls."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """For wsd: linear, or sqrt, which falls as 1 - √(share of the decay): faster at first. Since 0.2."""
    min_lr: NonNegative = 0.0
    """Learning rate at which cosine and wsd arrive one step after the last."""


class LrRule(Section):
    """Learning rates of parameter tokens by their number, so that a rate tuned at one number suits others.

    Each factor is a power of base / number, by kind of projection, where number is model.parameter_tokens: those that a
    position uses.
    """

    base_tokens: ParameterTokens
    """[tokens] Numbers at which optimizer.lr was tuned, by kind of projection. Since 0.2."""
    key_power: LrPower = 0.5
    """Power in the factor of key tokens' rate. Since 0.2."""
    value_power: LrPower = 1.0
    """Power in the factor of value tokens' rate. Their weight decay is divided by the factor. Since 0.2."""
    scale_initial_values: bool = False
    """Multiply initial value tokens of a new model by √(base / number): outputs begin equally large. Since 0.2."""


class Optimizer(OpenSection):
    """The keys of every optimizer. `type` adds its own; `Optimizer(...)` makes the section of that type."""

    registered = {"type": OPTIMIZERS}

    type: Annotated[str, name_in(OPTIMIZERS)] = DEFAULT
    """How parameters are updated: a registered optimizer."""
    lr: Positive
    """Largest learning rate of the schedule."""
    weight_decay: NonNegative = 0.1
    """Weight decay of parameter tokens and embedding; never of the final norm."""
    lr_rule: LrRule | None = None
    """Learning rates by the number of tokens. null: they do not depend on it. Since 0.2."""
    candidate_lr_factor: Positive | None = None
    """Learning rate of candidates, over that of other tokens. null: 0.6 for muon, else 1. Since 0.2."""
    router_lr_factor: Positive | None = None
    """Learning rate of routers and balance, over that of candidates. null: 0.1 for muon, else 1. Since 0.2."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a block over that of the next one, of the head over that of the last block. Since 0.2."""
    schedule: Schedule = Schedule()
    """Learning rate over the steps."""
