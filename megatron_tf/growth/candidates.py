"""Growth in candidates: the tokens of a dense projection become slots of candidates, slots get more candidates, or
slots are added to the tokens. `growth.split` and `growth.bank` have the state, and the proofs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_tf.architectures.tokenformer.section import Bank, suggested_bank, suggested_bank_next_to, written
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.differences import SPARSE, TOKENS, differing
from megatron_tf.config.nearest import either, multiples_near
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.growth.axes import GO_ON, PRUNE, Axis
from megatron_tf.growth.methods import BANK, SPLIT
from megatron_tf.state.parameters import projections

if TYPE_CHECKING:
    from megatron_tf.state.sources import StateSource


class CandidatesAxis(Axis):
    order = 2
    keys = (SPARSE,)
    changes = "candidates"
    takes_noise = True

    def between(self, old: Model, new: Model) -> Model:
        if "sparse" not in type(new).model_fields:
            return old
        # the settings that balance the choice may differ: no growth depends on them
        return old if _banks(old) == _banks(new) else old.model_copy(update={"sparse": dict(new)["sparse"]})

    def problems(self, old: Model, new: Model, growth: Growth) -> list[str]:
        if removed := list(_removed(old, new)):
            return removed
        changed = list(_changed(old, new))
        if growth.method == SPLIT:
            return _split_problems(old, new, growth, changed)
        if growth.method == BANK:
            return _bank_problems(old, new, growth)
        return [
            f"model.{key}: {before} before, {after} after. Growth by {growth.method} {_otherwise(key, before)}"
            for key, before, after in changed
        ]

    def without_effect(self, old: Model, new: Model, growth: Growth) -> list[str]:
        if growth.routers == "clusters" or _banks(old).keys() != _banks(new).keys():
            return []
        return [
            f"growth.routers: {growth.routers} is for a split of dense tokens, and no projection gets its first "
            "candidates. Remove it"
        ]

    def preserves(self, old: Model, new: Model, growth: Growth) -> bool:
        return not growth.noise

    def record(self, old: Model, new: Model, growth: Growth) -> dict[str, Any]:
        before, after = (architecture_of(model).sparse_sections(model) for model in (old, new))
        record = {"sparse": {"from": before, "to": after}}
        return record if growth.method == BANK else {"method": SPLIT, **record}

    def source(
        self, old: StateSource, fresh: StateSource, *, old_model: Model, new_model: Model, growth: Growth, seed: int
    ) -> StateSource:
        from megatron_tf.growth.bank import BankSource
        from megatron_tf.growth.split import SplitSource

        if growth.method == BANK:
            return BankSource(old, fresh, old_model)
        return SplitSource(old, fresh, old_model=old_model, new_model=new_model, growth=growth, seed=seed)


CANDIDATES = CandidatesAxis()


def _banks(model: Model) -> dict[str, Bank]:
    """The banks of candidates by kind of projection."""
    return {kind: bank for kind, bank in (dict(model).get("sparse") or ()) if isinstance(bank, Bank)}


def _written(bank: Bank | None) -> str:
    return "null" if bank is None else written(bank)


def _removed(old: Model, new: Model) -> Iterator[str]:
    after = _banks(new)
    for kind, bank in _banks(old).items():
        if kind not in after:
            yield (
                f"model.sparse.{kind}: {_written(bank)} before, null or one candidate after. Growth cannot take "
                f"candidates away: set it to {_written(bank)}, or prune the smaller model first: {PRUNE} --candidates "
                f"{kind}=1"
            )
        elif after[kind].candidates < bank.candidates:
            yield (
                f"model.sparse.{kind}.candidates: {bank.candidates} before, {after[kind].candidates} after. Growth "
                f"cannot take candidates away: set it to {bank.candidates}, or prune the smaller model first: {PRUNE} "
                f"--candidates {kind}={after[kind].candidates}"
            )


def _changed(old: Model, new: Model) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in each) where the banks differ; one that is new is one key."""
    before, after = _banks(old), _banks(new)
    yield from ((f"sparse.{kind}", "null", _written(after[kind])) for kind in after if kind not in before)
    for key, *values in differing(old, new):
        if CANDIDATES.claims(key) and key.split(".")[1] in before:
            yield key, *values


def _otherwise(key: str, before: Any) -> str:
    """What a method that appends tokens does instead of changing `key` of model.sparse, and the remedy."""
    if before == "null":
        return (
            "makes no candidates: set growth.method to split, which copies tokens to candidates, or to bank, which "
            "puts candidates next to them"
        )
    copied = ", or growth.method to split, which copies candidates to more of them" * key.endswith(".candidates")
    return f"adds slots that are like those of the smaller model: set it to {before}{copied}"


def missing_candidates(model: Model, growth: Growth, old: Model | None = None) -> list[str]:
    """A sentence when `growth` makes candidates and `model`, the bigger one, has none; empty otherwise.

    `old`: the smaller model, where it is known.
    """
    if growth.method not in (SPLIT, BANK) or any(projection.bank for projection in projections(model).values()):
        return []
    counts = architecture_of(model).token_counts(model)
    if not counts:
        does = "copies parameter tokens to candidates" if growth.method == SPLIT else "adds parameter tokens"
        return [f"growth.method: {growth.method} {does}, and a {model.architecture} has none. Remove growth.method"]
    none = "and the model has none, or one a slot."
    if growth.method == SPLIT:
        bank = suggested_bank(counts["ffn"])
        remedy = _remedy(f"model.sparse.ffn to {_written(bank)}" if bank else "", old, model)
        return [f"growth.method: split copies tokens to candidates, {none} {remedy}"]
    if old is None:
        remedy = (
            "model.sparse.ffn to {group_size: G, candidates: 4, dense: D}, where D is the smaller model's tokens and G "
            f"a multiple of 16 that divides the rest of model.parameter_tokens.ffn {counts['ffn']}"
        )
        return [f"growth.method: bank adds candidates to the tokens, {none} {_remedy(remedy, old, model)}"]
    before = architecture_of(old).token_counts(old)
    raised = [kind for kind in counts if counts[kind] > before[kind] and growth.method_of(kind) == BANK] or ["ffn"]
    tokens = " and ".join(f"{before[kind]} {kind}" for kind in raised)
    remedy = " and ".join(_bank_next_to(kind, before[kind], counts[kind]) for kind in raised)
    return [f"growth.method: bank adds candidates to the {tokens} tokens, {none} {_remedy(remedy, old, model)}"]


