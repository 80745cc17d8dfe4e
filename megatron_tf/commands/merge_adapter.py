"""Merge an adapter of a TokenFormer into it:
`python tools/merge_adapter.py --base exports/150M --adapter runs/finetune/adapter --to exports/merged`.

The adapter's tokens are put behind those of the base, and τ stays: the result is a TokenFormer with more tokens, as
convert to-hf writes it, for transformers, vLLM and, by convert from-hf, training. It is compared with base and adapter
before it is written, and loaded with transformers before it gets its name. Needs no GPU, and memory for three models in
fp32.
"""

from __future__ import annotations

from megatron_tf.adapters.command_line import parse_arguments, print_written


def main() -> None:
    arguments = parse_arguments(__doc__, base="the exported TokenFormer's folder")
    from megatron_tf.adapters.merge import merge_adapter
    from megatron_tf.adapters.summary import trained_adapter
    from megatron_tf.convert.huggingface.export import check_target

    check_target(arguments.target)
    adapter = trained_adapter(arguments.adapter)
    found = merge_adapter(arguments.base, adapter, arguments.target)
    compared = {f"on {kind}": agreement for kind, agreement in found.items()}
    print_written(arguments.base, adapter, compared, arguments.target)
    print(f"To train on, convert from-hf {arguments.target} --to a run's folder")
