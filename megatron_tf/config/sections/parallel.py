"""The `parallel` and `zero` sections: how the ranks of a run share its work."""

from __future__ import annotations

from typing import Literal

from megatron_tf.config.fields import Count, Seconds, Section

# each more than the one before
Shard = Literal["optimizer", "gradients", "parameters"]


class Parallel(Section):
    tensor: Count = 1
    """[ranks] Tensor-parallel ranks, which share each layer's parameter tokens, its heads and the vocabulary."""
    pipeline: Count = 1
    """[stages] Pipeline stages, which share the depth."""
    sequence: bool = False
    """Also split hidden states over the tensor ranks between the projections."""
    context: Count = 1
    """[ranks] Context-parallel ranks, which share the positions of each sample. Needs engine torch. Since 0.2."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Train with DeepSpeed, or with torch alone. Checkpoints of one resume in the other."""
    shard: Shard = "optimizer"
    """Each data-parallel rank keeps a part of this, and of those before it. All but optimizer need engine torch."""
    schedule: Literal["1f1b", "gpipe", "zero_bubble"] = "1f1b"
    """Order of the micro batches in a pipeline. All but 1f1b need engine torch. Since 0.2: zero_bubble."""
    virtual_stages: Count = 1
    """Parts of the depth on each pipeline rank, for interleaved 1F1B. Above 1 needs engine torch. Since 0.2."""
    timeout_seconds: Seconds = 1800.0
    """[seconds] A collective that waits longer ends the run."""

    @property
    def ranks_per_sample(self) -> int:
        """The number of ranks that work on one sample together: tensor × pipeline × context."""
        return self.tensor * self.pipeline * self.context


class Zero(Section):
    stage: Literal[0, 1] = 1
    """1 shards master weights and optimizer state over the data-parallel ranks."""
