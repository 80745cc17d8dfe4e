"""The plan of a run in words, printed before anything starts. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_tf.activations.forms import GPU
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.run_plan import BatchPlan, plan_batches, tokens_to_train, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import ParameterTokens
from megatron_tf.config.tasks import task_of
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import (
    flops_per_token,
    memory_per_rank,
    num_parameters,
    num_used_parameters,
    parameters_per_rank,
)
from megatron_tf.errors import ConfigError
from megatron_tf.state.lr_rule import in_words
from megatron_tf.state.parameters import projections
from megatron_tf.telemetry.text import count_of, of_which_used, size


def describe(
    config: RunConfig,
    world_size: int,
    batches: BatchPlan | None = None,
    step: int = 0,
    origin: str | None = None,
    device: str = GPU,
) -> str:
    """A text with one line each for model, layout, batch arithmetic, length, memory and so on, without a last newline.

    `config` has passed `validate` for `world_size`. `batches`: the plan of a run that has done `step` steps already.
    `device`: the type of device that the run uses.  `origin`: where its weights come from, as the end of a sentence;
        None: as the configuration says.
    """
    model, training = config.model, config.training
    topology, batches = topology_for(config, world_size), batches or plan_batches(config, world_size)
    memory = memory_per_rank(config, world_size)
    flops, count = flops_per_token(model), num_parameters(model)
    tokens = tokens_to_train(config) or batches.train_tokens
    sequence = ", sequence-parallel" if config.parallel.sequence else ""
    origin = _configured_origin(config) if origin is None else origin
    checkpointing = ", activation checkpointing" if training.activation_checkpointing else ""
    lines = {
        "run": f"{config.run.name} in {config.run.dir}, seed {config.run.seed}{origin}",
        "model": (
            f"{count:,} parameters{of_which_used(num_used_parameters(model), count)}: "
            f"{count_of(model.num_layers, 'layer')} × {model.hidden_size}, "
            f"{count_of(model.num_attention_heads, 'head')}, {architecture_of(model).describe(model)}, "
            f"{task_of(model).describe(model)}"
        ),
        "layout": (
            f"{count_of(world_size, 'rank')} as {topology}{sequence}, {_sharding(config)}, "
            f"{training.precision}{checkpointing}; "
            f"at most {parameters_per_rank(model, topology):,} parameters a rank"
        ),
        "step": (
            f"{count_of(batches.global_batch_size, 'sample')} = {batches.micro_batch_size} a micro batch "
            f"× {batches.num_micro_batches} accumulated × {batches.data_parallel} data-parallel; "
            f"× {batches.seq_length:,} = {batches.tokens_per_step:,} tokens"
        ),
        "length": (
            f"{count_of(batches.train_steps, 'step')}, "
            + (f"{max(0, batches.train_steps - step):,} of them left, " if step else "")
            + f"{tokens:,} tokens, {flops * tokens:.2e} FLOPs"
        ),
        "memory": (
            f"about {size(memory.total)} a rank: weights {size(memory.weights)}, gradients "
            f"{size(memory.gradients)}, optimizer {size(memory.optimizer)}, activations {size(memory.activations)}"
        ),
    }
    if rates := "; ".join(filter(None, [in_words(model, config.optimizer), *_rates_after_growth(config)])):
        lines["rates"] = f"× optimizer.lr: {rates}"
    if forms := architecture_of(model).norm_forms(config, device):
        lines["scores"] = _scores(config, world_size, forms)
    if training.precision == "fp8":
        lines["fp8"] = "experimental: products of Pattention, all else in bf16"
        if device != GPU:
            lines["fp8"] += "; this device has none, so factors are rounded and multiplied in fp32"
        elif not training.compile:
            lines["fp8"] += "; slower than bf16 unless training.compile is true"
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())


def _rates_after_growth(config: RunConfig) -> Iterator[str]:
    """The `lr_multipliers` that are not 1, and where one has no effect."""
    if config.growth is None:
        return
    rates = config.growth.lr_multipliers
    for key in ("old_tokens", "new_tokens", "new_layers", "other"):
        if (factor := getattr(rates, key)) != 1:
            falling = key == "new_tokens" and rates.new_tokens_decay_steps
            way = f" at first, 1 after {count_of(falling, 'step')}" if falling else ""
            yield f"{key.replace('_', ' ')} {factor:.3g}{way}"
    split = {own.kind for own in projections(config.model).values() if all(key.startswith("bank.") for key in own.keys)}
    if rates.old_tokens != 1 and split:
        names = " and ".join(sorted(split))
        yield f"growth.lr_multipliers.old_tokens has no effect on {names}, whose candidates all count as new"


def _scores(config: RunConfig, world_size: int, forms: Mapping[str, str]) -> str:
    """What the norms of scores are computed from, and the activations with the other value of training.scores, if the
    model can have it.

    `forms`: kind of projection -> "direct" or "gram".
    """
    kinds = {form: ", ".join(kind for kind in forms if forms[kind] == form) for form in ("direct", "gram")}
    sources = {"direct": "the scores", "gram": "KᵀK"}
    norms = "; ".join(f"norms of {names} from {sources[form]}" for form, names in kinds.items() if names)
    scores = config.training.scores
    other = "recompute" if scores == "keep" else "keep"
    with_other = config.training.model_copy(update={"scores": other})
    changed = config.model_copy(update={"training": with_other})
    try:
        validate(changed, world_size)
    except ConfigError:
        return f"{norms}; training.scores {scores}"
    there = memory_per_rank(changed, world_size).activations
    return f"{norms}; training.scores {scores}, with {other} activations would be {size(there)}"


def room_warning(config: RunConfig, steps_left: int, num_bytes: int, free_bytes: int) -> str | None:
    """A warning when the checkpoints of `steps_left` steps, `num_bytes` each, do not fit in `free_bytes`; else None.

    A new checkpoint is written before an old one is deleted, so for a while there is one more than
    checkpoint.keep_last.
    """
    interval, keep_last = config.checkpoint.interval_steps, config.checkpoint.keep_last
    saves = 1 if interval is None else -(-steps_left // interval)
    count = saves if keep_last is None else min(saves, keep_last + 1)
    if steps_left <= 0 or count * num_bytes <= free_bytes:
        return None
    remedy = "set checkpoint.keep_last" if keep_last is None else f"lower checkpoint.keep_last ({keep_last})"
    return (
        f"checkpoint: {count_of(count, 'checkpoint')} of {size(num_bytes)} need {size(count * num_bytes)}, and "
        f"{size(free_bytes)} are free in {config.run.dir}. Make room, or {remedy}."
    )


def _sharding(config: RunConfig) -> str:
    if config.parallel.engine == "deepspeed":
        return f"ZeRO {config.zero.stage}"
    ignored = "; zero.stage has no effect" if "stage" in config.zero.model_fields_set else ""
    return f"torch, sharded {config.parallel.shard}{ignored}"


def _configured_origin(config: RunConfig) -> str:
    if config.growth:
        return f", grown from {config.growth.source} by {_method(config.growth)}"
    if config.branch:
        return f", branched off {config.branch.source} at {config.branch.at}"
    return f", begun with the weights of {config.training.init_from}" if config.training.init_from else ""


def _method(growth: Growth) -> str:
    methods = {kind: growth.method_of(kind) for kind in ParameterTokens.model_fields}
    alike = len(set(methods.values())) == 1
    text = growth.method_of("qkv") if alike else ", ".join(f"{kind} {method}" for kind, method in methods.items())
    return text + (f" with noise {growth.noise:g}" if growth.noise else "")
