"""The parameter table: every fact about every parameter, declared once.

Model, optimizer, checkpoint, growth, conversion and estimates read it. A *logical* tensor is the unsharded one. Every
sharded tensor is split along dim 0, so any shard of it, and any ZeRO partition of that shard, is one contiguous range
of its flattened elements.
"""

from __future__ import annotations

from megatron_tf.architectures.spec import INITIAL_STD, ParameterSpec, ProjectionSpec, shard_range
from megatron_tf.checks import check_choice, check_whole_number
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of

__all__ = [
    "INITIAL_STD",
    "ParameterSpec",
    "ProjectionSpec",
    "default_scale",
    "initial_scales",
    "parameter_table",
    "projections",
    "shard_range",
]


def projections(model: Model) -> dict[str, ProjectionSpec]:
    """Every projection with parameter tokens by name, in model order: {"blocks.0.attention.query": ..., ...}."""
    return {projection.name: projection for projection in architecture_of(model).projections(model)}


def candidate_counts(model: Model) -> dict[str, int]:
    """The number of candidates of each slot, by kind of projection; without the dense kinds."""
    return {spec.kind: spec.bank.candidates for spec in projections(model).values() if spec.bank}


def layer_of(name: str) -> int | None:
    """The number of the block that contains a parameter or projection; None for one outside the blocks."""
    parts = name.split(".", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdecimal() else None


def matrix_rows(spec: ParameterSpec) -> int:
    """Rows of the matrices that a parameter is a stack of, for an optimizer of matrices; 0 where it holds none.

    Matrices are what is sharded in blocks: parameter tokens, routers, weights of linear layers. Most are stacks of one.
    """
    is_matrix = len(spec.shape) == 2 and spec.sharded and layer_of(spec.name) is not None
    return (spec.matrix_rows or spec.shape[0]) if is_matrix else 0


def in_layer(name: str, layer: int) -> str:
    """The name of the parameter or projection of block `layer` that corresponds to `name`, which is in some block."""
    first, _, rest = name.split(".", 2)
    return f"{first}.{layer}.{rest}"


def check_activation(name: str) -> None:
    """ArgumentError unless `name` is an activation."""
    check_choice("activation", name, ACTIVATIONS.names())


def default_scale(num_tokens: int, activation: str) -> float:
    """τ of a Pattention trained from scratch. ArgumentError for an unknown activation or no tokens."""
    check_activation(activation)
    check_whole_number("num_tokens", num_tokens, 1)
    return ACTIVATIONS[activation].default_scale(num_tokens)


def initial_scales(model: Model) -> dict[str, float]:
    """τ of every projection of a fresh model. A trained model's τ comes from its checkpoint instead."""
    return {name: default_scale(spec.tokens, spec.activation) for name, spec in projections(model).items()}


def parameter_table(model: Model) -> dict[str, ParameterSpec]:
    """All parameters by logical name, in model order: the task's input layer, blocks, final norm, the task's head."""
    specs = list(task_of(model).input_parameters(model))
    for layer in range(model.num_layers):
        specs += architecture_of(model).block_parameters(model, layer)
    for name, mean in (("weight", 1.0), ("bias", 0.0)):
        specs.append(
            ParameterSpec(
                f"final_norm.{name}",
                (model.hidden_size,),
                sharded=False,
                growable=False,
                decayed=False,
                std=0.0,
                mean=mean,
                ends=("last",),
                official_name=f"sequential.{model.num_layers + 3}.norm.{name}",
                huggingface_name=f"model.norm.{name}",
            )
        )
    specs += task_of(model).head_parameters(model)
    return {spec.name: spec for spec in specs}
