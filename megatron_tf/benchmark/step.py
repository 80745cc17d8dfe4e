"""A whole training step of a configuration, compared with the same model in other forms and a Transformer of its size.

Forward, backward, clipping and AdamW with fp32 master weights, in torch alone. The other forms are the Gram form, the
same with products in 8 bits where a GPU has them, the plain formula, a GELU MLP's, and nothing but the products of a
Pattention, which is the floor. All of these train the same weights. A model with candidates is compared with one whose
positions use as many tokens, without candidates. The Transformer has as many parameters as the model, or as that one,
and as many layers, and is wider. MFU is against a product of two square matrices, measured in the same rounds;
floating-point operations count as in training, attention in full.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_tf.benchmark.models import equal_transformer, in_form, of_the_same_weights, without_candidates
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import Call, interleaved
from megatron_tf.caches import prepare_compiler
from megatron_tf.config.sections.model import Model
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.engine.device import has_fp8
from megatron_tf.errors import ConfigError
from megatron_tf.model import TokenFormer, build_model
from megatron_tf.model.context import BlockContext
from megatron_tf.model.layers import Block
from megatron_tf.model.products import multiply
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.section import vocab_size_of

SQUARE = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is the machine's rate
_STATE_BYTES = 20  # of a parameter: weight and gradient in the compute type, fp32 gradient, master weight and moments
_GIB = 2**30


@dataclass(frozen=True)
class StepOptions:
    """The settings of a measurement. `layers` None: all.  `compile`: the blocks, except those of the plain formula.

    `forms`: of a model without candidates, besides its own, by name. "fp8" is left out unless a GPU has it, in bf16.
    """

    device: torch.device
    dtype: torch.dtype
    samples: int  # a step
    layers: int | None
    compile: bool
    rounds: int
    forms: Sequence[str] = ("gram", "fp8", "plain", "mlp", "products")


class TrainingStep:
    """One optimizer step on one batch of random tokens: what `training.loop` has an engine do, without an engine."""

    def __init__(self, model: TokenFormer, samples: int, device: torch.device, dtype: torch.dtype):
        self._model = model.to(device)
        self._weights: list[Tensor] = list(self._model.parameters())
        self._masters = self._weights
        if dtype is not torch.float32:
            self._masters = [nn.Parameter(weight.detach().clone()) for weight in self._weights]
            self._model.to(dtype)
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        shape = 2, samples, model.config.seq_length
        self._ids, self._labels = torch.randint(0, vocab_size_of(model.config), shape).to(device)

    def of(self, model: TokenFormer) -> TrainingStep:
        """A step with the same weights, optimizer and batch in `model`, which computes them in another way."""
        other = copy(self)
        other._model = model
        return other

    def __call__(self) -> Tensor:
        """The loss, on the device."""
        # candidates have an auxiliary loss, which keeps them balanced
        logits = self._model(self._ids, context=BlockContext(loss_weight=1.0)).transpose(0, 1)
        loss = cross_entropy(logits, self._labels.mT, 0, SINGLE).mean()
        loss.backward()
        if self._masters is not self._weights:
            for master, weight in zip(self._masters, self._weights):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        return loss.detach()


def rows(models: Mapping[str, Model], options: StepOptions) -> Iterator[Row]:
    """One row for each of `models`, by the name of its configuration. ConfigError, first of all, for what does not
    fit."""
    chosen = {name: _compared(model, options.layers) for name, model in models.items()}
    problems = [problem for name, own in chosen.items() for problem in _memory_problems(name, own.values(), options)]
    if problems:
        raise ConfigError(problems)
    for name, compared in chosen.items():
        # Otherwise the compiler would treat the next configuration's sizes as dynamic, unlike in a training run.
        torch.compiler.reset()
        yield _measure(name, models[name], compared, options)


def _compared(model: Model, layers: int | None) -> dict[str, Model]:
    """The models of different weights, cut to `layers` layers: "tokenformer", that without candidates as "dense" if it
    has some, and the "transformer" of equal size.

    The vocabulary is cut in proportion, so that embedding and head keep their share of parameters and time.
    """
    depth = min(layers or model.num_layers, model.num_layers)
    sizes = {"num_layers": depth, "vocab_size": math.ceil(vocab_size_of(model) * depth / model.num_layers)}
    dense = without_candidates(model)
    models = {"tokenformer": model, "dense": dense, "transformer": equal_transformer(dense)}
    return {name: own.model_copy(update=sizes) for name, own in models.items() if name != "dense" or own is not model}


def _measure(name: str, whole: Model, models: Mapping[str, Model], options: StepOptions) -> Row:
    model, transformer = models["tokenformer"], models["transformer"]
    tokens = options.samples * model.seq_length

    def step(of: Model) -> tuple[TokenFormer, TrainingStep]:
        torch.manual_seed(0)
        built = build_model(of)
        return built, TrainingStep(built, options.samples, options.device, options.dtype)

    def compiled(model: TokenFormer) -> TokenFormer:
        if options.compile:
            prepare_compiler()
            for block in model.blocks:
                assert isinstance(block, Block)
                block.compile_for(options.device.type, options.dtype)
        return model

    built = {name: step(of) for name, of in models.items()}
    ours, our_step = built["tokenformer"]
    wanted = [] if "dense" in models else _forms(options)
    forms = {name: in_form(of_the_same_weights(ours), name) for name in wanted}
    product, product_flops = square_product(options.device, options.dtype)
    calls: dict[str, Call] = {
        "tokenformer": our_step,
        **{name: our_step.of(form if name == "plain" else compiled(form)) for name, form in forms.items()},
        **{name: own_step for name, (_, own_step) in built.items()},
        "product": product,
    }
    for own_model, _ in built.values():
        compiled(own_model)
    timings = interleaved(calls, options.device, options.rounds)
    own, theirs = timings["tokenformer"], timings["transformer"]
    speeds = {name: tokens / timing.median for name, timing in timings.items() if name != "product"}
    work = {"mfu": (own, model), "mfu transformer": (theirs, transformer)}
    against = {
        f"× {name}" if name != "products" else "of floor": timing
        for name, timing in timings.items()
        if name not in ("tokenformer", "product")
    }
    return {
        "config": name,
        "dtype": str(options.dtype).removeprefix("torch."),
        "layers": f"{model.num_layers} of {whole.num_layers}",
        "vocabulary": f"{vocab_size_of(model):,} of {vocab_size_of(whole):,}",
        "tokens/step": tokens,
        "parameters": num_parameters(model),
        "transformer's": num_parameters(transformer),
        **{f"tok/s {name}": speed for name, speed in speeds.items()},
        **{key: own.speed_against(timing) for key, timing in against.items()},
        **{
            key: timing.speed_against(timings["product"]) * tokens * flops_per_token(of) / product_flops
            for key, (timing, of) in work.items()
        },
        "GEMM TFLOP/s": product_flops / timings["product"].median / 1e12,
    }


def _forms(options: StepOptions) -> Sequence[str]:
    # a CPU emulates it, and training in fp8 computes all else in bf16
    has = options.device.type == "cuda" and has_fp8(options.device) and options.dtype is torch.bfloat16
    return [name for name in options.forms if name != "fp8" or has]


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[Call, int]:
    """A product of two square matrices, and its floating-point operations."""
    side = SQUARE[device.type]
    left, right = (torch.randn(side, side).to(device, dtype) for _ in range(2))

    @torch.no_grad()
    def product() -> Tensor:
        return multiply(left, right)

    return product, 2 * side**3


def _memory_problems(name: str, models: Collection[Model], options: StepOptions) -> Iterator[str]:
    """All models are in memory at once, because they take turns; those of the same weights have them once."""
    state = _STATE_BYTES * sum(map(num_parameters, models))
    if options.device.type == "cuda":
        available = torch.cuda.get_device_properties(options.device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if state > available:
        yield (
            f"{name}: weights, gradients and optimizer of the {len(models)} models take {state / _GIB:.0f} GiB, and "
            f"here are {available / _GIB:.0f} GiB. Give fewer --layers."
        )
