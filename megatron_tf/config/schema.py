"""The configuration of a run: frozen, typed, strict. One class for each section, one docstring for each field.

It holds only the user's choices. Derived values (batch arithmetic, layouts, sizes) are computed by functions and never
written back. Sections with many keys are in `sections`, one file for each subject; rules between keys are in `rules`.

The docstring of a field becomes its line in the configuration reference (`reference.py`): "[unit] Meaning.", and
"Since X.Y." at its end for a field that came after 0.1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from megatron_tf.config.fields import Count, Path, Positive, Section
from megatron_tf.config.sections.data import Augmentation, Data, DataSource, RandAugment
from megatron_tf.config.sections.deepspeed import DeepSpeed, DeepSpeedFp16, DeepSpeedZero
from megatron_tf.config.sections.growth import Branch, Growth, GrowthMethods, LearningRates
from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.config.sections.optimizer import LrRule, Optimizer, Schedule
from megatron_tf.config.sections.parallel import Parallel, Zero
from megatron_tf.config.sections.training import Guard, Profile, StopWhen, Training

# Every section can be imported from here, whichever file defines it.
__all__ = [
    "Augmentation",
    "Branch",
    "Checkpoint",
    "Data",
    "DataSource",
    "DeepSpeed",
    "DeepSpeedFp16",
    "DeepSpeedZero",
    "Evaluation",
    "Growth",
    "GrowthMethods",
    "Guard",
    "LearningRates",
    "Logging",
    "LrRule",
    "Model",
    "Optimizer",
    "Parallel",
    "ParameterTokens",
    "Profile",
    "RandAugment",
    "Run",
    "RunConfig",
    "Schedule",
    "StopWhen",
    "Training",
    "Zero",
]


class Run(Section):
    name: str = "tokenformer"
    """Shown in logs and at trackers."""
    dir: Path
    """Folder of everything that the run writes: config.yml, metrics.jsonl, train.log, checkpoints/."""
    tags: tuple[str, ...] = ()
    """Words to find the run by at trackers."""
    notes: str = ""
    """A text on the run, shown at trackers."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Determines initial weights and data order."""
    max_hours: Positive | None = None
    """[hours] The run saves and stops when this time has passed since its start."""
    hang_seconds: Annotated[float, Field(ge=1, le=1e7)] = 900.0
    """[seconds] A longer step, or a longer silence of a rank, ends the run."""


class Checkpoint(Section):
    interval_steps: Count | None = None
    """[steps] Between checkpoints. The last step is always saved."""
    keep_last: Count | None = None
    """[checkpoints] Older complete ones are deleted. null keeps all."""
    keep_before_decay: bool = False
    """Save the state before the decay of a wsd schedule, and never delete it: for growths and branches. Since 0.2."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in CPU memory."""
    on_failure: Literal["warn", "stop"] = "warn"
    """Warn when a save fails, or stop the run."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest complete checkpoint of run.dir. never: refuse a run.dir with checkpoints."""
    allow_data_change: bool = False
    """Resume even if the data differs from the data that the checkpoint was trained on."""


class Evaluation(Section):
    interval_steps: Count | None = None
    """[steps] Between evaluations. The last step is always evaluated when there is validation data."""
    samples: Count = 64
    """[samples] Validation samples, the same ones each time; rounded up to whole batches."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues after each evaluation, by the likeliest tokens; in the log and at trackers."""
    sample_tokens: Annotated[int, Field(ge=1, le=1000)] = 40
    """[tokens] The most tokens that are added to a prompt."""


class Logging(Section):
    interval_steps: Count = 10
    """[steps] Between logged steps."""
    health_interval_steps: Count | None = None
    """[steps] Between measurements of Pattention's parameter tokens, each of them a forward pass. null: none."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """In addition to metrics.jsonl, which is always written."""
    project: str = "megatron_tf"
    """Name of the project at the tracker."""


class RunConfig(Section):
    """One file is one runnable run."""

    run: Run
    """Name, folder and limits."""
    model: SerializeAsAny[Model]
    """Sizes of the model."""
    parallel: Parallel = Parallel()
    """Layout over ranks. The remaining factor is data parallelism."""
    training: Training
    """Length, batch and precision."""
    optimizer: SerializeAsAny[Optimizer]
    """The optimizer and its learning rate."""
    data: Data
    """Tokenizer and sources."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save, and how to resume."""
    growth: Growth | None = None
    """The smaller run that this one grows from, and how. null: none."""
    branch: Branch | None = None
    """The run that this one branches off from. Steps count from the other's first one. null: none. Since 0.2."""
    guard: Guard = Guard()
    """Handling of bad steps."""
    evaluation: Evaluation = Evaluation()
    """Validation while training."""
    logging: Logging = Logging()
    """Log and trackers."""
    zero: Zero = Zero()
    """Sharding of the optimizer."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Settings under DeepSpeed's own names."""
