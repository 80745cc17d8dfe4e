"""The facts about an activation that configuration, costs, growth and formats need. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_tf.architectures.work import Passes


@dataclass(frozen=True, kw_only=True, eq=False)
class Activation:
    """Facts about θ, without torch. In each row, A are the scores, r is a statistic over all tokens, S = θ(A, r, τ).

    `function`: "module:class" of the `ScoreFunction` that computes it from the scores. Further implementations of the
        same θ have a field of their own, and `model.pattention.partial_pattention` chooses between them.
    `default_scale`: number of tokens -> τ of a projection that was never grown.
    `passes`: how often elementwise kernels read or write a score when PyTorch runs `function` operator by operator.
    `compiled_passes`: the same when torch.compile fuses everything between two reductions or products into one kernel.
    `kernel_passes`: the same with kernels written for it (`model.kernels`), on GPUs. None: there are none.
    `gram_saves`: the passes saved when r = ‖A‖₂ is found from KᵀK instead of the scores (`model.gram`). T of the
        `ScoreFunction` must then be ΣD∘A. None: the activation has no such form.
    `reductions`: successive all-reduces in which the tensor ranks find r in the forward pass.
    `formats`: the foreign formats whose code computes it, of "official" and "huggingface".
    `ignores_zero`: a score of 0 has the weight 0 and does not change r. Then tokens with zero keys change nothing.
    `scales_normed_scores`: r is ‖A‖₂, and S is a function of τA/r. Then r² = x KᵀK xᵀ, and new keys can compensate a
        change of τ.
    `proportional_to_scale`: S is proportional to τ. Then other values can compensate a change of τ.
    `refusals`: growth method -> the reason, as a clause, why it cannot keep the function.
    """

    function: str
    default_scale: Callable[[int], float]
    passes: Passes
    compiled_passes: Passes = Passes(3, 8)
    kernel_passes: Passes | None = None
    gram_saves: Passes | None = None
    reductions: int = 1
    formats: frozenset[str] = frozenset()
    ignores_zero: bool = False
    scales_normed_scores: bool = False
    proportional_to_scale: bool = False
    refusals: Mapping[str, str] = field(default_factory=dict)
