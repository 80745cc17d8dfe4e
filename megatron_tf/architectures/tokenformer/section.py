"""The `model:` section of a TokenFormer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_tf.architectures.spec import BankSpec
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.config.fields import Count, NonNegative, Section
from megatron_tf.config.nearest import divisors, either, multiples_near
from megatron_tf.config.sections.model import ActivationName, Model, ParameterTokens
from megatron_tf.telemetry.text import count_of


class Bank(Section):
    """Tokens in slots. A slot has several candidates, groups of tokens, and a position uses one of them."""

    group_size: Annotated[int, Field(ge=16, lt=2**31, multiple_of=16)]
    """[tokens] Size of a candidate. parameter_tokens, less `dense`, is a multiple of it: that many slots."""
    candidates: Count
    """Groups of tokens in each slot, of which a position uses one. 1: the projection is dense, and has no slots."""
    dense: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """[tokens] How many of parameter_tokens are used by every position, and are in no slot."""

    def slots(self, used: int) -> int:
        """The number of slots of a projection whose positions use `used` tokens."""
        return (used - self.dense) // self.group_size

    def groups(self, used: int) -> int:
        """The number of candidates of all slots together."""
        return self.slots(used) * self.candidates

    def stored(self, used: int) -> int:
        """The number of parameter tokens that the projection has."""
        return self.dense + self.groups(used) * self.group_size


class Sparse(Section):
    """Projections with more parameter tokens than a position uses; `parameter_tokens` counts the used ones."""

    qkv: Bank | None = None
    """Of the query, key and value Pattentions, each with candidates of its own."""
    proj: Bank | None = None
    """Of attention's output Pattention."""
    ffn: Bank | None = None
    """Of the feed-forward Pattention."""
    z_loss: NonNegative = 0.0
    """Weight of a loss that keeps the routers' scores small: the mean of (log Σ exp z)² over a slot's candidates."""

    def banks(self) -> dict[str, Bank]:
        """The banks that are configured, by kind of projection."""
        banks = {"qkv": self.qkv, "proj": self.proj, "ffn": self.ffn}
        return {kind: bank for kind, bank in banks.items() if bank is not None}


def with_choices(sparse: Sparse | None) -> Sparse | None:
    """`sparse` without banks of one candidate, which leave nothing to choose; None if no other is left."""
    if sparse is None or not sparse.banks():
        return sparse
    dense = {kind: None for kind, bank in sparse.banks().items() if bank.candidates == 1}
    return None if len(dense) == len(sparse.banks()) else sparse.model_copy(update=dense)


class TokenFormerModel(Model):
    architecture: Literal["tokenformer"] = "tokenformer"
    """What fills the blocks: Pattention."""
    parameter_tokens: ParameterTokens
    """Parameter tokens of each kind of projection, those that a position uses. Growth adds to them."""
    sparse: Annotated[Sparse | None, AfterValidator(with_choices)] = None
    """Projections with more parameter tokens than a position uses. null: a position uses them all."""
    activation: ActivationName = DEFAULT_ACTIVATION
    """Nonlinearity and normalisation over the parameter tokens."""


def as_tokenformer(model: Model) -> TokenFormerModel:
    """`model`, which is known to be a TokenFormer's."""
    assert isinstance(model, TokenFormerModel), model.architecture
    return model


def bank_of(model: TokenFormerModel, kind: str) -> Bank | None:
    """The bank of a projection of `kind`; None for one whose positions use all its tokens."""
    return None if model.sparse is None else model.sparse.banks().get(kind)


def banks_of(model: TokenFormerModel) -> dict[str, Bank]:
    """The banks of the model by kind of projection."""
    return {} if model.sparse is None else model.sparse.banks()


def written(bank: Bank) -> str:
    """A bank as YAML, without fields that have their default."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in bank.model_dump(exclude_defaults=True).items())}}}"


def bank_spec(model: TokenFormerModel, kind: str) -> BankSpec | None:
    """The sizes of a projection's bank; None for one that has none."""
    bank, used = bank_of(model, kind), getattr(model.parameter_tokens, kind)
    return None if bank is None else BankSpec(bank.slots(used), bank.candidates, bank.group_size)


