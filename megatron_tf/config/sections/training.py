"""The `training` and `guard` sections: length, batch, precision, and the handling of bad steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_tf.config.fields import Beta, Count, NonNegative, Path, Positive, Section, TotalCount

Precision = Literal["bf16", "fp16", "fp32", "fp8"]
Norm = Literal["auto", "direct", "gram"]
ComputeType = Literal["bf16", "fp16", "fp32"]


class Profile(Section):
    """A trace of some steps by torch's profiler, in run.dir/profile."""

    first_step: Count
    """[steps] First step to trace, as counted in the log. The very first steps are slower than others."""
    num_steps: Annotated[int, Field(ge=1, le=100)] = 2
    """[steps] Number of steps to trace. A trace of many steps is too large to view."""
    all_ranks: bool = False
    """Trace every rank instead of rank 0 alone."""


class StopWhen(Section):
    """Ends the run before its last step, by the validation loss. The run is then complete, and a chain goes on."""

    loss_below: Positive | None = None
    """Ends the run when the validation loss is below this."""
    patience: Count | None = None
    """[evaluations] Ends the run after so many in a row without an improvement of the best validation loss."""
    min_improvement: NonNegative = 0.0
    """Least difference of the validation loss that counts as an improvement."""


class Training(Section):
    train_steps: Count | None = None
    """[steps] Optimizer steps. Give this, train_tokens or train_samples."""
    train_tokens: TotalCount | None = None
    """[tokens] Rounded up to whole steps."""
    train_samples: TotalCount | None = None
    """[samples] For images, their number times epochs. Rounded up to whole steps. Since 0.2."""
    global_batch_size: Count
    """[samples] Of an optimizer step, over all ranks."""
    micro_batch_size: Count
    """[samples] Computed at once by each rank."""
    precision: Precision = "bf16"
    """Type of forward and backward pass. fp8 (experimental): bf16 with Pattention's products in fp8."""
    gradient_clipping: NonNegative = 1.0
    """Largest global L2 norm of the gradient. 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: bool = False
    """Run torch.compile on each block; of one with candidates, except in bf16 on GPUs, on attention without them."""
    norm: Norm = "auto"
    """Compute the norm of Pattention's scores from the scores, or from KᵀK. auto: by size and device. Since 0.2."""
    scores: Literal["keep", "recompute"] = "keep"
    """Keep Pattention's scores for the backward pass, or recompute them: less memory, one more product. Since 0.2."""
    stop_when: StopWhen | None = None
    """Conditions that end the run before its last step. null: none."""
    profile: Profile | None = None
    """Steps to record with torch's profiler."""
    drop_path: Beta = 0.0
    """[share] Samples that skip a residual branch of the last block; it falls to 0 at the first block. Since 0.2."""
    label_smoothing: Beta = 0.0
    """[share] Part of each target that is spread evenly over all classes. Since 0.2."""
    init_from: Path | None = None
    """Run folder, checkpoint or export. A new run begins with its weights instead of random ones; all else is fresh."""

    @property
    def compute_type(self) -> ComputeType:
        """The type of weights, hidden states and gradients, and of every product that is not in fp8."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def wanted_norm(self) -> Norm:
        """`norm`; gram for fp8 when it is auto, because fp8 needs it."""
        return "gram" if self.precision == "fp8" and self.norm == "auto" else self.norm


class Guard(Section):
    nonfinite: Literal["skip", "stop"] = "skip"
    """Skip a step with an infinite or NaN gradient, or stop the run. In fp16: only at the least loss scale."""
    nonfinite_patience: Count = 20
    """[steps] Skipped steps in a row that stop the run; in fp16 only those at the least loss scale count."""
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A loss more than this many times its lowest running mean so far is a spike. null: do not watch."""
    spike_patience: Count = 5
    """[steps] Spikes in a row before spike_action."""
    spike_action: Literal["stop", "lower_lr"] = "stop"
    """Stop the run after spikes, or lower the learning rate."""
    spike_lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """For lower_lr: factor of the learning rate from then on."""
