"""Training of adapters with equal numbers of parameters on a frozen Llama: speed, and bytes kept for the backward pass.

LoRA is PEFT's, on all linear layers. The others have as many trained parameters, up to one token. "soft mixture" is the
adapter that ScalarLM calls Tokenformer, by its formula: a mixture of four LoRA matrices for each position, at the MLPs.
Kept bytes are counted and exact; times are medians of interleaved rounds. Weights are random: losses are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.adapters.loading import random_llama, require_peft
from megatron_tf.adapters.modules import ATTENTION, LINEAR, MLP, PATTENTION, Place, select
from megatron_tf.benchmark.counting import saved_bytes
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import interleaved
from megatron_tf.errors import ArgumentError

VOCABULARY = 4096
_HEADS = 4  # of the soft mixture, and of its mixtures
_BASE, _LORA = "none", "LoRA"
LORA, MIXTURE, APPENDED = "lora", "mixture", "appended"
# name on a command line -> in tables
FORMS: Mapping[str, str] = {
    LORA: _LORA,
    "modules": "Pattention, attention and MLPs",
    "mlp": "Pattention, MLPs",
    "linear": "Pattention, linear layers",
    MIXTURE: "soft mixture, MLPs",
    APPENDED: "Pattention, appended tokens",
}
_PLACES: Mapping[str, Sequence[str]] = {
    "modules": (ATTENTION, MLP), "mlp": (MLP,), "linear": (LINEAR,), APPENDED: (PATTENTION,),
}  # fmt: skip


class SoftMixture(nn.Module):
    """Σ over heads of softmax(x_h k_hᵀ/√(d/H)) v_h is a matrix M(x) [d, r] for each position; the output is (x M(x))
    p."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.rank = rank
        self.keys = nn.Parameter(torch.randn(_HEADS, width) * 3 / (width / _HEADS) ** 0.5)
        self.values = nn.Parameter((2 * torch.rand(_HEADS, width * rank) - 1) * 3 / width**0.5)
        self.output = nn.Parameter(torch.zeros(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        query = x.reshape(-1, _HEADS, width // _HEADS).transpose(0, 1)
        keys = self.keys.view(_HEADS, _HEADS, -1).transpose(0, 1)
        values = self.values.view(_HEADS, _HEADS, -1).transpose(0, 1)
        mixed = F.scaled_dot_product_attention(query, keys, values)
        matrices = mixed.transpose(0, 1).reshape(-1, width, self.rank)
        return (x.reshape(-1, 1, width) @ matrices @ self.output).view(x.shape)


def rows(
    device: torch.device, layers: int, width: int, samples: int, positions: int, rank: int, rounds: int
) -> Iterator[Row]:
    """One row for each adapter, the frozen base without any and LoRA first; fp32."""
    ids = torch.randint(VOCABULARY, (samples, positions), generator=torch.Generator().manual_seed(0)).to(device)
    forms = [form for form in FORMS if form != APPENDED]
    yield from rows_on(partial(random_llama, layers, width, VOCABULARY), ids, rank, forms, rounds)


def forms_of(base: Any) -> tuple[str, ...]:
    """Names of the FORMS that a base can have."""
    try:
        select(base, _PLACES[APPENDED])
    except ArgumentError:
        return tuple(form for form in FORMS if form != APPENDED)
    return tuple(FORMS)


def rows_on(base: Callable[[], Any], ids: Tensor, rank: int, forms: Collection[str], rounds: int) -> Iterator[Row]:
    """As `rows`, of `forms`, names of FORMS with LoRA among them, on models that `base` makes; `ids` [b, s] are on the
    device."""
    require_peft()
    device = ids.device
    models = {_BASE: _without_adapter(base().to(device))}
    models |= {FORMS[form]: with_adapter(base().to(device), form, rank) for form in forms}
    kept = {name: saved_bytes(partial(_loss, model, ids)) for name, model in models.items()}
    trained = interleaved({name: partial(_step, model, ids) for name, model in models.items()}, device, rounds)
    forward = interleaved({name: partial(_forward, model, ids) for name, model in models.items()}, device, rounds)
    single = interleaved(
        {name: partial(_forward, model, ids[:1, :1]) for name, model in models.items()}, device, rounds
    )
    for name, model in models.items():
        yield {
            "adapter": name,
            "parameters": sum(parameter.numel() for parameter in trained_parameters(model)),
            "kept MiB": kept[name] / 2**20,
            "above base MiB": (kept[name] - kept[_BASE]) / 2**20,
            "of LoRA's": (kept[name] - kept[_BASE]) / (kept[_LORA] - kept[_BASE]),
            "step ms": 1e3 * trained[name].median,
            "training × LoRA": trained[name].speed_against(trained[_LORA]),
            "forward × base": forward[name].speed_against(forward[_BASE]),
            "one token × base": single[name].speed_against(single[_BASE]),
        }


def with_adapter(base: Any, form: str, rank: int) -> Any:
    """`base` with an adapter that has as many parameters as LoRA of `rank` on all linear layers, up to one token.
    `form`: a name of FORMS."""
    budget = rank * sum(place.d_in + place.d_out for place in select(base, (LINEAR,)))
    if form == LORA:
        return _with_lora(base, rank)
    if form == MIXTURE:
        return _with_mixtures(base, budget).to(base.device)
    return _with_tokens(base, _PLACES[form], budget)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _with_lora(base: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = sorted(place.name for place in select(base, (LINEAR,)))
    return get_peft_model(base, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))


def add_lora(model: Any, rank: int) -> None:
    """Adds a second LoRA to a model with a first one, which is frozen; both are active."""
    from peft import LoraConfig

    first = model.peft_config["default"]
    model.add_adapter("second", LoraConfig(r=rank, target_modules=first.target_modules, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)


def _without_adapter(plain: Any) -> Any:
    """The base with gradients back to the first MLP's output, which is the least that any adapter here needs."""
    plain.requires_grad_(False)
    first = select(plain, (MLP,))[0]
    plain.get_submodule(first.name).register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return plain


def _with_tokens(base: Any, kinds: Sequence[str], budget: int) -> Any:
    from megatron_tf.adapters.tuner import with_new_adapter

    per_token = sum(place.d_in + place.d_out for place in select(base, kinds))
    return with_new_adapter(base, max(1, round(budget / per_token)), kinds)


def _with_mixtures(base: Any, budget: int) -> Any:
    base.requires_grad_(False)
    places = select(base, (MLP,))
    width = places[0].d_in
    rank = max(1, round((budget / len(places) / width - _HEADS) / (_HEADS + 1)))
    for place in places:
        _add_mixture(base, place, SoftMixture(width, rank))
    return base


def _add_mixture(base: Any, place: Place, mixture: SoftMixture) -> None:
    module = base.get_submodule(place.name)
    module.add_module("soft_mixture", mixture)
    module.register_forward_hook(lambda module, inputs, output: output + mixture(inputs[0]))


def _loss(model: Callable[..., Any], ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _step(model: Any, ids: Tensor) -> None:
    model.zero_grad()
    _loss(model, ids).backward()


@torch.no_grad()
def _forward(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)
