"""The parameters of a Transformer's block: four matrices."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tf.architectures.spec import ParameterSpec, input_std, output_std
from megatron_tf.architectures.transformer.section import TransformerModel


def block_parameters(model: TransformerModel, layer: int) -> Iterator[ParameterSpec]:
    """The parameters of block `layer`. Dim 0 of each matrix is split over the tensor group.

    With h query heads and g heads of keys and values, each of c = d/h channels, and f columns of the MLP:

    | matrix | shape | dim 0 |
    |---|---|---|
    | attention.qkv | [(h + 2g)·c, d] | outputs, by key-value head: its h/g queries, its key, its value; then the next |
    | attention.proj | [d, d] | inputs, by heads |
    | ffn.up | [f, d] | outputs |
    | ffn.down | [f, d] | inputs |
    """
    for matrix, rows, std, huggingface in (
        ("attention.qkv", qkv_rows(model), input_std(model), "self_attn.qkv_proj"),
        ("attention.proj", model.hidden_size, output_std(model), "self_attn.o_proj"),
        ("ffn.up", model.ffn_hidden_size, input_std(model), "mlp.up_proj"),
        ("ffn.down", model.ffn_hidden_size, output_std(model), "mlp.down_proj"),
    ):
        is_output = matrix in ("attention.proj", "ffn.down")
        yield ParameterSpec(
            f"blocks.{layer}.{matrix}.weight",
            (rows, model.hidden_size),
            sharded=True,
            growable=False,
            decayed=True,
            std=std,
            mean=0.0,
            output=is_output,
            huggingface_name=f"model.layers.{layer}.{huggingface}.weight",
            transposed=is_output,
        )


def qkv_rows(model: TransformerModel) -> int:
    """(h + 2g)·c: outputs of query, key and value together."""
    head_dim = model.hidden_size // model.num_attention_heads
    return (model.num_attention_heads + 2 * model.num_key_value_heads) * head_dim
