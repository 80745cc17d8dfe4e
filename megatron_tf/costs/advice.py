"""When to grow, and to which size, for a budget of FLOPs: predicted from a law of the loss and κ. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.estimate import chooses, flops_per_token, num_parameters
from megatron_tf.costs.law import Findings, Law, Range, cost_ratio

# The fewest tokens of a grown model for which κ is assumed to hold, as a share of the tokens from scratch. The decay of
# a schedule alone is a fifth.
LEAST_SHARE = 0.2


@dataclass(frozen=True)
class Size:
    """A model: its name, its number of parameters, and its FLOPs for each trained token."""

    name: str
    parameters: int
    token_flops: float


@dataclass(frozen=True)
class Step:
    """One growth from the size `small` to the size `large` that spends the whole budget.

    `before`, `after`: tokens trained before and after the growth.  `kappa_of_loss`: the κ that would hold if the grown
    model learned only as fast as a model from scratch of the same loss.  `loss`: at the end, in nats a token.
    `against_static`: FLOPs until it has the loss of the best static size, divided by the budget; None when it never has
    that loss.
    """

    small: str
    large: str
    kappa: float
    before: float
    after: float
    kappa_of_loss: float
    loss: float
    against_static: float | None


@dataclass(frozen=True)
class Static:
    """A size trained from scratch: its tokens, and its loss at the end."""

    name: str
    tokens: float
    loss: float


def best_static(law: Law, sizes: Sequence[Size], budget: float) -> Static:
    """The size that ends with the lowest loss when it is trained from scratch for `budget` FLOPs."""
    found = [
        Static(size.name, budget / size.token_flops, law.loss(size.parameters, budget / size.token_flops))
        for size in sizes
    ]
    return min(found, key=lambda static: static.loss)


def best_step(law: Law, sizes: Sequence[Size], budget: float, kappa: float, least_share: float) -> Step | None:
    """The growth that ends with the lowest loss; None when none costs less than its larger size from scratch.

    `sizes`: from small to large.  `budget`: FLOPs.  `least_share`: the least φ (see `law`) at which κ holds.

    A FLOP before the growth is worth κ/c_s tokens of the large model, however many there are. So the best growth is the
    latest one that `least_share` allows.
    """
    static = best_static(law, sizes, budget)
    found = []
    for number, small in enumerate(sizes):
        for large in sizes[number + 1 :]:
            ratio = cost_ratio(least_share, small.token_flops / large.token_flops, kappa)
            if ratio >= 1:
                continue
            worth = budget / (large.token_flops * ratio)
            needed = law.tokens_for(large.parameters, static.loss)
            before = (1 - least_share) * worth / kappa
            alike = law.tokens_for(large.parameters, law.loss(small.parameters, before))
            found.append(
                Step(
                    small.name,
                    large.name,
                    kappa,
                    before,
                    least_share * worth,
                    0.0 if alike is None else alike / before,
                    law.loss(large.parameters, worth),
                    None if needed is None else needed / worth,
                )
            )
    return min(found, key=lambda step: step.loss) if found else None


def advise(configs: Sequence[RunConfig], findings: Findings, kappa: Range, budget: float) -> dict[str, Any]:
    """The best static size and the best growths among the sizes of a chain, for `budget` FLOPs.

    Keys: source, budget, least_share, law (in words), why_no_law. Without a law, `law` is None, `why_no_law` says why,
    and there are no other keys. With one also: kappa (its least and greatest value), ceiling (see `Law.ceiling`),
    static, steps (the best growth for each kappa; None where growth costs more), beyond (sentences, with both numbers,
    about values outside the range of the law's runs).
    """
    found: dict[str, Any] = {"source": findings.source, "budget": budget, "least_share": LEAST_SHARE, "law": None}
    law, models = findings.law, [config.model for config in configs]
    with_candidates = [config.run.name for config in configs if chooses(config.model)]
    if law is None or with_candidates:
        names = ", ".join(with_candidates)
        reason = f"the law is of models whose positions use all tokens, and those of {names} choose"
        return {**found, "why_no_law": reason if with_candidates else findings.why_no_law}
    sizes = [
        Size(config.run.name, num_parameters(model), float(flops_per_token(model)))
        for config, model in zip(configs, models)
    ]
    worths = list(dict.fromkeys(kappa))
    static = best_static(law, sizes, budget)
    steps = [best_step(law, sizes, budget, worth, LEAST_SHARE) for worth in worths]
    return {
        **found,
        "law": law.in_words(),
        "why_no_law": "",
        "kappa": worths,
        "ceiling": law.ceiling(),
        "static": asdict(static),
        "steps": [None if step is None else asdict(step) for step in steps],
        "beyond": list(_beyond(law, sizes, budget, static, [step for step in steps if step is not None])),
    }


def _beyond(law: Law, sizes: Sequence[Size], budget: float, static: Static, steps: Sequence[Step]) -> Iterator[str]:
    tokens = {f"{static.name} from scratch": static.tokens}
    for step in steps:
        tokens[f"{step.small} before it grows (κ {step.kappa:.2g})"] = step.before
        tokens[f"{step.large}, as if from scratch (κ {step.kappa:.2g})"] = step.after + step.kappa * step.before
    told: list[tuple[str, Mapping[str, float], Range]] = [
        ("parameters", {size.name: size.parameters for size in sizes}, law.parameters),
        ("tokens", tokens, law.tokens),
        ("FLOPs", {"the budget": budget}, law.flops),
    ]
    for what, values, (least, most) in told:
        outside = [f"{name} {value:.3g}" for name, value in values.items() if not least <= value <= most]
        if outside:
            yield f"{what}: {', '.join(outside)}, and the law's runs have {least:.3g} to {most:.3g}"
