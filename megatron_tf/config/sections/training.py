"""The `training` and `guard` sections: length, batch, precision, and what is done about bad steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_tf.config.fields import Beta, Count, Fraction, NonNegative, Path, Positive, Section, TotalCount

Precision = Literal["bf16", "fp16", "fp32", "fp8"]
Norm = Literal["auto", "direct", "gram"]
ComputeType = Literal["bf16", "fp16", "fp32"]


class Profile(Section):
    """A trace of some steps by torch's profiler, in run.dir/profile."""

    first_step: Count
    """[steps] As the log counts. Choose one after the first steps, which are slower."""
    num_steps: Annotated[int, Field(ge=1, le=100)] = 2
    """[steps] A trace of more is too large to look at."""
    all_ranks: bool = False
    """Trace every rank instead of rank 0 alone."""


class StopWhen(Section):
    """Ends the run before its last step, by the validation loss. The run is then complete, and a chain goes on."""

    loss_below: Positive | None = None
    """Validation loss that is low enough."""
    patience: Count | None = None
    """[evaluations] In a row without an improvement of the best validation loss."""
    min_improvement: NonNegative = 0.0
    """Difference of the validation loss that counts as an improvement."""


class Training(Section):
    train_steps: Count | None = None
    """[steps] Optimizer steps. Give this, train_tokens or train_samples."""
    train_tokens: TotalCount | None = None
    """[tokens] Rounded up to whole steps."""
    train_samples: TotalCount | None = None
    """[samples] Such as images times epochs. Rounded up to whole steps. Since 0.2."""
    global_batch_size: Count
    """[samples] Of a step, over all ranks."""
    micro_batch_size: Count
    """[samples] Computed by a rank at once."""
    precision: Precision = "bf16"
    """Of forward and backward pass; fp8 (experimental): bf16, but Pattention's products. Masters are always fp32."""
    gradient_clipping: NonNegative = 1.0
    """Largest global L2 norm of the gradient. 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: bool = False
    """Run torch.compile on each block."""
    norm: Norm = "auto"
    """Where the norm of Pattention's scores comes from: from them, or from KᵀK. auto: by size and device. Since 0.2."""
    scores: Literal["keep", "recompute"] = "keep"
    """Pattention's scores, for the backward pass. recompute: one more product, and no memory for them. Since 0.2."""
    stop_when: StopWhen | None = None
    """When to end before the last step. null: never."""
    profile: Profile | None = None
    """Steps to record with torch's profiler."""
    drop_path: Beta = 0.0
    """[share] Of the samples that skip a residual branch of the last block; it falls to 0 at the first. Since 0.2."""
    label_smoothing: Fraction = 0.0
    """[share] Of a target that all classes share alike. Since 0.2."""
    init_from: Path | None = None
    """Run folder, checkpoint or export. A new run begins with its weights instead of random ones; all else is fresh."""

    @property
    def compute_type(self) -> ComputeType:
        """Of weights, hidden states and gradients, and of every product that is not in fp8."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def wanted_norm(self) -> Norm:
        """`norm`, or what the precision needs."""
        return "gram" if self.precision == "fp8" and self.norm == "auto" else self.norm


class Guard(Section):
    nonfinite: Literal["skip", "stop"] = "skip"
    """What a step with an infinite or NaN gradient does; it changes nothing. In fp16: at the least loss scale."""
    nonfinite_patience: Count = 20
    """[steps] Skipped steps in a row that stop the run; in fp16 at the least loss scale."""
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A loss more than this many times its running mean is a spike. null: do not watch."""
    spike_patience: Count = 5
    """[steps] Spikes in a row before something is done."""
    spike_action: Literal["stop", "lower_lr"] = "stop"
    """What is done about them."""
    spike_lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of lower_lr: multiplies the learning rate from then on."""
