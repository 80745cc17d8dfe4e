"""The effect of `lr_rule`, `candidate_lr_factor`, `router_lr_factor` and `layer_decay` of the optimizer on each
parameter: factors of its learning rate, weight decay and initial size. No torch.

A projection with n tokens adds up n values, each weighted by a score of unit variance, whatever n is. An update of Adam
moves every value by the rate, in directions that agree, so it moves the output by n times the rate. Therefore values
need a rate that falls as 1/n. A score moves by the same amount at every n, but the scores of n keys move together,
which moves the output by n times the size of the values. With values that fall as 1/√n, keys need a rate that falls as
1/√n.

Decoupled weight decay acts through rate × decay. For values that product stays the same. Keys keep their decay instead:
they are normed, so decay only sets their size, and with the product held they would turn as fast as without the rule.

With a layer decay, the final norm and the head learn at the whole rate, each block at a fixed share of the rate of the
next one, and the input layer, even if it is the head as well, at the same share of the rate of the first block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.sections.model import Model
from megatron_tf.config.sections.optimizer import OF_CANDIDATES, Optimizer
from megatron_tf.state.parameters import ParameterSpec, layer_of, parameter_table, projections


@dataclass(frozen=True)
class Factors:
    """Factors for one parameter: of its learning rate, of its weight decay, and of its weights in a new model."""

    lr: float = 1.0
    weight_decay: float = 1.0
    initial: float = 1.0


PLAIN = Factors()


def factors(model: Model, optimizer: Optimizer) -> dict[str, Factors]:
    """The factors of each parameter that a setting changes, by name; empty when none does."""
    found = _by_rule(model, optimizer)
    for name, factor in _of_candidates(model, optimizer).items():
        if factor != 1:
            own = found.get(name, PLAIN)
            found[name] = replace(own, lr=own.lr * factor)
    if optimizer.layer_decay == 1:
        return found
    for name, spec in parameter_table(model).items():
        own, rate = found.get(name, PLAIN), optimizer.layer_decay ** _layers_above(spec, model)
        found[name] = replace(own, lr=own.lr * rate)
    return found


def _layers_above(spec: ParameterSpec, model: Model) -> int:
    """The number of layers after a parameter's own, counting blocks and the head as one layer each; 0 for the head."""
    layer = layer_of(spec.name)
    if layer is not None:
        return model.num_layers - layer
    return model.num_layers + 1 if "first" in spec.ends else 0


def _by_rule(model: Model, optimizer: Optimizer) -> dict[str, Factors]:
    rule = optimizer.lr_rule
    if rule is None:
        return {}
    table = parameter_table(model)
    found: dict[str, Factors] = {}
    for projection in projections(model).values():
        share = getattr(rule.base_tokens, projection.kind) / projection.tokens
        of_values = share**rule.value_power
        initial = share**0.5 if rule.scale_initial_values else 1.0
        rows = {}
        for key in projection.keys:
            name = f"{projection.name}.{key}"
            found[name] = Factors(lr=share**rule.key_power)
            rows[key.rpartition(".")[0]] = table[name].shape[0]
        for value in projection.values:
            name = f"{projection.name}.{value}"
            # The rule is for tokens: a bank's router and balance have a row for each candidate instead.
            if table[name].shape[0] == rows.get(value.rpartition(".")[0]):
                found[name] = Factors(lr=of_values, weight_decay=1 / of_values, initial=initial)
    return found


def _of_candidates(model: Model, optimizer: Optimizer) -> dict[str, float]:
    """Factors of the rates of all parameters of banks, by name."""
    of_tokens = _given(optimizer, "candidate_lr_factor")
    of_routers = of_tokens * _given(optimizer, "router_lr_factor")
    return {
        f"{projection.name}.{name}": of_routers if name in ("bank.router", "bank.balance") else of_tokens
        for projection in projections(model).values()
        for name in (*projection.keys, *projection.values)
        if name.startswith("bank.")
    }


def _given(optimizer: Optimizer, key: str) -> float:
    """The factor that the section gives, or that of its type of optimizer."""
    given = getattr(optimizer, key)
    return getattr(rule_of(optimizer), key) if given is None else given


def _candidates_in_words(model: Model, optimizer: Optimizer) -> Iterator[str]:
    if not _of_candidates(model, optimizer):
        for key in OF_CANDIDATES:
            if (given := getattr(optimizer, key)) not in (None, 1):
                yield f"{key} {given:.3g} has no effect, the model has no candidates"
        return
    tokens, routers = (_given(optimizer, key) for key in OF_CANDIDATES)
    if tokens != 1:
        yield f"candidates {tokens:.3g}"
    if routers != 1:
        yield f"their routers {tokens * routers:.3g}"


def in_words(model: Model, optimizer: Optimizer) -> str:
    """The factors of learning rates as text: "qkv 0.5 keys, 0.25 values; ...; layers 0.0625 to 0.5"; "" without any."""
    found = _by_rule(model, optimizer)
    by_kind: dict[str, str] = {}
    for projection in projections(model).values() if found else ():
        key, value = (found[f"{projection.name}.{names[0]}"].lr for names in (projection.keys, projection.values))
        by_kind[projection.kind] = f"{projection.kind} {key:.3g} keys, {value:.3g} values"
    words = list(by_kind.values())
    words += _candidates_in_words(model, optimizer)
    if (decay := optimizer.layer_decay) != 1:
        words.append(f"layers {decay**model.num_layers:.3g} to {decay:.3g}")
    return "; ".join(words)
