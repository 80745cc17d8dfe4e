"""What growth costs by κ and by a law, against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_tf.config.stages import load_stages
from megatron_tf.costs.advice import LEAST_SHARE, Size, advise, best_static, best_step
from megatron_tf.costs.law import Findings, Law, cost_ratio, read_findings
from megatron_tf.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28, 40, 0.01, (1e6, 1e9), (1e8, 1e10), (1e15, 1e20))


def test_growth_pays_exactly_above_the_relative_cost_of_a_token():
    assert cost_ratio(0.1, 0.1, 0.43) == pytest.approx(0.309, abs=1e-3)
    for share in (0.1, 0.5, 0.9):
        assert cost_ratio(share, 0.4, 0.4) == pytest.approx(1.0)
        assert cost_ratio(share, 0.4, 0.5) < 1 < cost_ratio(share, 0.4, 0.3)
    # as it is defined: c_s = 2, c_l = 5, D₁ = 30, D₂ = 10, κ = 0.5
    assert cost_ratio(10 / 25, 2 / 5, 0.5) == pytest.approx((2 * 30 + 5 * 10) / (5 * 25))


def test_growth_at_every_instant_to_the_best_size():
    """That only goes on from its loss: 0.946 of the best static size by Chinchilla's law, also when it is followed
    step by step."""
    assert CHINCHILLA.ceiling() == pytest.approx(0.946, abs=5e-4)
    assert stepwise(CHINCHILLA) == pytest.approx(CHINCHILLA.ceiling(), rel=1e-3)
    assert stepwise(Law(0.0, 3.0, 0.5, 7.0, 0.4)) == pytest.approx(Law(0, 1, 0.5, 1, 0.4).ceiling(), rel=1e-3)


def stepwise(law, final=0.3, most=1e6, steps=20_000):
    """FLOPs of growth over those of the best static size, to a loss of E + `final`."""
    spent, falls = 0.0, math.log(most / final) / steps
    q = law.alpha * (1 + law.beta) / law.beta
    for step in range(steps):
        left = most * math.exp(-falls * (step + 0.5))
        size = (law.A * (1 + q) / left) ** (1 / law.alpha)
        of_tokens = left * q / (1 + q)
        tokens_a_loss = law.B ** (1 / law.beta) / law.beta * of_tokens ** (-1 / law.beta - 1)
        spent += 6 * size * tokens_a_loss * left * falls
    sizes = [10 ** (number / 500) for number in range(0, 12_000)]
    static = min(6 * size * tokens for size in sizes if (tokens := law.tokens_for(size, law.E + final)) is not None)
    return spent / static


def test_tokens_for_is_the_law_the_other_way_round():
    assert CHINCHILLA.tokens_for(1e8, CHINCHILLA.loss(1e8, 3e9)) == pytest.approx(3e9)
    assert CHINCHILLA.tokens_for(1e8, CHINCHILLA.E) is None


SIZES = [Size("small", 10**7, 6e7), Size("middle", 4 * 10**7, 2.4e8), Size("large", 16 * 10**7, 9.6e8)]


def test_the_best_size_for_a_budget():
    assert best_static(CHINCHILLA, SIZES, 1e16).name == "small"
    late = best_static(CHINCHILLA, SIZES, 1e20)
    assert late.name == "large" and late.tokens == pytest.approx(1e20 / 9.6e8)
    assert late.loss == CHINCHILLA.loss(16e7, late.tokens)


def test_the_best_growth_spends_the_budget_and_is_what_it_costs():
    step = best_step(CHINCHILLA, SIZES, 1e19, 0.7, 0.2)
    by_name = {size.name: size for size in SIZES}
    small, large = by_name[step.small], by_name[step.large]
    assert step.before * small.token_flops + step.after * large.token_flops == pytest.approx(1e19)
    scratch = step.after + 0.7 * step.before
    assert step.after / scratch == pytest.approx(0.2) and step.loss == CHINCHILLA.loss(large.parameters, scratch)
    there = CHINCHILLA.loss(small.parameters, step.before)
    assert CHINCHILLA.loss(large.parameters, step.kappa_of_loss * step.before) == pytest.approx(there)
    static = best_static(CHINCHILLA, SIZES, 1e19)
    assert (step.against_static < 1) == (step.loss < static.loss)
    # spending that share alone ends at the loss of the static size
    less = best_step(CHINCHILLA, [small, large], 1e19 * step.against_static, 0.7, 0.2)
    assert less.loss == pytest.approx(static.loss)
    assert best_step(CHINCHILLA, SIZES, 1e19, 0.05, 0.2) is None


def test_advice_for_a_chain():
    configs = load_stages(CONFIGS / "chain_124M_to_1.4B.yml")
    found = advise(configs, Findings("results.json", CHINCHILLA, "", None), (0.01, 0.7), 1e21)
    assert found["steps"][0] is None and found["steps"][1]["kappa"] == 0.7
    assert found["beyond"][0] == "parameters: chain-1.4B 1.31e+09, and the law's runs have 1e+06 to 1e+09"
    tokens, flops = found["beyond"][1:]
    assert tokens.startswith("tokens: chain-") and tokens.endswith("and the law's runs have 1e+08 to 1e+10")
    assert flops == "FLOPs: the budget 1e+21, and the law's runs have 1e+15 to 1e+20"
    assert found["ceiling"] == pytest.approx(0.946, abs=5e-4)
    assert found["static"]["name"] in {config.run.name for config in configs} and found["least_share"] == LEAST_SHARE
    assert "fitted to 40 runs of 1e+06 to 1e+09 parameters" in found["law"]


def test_within_the_runs_of_a_law_nothing_is_extrapolated():
    configs = load_stages(CONFIGS / "chain_124M_to_1.4B.yml")[:2]
    wide = Law(1.69, 406.4, 0.34, 410.7, 0.28, 40, 0.01, (1e6, 1e10), (1e6, 1e13), (1e15, 1e23))
    assert advise(configs, Findings("x", wide, "", None), (0.5, 0.9), 1e21)["beyond"] == []


def test_growth_that_was_worth_less_than_nothing():
    """A κ that an arm which lost has measured below 0: never a growth, and no cost below that of its own tokens."""
    assert cost_ratio(0.2, 0.4, -0.3) == cost_ratio(0.2, 0.4, 0.0) == math.inf
    assert best_step(CHINCHILLA, SIZES, 1e19, -0.3, 0.2) is None
    configs = load_stages(CONFIGS / "chain_124M_to_1.4B.yml")
    found = advise(configs, Findings("x", CHINCHILLA, "", None), (-0.3, 0.0), 1e19)
    assert found["steps"] == [None, None]


def test_a_law_of_other_models_says_nothing():
    sparse = load_stages(CONFIGS / "chain_sparse.yml")
    found = advise(sparse, Findings("x", CHINCHILLA, "", None), (0.3, 0.7), 1e21)
    assert found["law"] is None and "those of chain_sparse-" in found["why_no_law"]
    dense = load_stages(CONFIGS / "tiny_chain.yml")
    assert advise(dense, Findings("x", None, "too few", None), (0.3, 0.7), 1e21)["why_no_law"] == "too few"


def results(arms=(), **laws):
    return json.dumps({"laws": laws, "arms": [{"growth": growth} for growth in arms]})


def test_findings_are_read_from_a_report(tmp_path):
    law = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "points": 40, "residual": 0.01,
           "parameters": [1e6, 1e9], "tokens": [1e8, 1e10], "flops": [1e15, 1e20]}  # fmt: skip
    kappas = [
        {"mean": math.nan, "bound": None},
        {"mean": 0.4, "bound": None},
        {"mean": 0.6, "bound": None},
        {"mean": 0.9, "bound": "at least"},
        None,
    ]
    (tmp_path / "results.json").write_text(
        results([None, *({"kappa": kappa} for kappa in kappas)], tokenformer=law, transformer={"missing": "few runs"})
    )
    found = read_findings(tmp_path / "results.json", "tokenformer")
    assert (found.law, found.kappa, found.why_no_law) == (CHINCHILLA, (0.4, 0.6), "")
    assert read_findings(tmp_path / "results.json", "transformer").why_no_law == "few runs"
    assert read_findings(tmp_path / "results.json", "mlp").why_no_law == "no run of the study is of a mlp"


NO_NUMBERS = (
    '{"laws": {"tokenformer": {"E": NaN, "A": 1, "alpha": 1, "B": 1, "beta": 1, "points": 9, "residual": 0, '
    '"parameters": [1, 2], "tokens": [1, 2], "flops": [1, 2]}}, "arms": []}'
)


ENDLESS = NO_NUMBERS.replace("NaN", "1").replace('"points": 9', '"points": 1e999')
EMPTY_RANGE = NO_NUMBERS.replace("NaN", "1").replace('"tokens": [1, 2]', '"tokens": []')
BELOW_ZERO = NO_NUMBERS.replace("NaN", "1").replace('"B": 1', '"B": -1')
NO_FIELDS = '{"laws": {"tokenformer": {"E": 1}}, "arms": []}'


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", NO_NUMBERS, NO_FIELDS, ENDLESS, EMPTY_RANGE, BELOW_ZERO, "[" * 100_000],
    ids=lambda text: text[:30],
)
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match="results.json: is not the results.json of a study. Write it anew"):
        read_findings(tmp_path / "results.json", "tokenformer")
    with pytest.raises(ConfigError, match=r"none.json: .*Give the results.json in the folder of a study: mega"):
        read_findings(tmp_path / "none.json", "tokenformer")
    with pytest.raises(ConfigError, match="results.json: is not the results.json of a study"):
        read_findings(tmp_path, "tokenformer")
    (tmp_path / "results.json").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="results.json: byte 0 is not UTF-8 text"):
        read_findings(tmp_path, "tokenformer")
