"""Growing and shrinking a trained adapter, without its base model.

The methods are those that grow models (`growth.methods`), applied to each branch; τ stays one number for all branches.
Appended tokens share norm and τ with the base, so only zero_key keeps their function. `freeze_old` freezes
the present tokens; `shrink` to their number then restores the adapter to the last bit. `split` copies the tokens to
candidates (see `candidates`): a position uses as many as before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tf.adapters.candidates import projection, split_branch, usual_group, with_fewer
from megatron_tf.adapters.folder import (
    CHOICE_FIELDS,
    DENSE_VERSION,
    FORMAT_VERSION,
    Adapter,
    Branch,
    check_group,
    is_appended,
    num_candidates,
)
from megatron_tf.checks import check_choice, check_whole_number
from megatron_tf.config.nearest import either, multiples_near
from megatron_tf.errors import ArgumentError, CheckpointError
from megatron_tf.growth.methods import METHODS, METHODS_OF_ADAPTERS, PRESERVING, SPLIT, Elements, GrowingProjection
from megatron_tf.model.pattention import pattention
from megatron_tf.pruning.criterion import largest, summed_contributions, summed_scale_terms
from megatron_tf.state.parameters import INITIAL_STD, default_scale

_ROWS = 256  # random inputs, to compare functions before and after and to measure contributions
TOLERANCE = 1e-5  # of the largest output: two orders of summation in fp32


def grow_adapter(
    adapter: Adapter,
    num_tokens: int,
    method: str = "zero_key",
    *,
    freeze_old: bool = False,
    group_size: int | None = None,
    seed: int = 0,
) -> Adapter:
    """The adapter with `num_tokens` tokens in each branch, the old ones first. ArgumentError if `method` cannot do it.

    `zero_key`, `gram` and `split` keep its function, `random` does not. New values are as large as the old ones are
    (RMS).  `group_size`: tokens of a candidate, for the first split.
    """
    config = adapter.config
    old = config["num_tokens"]
    check_choice("method", method, METHODS_OF_ADAPTERS)
    check_whole_number("seed", seed, 0)
    check_whole_number("num_tokens", num_tokens, 1)
    if num_tokens <= old:
        raise ArgumentError(
            f"num_tokens: {num_tokens}, and the adapter has {old} tokens. Give more to grow it, or shrink it."
        )
    appended = is_appended(config)
    if appended and method != "zero_key":
        raise ArgumentError(
            f"method: {method} needs the tokens of the base, whose norm appended tokens share. Set it to zero_key."
        )
    if method == SPLIT:
        return _split(adapter, num_tokens, group_size, freeze_old, seed)
    if group_size is not None:
        raise ArgumentError(f"group_size: {group_size}, and {method} makes no candidates. Leave it out.")
    if num_candidates(config) > 1:
        raise ArgumentError(
            f"method: {method} adds tokens that all positions use, and those of this adapter choose among "
            f"{num_candidates(config)} candidates. Set it to split."
        )
    if method == "gram":
        _check_gram(adapter, num_tokens)
    branches = {}
    for name, branch in adapter.branches.items():
        keys, values = _initial(branch, num_tokens, seed, name)
        projection = GrowingProjection(
            name=name, kind="adapter", key="method", activation=config["activation"], width=branch.keys.shape[1],
            old_tokens=old, new_tokens=num_tokens, scale=_scale(adapter), seed=seed,
            old_keys={"key_tokens": _flat(branch.keys)}, initial_keys={"key_tokens": _flat(keys)},
            initial_values={"value_tokens": _flat(values)},
        )  # fmt: skip
        decided = METHODS[method](projection)
        grown = {}
        for part, tokens in (("key_tokens", branch.keys), ("value_tokens", branch.values)):
            width, elements = tokens.shape[1], decided.elements(part)
            new = tokens.new_zeros(num_tokens - old, width)
            if elements is not None:
                new = elements(old * width, num_tokens * width).view(-1, width).to(tokens.dtype)
            grown[part] = torch.cat([tokens, new])
        branches[name] = Branch(grown["key_tokens"], grown["value_tokens"])
        new_scale = None if appended else decided.scale
    entry = _entry(adapter, method, num_tokens, new_scale, seed)
    frozen = old if freeze_old else config["frozen_tokens"]
    return _changed(adapter, branches, entry, num_tokens=num_tokens, scale=new_scale, frozen_tokens=frozen)


def shrink_adapter(adapter: Adapter, num_tokens: int, *, seed: int = 0) -> Adapter:
    """The adapter with the `num_tokens` tokens of each branch that contribute most. ArgumentError if they do not fit.

    Contributions are measured on random inputs of equal variance in every direction; τ minimises the change of outputs.
    Frozen tokens stay. If only they are left, they are no longer frozen, and get back the τ from before the growth that
    froze them; without such a growth τ stays.
    An adapter with candidates loses whole candidates, as many in each slot, and keeps τ.
    """
    config = adapter.config
    old, frozen, scale = config["num_tokens"], config["frozen_tokens"], config["scale"]
    check_whole_number("num_tokens", num_tokens, 1)
    if num_tokens >= old:
        raise ArgumentError(
            f"num_tokens: {num_tokens}, and the adapter has {old} tokens. Give fewer to shrink it, or grow it."
        )
    if num_tokens < frozen:
        raise ArgumentError(
            f"num_tokens: {num_tokens}, and {frozen} tokens are frozen, which stay. Give at least {frozen}."
        )
    if num_tokens != frozen and is_appended(config):
        raise ArgumentError(
            f"num_tokens: {num_tokens}, and what an appended token contributes depends on the base's tokens, whose "
            "norm it shares. Merge the adapter and prune the model."
        )
    if num_candidates(config) > 1:
        return _fewer_candidates(adapter, num_tokens, seed)
    if num_tokens == frozen:
        growths = (one for one in reversed(config["history"]) if one["from"] == frozen and one["to"] > frozen)
        back = next(growths, {"scale_from": scale, "frozen_from": 0})
        kept = {name: torch.arange(frozen) for name in adapter.branches}
        scale, frozen = back["scale_from"], back["frozen_from"]
    else:
        kept, scale = _most_contributing(adapter, num_tokens, seed)
    branches = {name: Branch(one.keys[kept[name]], one.values[kept[name]]) for name, one in adapter.branches.items()}
    entry = _entry(adapter, "shrink", num_tokens, scale, seed)
    return _changed(adapter, branches, entry, num_tokens=num_tokens, scale=scale, frozen_tokens=frozen)


def _split(adapter: Adapter, num_tokens: int, group_size: int | None, freeze_old: bool, seed: int) -> Adapter:
    config = adapter.config
    old, frozen, before = config["num_tokens"], config["frozen_tokens"], num_candidates(config)
    used = old // before
    if freeze_old or frozen:
        raise ArgumentError(
            f"{'freeze_old' if freeze_old else 'method'}: split copies all tokens, and copies of frozen ones would not "
            "part. Leave freeze_old out, or set the method to zero_key."
        )
    if num_tokens % old:
        raise ArgumentError(
            f"num_tokens: {num_tokens}, and split copies each of the {old} tokens as often. Set it to a multiple of "
            f"{old}, such as {either(count for count in multiples_near(num_tokens, old) if count > old)}."
        )
    if before > 1 and group_size not in (None, config["group_size"]):
        raise ArgumentError(
            f"group_size: {group_size}, and the adapter's candidates are of {config['group_size']} tokens. "
            "Leave it out."
        )
    size = config["group_size"] if before > 1 else usual_group(used) if group_size is None else group_size
    check_group("group_size", used, size)
    candidates, branches = num_tokens // used, {}
    for name, branch in adapter.branches.items():
        # Other numbers than in a split before: δ that equal ρ would leave some copies to no position.
        generator = _generator(seed, name, f"routers {len(config['history'])}")
        fresh = torch.randn(num_tokens // size, branch.keys.shape[1], generator=generator)
        branches[name] = split_branch(branch, (fresh * INITIAL_STD).to(branch.keys.dtype), size, candidates)
    return _changed(
        adapter, branches, _entry(adapter, SPLIT, num_tokens, config["scale"], seed), num_tokens=num_tokens,
        candidates=candidates, group_size=size, format_version=FORMAT_VERSION,
    )  # fmt: skip


def _fewer_candidates(adapter: Adapter, num_tokens: int, seed: int) -> Adapter:
    config = adapter.config
    used = config["num_tokens"] // num_candidates(config)
    count = num_tokens // used
    if num_tokens % used:
        raise ArgumentError(
            f"num_tokens: {num_tokens}, and of {num_candidates(config)} candidates whole ones go, {used} tokens each "
            f"in all slots. Set it to a multiple of {used}, such as {either(multiples_near(num_tokens, used))}."
        )
    inputs = {name: _inputs(branch, seed, name) for name, branch in adapter.branches.items()}
    entry = _entry(adapter, "shrink", num_tokens, config["scale"], seed)
    if count > 1:
        kept = {**config, "candidates": count}
    else:
        kept = {key: value for key, value in config.items() if key not in CHOICE_FIELDS}
        kept["format_version"] = DENSE_VERSION
    found = [
        _changed(Adapter(kept, adapter.branches), branches, entry, num_tokens=num_tokens)
        for branches in with_fewer(adapter.branches, config, count, inputs)
    ]
    return min(found, key=lambda one: compare(adapter, one, seed).error)


@dataclass(frozen=True)
class Difference:
    """`error`: largest difference of any output of any branch.  `largest`: largest output before."""

    error: float
    largest: float

    @property
    def holds(self) -> bool:
        return self.error <= TOLERANCE * self.largest

    def __str__(self) -> str:
        return f"outputs differ by {self.error:.2g} at most; the largest is {self.largest:.3g}"


@torch.no_grad()
def compare(before: Adapter, after: Adapter, seed: int = 0) -> Difference:
    """Compares the outputs of every branch on random inputs, computed in fp32."""
    errors, sizes = [0.0], [0.0]
    for name, branch in before.branches.items():
        x = _inputs(branch, seed, name)
        one, other = (_output(adapter, adapter.branches[name], x) for adapter in (before, after))
        errors.append((one - other).abs().max().item())
        sizes.append(one.abs().max().item())
    return Difference(max(errors), max(sizes))


def check_growth(before: Adapter, after: Adapter, method: str) -> Difference:
    """`compare`; CheckpointError when a method that promises to keep the function has not."""
    found = compare(before, after)
    if method in (*PRESERVING, SPLIT) and not found.holds:
        raise CheckpointError(
            f"the growth by {method} changes the adapter's function: {found}. Nothing was written. Please report this, "
            "with the adapter's adapter_config.json"
        )
    return found


def _output(adapter: Adapter, branch: Branch, x: Tensor) -> Tensor:
    if branch.router is not None:
        return projection(branch, adapter.config).partial(x)
    keys, values = branch.keys.float(), branch.values.float()
    return pattention(x, keys, values, scale=_scale(adapter), activation=adapter.config["activation"])


def _scale(adapter: Adapter) -> float:
    """τ; 1 for appended tokens, whose τ is the base's: any value will do to compare two such adapters."""
    return 1.0 if is_appended(adapter.config) else adapter.config["scale"]


