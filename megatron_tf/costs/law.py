"""A law of the loss by parameters and tokens, and the cost of growth that follows from it. Arithmetic, no torch.

    L(N, D) = E + A·N^−α + B·D^−β        N parameters, D tokens, for models trained from scratch with a decay

Growth has D₁ tokens of a smaller model (c_s floating-point operations each) and D₂ of the larger one (c_l). κ is
defined by D_scr = D₂ + κ·D₁: the larger model from scratch needs D_scr tokens for the same loss. With φ = D₂ / D_scr,
growth costs

    R = (c_s·D₁ + c_l·D₂) / (c_l·D_scr) = φ + (1 − φ)·(c_s/c_l)/κ

of what the larger model costs from scratch: less than 1 exactly when κ > c_s/c_l.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from megatron_tf.errors import NOT_AS_WRITTEN, ConfigError
from megatron_tf.text_files import read_text_file

RESULTS = "results.json"

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = tuple[NotNegative, NotNegative]
# Least and greatest κ in studies that compared growth fairly with training from scratch. Used where κ was not measured.
ASSUMED_KAPPA: Range = (0.3, 0.7)


def cost_ratio(share: float, token_cost: float, kappa: float) -> float:
    """R. `share`: φ.  `token_cost`: c_s/c_l.  Infinite for κ ≤ 0: the tokens before the growth were worth nothing."""
    if kappa <= 0:
        return math.inf
    return share + (1 - share) * token_cost / kappa


@dataclass(frozen=True)
class Law:
    """A fitted law L(N, D), in nats a token; see the module for `E`, `A`, `alpha`, `B` and `beta`.

    `points`: number of runs that it was fitted to.  `parameters`, `tokens`, `flops`: their least and greatest values.
    `residual`: the largest difference between a run's loss and the law.
    """

    E: NotNegative
    A: AboveZero
    alpha: AboveZero
    B: AboveZero
    beta: AboveZero
    points: Annotated[int, Field(ge=0, lt=2**60)] = 0
    residual: NotNegative = 0.0
    parameters: Range = (0.0, 0.0)
    tokens: Range = (0.0, 0.0)
    flops: Range = (0.0, 0.0)

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def tokens_for(self, parameters: float, loss: float) -> float | None:
        """Tokens that a model of so many parameters needs to reach `loss`; None when it never does."""
        left = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else None

    def ceiling(self) -> float:
        """The least cost of growth, as a share of the best static size's cost, if a grown model learns only as fast as
        a model from scratch of the same loss. A token costs 6·N FLOPs.

        The cheapest growth has at every instant the size at which a FLOP lowers the loss most. There the share of
        A·N^−α in L − E is 1/(1 + q) with q = α(1 + β)/β; for the best static size the share is β/(α + β).
        """
        a, b = self.alpha, self.beta
        q = a * (1 + b) / b
        grown = (1 + q) ** (1 / a) * (1 + 1 / q) ** (1 + 1 / b) / (1 + b / a)
        return grown / (((a + b) / b) ** (1 / a) * ((a + b) / a) ** (1 / b))

    def in_words(self) -> str:
        sizes, tokens, flops = (f"{low:.3g} to {high:.3g}" for low, high in (self.parameters, self.tokens, self.flops))
        return (
            f"L = {self.E:.3g} + {self.A:.3g}·N^-{self.alpha:.3g} + {self.B:.3g}·D^-{self.beta:.3g}, fitted to "
            f"{self.points} runs of {sizes} parameters, {tokens} tokens, {flops} FLOPs; largest residual "
            f"{self.residual:.3g}"
        )


_LAW = TypeAdapter(Law)


@dataclass(frozen=True)
class Findings:
    """Results of a study for one architecture.

    `law`: None when none could be fitted; `why_no_law` then says why.  `kappa`: least and greatest over the grown arms;
    None when no arm measured it.  `source`: path of the results.
    """

    source: str
    law: Law | None
    why_no_law: str
    kappa: Range | None


def read_findings(path: str | os.PathLike[str], architecture: str) -> Findings:
    """Reads the results.json of `megatron_tf study report`; `path` is that file or its folder.

    ConfigError when it cannot be read or is not the results of a study.
    """
    path = os.path.join(path, RESULTS) if os.path.isdir(path) else os.fspath(path)
    remedy = f"Give the {RESULTS} in the folder of a study: megatron_tf study report FILE writes it."
    text = read_text_file(ConfigError, path, remedy)
    try:
        values = json.loads(text)
        found = values["laws"].get(architecture, {"missing": f"no run of the study is of a {architecture}"})
        law = None if "missing" in found else law_of(found)
        worth = [arm["growth"]["kappa"] for arm in values["arms"] if arm["growth"] and arm["growth"]["kappa"]]
        known = [kappa["mean"] for kappa in worth if kappa["bound"] is None and kappa["mean"] is not None]
        measured = [float(kappa) for kappa in known if math.isfinite(kappa)]
    except NOT_AS_WRITTEN:
        raise ConfigError(
            f"{path}: is not the {RESULTS} of a study. Write it anew: megatron_tf study report FILE."
        ) from None
    return Findings(path, law, found.get("missing", ""), (min(measured), max(measured)) if measured else None)


def law_of(values: Mapping[str, Any]) -> Law:
    """The law from its values in results.json. ValueError for other values than expected."""
    return _LAW.validate_python(values)
