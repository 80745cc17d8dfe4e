"""AdamW over segments: ranges of flat buffers, each with its own weight decay, learning rate and age.

ZeRO hands an optimizer one flat fp32 buffer that cuts across parameters. A *segment* is the part of one logical
tensor within it. So one parameter group serves the whole model, on every rank alike (DeepSpeed hangs when
pipeline stages have different groups), and still every logical range has its own decay, learning rate and step
count: tokens that a growth appended are younger than the rest, and their bias correction must know it.
With the count of the old tokens, their first updates would be (1 − β₁)/√(1 − β₂) times what Adam's are: 3.2 times
at β₁ = 0.9, β₂ = 0.999, and 0.45 times at β₂ = 0.95.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_tf.state.optimizer_states import MOMENTS, WEIGHT


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of the flattened logical tensor `name`, which lie in `buffer` from `offset` on.

    `owned`: false for a replica (tied embedding, replicated norm) that another rank saves.
    `age`: number of Adam updates so far, a tensor as torch's Adam keeps it.
    `lr_multiplier`: times the learning rate. 0 leaves the weights as they are to the last bit: weight decay is
    multiplied by the learning rate too.
    """

    name: str
    start: int
    stop: int
    buffer: Tensor
    offset: int
    owned: bool
    decayed: bool
    age: Tensor
    lr_multiplier: float = 1.0

    def view(self, flat: Tensor) -> Tensor:
        """This segment's elements of a tensor that is laid out like `buffer`."""
        return flat.view(-1)[self.offset : self.offset + self.stop - self.start]


class SegmentedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and bias correction, through torch's own kernels.

    It does nothing until `bind` gave it its segments, because DeepSpeed first replaces the parameters by flat buffers.
    `observe`, when set, is called with every segment and its final gradient (averaged and clipped) before the update.
    `before_update`, when set, is called before anything changes; between two of its calls no state changes at all.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.segments: list[Segment] = []
        self.num_updates = 0  # since `bind`
        self.observe: Callable[[Segment, Tensor], None] | None = None
        self.before_update: Callable[[], None] | None = None
        self.skip_next = False  # makes the next call of `step` do nothing

    def bind(self, segments: Iterable[Segment]) -> None:
        """Sets the segments and allocates the moments of their buffers."""
        self.segments, self.num_updates = list(segments), 0
        for segment in self.segments:
            state = self.state[segment.buffer]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(segment.buffer, requires_grad=False)

    def states(self, segment: Segment) -> dict[str, Tensor]:
        """Live flat fp32 views of the segment's master weight and Adam moments."""
        state = self.state[segment.buffer]
        return {WEIGHT: segment.view(segment.buffer.detach())} | {s: segment.view(state[s]) for s in MOMENTS}

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        (group,) = self.param_groups
        if self.skip_next:
            self.skip_next = False
            return
        if self.before_update:
            self.before_update()
        self.num_updates += 1
        alike = defaultdict(list)
        for segment in self.segments:
            if segment.buffer.grad is not None:
                alike[segment.decayed, segment.lr_multiplier].append(segment)
        for (decayed, multiplier), segments in alike.items():
            views = [self.states(segment) for segment in segments]
            grads = [segment.view(segment.buffer.grad).to(torch.float32) for segment in segments]
            if self.observe:
                for segment, grad in zip(segments, grads):
                    self.observe(segment, grad)
            adamw(
                *([view[state] for view in views] if state else grads for state in (WEIGHT, None, *MOMENTS)),
                max_exp_avg_sqs=[],
                state_steps=[segment.age for segment in segments],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"] * multiplier,
                weight_decay=group["weight_decay"] if decayed else 0.0,
                eps=group["eps"],
                maximize=False,
            )
