"""Write a base model and an adapter as one folder that transformers loads:
`python tools/export_adapter.py --base models/smollm2 --adapter adapters/first --to exports/adapted`.

The folder holds the base's weights, the adapter's tokens, the tokenizer, and the code of the branches, which needs
torch and transformers alone. It is loaded with transformers and compared with base and adapter, also in generation with
and without caches, before it gets its name. Needs no GPU, and memory for two models in fp32.
"""

from __future__ import annotations

from megatron_tf.adapters.command_line import parse_arguments, print_written


def main() -> None:
    arguments = parse_arguments(__doc__, base="the base model's folder")
    from megatron_tf.adapters.export import export_adapter
    from megatron_tf.adapters.folder import check_new_folder
    from megatron_tf.adapters.summary import trained_adapter

    check_new_folder(arguments.target)
    adapter = trained_adapter(arguments.adapter)
    found = export_adapter(arguments.base, adapter, arguments.target)
    compared = {f"with transformers on {kind}": agreement for kind, agreement in found.items()}
    print_written(arguments.base, adapter, compared, arguments.target)
