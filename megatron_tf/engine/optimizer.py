"""An optimizer over segments: ranges of flat buffers, each with its own weight decay, learning rate and age.

ZeRO hands an optimizer one flat fp32 buffer that cuts across parameters. A *segment* is the part of one logical
tensor within it. So one parameter group serves the whole model on every rank (DeepSpeed hangs when pipeline stages have
different groups), and still every logical range has its own decay, learning rate and step count. Tokens that a growth
appended have fewer updates than the others, and the bias correction must use their own count: with that of the old
tokens, AdamW's first updates of them would be multiplied by (1 − β₁)/√(1 − β₂), which is 3.2 at β₁ = 0.9, β₂ = 0.999,
and 0.45 at β₂ = 0.95.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.engine.matrices import Matrices
from megatron_tf.optimizers.base import MatrixRule, UpdateBatch
from megatron_tf.parallel.groups import SINGLE, Group
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import ParameterSpec, layer_of, matrix_rows


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of the flattened logical tensor `name`, which lie in `buffer` from `offset` on.

    `owned`: false for a replica (tied embedding, replicated norm) that another rank saves.
    `age`: number of updates so far, a tensor [] as torch's optimizers keep it.
    `lr_multiplier`: factor of the learning rate. 0 keeps the weights to the last bit, because weight decay is
    multiplied by the learning rate too.
    `decay_multiplier`: factor of the weight decay.
    `new`: whether it is of tokens that the run's growth added. Their rate is also multiplied by the optimizer's
    `new_tokens_factor`.
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
    decay_multiplier: float = 1.0
    new: bool = False

    def view(self, flat: Tensor) -> Tensor:
        """This segment's elements of a tensor that is laid out like `buffer`."""
        return flat.view(-1)[self.offset : self.offset + self.stop - self.start]


class SegmentedOptimizer(torch.optim.Optimizer):
    """The optimizer that a configuration names, see `optimizers.base`.

    It needs `bind` before its first step, because DeepSpeed first replaces the parameters by flat buffers.
    `observe`, when set, is called with every segment and its final gradient (averaged and clipped) before the update.
    `before_update`, when set, is called before anything changes; between two of its calls no state changes at all.
    `new_tokens_factor`: factor, at the next step, of the learning rate of segments that are `new`.
    """

    def __init__(self, params: Iterable[Tensor], settings: Optimizer):
        """The learning rate of a step is that of the parameter group; it begins with `settings.lr`."""
        super().__init__(params, {"lr": settings.lr})
        self.settings = settings
        self.rule = rule_of(settings)
        self.segments: list[Segment] = []
        self.num_updates = 0  # since `bind`
        self.new_tokens_factor = 1.0
        self.observe: Callable[[Segment, Tensor], None] | None = None
        self.before_update: Callable[[], None] | None = None
        self._matrices = Matrices([], {}, SINGLE)
        self.skip_next = False  # makes the next call of `step` do nothing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, without a wrapper that serves compiled code only and would import torch's compiler."""
        wrapped = torch.optim.Optimizer.add_param_group
        getattr(wrapped, "__wrapped__", wrapped)(self, param_group)

    def bind(self, segments: Iterable[Segment], matrices: Sequence[ParameterSpec] = (), rows: Group = SINGLE) -> None:
        """Sets the segments and allocates the states of their buffers.

        `matrices`: those of this rank's blocks, for a `MatrixRule`; `segments` cut them between rows.
        `rows`: the ranks that share the rows of each. They bind the same matrices.
        """
        self.segments = list(segments)
        named = {spec.name: spec for spec in matrices}
        owned: dict[str, range] = {}
        for segment in self.segments:
            if segment.name in named:
                width = named[segment.name].width
                before = owned.get(segment.name, range(segment.start // width, 0))
                owned[segment.name] = range(before.start, segment.stop // width)
        self._matrices = Matrices(matrices, owned, rows)
        self.num_updates = 0
        for segment in self.segments:
            state = self.state[segment.buffer]
            for declared in self.rule.states:
                if declared.name not in state:
                    state[declared.name] = torch.full_like(segment.buffer, declared.initial, requires_grad=False)

    def states(self, segment: Segment) -> dict[str, Tensor]:
        """Live flat fp32 views of the segment's master weight and of its optimizer states, by name."""
        state = self.state[segment.buffer]
        kept = {declared.name: segment.view(state[declared.name]) for declared in self.rule.states}
        return {WEIGHT: segment.view(segment.buffer.detach()), **kept}

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
        of_matrices: dict[str, list[Segment]] = {spec.name: [] for spec in self._matrices.specs}
        for segment in self.segments:
            if segment.buffer.grad is None:
                continue
            if segment.name in of_matrices:
                of_matrices[segment.name].append(segment)
            else:
                alike[self._decay(segment), self._lr_multiplier(segment)].append(segment)
        for (decay, multiplier), segments in alike.items():
            self.rule.update(self.settings, self._batch(segments), group["lr"] * multiplier, decay)
        for _, specs in groupby(self._matrices.specs, lambda spec: layer_of(spec.name)):
            self._update_matrices([(spec, of_matrices[spec.name]) for spec in specs], group["lr"])

    def _lr_multiplier(self, segment: Segment) -> float:
        return segment.lr_multiplier * self.new_tokens_factor if segment.new else segment.lr_multiplier

    def _decay(self, segment: Segment) -> float:
        return self.settings.weight_decay * segment.decay_multiplier if segment.decayed else 0.0

    def _batch(self, segments: Sequence[Segment]) -> UpdateBatch:
        """The tensors to update. Calls `observe` first."""
        views = [self.states(segment) for segment in segments]
        grads = []
        for segment in segments:
            gradient = segment.buffer.grad
            assert gradient is not None, "step leaves out what has none"
            grads.append(segment.view(gradient).to(torch.float32))
        if self.observe:
            for segment, grad in zip(segments, grads):
                self.observe(segment, grad)
        return UpdateBatch(
            weights=[view[WEIGHT] for view in views],
            gradients=grads,
            states={state.name: [view[state.name] for view in views] for state in self.rule.states},
            ages=[segment.age for segment in segments],
        )

    def _update_matrices(self, matrices: Sequence[tuple[ParameterSpec, list[Segment]]], lr: float) -> None:
        """Updates the matrices of one block with one all-reduce for all of them. A rank may have no rows of some."""
        rule = self.rule
        assert isinstance(rule, MatrixRule)
        device = self.param_groups[0]["params"][0].device
        batches, directions = [], []
        for spec, segments in matrices:
            batches.append(self._batch(segments))
            own = rule.directions(self.settings, batches[-1]) if segments else []
            rows = torch.cat(own) if own else torch.empty(0, device=device)
            directions.append((spec, rows.view(-1, spec.width)))
        updates = self._matrices.transformed(rule, directions)
        for (spec, segments), batch, update in zip(matrices, batches, updates):
            size = rule.size((matrix_rows(spec), spec.width))
            counts = [weight.numel() // spec.width for weight in batch.weights]
            for segment, weight, part in zip(segments, batch.weights, update.split(counts)):
                rate = lr * self._lr_multiplier(segment)
                if segment.decayed:
                    weight.mul_(1 - rate * self._decay(segment))
                weight.view(part.shape).sub_(part, alpha=rate * size)
