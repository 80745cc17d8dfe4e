"""Adding and removing candidates of an adapter's branches, by the functions that do the same for models.

`growth.split` has the proof that a split keeps the function. `pruning.candidates` has the ways back: candidates that
contribute least are dropped, or neighbours are merged. Contributions are measured on random inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_tf.adapters.folder import Branch, num_candidates
from megatron_tf.config.nearest import divisors
from megatron_tf.growth.methods import Elements
from megatron_tf.growth.split import Copies
from megatron_tf.model.sparse_pattention import SparsePattention
from megatron_tf.pruning.candidates import Use, add_use, even_shares, ways_to

_LARGEST_GROUP = 16


def usual_group(used: int) -> int:
    """The default number of tokens of a candidate: a divisor of `used`, at most 16, that leaves two slots if it can."""
    most = max(1, min(_LARGEST_GROUP, used // 2))
    return max(size for size in divisors(used) if size <= most)


def split_branch(branch: Branch, fresh: Tensor, group_size: int, candidates: int) -> Branch:
    """A branch with `candidates` of each slot, copies of its present tokens. `fresh`: random routers [groups, d_in]."""
    groups = len(fresh)
    count = groups * group_size // len(branch.keys)
    keys, values = (
        _copied(Copies(0, group_size * tokens.shape[1], count), tokens, groups * group_size)
        for tokens in (branch.keys, branch.values)
    )
    if branch.router is None or branch.balance is None:
        return Branch(keys, values, fresh, fresh.new_zeros(groups))
    routers = Copies(0, fresh.shape[1], count, candidates)
    router = routers.parted(_flat(branch.router), _flat(fresh), 0, fresh.numel()).view_as(fresh).to(fresh.dtype)
    return Branch(keys, values, router, _copied(Copies(0, 1, count), branch.balance[:, None], groups).flatten())


def projection(branch: Branch, config: Mapping[str, Any]) -> SparsePattention:
    """The module of a branch with candidates, fp32."""
    candidates = num_candidates(config)
    with torch.device("meta"):
        made = SparsePattention(
            config["num_tokens"] // candidates, branch.keys.shape[1], branch.values.shape[1],
            group_size=config["group_size"], candidates=candidates, scale=config["scale"],
            activation=config["activation"],
        )  # fmt: skip
    state = {f"bank.{leaf}": tensor.float() for leaf, tensor in branch.tensors().items()}
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False)


def with_fewer(
    branches: Mapping[str, Branch], config: Mapping[str, Any], count: int, inputs: Mapping[str, Tensor]
) -> Iterator[dict[str, Branch]]:
    """Yields the branches with `count` candidates for each slot, once for each way of removing the others.
    `inputs`: [rows, d_in] by branch, to measure contributions on.
    """
    use = {}
    for name, branch in branches.items():
        module = projection(branch, config)
        use[name] = Use(*torch.zeros(2, *module.bank.shape[:2], dtype=torch.float64))
        add_use(module, use[name], inputs[name])
    for mixture in ways_to(use, dict.fromkeys(use, count)).values():
        yield {name: _mixed(branch, mixture[name], config["group_size"]) for name, branch in branches.items()}


def _mixed(branch: Branch, mixture: Tensor, group_size: int) -> Branch:
    """Means of candidates: tokens weighted by `mixture` [slots, count, candidates], routers and balances evenly."""
    slots, count, candidates = mixture.shape
    even = even_shares(mixture)

    def mean(tensor: Tensor, shares: Tensor) -> Tensor:
        mixed = torch.einsum("skm,sm...->sk...", shares, tensor.double().unflatten(0, (slots, candidates, -1)))
        return mixed.flatten(0, 2).to(tensor.dtype)

    keys, values = mean(branch.keys, mixture), mean(branch.values, mixture)
    if count == 1:
        return Branch(keys, values)
    assert branch.router is not None and branch.balance is not None
    return Branch(keys, values, mean(branch.router, even), mean(branch.balance, even))


def _copied(copies: Copies, tokens: Tensor, rows: int) -> Tensor:
    width = tokens.shape[1]
    return copies.originals(_flat(tokens), 0, rows * width).view(rows, width).to(tokens.dtype)


def _flat(tokens: Tensor) -> Elements:
    flat = tokens.reshape(-1)
    return lambda start, stop: flat[start:stop]