def suggested_bank(used: int) -> Bank | None:
    """A bank for a projection whose positions use `used` tokens, of two slots or more where the tokens suffice for
    them. None when they do not suffice for one slot."""
    dense = used % 16
    in_slots = used - dense
    largest = min(256, max(16, in_slots // 2))
    sizes = [size for size in divisors(in_slots) if size % 16 == 0 and size <= largest] if in_slots else []
    return Bank(group_size=sizes[-1], candidates=4, dense=dense) if sizes else None


def suggested_bank_next_to(dense: int, used: int) -> tuple[Bank, int]:
    """A bank next to `dense` tokens that every position uses, and the tokens that a position then uses in all: `used`
    where those beyond `dense` make whole slots, else the next number with which they do."""
    new = -(-max(used - dense, 0) // 16) * 16
    if not new:
        bank = suggested_bank(dense)
        new = bank.group_size if bank else 16
    bank = suggested_bank(new)
    assert bank is not None  # a multiple of 16 makes slots
    return bank.model_copy(update={"dense": dense}), dense + new


def bank_problems(model: TokenFormerModel) -> Iterator[str]:
    """Sentences on banks whose tokens do not fill whole slots, and on a section without a bank."""
    if model.sparse is not None and not model.sparse.banks():
        bank = suggested_bank(model.parameter_tokens.ffn)
        remedy = f"Set model.sparse.ffn to {written(bank)}, or" if bank else "Set"
        yield (
            f"model.sparse: names none of the projections {', '.join(ParameterTokens.model_fields)}. {remedy} "
            "model.sparse to null."
        )
    for kind, bank in banks_of(model).items():
        used = getattr(model.parameter_tokens, kind)
        in_slots, size = used - bank.dense, bank.group_size
        if in_slots <= 0:
            fitting = f"model.sparse.{kind}.dense to {used - size}, or " if used >= size else ""
            yield (
                f"model.sparse.{kind}.dense: {bank.dense} tokens are used by every position, which leaves none of "
                f"model.parameter_tokens.{kind} {used} for slots. Set {fitting}model.parameter_tokens.{kind} to "
                f"{bank.dense + size}."
            )
        elif in_slots < size or in_slots % size:
            ways = []
            # a split keeps the counts of the smaller model, so other counts come last
            if denser := [used - count for count in reversed(multiples_near(in_slots, size)) if count <= used]:
                ways.append(f"model.sparse.{kind}.dense to {either(denser)}")
            if sizes := [count for count in divisors(in_slots) if count % 16 == 0]:
                ways.append(f"model.sparse.{kind}.group_size to {either(sizes)}")
            counts = either(bank.dense + count for count in multiples_near(in_slots, size))
            ways.append(f"model.parameter_tokens.{kind} to {counts}")
            yield (
                f"model.parameter_tokens.{kind}: {used}, of which model.sparse.{kind}.dense {bank.dense} are used by "
                f"every position; the other {in_slots} are no whole slots of model.sparse.{kind}.group_size {size} "
                f"tokens. Set {', or '.join(ways)}."
            )


def slot_counts(model: TokenFormerModel) -> dict[str, int]:
    """The number of slots by kind of projection, of banks that have whole ones; `bank_problems` has the others."""
    found = {}
    for kind, bank in banks_of(model).items():
        used = getattr(model.parameter_tokens, kind)
        if used > bank.dense and (used - bank.dense) % bank.group_size == 0:
            found[kind] = bank.slots(used)
    return found


def bank_layout_problems(
    model: TokenFormerModel, tensor: int, sizes_near: list[int], *, counts_are_given: bool
) -> Iterator[str]:
    """Sentences on slots that the tensor ranks cannot share evenly.

    `sizes_near`: values of parallel.tensor that are possible.
    `counts_are_given`: no other number of tokens is a remedy, since a split keeps that of the smaller model.
    """
    for kind, slots in slot_counts(model).items():
        bank = banks_of(model)[kind]
        in_slots = slots * bank.group_size
        if slots % tensor == 0:
            continue
        ways = [f"parallel.tensor to {either(sizes_near)}"]
        sizes = [size for size in divisors(in_slots) if size % 16 == 0 and in_slots // size % tensor == 0]
        if sizes:
            ways.append(f"model.sparse.{kind}.group_size to {either(sizes)}")
        if not counts_are_given:
            counts = either(bank.dense + bank.group_size * count for count in multiples_near(slots, tensor))
            ways.append(f"model.parameter_tokens.{kind} to {counts}")
        yield (
            f"parallel.tensor: {tensor} does not divide the {count_of(slots, 'slot')} of model.sparse.{kind} "
            f"({in_slots} tokens in groups of {bank.group_size}), and a rank holds whole slots. Set "
            f"{', or '.join(ways)}."
        )
