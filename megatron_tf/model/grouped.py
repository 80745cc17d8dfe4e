"""Products of rows with the one candidate of each slot that a row has chosen.

A slot has m candidates, each a group of g tokens; its columns in the scores are g whatever the choice is. So scores, their
gradient and weights S are dense matrices [rows, slots · g], as those of a model that has the chosen tokens only, and
everything between the products is that of such a model.

| tensor | shape |
|---|---|
| tokens: keys or values of all candidates | [slots, m, g, width] |
| scores | [rows, slots · g] |
| inputs or outputs, one row a position | [rows, width] |

| function | what it makes | used for |
|---|---|---|
| `scores_of` | scores from inputs | A = X Kᵀ, dS = dO Vᵀ |
| `add_outputs` | outputs from scores | O = S V, dX = dA K |
| `token_gradients` | gradients of tokens | dK = dAᵀ X, dV = Sᵀ dO |

Rows are taken in the order of their candidates (`Assignment`), so each candidate has a product of its own. On a CPU that is a
loop. On a GPU it is one grouped product a slot, whose sizes are read on the device: nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Assignment:
    """Which rows use which candidate.

    `order`: int64 [slots, rows], the rows of each slot sorted by candidate, equal ones in their own order.
    `ends`: int32 [slots, m], where in `order` the rows of each candidate end.
    """

    order: Tensor
    ends: Tensor

    @property
    def num_slots(self) -> int:
        return self.order.shape[0]

    def columns(self, scores: Tensor, slot: int) -> Tensor:
        """The columns of `slot` in scores."""
        width = scores.shape[1] // self.num_slots
        return scores[:, slot * width : (slot + 1) * width]


def assign(candidates: Tensor, num_candidates: int) -> Assignment:
    """The assignment of `candidates`, whole numbers [rows, slots] below `num_candidates`."""
    by_slot = candidates.mT.contiguous()
    counts = torch.zeros(by_slot.shape[0], num_candidates, dtype=torch.int32, device=candidates.device)
    counts.scatter_add_(1, by_slot, torch.ones_like(by_slot, dtype=torch.int32))
    order = by_slot.argsort(dim=1, stable=True)
    return Assignment(order, counts.cumsum(1, dtype=torch.int32))


def scores_of(inputs: Tensor, tokens: Tensor, assignment: Assignment, scores: Tensor) -> None:
    """Writes inputs · tokensᵀ of the chosen candidates into `scores`."""
    if _in_one_call(inputs):
        for slot, own_tokens in enumerate(tokens):
            chosen = assignment.order[slot]
            product = F.grouped_mm(inputs[chosen], own_tokens.mT, offs=assignment.ends[slot])
            assignment.columns(scores, slot)[chosen] = product
        return
    taken, product = _room(inputs, assignment, inputs.shape[1]), _room(inputs, assignment, tokens.shape[2])
    for slot, candidate, rows in _groups(assignment):
        own = torch.index_select(inputs, 0, rows, out=taken[: len(rows)])
        torch.mm(own, tokens[slot, candidate].mT, out=product[: len(rows)])
        assignment.columns(scores, slot).index_copy_(0, rows, product[: len(rows)])


def add_outputs(scores: Tensor, tokens: Tensor, assignment: Assignment, outputs: Tensor) -> None:
    """Adds scores · tokens of the chosen candidates to `outputs`. A slot adds to each row once: the order is always the same."""
    if _in_one_call(outputs):
        for slot, own_tokens in enumerate(tokens):
            chosen = assignment.order[slot]
            own = assignment.columns(scores, slot)[chosen]
            outputs.index_add_(0, chosen, F.grouped_mm(own, own_tokens, offs=assignment.ends[slot]))
        return
    taken, product = _room(scores, assignment, tokens.shape[2]), _room(scores, assignment, tokens.shape[3])
    for slot, candidate, rows in _groups(assignment):
        own = torch.index_select(assignment.columns(scores, slot), 0, rows, out=taken[: len(rows)])
        torch.mm(own, tokens[slot, candidate], out=product[: len(rows)])
        outputs.index_add_(0, rows, product[: len(rows)])


def token_gradients(scores: Tensor, inputs: Tensor, assignment: Assignment, tokens: Tensor) -> Tensor:
    """scoresᵀ · inputs over the rows of each candidate, in the shape of `tokens`; 0 for one that nobody chose."""
    if _in_one_call(inputs):
        gradients = torch.empty_like(tokens)
        for slot, own_gradients in enumerate(gradients):
            chosen = assignment.order[slot]
            own = assignment.columns(scores, slot)[chosen]
            own_gradients.copy_(F.grouped_mm(own.mT, inputs[chosen], offs=assignment.ends[slot]))
        return gradients
    gradients = torch.zeros_like(tokens)
    own_scores, own_inputs = _room(scores, assignment, tokens.shape[2]), _room(inputs, assignment, tokens.shape[3])
    for slot, candidate, rows in _groups(assignment):
        left = torch.index_select(assignment.columns(scores, slot), 0, rows, out=own_scores[: len(rows)])
        right = torch.index_select(inputs, 0, rows, out=own_inputs[: len(rows)])
        torch.mm(left.mT, right, out=gradients[slot, candidate])
    return gradients


def _in_one_call(inputs: Tensor) -> bool:
    """Whether torch has a grouped product for such inputs that is faster than a loop, and does not wait for the host."""
    return inputs.device.type == "cuda" and inputs.dtype == torch.bfloat16


def _room(like: Tensor, assignment: Assignment, width: int) -> Tensor:
    """Memory for the rows of any one candidate, which stays in the processor's cache."""
    starts = F.pad(assignment.ends[:, :-1], (1, 0))
    return like.new_empty(int((assignment.ends - starts).max()) if assignment.ends.numel() else 0, width)


def _groups(assignment: Assignment) -> Iterator[tuple[int, int, Tensor]]:
    """(slot, candidate, its rows) for each candidate that has any."""
    for slot, ends in enumerate(assignment.ends.tolist()):
        first = 0
        for candidate, last in enumerate(ends):
            if last > first:
                yield slot, candidate, assignment.order[slot, first:last]
            first = last