def _bank_next_to(kind: str, before: int, after: int) -> str:
    """A remedy: the values of keys with which candidates are next to the `before` tokens of the smaller model."""
    bank, used = suggested_bank_next_to(before, after)
    count = f" and model.parameter_tokens.{kind} to {used}" if used != after else ""
    return f"model.sparse.{kind} to {_written(bank)}{count}"


def _remedy(candidates: str, old: Model | None, new: Model) -> str:
    """What to set for candidates, and what for none. `candidates`: keys and values; "" where none can be."""
    is_same = old is not None and not any(differing(old, new))
    settings = [candidates] if candidates else []
    if not is_same:
        settings.append("growth.method to zero_key, which adds tokens or layers")
    ways = [f"set {', or '.join(settings)}"] if settings else []
    if is_same or old is None:
        ways.append(f"to go on with the same model, {GO_ON}")
    text = "; ".join(ways)
    return text[0].upper() + text[1:]


def _split_problems(old: Model, new: Model, growth: Growth, changed: list[tuple[str, Any, Any]]) -> list[str]:
    """Why `old` cannot be split into `new`, unless `new` has candidates of the tokens, or more of the candidates, that
    `old` has."""
    problems = missing_candidates(new, growth, old)
    for key, before, after in differing(old, new):
        if key.startswith(TOKENS):
            problems.append(
                f"model.{key}: {before} before, {after} after. split changes model.sparse, and no token counts: grow "
                "by another method in a run before or after it"
            )
    for key, before, after in changed:
        if before == "null":
            continue
        if not key.endswith(".candidates"):
            problems.append(
                f"model.{key}: {before} before, {after} after. Candidates are split as they are, each into copies of "
                f"its own size: set it to {before}, or split the dense model that they come from"
            )
        elif after % before:
            several = [count for count in multiples_near(after, before) if count > before] or [2 * before]
            problems.append(
                f"model.{key}: {before} before, {after} after. Each candidate is split into as many copies as the "
                f"others: set it to a multiple of {before}, such as {either(several)}"
            )
    if not problems and not changed:
        problems.append(
            "growth.method: split makes candidates, and the smaller model has those of model.sparse already. Raise "
            f"{either(f'model.sparse.{kind}.candidates' for kind in _banks(new))}, set the method to zero_key to add "
            f"tokens or layers, or, to go on with the same model, {GO_ON}"
        )
    return problems


def _whole_slots(kind: str, before: int, after: int, group_size: int) -> str:
    """What else to set so that the tokens beyond the `before` dense ones make whole slots; "" where they do."""
    more = max(after - before, 0)
    if more and more % group_size == 0:
        return ""
    counts = either(before + count for count in multiples_near(more, group_size))
    return f", and model.parameter_tokens.{kind} to {counts}"


def _bank_problems(old: Model, new: Model, growth: Growth) -> list[str]:
    """Why `old` cannot get banks as `new` has them, unless `old` has none, and all its tokens stay in use."""
    before, after = (architecture_of(model).token_counts(model) for model in (old, new))
    if missing := missing_candidates(new, growth, old):
        return missing
    banks = {projection.kind: projection for projection in projections(new).values() if projection.bank}
    if any(projection.bank for projection in projections(old).values()):
        return [
            "growth.method: bank begins with a dense model, and the smaller one has model.sparse already. Set it to "
            "zero_key to add slots like those that there are, or to split to copy candidates to more of them"
        ]
    problems = []
    for kind, projection in banks.items():
        assert projection.bank is not None
        dense = after[kind] - projection.bank.used_tokens
        if dense != before[kind]:
            split = "; or set growth.method to split, which makes candidates of the tokens"
            problems.append(
                f"model.sparse.{kind}.dense: {dense}, and the smaller model has {before[kind]} {kind} tokens, which "
                f"stay in use at every position. Set it to {before[kind]}"
                f"{_whole_slots(kind, before[kind], after[kind], projection.bank.group_size)}"
                f"{split if after[kind] == before[kind] else ''}"
            )
        if not ACTIVATIONS[projection.activation].ignores_zero:
            problems.append(
                f"growth.method: bank cannot keep the function of a {projection.activation} model: "
                f"{ACTIVATIONS[projection.activation].refusals.get('zero_key', 'a key of 0 has a weight')}. Set it to "
                "split"
            )
        if (method := growth.method_of(kind)) != BANK:
            problems.append(
                f"growth.methods.{kind}: {method}, and growth.method bank makes the new {kind} tokens. Leave "
                f"growth.methods.{kind} out"
            )
    problems += [
        f"model.parameter_tokens.{kind}: {before[kind]} before, {after[kind]} after, and model.sparse.{kind} is null "
        "or has one candidate, which leaves nothing to choose. Set "
        f"{_bank_next_to(kind, before[kind], after[kind])}, or growth.methods.{kind} to zero_key"
        for kind in before
        # fewer tokens are the problem of another axis
        if kind not in banks and after[kind] > before[kind] and growth.method_of(kind) == BANK
    ]
    return list(dict.fromkeys(problems))
