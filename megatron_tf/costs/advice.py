"""When to grow, and by how much, for a budget: what a law of the loss and κ say of the sizes of a chain. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.estimate import chooses, flops_per_token, num_parameters
from megatron_tf.costs.law import Findings, Law, Range, cost_ratio

# Tokens that a grown model needs at least before κ holds, as a share of those from scratch. An assumption: the decay of
# a schedule alone is a fifth.
LEAST_SHARE = 0.2


@dataclass(frozen=True)
class Size:
    """A model: its name, parameters, and floating-point operations a trained token."""

    name: str
    parameters: int
    token_flops: float


@dataclass(frozen=True)
class Step:
    """A growth of one size to another, once, that spends a budget.

    `before`, `after`: tokens of either.  `kappa_of_loss`: what κ is if the grown model goes on from the loss that it
    has, at the speed of one from scratch at that loss, and no better.  `loss`: at the end.  `against_static`: FLOPs
    that it takes to the loss of the best static size, over the budget; None when it does not get there.
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

    `sizes`: from small to large.  `least_share`: the least φ at which κ holds: tokens that the grown model needs, as a
    share of those from scratch. What a token before the growth is worth, κ/c_s a FLOP, does not depend on how many
    there are, so the best growth is as late as that allows.
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
    """For the sizes of a chain. Keys: law (in words; None with the reason in why_no_law), source, budget, least_share,
    ceiling, static, steps (the best growth at the least and at the greatest κ, None where growth costs more), beyond
    (sentences on what is outside of the law's runs, with both numbers)."""
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