def _check_gram(adapter: Adapter, num_tokens: int) -> None:
    old, scale = adapter.config["num_tokens"], adapter.config["scale"]
    needed = max(min(old, branch.keys.shape[1]) for branch in adapter.branches.values())
    if num_tokens - old < needed:
        raise ArgumentError(
            f"num_tokens: gram needs at least {needed} new tokens, the lesser of the {old} old ones and the width of "
            f"their module; from {old} to {num_tokens} they are {num_tokens - old}. Give at least {old + needed}, or "
            "zero_key."
        )
    new_scale = default_scale(num_tokens, adapter.config["activation"])
    if new_scale <= scale:
        raise ArgumentError(
            f"num_tokens: gram sets τ to √{num_tokens} = {new_scale:.6g}, which must be more than the {scale:.6g} of "
            f"now. Give more than {scale**2:.0f}, or zero_key."
        )


def _most_contributing(adapter: Adapter, num_tokens: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """(Rows of each branch that stay, ascending; τ for all branches)."""
    config = adapter.config
    frozen, scale, activation = config["frozen_tokens"], config["scale"], config["activation"]
    kept, above, below = {}, 0.0, 0.0
    for name, branch in adapter.branches.items():
        x, tokens = _inputs(branch, seed, name), (branch.keys.float(), branch.values.float())
        contributions = summed_contributions(x, *tokens, scale, activation)
        rows = frozen + largest(contributions[frozen:], num_tokens - frozen)
        kept[name] = torch.cat([torch.arange(frozen), rows])
        terms = summed_scale_terms(x, *tokens, kept[name], scale, activation)
        above, below = above + terms[0], below + terms[1]
    return kept, scale * (above / below if above > 0 and below > 0 else 1.0)


def _entry(adapter: Adapter, method: str, num_tokens: int, scale: float | None, seed: int) -> dict[str, Any]:
    """The history entry of a growth or shrinking."""
    config = adapter.config
    return {"method": method, "from": config["num_tokens"], "to": num_tokens, "scale_from": config["scale"],
            "scale_to": scale, "seed": seed, "frozen_from": config["frozen_tokens"]}  # fmt: skip


def _changed(adapter: Adapter, branches: Mapping[str, Branch], entry: Mapping[str, Any], **fields: Any) -> Adapter:
    history = [*adapter.config["history"], dict(entry)]
    return Adapter({**adapter.config, **fields, "history": history}, branches)


def _initial(branch: Branch, num_tokens: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Random keys and values for all tokens of the grown branch, with the root mean squares of the present ones."""
    generator = _generator(seed, name, "growth")
    drawn = []
    for tokens in (branch.keys, branch.values):
        std = tokens.double().square().mean().sqrt().item() or INITIAL_STD
        drawn.append(torch.randn(num_tokens, tokens.shape[1], generator=generator, dtype=torch.float64) * std)
    return drawn[0], drawn[1]


def _inputs(branch: Branch, seed: int, name: str) -> Tensor:
    return torch.randn(_ROWS, branch.keys.shape[1], generator=_generator(seed, name, "inputs"))


def _generator(seed: int, name: str, purpose: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _flat(tokens: Tensor) -> Elements:
    flat = tokens.reshape(-1)
    return lambda start, stop: flat[start:stop]
