"""The `optimizer` section: what every optimizer has, and the learning rate over steps and tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_tf.config.fields import Count, NonNegative, OpenSection, Positive, Section, name_in
from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.config.sections.model import ParameterTokens

LrPower = Annotated[float, Field(ge=0, le=2)]


class Schedule(Section):
    type: Literal["cosine", "constant", "wsd"] = "cosine"
    """Of the learning rate. wsd: warm-up, stable, decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """[steps] The rate rises linearly from 0; the first update has rate 0."""
    decay_steps: Count | None = None
    """[steps] Of wsd: the last steps, in which the rate falls."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """Of wsd: how it falls. linear: in a straight line; sqrt: by 1 - √(share of decay), faster at first. Since 0.2."""
    min_lr: NonNegative = 0.0
    """Where cosine and wsd end, at the last step."""


class LrRule(Section):
    """Learning rates of parameter tokens by their number, so that a rate that was tuned at one number serves at others.

    Each factor is a power of base / number, by kind of projection, where number is model.parameter_tokens: those that a
    position uses.
    """

    base_tokens: ParameterTokens
    """[tokens] At which optimizer.lr was tuned, by kind of projection. Since 0.2."""
    key_power: LrPower = 0.5
    """Of the factor of key tokens' rate. Since 0.2."""
    value_power: LrPower = 1.0
    """Of the factor of value tokens' rate. Their weight decay is divided by it: rate times decay stays. Since 0.2."""
    scale_initial_values: bool = False
    """Multiply initial value tokens of a new model by √(base / number): outputs begin equally large. Since 0.2."""


class Optimizer(OpenSection):
    """What every optimizer has. `type` adds its own keys; `Optimizer(...)` makes the section of that type."""

    registered = {"type": OPTIMIZERS}

    type: Annotated[str, name_in(OPTIMIZERS)] = DEFAULT
    """How parameters are updated: a registered optimizer."""
    lr: Positive
    """Largest learning rate of the schedule."""
    weight_decay: NonNegative = 0.1
    """Of parameter tokens and embedding, never of the final norm."""
    lr_rule: LrRule | None = None
    """Learning rates by the number of tokens. null: all of a group learn at one rate. Since 0.2."""
    candidate_lr_factor: Positive = 1.0
    """Learning rate of candidates, their router and balance, over that of other tokens. Since 0.2."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a block over that of the next one, of the head over that of the last block. Since 0.2."""
    schedule: Schedule = Schedule()
    """Learning rate over the steps."""
